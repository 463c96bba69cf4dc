"""Measuring the engine against the lm-eval loop, side by side in one process."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

from tracker.ablations import Ablation, single_layers
from tracker.config import CellRequest
from tracker.models.sources import find_model
from tracker.provenance import machine, package_versions
from tracker.runner.local import Options
from tracker.runner.progress import Progress

BATCH_SIZES = (1, 4, 8, 16, 32)
MEASURED_LAYERS = 4
"""Layers that the lm-eval loop really runs without; the others cost what these cost on average."""


@dataclass(frozen=True)
class Bench:
    """One comparison.

    Attributes:
        benchmark: What was scored.
        documents: How many documents.
        ablations: The baseline and every layer.
        dtype: The numbers' type.
        engine_seconds: The engine, all ablations.
        check_seconds: Its self-check, not part of `engine_seconds`.
        loop_seconds: lm-eval once per ablation, extrapolated from the evaluations that were run.
        loop_evaluations: Removed layer (None = baseline) → seconds of lm-eval.
        loop_batch_size: The fastest of `BATCH_SIZES` on the baseline.
        ratio: `loop_seconds / engine_seconds`.
        largest_difference: Of a log-likelihood between the two, in nats.
        greedy_disagreements: Requests whose greedy flags differ.
        requests_compared: Requests behind both.
        sharing: What the engine shared.
        engine_gflops: Floating-point operations per second that the engine reached, in 1e9.
        matrix_gflops: The same of a plain matrix product in this process.
        peak_gib: Peak memory of the whole process, the lm-eval loop included.
        machine: Where.
        versions: With what.
    """

    benchmark: str
    documents: int
    ablations: int
    dtype: str
    engine_seconds: float
    check_seconds: float
    loop_seconds: float
    loop_evaluations: dict[str, float]
    loop_batch_size: int
    ratio: float
    largest_difference: float
    greedy_disagreements: int
    requests_compared: int
    sharing: str
    engine_gflops: float
    matrix_gflops: float
    peak_gib: float
    machine: dict[str, str]
    versions: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """Give the figures as plain values."""
        return asdict(self)


def bench(request: CellRequest, options: Options, progress: Progress) -> Bench:
    """Run the engine and the lm-eval loop in turn on the same documents.

    Args:
        request: What to score; its layers do not count: all are removed.
        options: How to run.
        progress: Told what happens.

    Returns:
        The comparison.

    Raises:
        RequestError: Something that was asked for does not exist.
    """
    from tracker.benchmarks.benchmark import open_benchmark
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.benchmarks.plain import score_with_lm_eval
    from tracker.engine.check import check
    from tracker.engine.memory import keep_freed_memory
    from tracker.engine.plan import cost, matrix_rate
    from tracker.engine.sweep import Engine
    from tracker.models.layers import layers_removed
    from tracker.models.load import load_model

    keep_freed_memory()
    benchmark = open_benchmark(request)
    progress.say(f"loading {request.model}")
    source = find_model(request.model, request.revision)
    loaded = load_model(source, request.dtype, options.device, options.trust_remote_code)
    encoder = RequestEncoder(loaded.model, loaded.tokenizer)
    documents = benchmark.documents(encoder, request.limit)
    layers = tuple(range(loaded.identity.layers))
    ablations = single_layers(layers)

    def plainly(layer: int | None, batch_size: int) -> tuple[float, list[Any]]:
        removed = () if layer is None else (layer,)
        with layers_removed(loaded.model, removed):
            start = time.perf_counter()
            answers = score_with_lm_eval(loaded.model, loaded.tokenizer, documents, batch_size)
            return time.perf_counter() - start, answers

    progress.say("lm-eval: trying batch sizes on the baseline")
    tried = {size: plainly(None, size)[0] for size in BATCH_SIZES}
    batch_size = min(tried, key=lambda size: tried[size])

    start = time.perf_counter()
    checked = check(Engine(loaded, encoder.max_length), documents, ablations)
    check_seconds = time.perf_counter() - start
    engine = checked.engine
    progress.start(
        f"{request.benchmark}: engine",
        sum(len(document.requests) for document in documents) * len(ablations),
    )
    start = time.perf_counter()
    scores = engine.score(documents, ablations, progress.advance)
    engine_seconds = time.perf_counter() - start
    progress.finish()

    chosen = [round(i * (len(layers) - 1) / (MEASURED_LAYERS - 1)) for i in range(MEASURED_LAYERS)]
    seconds: dict[int | None, float] = {}
    worst, disagreements, compared = 0.0, 0, 0
    for layer in (None, *chosen):
        progress.say(f"lm-eval: {'baseline' if layer is None else f'without layer {layer}'}")
        seconds[layer], theirs = plainly(layer, batch_size)
        number = ablations.index(Ablation() if layer is None else Ablation((layer,)))
        ours = [response for score in scores for response in score.responses[number]]
        for response, (loglikelihood, greedy) in zip(ours, theirs, strict=True):
            worst = max(worst, abs(response.loglikelihood - loglikelihood))
            disagreements += response.greedy != greedy
            compared += 1
    per_layer = statistics.mean(value for layer, value in seconds.items() if layer is not None)
    loop_seconds = seconds[None] + len(layers) * per_layer
    found = cost(loaded.model, documents, ablations, encoder.max_length)
    return Bench(
        benchmark=f"{request.benchmark}, {benchmark.identity.num_fewshot}-shot",
        documents=len(documents),
        ablations=len(ablations),
        dtype=loaded.identity.dtype,
        engine_seconds=engine_seconds,
        check_seconds=check_seconds,
        loop_seconds=loop_seconds,
        loop_evaluations={str(layer): value for layer, value in seconds.items()},
        loop_batch_size=batch_size,
        ratio=loop_seconds / engine_seconds,
        largest_difference=worst,
        greedy_disagreements=disagreements,
        requests_compared=compared,
        sharing=str(engine.sharing),
        engine_gflops=found.flops / engine_seconds / 1e9,
        matrix_gflops=matrix_rate(loaded.model.dtype) / 1e9,
        peak_gib=_peak_bytes() / 2**30,
        machine=machine(),
        versions=package_versions(),
    )


def _peak_bytes() -> int:
    """Peak resident memory of this process; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
