"""Evaluate all documents separately under each ablation, as the reference for timing the engine.

The evaluations use lm-eval's own model classes for Hugging Face or vLLM.
"""

from __future__ import annotations

import copy
import inspect
import os
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from torch import nn

from tracker.benchmarks.encoder import score_with_lm_eval, vllm_class
from tracker.benchmarks.generation import generate_with_lm_eval
from tracker.engine.scoring.sweep import Engine
from tracker.measuring.job import Options
from tracker.measuring.progress import Progress
from tracker.models.checkpoint import save_copy
from tracker.models.devices import empty_cache, free_memory, total_memory
from tracker.models.layers import find_layers
from tracker.models.sources import find_model
from tracker.schema.changes import Ablation
from tracker.schema.config import CellRequest
from tracker.schema.documents import Document, GeneratedText, Response
from tracker.schema.errors import RequestError, first_line, translate_errors
from tracker.schema.grouping import group_by

T = TypeVar("T")
Evaluation = tuple[float, list[Any]]
"""Seconds of an evaluation, and its answers: generated texts, or pairs of the log-likelihood and
the greedy flag of a request."""
EngineAnswers = Sequence[Sequence[Sequence[Response | GeneratedText]]]
"""The engine's responses or texts: for each document, one list per ablation."""
MEASURED_ABLATIONS = 4
"""Number of ablations of each component that are evaluated. The other ablations are assumed to
cost as much on average."""


@dataclass(frozen=True)
class LoopTiming:
    """Timing of an evaluation loop, and comparison of its results with the engine's.

    Attributes:
        settings: Settings that affect the loop's speed, e.g. the batch size, as text.
        seconds: Estimated seconds for all ablations, extrapolated from `evaluations`.
        evaluations: Ablation → seconds that the evaluation under this ablation took.
        ratio: `seconds` divided by the seconds that the engine needed.
        largest_difference: Largest difference from the engine's log-likelihoods, in nats; None for
            generated texts.
        disagreements: Number of requests for which only one program found the continuation to be
            greedy; or number of generated texts that differ.
        compared: Number of requests or texts that were compared; 0 for sampled texts, which lm-eval
            draws with other random numbers.
    """

    settings: str
    seconds: float
    evaluations: dict[str, float]
    ratio: float
    largest_difference: float | None
    disagreements: int
    compared: int


@dataclass(frozen=True)
class Loop:
    """Loop that evaluates one ablation at a time with a model class of lm-eval.

    Attributes:
        name: The name of the program.
        settings: Settings that affect the loop's speed, e.g. the batch size, as text.
        model_without: Function that returns the ablated model as an lm-eval model.
        evaluations: Ablation → seconds and results of the last evaluation under this ablation.
    """

    name: str
    settings: str
    model_without: Callable[[Ablation], Any]
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    def evaluate(self, ablation: Ablation, documents: Sequence[Document]) -> Evaluation:
        """Score documents, or generate their texts, under an ablation.

        The method stores the seconds and the results in `evaluations`, and returns both.
        """
        model = self.model_without(ablation)
        self.evaluations[ablation.name] = time_call(lambda: _run_lm_eval(model, documents))
        return self.evaluations[ablation.name]

    def run(
        self, documents: Sequence[Document], ablations: Sequence[Ablation], progress: Progress
    ) -> None:
        """Evaluate the baseline and some other ablations, and store the results in `evaluations`.

        The first item of `ablations` is the baseline. At most `MEASURED_ABLATIONS` ablations of
        each component are evaluated.
        """
        for ablation in (ablations[0], *choose_ablations(ablations)):
            progress.say(f"{self.name}: {ablation.name}")
            self.evaluate(ablation, documents)

    def timing(
        self,
        documents: Sequence[Document],
        ablations: Sequence[Ablation],
        engine_answers: EngineAnswers,
        engine_seconds: float,
    ) -> LoopTiming:
        """Compare the speed and the results of this loop with the engine's.

        `engine_answers` and `engine_seconds` are the results and the run time of the engine for all
        `ablations`. The time of the loop is extrapolated from the ablations that `run` evaluated.
        """
        timings = {name: seconds for name, (seconds, _) in self.evaluations.items()}
        baseline, *changed = timings.values()
        # A model of one layer has nothing to remove.
        total = baseline + (len(ablations) - 1) * statistics.mean(changed or [0.0])
        columns = {ablation.name: column for column, ablation in enumerate(ablations)}
        answers = [answer for _, answers in self.evaluations.values() for answer in answers]
        rows = (by_ablation[columns[name]] for name in timings for by_ablation in engine_answers)
        pairs = list(zip(chain.from_iterable(rows), answers, strict=True))
        if any(document.prompt and document.prompt.is_sampled for document in documents):
            pairs = []
        distances = [abs(r.loglikelihood - a[0]) for r, a in pairs if isinstance(r, Response)]
        return LoopTiming(
            settings=self.settings,
            seconds=total,
            evaluations=timings,
            ratio=total / engine_seconds,
            largest_difference=max(distances, default=None),
            disagreements=sum(
                r.greedy != a[1] if isinstance(r, Response) else r.text != a for r, a in pairs
            ),
            compared=len(pairs),
        )


def _run_lm_eval(model: Any, documents: Sequence[Document]) -> list[Any]:
    """Score all documents, or generate their texts, with a model of lm-eval."""
    prompts = [d.prompt for d in documents if d.prompt for _ in range(d.prompt.samples)]
    if prompts:
        return generate_with_lm_eval(model, prompts)
    return score_with_lm_eval(model, documents)


