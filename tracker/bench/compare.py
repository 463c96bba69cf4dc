"""Time the engine against evaluating each ablation on its own, on the same documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tracker.bench.loops import Loop, LoopTiming, open_vllm, refuse_vllm, timed
from tracker.benchmarks.benchmark import open_benchmark
from tracker.benchmarks.encoder import RequestEncoder, huggingface_model
from tracker.core.changes import Ablation
from tracker.core.config import CellRequest, Changes
from tracker.core.documents import Document
from tracker.core.errors import BenchmarkError
from tracker.core.model_parts import with_all_parts
from tracker.core.provenance import machine, package_versions
from tracker.engine.plan import cost, matrix_rate
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.check import check
from tracker.measuring.job import Options
from tracker.measuring.meter import open_model
from tracker.measuring.progress import Progress
from tracker.measuring.scorer import with_fastest_rows
from tracker.models.devices import peak_memory, reset_peak_memory
from tracker.models.hooks import replaced_forward
from tracker.models.load import LoadedModel
from tracker.models.sources import find_model, parts_of

BATCH_SIZES = (1, 4, 8, 16, 32)
TRIED_DOCUMENTS = 40
"""Number of documents on which batch sizes are tried."""


@dataclass(frozen=True)
class Bench:
    """One comparison.

    Attributes:
        engine_seconds: Seconds of the engine for all ablations.
        check_seconds: Seconds of its self-check, not part of `engine_seconds`; None if left out.
        outside_share: Share of `engine_seconds` spent outside the model's layers and head; None on
            an accelerator, which works while the clock runs.
        offloaded_bytes: Bytes of the offloaded layers; 0 if all are in place.
        read_bytes: Bytes of offloaded layers loaded while the engine ran.
        waiting_share: Share of `engine_seconds` spent waiting for them.
        loops: Name of a loop → its timing; empty if weights are offloaded, since each call of a
            loop would read all of them.
        layer_passes: Tokens times the layers that each passes in the engine.
        times_the_passes: Program → ratio of its layer passes to the engine's, as
            `Cost.times_the_passes`.
        sharing: The sharing of the engine.
        engine_gflops: Floating-point operations per second that the engine reached, in 1e9.
        matrix_gflops: Floating-point operations per second of a plain matrix product in this
            process, in 1e9.
        engine_peak_gib: Peak memory while the engine ran: of the process, or of the accelerator.
    """

    benchmark: str
    documents: int
    ablations: int
    dtype: str
    engine_seconds: float
    check_seconds: float | None
    outside_share: float | None
    offloaded_bytes: int
    read_bytes: int
    waiting_share: float
    loops: dict[str, LoopTiming]
    layer_passes: float
    times_the_passes: dict[str, float]
    sharing: str
    engine_gflops: float
    matrix_gflops: float
    engine_peak_gib: float
    machine: dict[str, str]
    versions: dict[str, str]

    def text(self) -> str:
        """Describe the figures in words."""
        part = 100 * self.engine_gflops / self.matrix_gflops
        outside = self.outside_share
        spent = "" if outside is None else f"; {100 * outside:.1f} % outside the model"
        checked = "left out" if self.check_seconds is None else f"{self.check_seconds:.1f} s"
        lines = [
            f"{self.benchmark}, {self.documents} documents, {self.ablations} ablations, "
            f"{self.dtype}, {self.machine['cores']} cores",
            f"engine        {self.engine_seconds:8.1f} s   (self-check {checked}{spent})",
        ]
        if self.offloaded_bytes:
            lines.append(
                f"weights       {self.offloaded_bytes / 1e9:8.1f} GB  rest elsewhere, "
                f"{self.read_bytes / 1e9:.1f} GB were read; {100 * self.waiting_share:.1f} % of "
                "the time waited for them"
            )
        lines += [loop.text(name) for name, loop in self.loops.items()]
        times = ", ".join(f"{name} {ratio:.1f}" for name, ratio in self.times_the_passes.items())
        lines += [
            f"layer passes  {self.layer_passes:8,.0f}     (counted; times as many: {times})",
            f"rate          {self.engine_gflops:8.0f} GFLOP/s, {part:.0f} % of "
            f"{self.matrix_gflops:.0f} in a matrix product",
            f"peak memory   {self.engine_peak_gib:8.1f} GiB",
        ]
        return "\n".join(lines)


def prepare(
    request: CellRequest, options: Options, progress: Progress
) -> tuple[Engine, Sequence[Document], str]:
    """Return an engine with full sharing, the documents and their title.

    Raises RequestError for something that does not exist, or generates texts.
    """
    # A missing model is reported before a benchmark's data are searched for.
    find_model(request.model)
    benchmark = open_benchmark(request)
    progress.say(f"loading {request.model}")
    loaded = open_model(request.model, options).loaded
    encoder = RequestEncoder(loaded.model, loaded.tokenizer, request.benchmark)
    documents = benchmark.documents(encoder, request.extent)
    if any(document.prompt is not None for document in documents):
        raise BenchmarkError(f"{request.benchmark} generates texts; tracker bench times scoring")
    engine = with_fastest_rows(Engine(loaded, encoder.max_length, memory=options.memory))
    return engine, documents, f"{request.benchmark}, {benchmark.identity.num_fewshot}-shot"


def bench(
    request: CellRequest,
    options: Options,
    progress: Progress,
    checking: bool = True,
    against: str | None = None,
) -> Bench:
    """Run the engine and loops over ablations in turn on the same documents.

    Args:
        request: The documents. Of its runs only the components count: all layers are removed.
        options: Options of the model, such as its device.
        progress: The progress listener.
        checking: Whether the self-check runs too; without it, all is shared unchecked.
        against: One of `COMPETITORS` to time besides lm-eval's Hugging Face model.

    Returns:
        The timings, and whether the results agree.

    Raises:
        RequestError: Something does not exist, or the competitor does not run here.
    """
    if against is not None:
        refuse_vllm(request)
    engine, documents, title = prepare(request, options, progress)
    loaded = engine.loaded
    ablations = _every_layer(request, loaded)

    loops: list[Loop] = []
    if against is not None:
        progress.say(f"{against}: loading {request.model}")
        with open_vllm(request, options, engine, documents) as vllm:
            vllm.evaluate(ablations[0], documents[:TRIED_DOCUMENTS])  # to warm up
            vllm.run(documents, ablations, progress)
        loops.append(vllm)

    check_seconds = None
    if checking:
        progress.say("checking that sharing is exact for this model")
        check_seconds, checked = timed(lambda: check(engine, documents, ablations))
        engine = checked.engine

    weights = loaded.offloaded
    if weights is None:
        progress.say("lm-eval: trying batch sizes on the baseline")
        few = documents[:TRIED_DOCUMENTS]
        trials = [huggingface_loop(engine, size) for size in BATCH_SIZES]
        loops.append(min(trials, key=lambda loop: loop.evaluate(ablations[0], few)[0]))

    responses = sum(len(document.requests) for document in documents) * len(ablations)
    progress.start(f"{request.benchmark}: engine", responses)
    reset_peak_memory(loaded.device)
    before = (weights.read_bytes, weights.waited) if weights else (0, 0.0)
    with _stopwatch(engine) as inside:
        engine_seconds, scores = timed(lambda: engine.score(documents, ablations, progress.advance))
    peak = peak_memory(loaded.device)
    progress.finish()
    after = (weights.read_bytes, weights.waited) if weights else (0, 0.0)

    if weights is None:
        loops[-1].run(documents, ablations, progress)
    work = cost(loaded.model, documents, ablations, engine.max_length)
    return Bench(
        benchmark=title,
        documents=len(documents),
        ablations=len(ablations),
        dtype=loaded.identity.dtype,
        engine_seconds=engine_seconds,
        check_seconds=check_seconds,
        outside_share=1 - sum(inside) / engine_seconds if loaded.device.type == "cpu" else None,
        offloaded_bytes=weights.bytes if weights else 0,
        read_bytes=after[0] - before[0],
        waiting_share=(after[1] - before[1]) / engine_seconds,
        loops={loop.name: loop.timing(ablations, scores, engine_seconds) for loop in loops},
        layer_passes=work.layer_passes,
        times_the_passes=work.times_the_passes,
        sharing=str(engine.sharing),
        engine_gflops=work.flops / engine_seconds / 1e9,
        matrix_gflops=matrix_rate(loaded.model.dtype, loaded.device) / 1e9,
        engine_peak_gib=peak / 2**30,
        machine=machine(),
        versions=package_versions(),
    )


def _every_layer(request: CellRequest, loaded: LoadedModel) -> list[Ablation]:
    """Return the ablations of a whole sweep of the requested components, with the baseline."""
    grid = request.changes
    changes = Changes(components=grid.components, heads=grid.heads, experts=grid.experts)
    parts = parts_of(loaded.model.config.get_text_config())
    every = with_all_parts(replace(request, changes=changes, removed=()), parts)
    return every.ablations(loaded.identity.layers)


def huggingface_loop(engine: Engine, batch_size: int) -> Loop:
    """Return the loop of lm-eval's Hugging Face model around really pruned copies of the model."""

    def without(ablation: Ablation) -> Any:
        pruned = engine.without(ablation).loaded
        return huggingface_model(pruned.model, pruned.tokenizer, batch_size)

    return Loop("lm-eval", f"batch {batch_size}", without)


@contextmanager
def _stopwatch(engine: Engine) -> Iterator[list[float]]:
    """Record the seconds spent inside the model's layers and its head, until exit."""
    spent: list[float] = []

    def clocked(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seconds, output = timed(lambda: forward(*args, **kwargs))
        spent.append(seconds)
        return output

    with ExitStack() as stack:
        for layer in engine.loaded.layers:
            stack.enter_context(replaced_forward(layer, partial(clocked, layer.forward)))
        head: Any = engine.head
        head.predictions = partial(clocked, head.predictions)
        stack.callback(delattr, head, "predictions")
        yield spent
