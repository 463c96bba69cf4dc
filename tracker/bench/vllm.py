"""vLLM, loaded once, with layers passed over, under lm-eval's own vLLM model."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tracker.bench.loops import Loop, timed
from tracker.core.changes import Ablation
from tracker.core.config import CellRequest
from tracker.core.errors import RequestError, first_line
from tracker.models.sources import find_model

if TYPE_CHECKING:
    from torch import nn

    from tracker.core.documents import Document
    from tracker.engine.scoring.sweep import Engine
    from tracker.measuring.job import Options

MEMORY_SHARE = 0.8
"""Share of the free memory that vLLM may take; the logits of prompts, which it does not count, and
this process take of the rest."""
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # Standard output is for the figures.
    "VLLM_NO_USAGE_STATS": "1",
    # A fork of a process whose threads have computed may hang.
    "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
}


class PassingWorker:
    """Extension of vLLM's workers (`worker_extension_cls`)."""

    def pass_over(self: Any, removed: Sequence[int]) -> None:
        """Make the model pass over these layers, and over no others."""
        from tracker.models.layers import find_layers

        pass_over(find_layers(self.get_model()), removed)


def pass_over(layers: Iterable[nn.Module], removed: Collection[int]) -> None:
    """Replace removed layers by the identity, and restore all others.

    vLLM's layers return an update and the residual stream it is still to be added to; in front of
    the first layer the stream is `hidden_states`, and there is no update.
    """
    for number, layer in enumerate(layers):
        vars(layer).pop("forward", None)
        if number in removed:
            layer.forward = _identity(layer.forward)


def _identity(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Build a function with a layer's signature that leaves the residual stream unchanged."""
    signature = inspect.signature(forward)

    def identity(*args: Any, **kwargs: Any) -> Any:
        arguments = signature.bind(*args, **kwargs).arguments
        hidden = arguments["hidden_states"]
        if "residual" not in signature.parameters:
            return hidden
        residual = arguments.get("residual")
        return (hidden.new_zeros(hidden.shape), hidden) if residual is None else (hidden, residual)

    return identity


def refuse_vllm(request: CellRequest) -> None:
    """Refuse, before anything is loaded, what vLLM is not timed with here: RequestError."""
    from tracker.benchmarks.encoder import vllm_class

    parts = ", ".join(sorted({*request.components} - {"layer"}))
    reasons = {
        f"only whole layers are passed over in vLLM, not {parts}; leave --component out": parts,
        "vLLM does not take model_args; leave them out": request.model_args,
        "vLLM is not installed in this environment; type pip install vllm": not find_spec("vllm"),
    }
    if reason := next((text for text, applies in reasons.items() if applies), None):
        raise RequestError(f"--against vllm: {reason}, or leave --against out")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with _refusing("lm-eval cannot use the installed vLLM"):
        vllm_class()


@contextmanager
def open_vllm(
    request: CellRequest, options: Options, engine: Engine, documents: Sequence[Document]
) -> Iterator[Loop]:
    """Load a model into vLLM, in a process of its own, until exit.

    Args:
        request: The model's name and revision.
        options: Whether code of the model may run, and the memory of keys and values.
        engine: The engine around the same model in this process.
        documents: The documents; vLLM reads no texts longer than theirs.

    Yields:
        The loop.

    Raises:
        RequestError: vLLM does not run on the model's device, or fails.
    """
    from vllm import __version__ as version
    from vllm.platforms import current_platform

    from tracker.benchmarks.encoder import vllm_class
    from tracker.models.checkpoint import save
    from tracker.models.devices import empty_cache, free_memory, total_memory

    loaded, device = engine.loaded, current_platform.device_type
    if device != loaded.device.type or loaded.device.index or loaded.offloaded is not None:
        state = "offloaded" if loaded.offloaded is not None else f"on {loaded.device}"
        raise RequestError(
            f"--against vllm: vLLM runs on the first device of type {device or 'none'}, and the "
            f"model is {state}; leave --against out"
        )
    empty_cache()
    share = MEMORY_SHARE * free_memory(loaded.device) / total_memory(loaded.device)
    source = find_model(request.model, request.revision)
    texts = [r.context + r.continuation for document in documents for r in document.requests]
    with TemporaryDirectory() as folder, _refusing(f"vLLM cannot run {request.model}"):
        if source.gguf_file:
            save(loaded, copy.deepcopy(loaded.model), Path(folder))
        else:  # The tokenizer, which a shape lacks, and what vLLM looks for beside it.
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
            gpu_memory_utilization=share,
            kv_cache_memory_bytes=options.memory,
            worker_extension_cls=f"{__name__}.{PassingWorker.__name__}",
        )
        seconds, model = timed(load)

        def without(ablation: Ablation) -> Any:
            model.model.collective_rpc("pass_over", args=(list(ablation.removed()),))
            return model

        try:
            about = f"vLLM {version}, {device}, eager, loaded in {seconds:.0f} s"
            yield Loop("vllm", about, without)
        finally:
            model.model.llm_engine.engine_core.shutdown()


@contextmanager
def _refusing(problem: str) -> Iterator[None]:
    """Make a refusal, with its reason, of whatever vLLM raises."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  a broken installation raises anything
        reason = f"{type(error).__name__}: {first_line(error)}"
        text = f"--against vllm: {problem} ({reason}); leave --against out"
        raise RequestError(text) from None
