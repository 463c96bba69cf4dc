"""Measuring the engine against the lm-eval loop, side by side in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tracker.core.ablations import Ablation, ablations_of
from tracker.core.config import ONE_EACH, CellRequest
from tracker.core.errors import BenchmarkError
from tracker.core.grouping import grouped
from tracker.core.model_parts import with_all_parts
from tracker.core.provenance import machine, package_versions
from tracker.measuring.job import Options
from tracker.measuring.progress import Progress
from tracker.models.sources import find_model, parts_of

if TYPE_CHECKING:
    from tracker.core.documents import Document
    from tracker.engine.scoring.sweep import DocumentScores, Engine
    from tracker.models.load import LoadedModel

T = TypeVar("T")
_RESET = Path("/proc/self/clear_refs")
BATCH_SIZES = (1, 4, 8, 16, 32)
TRIED_DOCUMENTS = 40
"""Documents on which the batch sizes are tried."""
MEASURED = 4
"""Ablations of each component that the lm-eval loop really runs; the others cost what these cost on
average."""


@dataclass(frozen=True)
class Bench:
    """One comparison.

    Attributes:
        engine_seconds: The engine, all ablations.
        check_seconds: Its self-check, not part of `engine_seconds`; None where it was left out.
        outside_share: Part of `engine_seconds` that is spent neither in the model's layers nor in
            its head; None on an accelerator, which works while the clock runs.
        offloaded_bytes: Bytes of the layers that rest elsewhere; 0 where all are in place.
        read_bytes: Bytes of them that were brought in while the engine ran.
        waiting_share: Part of `engine_seconds` that was spent waiting for them.
        loop_seconds: lm-eval once per ablation, extrapolated from the evaluations that were run;
            None, as all figures of it, where weights rest elsewhere: each of its calls would read
            all of them.
        loop_evaluations: Ablation → seconds of lm-eval.
        loop_batch_size: The fastest of `BATCH_SIZES` on some documents.
        ratio: `loop_seconds / engine_seconds`.
        largest_difference: Of a log-likelihood between the two, in nats.
        greedy_disagreements: Requests whose greedy flags differ.
        requests_compared: Requests behind both.
        sharing: What the engine shared.
        engine_gflops: Floating-point operations per second that the engine reached, in 1e9.
        matrix_gflops: The same of a plain matrix product in this process.
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
    loop_seconds: float | None
    loop_evaluations: dict[str, float]
    loop_batch_size: int | None
    ratio: float | None
    largest_difference: float | None
    greedy_disagreements: int | None
    requests_compared: int
    sharing: str
    engine_gflops: float
    matrix_gflops: float
    engine_peak_gib: float
    machine: dict[str, str]
    versions: dict[str, str]

    def text(self) -> str:
        """Put the figures into words."""
        evaluations = ", ".join(f"{k} {v:.1f} s" for k, v in self.loop_evaluations.items())
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
        if self.loop_seconds is not None:
            lines.append(
                f"lm-eval loop  {self.loop_seconds:8.1f} s   (extrapolated, batch "
                f"{self.loop_batch_size}; measured: {evaluations})"
            )
            lines.append(f"ratio         {self.ratio:8.1f}")
        lines.append(
            f"rate          {self.engine_gflops:8.0f} GFLOP/s, {part:.0f} % of "
            f"{self.matrix_gflops:.0f} in a matrix product"
        )
        lines.append(f"peak memory   {self.engine_peak_gib:8.1f} GiB")
        if self.largest_difference is not None:
            lines.append(
                f"agreement     largest log-likelihood difference {self.largest_difference:.1e} "
                f"nats, {self.greedy_disagreements} of {self.requests_compared} greedy flags differ"
            )
        return "\n".join(lines)


@dataclass(frozen=True)
class Prepared:
    """A model, an engine with full sharing and documents, ready to be timed; `title` names them."""

    engine: Engine
    documents: Sequence[Document]
    title: str


