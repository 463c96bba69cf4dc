"""Compare the speed of the engine with the speed of evaluating one ablation at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

from tracker.bench.loops import EngineAnswers, Loop, LoopTiming, open_vllm, refuse_vllm, time_call
from tracker.benchmarks.benchmark import open_benchmark
from tracker.benchmarks.encoder import RequestEncoder, huggingface_model
from tracker.engine.plan import estimate_cost, measure_matrix_rate
from tracker.engine.scoring.sweep import Engine
from tracker.engine.selfcheck.check import check_sharing
from tracker.measuring.job import Options
from tracker.measuring.meter import open_model
from tracker.measuring.progress import Progress
from tracker.measuring.scorer import Generation, set_row_size
from tracker.models.devices import peak_memory, reset_peak_memory
from tracker.models.hooks import replaced_forward
from tracker.models.load import LoadedModel
from tracker.models.sources import find_model, parts_of_config
from tracker.schema.changes import Ablation
from tracker.schema.config import CellRequest, Changes
from tracker.schema.documents import Document, GeneratedText
from tracker.schema.errors import BenchmarkError
from tracker.schema.model_parts import fill_parts
from tracker.schema.provenance import describe_machine, package_versions
from tracker.schema.text_templates import open_templates

BATCH_SIZES = (1, 4, 8, 16, 32)
GENERATION_BATCH_SIZES = (1, 8)
"""Numbers of texts that lm-eval generates in one batch; the faster is timed."""
TRIAL_DOCUMENTS = 40
"""Number of documents on which batch sizes are tried."""


@dataclass(frozen=True)
class BenchResult:
    """Timings of the engine and of loops that evaluate one ablation at a time.

    Attributes:
        engine_seconds: Seconds that the engine needed for all ablations.
        tokens: Number of tokens that the engine generated; 0 if it scored given answers.
        check_seconds: Seconds that the self-check needed in addition to `engine_seconds`; None if
            the self-check was skipped.
        outside_share: Share of `engine_seconds` spent outside the model's layers and output head;
            None on an accelerator and for generated texts.
        offloaded_bytes: Bytes of the offloaded layers; 0 if no layer is offloaded.
        read_bytes: Bytes of offloaded layers that the engine loaded during the run.
        waiting_share: Share of `engine_seconds` spent waiting for offloaded layers.
        loops: Name of an evaluation loop → its timing; empty if weights are offloaded.
        layer_passes: Number of layers that the engine computes, summed over all tokens; None for
            generated texts, whose computations are not counted.
        times_the_passes: Name of a program (e.g. lm-eval) → number of layers that the program
            computes, divided by `layer_passes`.
        sharing: Description of the computation that the engine shares between ablations.
        engine_gflops: Speed of the engine in GFLOP/s; None for generated texts.
        matrix_gflops: Speed of a matrix product in GFLOP/s, for comparison.
        engine_peak_gib: Peak memory of the process, or of the accelerator, while the engine ran.
    """

    benchmark: str
    documents: int
    ablations: int
    dtype: str
    engine_seconds: float
    tokens: int
    check_seconds: float | None
    outside_share: float | None
    offloaded_bytes: int
    read_bytes: int
    waiting_share: float
    loops: dict[str, LoopTiming]
    layer_passes: float | None
    times_the_passes: dict[str, float]
    sharing: str
    engine_gflops: float | None
    matrix_gflops: float
    engine_peak_gib: float
    machine: dict[str, str]
    versions: dict[str, str]

    def text(self) -> str:
        """Format the timings as text for the terminal."""
        template = open_templates("tracker.bench").get_template("timings.txt.j2")
        return template.render(result=self)


def prepare_engine(
    request: CellRequest, options: Options, progress: Progress
) -> tuple[Engine, Sequence[Document], str]:
    """Load the model and the documents; return the engine, the documents and a title.

    Raises RequestError if the model, data or device does not exist.
    """
    # A missing model is reported before a benchmark's data are searched for.
    find_model(request.model)
    benchmark = open_benchmark(request)
    progress.say(f"loading {request.model}")
    loaded = open_model(request.model, options).loaded
    encoder = RequestEncoder(loaded.model, loaded.tokenizer, request.benchmark)
    documents = benchmark.documents(encoder, request.extent)
    engine = set_row_size(Engine(loaded, encoder.max_length, memory=options.memory))
    return engine, documents, f"{request.benchmark}, {benchmark.identity.num_fewshot}-shot"


def run_bench(
    request: CellRequest,
    options: Options,
    progress: Progress,
    with_check: bool = True,
    competitor: str | None = None,
) -> BenchResult:
    """Time the engine and each evaluation loop on the same documents and ablations.

    Args:
        request: Request that defines the documents and the components to remove. All layers are
            removed in turn.
        options: Options of the model, such as its device.
        progress: Listener that receives progress messages.
        with_check: Whether a self-check first verifies the engine's results.
        competitor: Further program in `COMPETITORS` to time; None to time only lm-eval's Hugging
            Face model.

    Returns:
        The timings, and the differences between the programs' results.

    Raises:
        RequestError: The model, data or device does not exist, or the competitor cannot run here.
    """
    if competitor is not None:
        refuse_vllm(request)
    engine, documents, title = prepare_engine(request, options, progress)
    loaded = engine.loaded
    ablations = _sweep_ablations(request, loaded)
    prompts = [document.prompt for document in documents if document.prompt is not None]
    if prompts:
        title += f", {prompts[0].samples} texts per document"
        if competitor is not None:
            raise BenchmarkError(
                f"{request.benchmark} is a generation task, but --against {competitor} only times "
                "the scoring of given answers; leave --against out, or choose a benchmark with "
                "given answers"
            )

    loops: list[Loop] = []
    if competitor is not None:
        progress.say(f"{competitor}: loading {request.model}")
        with open_vllm(request, options, engine, documents) as vllm:
            vllm.evaluate(ablations[0], documents[:TRIAL_DOCUMENTS])  # to warm up
            vllm.run(documents, ablations, progress)
        loops.append(vllm)

    check_seconds = None
    if with_check and not prompts:
        progress.say("checking results against pruned models")
        check_seconds, checked = time_call(lambda: check_sharing(engine, documents, ablations))
        engine = checked.engine

    weights = loaded.offloaded
    if weights is None:
        progress.say("lm-eval: trying batch sizes on the baseline")
        few = documents[:TRIAL_DOCUMENTS]
        sizes = GENERATION_BATCH_SIZES if prompts else BATCH_SIZES
        trials = [huggingface_loop(engine, size) for size in sizes]
        loops.append(min(trials, key=lambda loop: loop.evaluate(ablations[0], few)[0]))

    n_answers = len(prompts) or sum(len(document.requests) for document in documents)
    progress.start(f"{request.benchmark}: engine", n_answers * len(ablations))
    reset_peak_memory(loaded.device)
    read_before = (weights.read_bytes, weights.wait_seconds) if weights else (0, 0.0)
    with _timed_model(engine) as inside:
        answer = partial(_run_engine, engine, documents, ablations, progress.advance)
        seconds, answers = time_call(answer)
    peak = peak_memory(loaded.device)
    progress.finish()
    read_after = (weights.read_bytes, weights.wait_seconds) if weights else (0, 0.0)

    if weights is None:
        loops[-1].run(documents, ablations, progress)
    cost = None if prompts else estimate_cost(loaded.model, documents, ablations, engine.max_length)
    is_timed = cost is not None and loaded.device.type == "cpu"
    texts = chain.from_iterable(chain.from_iterable(answers))
    return BenchResult(
        benchmark=title,
        documents=len(documents),
        ablations=len(ablations),
        dtype=loaded.identity.dtype,
        engine_seconds=seconds,
        tokens=sum(text.tokens or 0 for text in texts if isinstance(text, GeneratedText)),
        check_seconds=check_seconds,
        outside_share=1 - sum(inside) / seconds if is_timed else None,
        offloaded_bytes=weights.bytes if weights else 0,
        read_bytes=read_after[0] - read_before[0],
        waiting_share=(read_after[1] - read_before[1]) / seconds,
        loops={loop.name: loop.timing(documents, ablations, answers, seconds) for loop in loops},
        layer_passes=cost.layer_passes if cost else None,
        times_the_passes=cost.times_the_passes if cost else {},
        sharing=str(engine.sharing),
        engine_gflops=cost.flops / seconds / 1e9 if cost else None,
        matrix_gflops=measure_matrix_rate(loaded.model.dtype, loaded.device) / 1e9,
        engine_peak_gib=peak / 2**30,
        machine=describe_machine(),
        versions=package_versions(),
    )


def _run_engine(
    engine: Engine,
    documents: Sequence[Document],
    ablations: Sequence[Ablation],
    advance: Callable[[int], None],
) -> EngineAnswers:
    """Score all documents, or generate their texts, under all ablations.

    The function calls `advance` with the number of new answers.
    """
    prompts = [document.prompt for document in documents if document.prompt is not None]
    if not prompts:
        return [score.responses for score in engine.score(documents, ablations, advance)]
    end_token = prompts[0].think_end_token
    generation = Generation(engine, engine.loaded.tokenizer, think_end_token=end_token)
    answers = []
    for prompt in prompts:
        answers.append(generation.generate(prompt, ablations))
        advance(len(ablations))
    return answers


def _sweep_ablations(request: CellRequest, loaded: LoadedModel) -> list[Ablation]:
    """List the baseline, and one ablation per layer for each requested component."""
    named = request.changes
    numbers = {field: getattr(named, field) for field in ("heads", "experts", "neurons")}
    sweep = Changes(components=named.components, **numbers)
    parts = parts_of_config(loaded.model.config.get_text_config())
    request = fill_parts(replace(request, changes=sweep, removed=()), parts)
    return request.ablations(loaded.identity.layers)


def huggingface_loop(engine: Engine, batch_size: int) -> Loop:
    """Build a loop that scores pruned copies of a model with lm-eval's HFLM class."""

    def prune_model(ablation: Ablation) -> Any:
        pruned = engine.ablate(ablation).loaded
        return huggingface_model(pruned.model, pruned.tokenizer, batch_size)

    return Loop("lm-eval", f"batch {batch_size}", prune_model)


@contextmanager
def _timed_model(engine: Engine) -> Iterator[list[float]]:
    """Time each call of a layer or of the output head; yield the growing list of seconds."""
    spent: list[float] = []

    def call_timed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seconds, output = time_call(lambda: forward(*args, **kwargs))
        spent.append(seconds)
        return output

    with ExitStack() as stack:
        for layer in engine.loaded.layers:
            stack.enter_context(replaced_forward(layer, partial(call_timed, layer.forward)))
        head: Any = engine.head
        head.predictions = partial(call_timed, head.predictions)
        stack.callback(delattr, head, "predictions")
        yield spent