def time_call(function: Callable[[], T]) -> tuple[float, T]:
    """Call a function; return the elapsed seconds and the function's result."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def choose_ablations(ablations: Sequence[Ablation]) -> list[Ablation]:
    """Choose evenly spaced ablations of each component, including the first and the last."""
    chosen = []
    for group in group_by(ablations[1:], lambda ablation: ablation.name.partition(":")[0]).values():
        step = (len(group) - 1) / (MEASURED_ABLATIONS - 1)
        chosen += [group[i] for i in sorted({round(i * step) for i in range(MEASURED_ABLATIONS)})]
    return chosen


VLLM_MEMORY_SHARE = 0.8
"""Share of the free memory that vLLM may take. The rest is for this process and for the logits of
prompts, which vLLM does not count."""
VLLM_ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # Standard output is for the figures.
    "VLLM_NO_USAGE_STATS": "1",
    # A fork of a process whose threads have computed may hang.
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
}


class SkippingWorker:
    """Extension of vLLM's worker class that makes the model skip removed layers."""

    def pass_over(self: Any, removed: Sequence[int]) -> None:
        """Make the worker's model skip the layers in `removed`, and no other layers."""
        skip_layers(find_layers(self.get_model()), removed)


def skip_layers(layers: Iterable[nn.Module], removed: Collection[int]) -> None:
    """Replace removed layers by the identity, and restore all other layers.

    `removed` contains the indices of the removed layers in `layers`.
    """
    for index, layer in enumerate(layers):
        vars(layer).pop("forward", None)
        if index in removed:
            layer.forward = _identity_forward(layer.forward)


def _identity_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Build a method that returns a layer's input unchanged, to replace the layer's `forward`."""
    signature = inspect.signature(forward)

    def identity(*args: object, **kwargs: object) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        hidden = arguments["hidden_states"]
        if "residual" not in signature.parameters:
            return hidden
        residual = arguments.get("residual")
        return (hidden.new_zeros(hidden.shape), hidden) if residual is None else (hidden, residual)

    return identity


def refuse_vllm(request: CellRequest) -> None:
    """Raise RequestError if vLLM is missing or cannot run a request.

    No model is loaded for this check.
    """
    parts = ", ".join(sorted({*request.changes.components} - {"layer"}))
    reasons = {
        f"vLLM can only skip whole layers, not {parts}; leave --component out": parts,
        "vLLM does not take model_args; leave model_args out": request.model.model_args,
        "vLLM is not installed in this environment; type pip install vllm": not find_spec("vllm"),
    }
    for reason in (text for text, applies in reasons.items() if applies):
        raise RequestError(f"--against vllm: {reason}, or leave --against out")
    for name, value in VLLM_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with _refusing_errors("lm-eval cannot use the installed vLLM"):
        vllm_class()


@contextmanager
def open_vllm(
    request: CellRequest, options: Options, engine: Engine, documents: Sequence[Document]
) -> Iterator[Loop]:
    """Load a model into vLLM in a separate process, and stop the process at exit.

    Args:
        request: Request with the model's name and revision.
        options: Options: permission to run remote code, and memory for the key-value cache.
        engine: Engine that holds the same model in this process.
        documents: Documents to score.

    Yields:
        The evaluation loop that scores documents with vLLM.

    Raises:
        RequestError: vLLM does not run on the model's device, or fails.
    """
    from vllm import __version__ as version
    from vllm.platforms import current_platform

    loaded, device = engine.loaded, current_platform.device_type
    offloaded = loaded.offloaded is not None
    if device != loaded.device.type or loaded.device.index or offloaded:
        state = "offloaded" if offloaded else f"on {loaded.device}"
        raise RequestError(
            f"--against vllm: vLLM needs a model on the first device of type {device or 'none'}, "
            f"but this model is {state}; leave --against out"
        )
    empty_cache()
    memory_share = VLLM_MEMORY_SHARE * free_memory(loaded.device) / total_memory(loaded.device)
    source = find_model(request.model)
    texts = [r.context + r.continuation for document in documents for r in document.requests]
    with TemporaryDirectory() as folder, _refusing_errors(f"vLLM cannot run {request.model}"):
        if source.gguf_file:
            save_copy(loaded, copy.deepcopy(loaded.model), Path(folder))
        else:  # The tokenizer, which a shape lacks, and the files that vLLM looks for beside it.
            loaded.model.config.save_pretrained(folder)
            loaded.tokenizer.save_pretrained(folder)
        load = partial(
            vllm_class(),
            pretrained=folder if source.gguf_file else source.location,
            tokenizer=folder,
            revision=source.revision,
            dtype=loaded.identity.dtype,
            trust_remote_code=options.trust_remote_code,
            max_model_len=min(max(map(len, texts)) + 1, engine.max_length),
            batch_size=len(texts),
            enforce_eager=True,  # A compiled model would not notice that layers change.
            gpu_memory_utilization=memory_share,
            kv_cache_memory_bytes=options.memory,
            worker_extension_cls=f"{__name__}.{SkippingWorker.__name__}",
        )
        seconds, model = time_call(load)

        def model_without(ablation: Ablation) -> Any:
            model.model.collective_rpc("pass_over", args=(list(ablation.removed()),))
            return model

        try:
            settings = f"vLLM {version}, {device}, eager, loaded in {seconds:.0f} s"
            yield Loop("vllm", settings, model_without)
        finally:
            model.model.llm_engine.engine_core.shutdown()


def _refusing_errors(problem: str) -> AbstractContextManager[None]:
    """Return a context manager that converts errors of vLLM to RequestError.

    `problem` is a clause for the error message, such as "vLLM cannot run MODEL".
    """

    def refuse(error: Exception) -> RequestError:
        reason = f"{type(error).__name__}: {first_line(error)}"
        return RequestError(f"--against vllm: {problem} ({reason}); leave --against out")

    return translate_errors(refuse)