def plainly(
    engine: Engine, ablation: Ablation, batch_size: int, documents: Sequence[Document]
) -> tuple[float, list[tuple[float, bool]]]:
    """Let lm-eval score documents with an ablation's layers really taken out.

    Seconds, and the answers to all requests in order.
    """
    from tracker.benchmarks.encoder import score_with_lm_eval

    pruned = engine.without(ablation).loaded
    return timed(lambda: score_with_lm_eval(pruned.model, pruned.tokenizer, documents, batch_size))


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Measure how many seconds some work takes; they, and what it returns."""
    start = time.perf_counter()
    done = work()
    return time.perf_counter() - start, done


def prepare(request: CellRequest, options: Options, progress: Progress) -> Prepared:
    """Load what is to be timed.

    RequestError for something that does not exist, or generates texts.
    """
    from tracker.benchmarks.benchmark import open_benchmark
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.engine.scoring.sweep import Engine
    from tracker.measuring.meter import open_model
    from tracker.measuring.row_size import with_fastest_rows

    # A model that is not there is said before a benchmark's data are looked for.
    find_model(request.model, request.revision, request.model_args)
    benchmark = open_benchmark(request)
    progress.say(f"loading {request.model}")
    loaded = open_model(request, options).loaded
    encoder = RequestEncoder(loaded.model, loaded.tokenizer, request)
    documents = benchmark.documents(encoder, request.extent)
    if any(document.prompt is not None for document in documents):
        raise BenchmarkError(f"{request.benchmark} generates texts; tracker bench times scoring")
    return Prepared(
        with_fastest_rows(Engine(loaded, encoder.max_length, memory=options.memory)),
        documents,
        f"{request.benchmark}, {benchmark.identity.num_fewshot}-shot",
    )


def bench(
    request: CellRequest, options: Options, progress: Progress, checking: bool = True
) -> Bench:
    """Run the engine and the lm-eval loop in turn on the same documents.

    Args:
        request: The documents. Of its runs only the components count: all layers are removed.
        options: Where the model runs.
        progress: Told what happens.
        checking: Whether the self-check runs too; without it, all is shared unchecked.

    Returns:
        What both took, and whether their numbers agree.

    Raises:
        RequestError: Something does not exist.
    """
    from tracker.engine.plan import cost, matrix_rate
    from tracker.engine.selfcheck.check import check

    ready = prepare(request, options, progress)
    documents, loaded = ready.documents, ready.engine.loaded
    ablations = _every_layer(request, loaded)

    check_seconds, engine = None, ready.engine
    if checking:
        progress.say("checking that sharing is exact for this model")
        check_seconds, checked = timed(lambda: check(ready.engine, documents, ablations))
        engine = checked.engine

    weights = loaded.offloaded
    batch_size = None
    if weights is None:
        progress.say("lm-eval: trying batch sizes on the baseline")
        few = documents[:TRIED_DOCUMENTS]
        tried = {size: plainly(engine, ablations[0], size, few)[0] for size in BATCH_SIZES}
        batch_size = min(tried, key=tried.__getitem__)

    responses = sum(len(document.requests) for document in documents) * len(ablations)
    progress.start(f"{request.benchmark}: engine", responses)
    _forget_peak(loaded.device)
    before = (weights.read_bytes, weights.waited) if weights else (0, 0.0)
    with _stopwatch(engine) as inside:
        engine_seconds, scores = timed(lambda: engine.score(documents, ablations, progress.advance))
    peak = _peak(loaded.device)
    progress.finish()
    after = (weights.read_bytes, weights.waited) if weights else (0, 0.0)

    loop = None
    if batch_size is not None:
        loop = _loop(engine, documents, ablations, scores, batch_size, progress)
    loop_seconds = None if loop is None else loop.extrapolated(len(ablations))
    work = cost(loaded.model, documents, ablations, engine.max_length)
    return Bench(
        benchmark=ready.title,
        documents=len(documents),
        ablations=len(ablations),
        dtype=loaded.identity.dtype,
        engine_seconds=engine_seconds,
        check_seconds=check_seconds,
        outside_share=1 - sum(inside) / engine_seconds if loaded.device.type == "cpu" else None,
        offloaded_bytes=weights.bytes if weights else 0,
        read_bytes=after[0] - before[0],
        waiting_share=(after[1] - before[1]) / engine_seconds,
        loop_seconds=loop_seconds,
        loop_evaluations=loop.seconds if loop else {},
        loop_batch_size=batch_size,
        ratio=None if loop_seconds is None else loop_seconds / engine_seconds,
        largest_difference=max(loop.differences, default=None) if loop else None,
        greedy_disagreements=loop.disagreements if loop else None,
        requests_compared=len(loop.differences) if loop else 0,
        sharing=str(engine.sharing),
        engine_gflops=work.flops / engine_seconds / 1e9,
        matrix_gflops=matrix_rate(loaded.model.dtype, loaded.device) / 1e9,
        engine_peak_gib=peak / 2**30,
        machine=machine(),
        versions=package_versions(),
    )


def _every_layer(request: CellRequest, loaded: LoadedModel) -> list[Ablation]:
    """List what a whole sweep of the components that are asked for removes, with the baseline."""
    said = {name: getattr(request, name) for name in ("components", "heads", "experts")}
    alone = {**ONE_EACH, **said, "layers": (), "removed": ()}
    parts = parts_of(loaded.model.config.get_text_config())
    asked = with_all_parts(request.model_copy(update=alone), parts)
    return ablations_of(asked, loaded.identity.layers)


@dataclass(frozen=True)
class _Loop:
    """What some evaluations of lm-eval took, the baseline's first, and how far they are from ours.

    Attributes:
        seconds: By ablation.
        differences: Of log-likelihoods, a request, in nats.
        disagreements: How many requests are greedy in one of both alone.
    """

    seconds: dict[str, float]
    differences: list[float]
    disagreements: int

    def extrapolated(self, ablations: int) -> float:
        """Seconds of so many evaluations; a model of one layer has nothing to remove."""
        baseline, *removed = self.seconds.values()
        return baseline + (ablations - 1) * statistics.mean(removed or [0.0])


def _loop(
    engine: Engine,
    documents: Sequence[Document],
    ablations: Sequence[Ablation],
    scores: Sequence[DocumentScores],
    batch_size: int,
    progress: Progress,
) -> _Loop:
    """Let lm-eval score the baseline and some ablations, and compare every answer."""
    seconds: dict[str, float] = {}
    differences: list[float] = []
    disagreements = 0
    for ablation in (ablations[0], *_measured(ablations)):
        progress.say(f"lm-eval: {ablation.name}")
        seconds[ablation.name], theirs = plainly(engine, ablation, batch_size, documents)
        number = ablations.index(ablation)
        ours = [response for score in scores for response in score.responses[number]]
        for response, (loglikelihood, greedy) in zip(ours, theirs, strict=True):
            differences.append(abs(response.loglikelihood - loglikelihood))
            disagreements += response.greedy != greedy
    return _Loop(seconds, differences, disagreements)


def _measured(ablations: Sequence[Ablation]) -> list[Ablation]:
    """Choose evenly spaced ablations of each component, the first and last among them."""
    found = []
    for some in grouped(ablations[1:], lambda each: each.name.partition(":")[0]).values():
        chosen = {round(i * (len(some) - 1) / (MEASURED - 1)) for i in range(MEASURED)}
        found += [some[place] for place in sorted(chosen)]
    return found


@contextmanager
def _stopwatch(engine: Engine) -> Iterator[list[float]]:
    """Collect the seconds that pass inside the model's layers and its head."""
    from tracker.models.sublayers import replaced_forward

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


def _forget_peak(device: Any) -> None:
    """Let the peak memory count from now on, where that can be done."""
    from tracker.models.devices import reset_peak_memory

    if device.type != "cpu":
        reset_peak_memory(device)
    elif _RESET.exists():
        _RESET.write_text("5", encoding="ascii")


def _peak(device: Any) -> int:
    """Say the peak memory, in bytes, since `_forget_peak`."""
    from tracker.models.devices import peak_memory

    if device.type != "cpu" or not _RESET.exists():
        return peak_memory(device)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
