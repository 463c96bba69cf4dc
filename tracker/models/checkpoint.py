"""Save a model without some of its layers, or with some repeated, as an ordinary checkpoint.

Plain transformers loads it. The layers are those of `pruned`, as for all really changed models. In
addition, a model is refused unless numbers and lists in its configuration describe it completely.

The module also measures how much faster one model reads than another, by turns in one process. It
saves a model object of a notebook once, under a name made from its contents.
"""

from __future__ import annotations

import copy
import gc
import hashlib
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from tracker.core.changes import Change
from tracker.core.errors import ModelError, WorkError, attempt, first_line, translate_errors
from tracker.core.provenance import content_hash, file_hash
from tracker.ledger.files import make_folder, new_folder, write_bytes
from tracker.models.devices import empty_cache
from tracker.models.layers import find_layers
from tracker.models.load import TRANSFORMERS_LOCK, LoadedModel, hollow
from tracker.models.miniature import miniature
from tracker.models.pruned import Shapes, as_loaded, left, misfit, pruned, shapes
from tracker.models.sources import BITS, ModelSource, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SECONDS = 4.0
"""Minimum total time that the two models are run, in seconds."""
TURNS = 8
MOST = 1.15
"""Maximum ratio of the ends of the turns' middle half. If it is larger, other work on the machine
affected the two models unequally."""


@torch.inference_mode()
def times_as_fast(
    model: PreTrainedModel, base: PreTrainedModel, batch: int, length: int
) -> tuple[float, float, float] | None:
    """Measure how much faster one model reads than another, by turns on the same tokens.

    Args:
        model: A causal language model.
        base: The model to compare with, on the same device.
        batch: Number of texts at a time.
        length: Tokens of each text.

    Returns:
        The speed of the first relative to the second, as `ratio` returns it.
    """
    place = base.get_input_embeddings().weight.device
    vocabulary = base.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch, length), generator=generator).to(place)
    turns: list[tuple[float, float]] = []
    for each in (model, base):
        _seconds(each, ids)
    while len(turns) < TURNS or sum(map(sum, turns)) < SECONDS:
        turns.append((_seconds(model, ids), _seconds(base, ids)))
    return ratio(turns)


def ratio(turns: Sequence[tuple[float, float]]) -> tuple[float, float, float] | None:
    """Compute the speed of the first of two models relative to the second.

    Other work that slows both in a turn does not change their ratio.

    Args:
        turns: The seconds of both, turn by turn.

    Returns:
        The median of the turns' ratios, and the ends of their middle half; None if these are
        further apart than `MOST`.
    """
    first, second = np.array(turns).T
    low, middle, high = np.quantile(second / first, (0.25, 0.5, 0.75))
    return (float(middle), float(low), float(high)) if high <= MOST * low else None


def _seconds(model: PreTrainedModel, ids: torch.Tensor) -> float:
    start = time.perf_counter()
    # Reading a number waits for the accelerator.
    float(model(input_ids=ids, use_cache=False).logits[0, -1, 0])
    return time.perf_counter() - start


PROBE = 48
"""Tokens that a miniature reads, more than its windows see."""
ROUNDING = 1e-4
"""Tolerance between two ways of computing a miniature's experts, relative to the largest logit."""
_IDLE = ("name_or_path", "training")
"""Attributes of a module that do not affect its results here."""
_TRANSFORMERS = "transformers."
"""Prefix of the modules of transformers' own classes, unlike those of downloads."""


def without(
    model: PreTrainedModel, removed: Collection[int], repeated: Sequence[Change] = ()
) -> Any:
    """Copy a model without some layers, or with some repeated, and adapt its configuration.

    Args:
        model: A causal language model of transformers.
        removed: The layers to remove, 0-based.
        repeated: Spans of layers that are passed several times.

    Returns:
        The copy. It shares the weights, except for a layer's further passes, which have their own:
        a safetensors file holds shared weights once, and the class would look for them twice.

    Raises:
        ModelError: Its configuration cannot describe what is left; the message gives the reason.
    """
    kept = left(len(find_layers(model)), removed, repeated)
    twin = pruned(model, removed, repeated=repeated)
    layers = find_layers(twin)
    for place, index in enumerate(kept):
        if index in kept[:place]:
            layers[place] = copy.deepcopy(layers[place])
    config = twin.config.get_text_config()
    kind = type(model) if _brings_code(model) else None
    if kind is None:
        # It points to code that was not used, and that a user would have to trust.
        for each in (twin.config, config):
            vars(each).pop("auto_map", None)
    with suppress(ModelError):  # the check below reports the reason
        as_loaded(model, twin, kept)
    why = _misfit(twin.config, shapes(twin), kind)
    if why:
        said = _clauses(removed, repeated)
        raise ModelError(f"{type(model).__name__}: its configuration cannot say that {said}: {why}")
    return twin


def resized(model: PreTrainedModel, twin: PreTrainedModel) -> tuple[str, ...]:
    """List the keys that a copy's configuration changes besides the number of layers."""
    before, after = (each.config.get_text_config().to_dict() for each in (model, twin))
    idle = ("num_hidden_layers", "auto_map")
    return tuple(sorted(n for n in after if n not in idle and after[n] != before.get(n)))


def _brings_code(model: PreTrainedModel) -> bool:
    """Return whether a download's code made the model, and is therefore trusted."""
    return not all(
        type(each).__module__.startswith(_TRANSFORMERS) for each in (model, model.config)
    )


def _misfit(config: PreTrainedConfig, wanted: Shapes, kind: type | None) -> str | None:
    """Describe what the saved configuration of a model fails to describe; None if nothing.

    `kind` is its class if that is trusted code; None if transformers is to find it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    def read_back() -> Shapes:
        with TemporaryDirectory() as folder, torch.device("meta"):
            config.save_pretrained(folder)
            read = AutoConfig.from_pretrained(folder, trust_remote_code=kind is not None)
            with TRANSFORMERS_LOCK:
                return shapes(kind(read) if kind else AutoModelForCausalLM.from_config(read))

    found = attempt(read_back)  # a class may refuse lists of another length
    return first_line(found) if isinstance(found, Exception) else misfit(found, wanted)


def refuse_unsizable(
    source: ModelSource,
    removed: Collection[int] | None = None,
    repeated: Sequence[Change] = (),
) -> None:
    """Refuse changes of layers whose result plain transformers could not load.

    Reads no weights. A miniature of the model, made once, is cut, saved, loaded and run, which
    takes a second.

    Args:
        source: The model.
        removed: The layers to remove; None if they are not known yet: then one at the beginning and
            one in the middle are tried, each alone.
        repeated: Spans of layers that are passed several times.

    Raises:
        ModelError: Its configuration cannot describe the result, or another model is loaded.
    """
    refuse_packed(source)
    model, small = _small(source, content_hash(source.stamp()))
    total = len(find_layers(model))
    for layers in [[0], [total // 2]] if removed is None else [removed]:
        named = [*layers, *(layer for stretch in repeated for layer in stretch.layers)]
        beyond = [layer for layer in named if not 0 <= layer < total]
        if beyond or len(set(layers)) >= total:
            what = f"layer {beyond[0]} is out of range" if beyond else "no layer would be left"
            raise ModelError(f"{what}: {source.source} has {total} layers, 0 to {total - 1}")
        if small is None:
            without(model, layers, repeated)
        else:
            _try(copy.deepcopy(small), layers, repeated)


@lru_cache(maxsize=1)
def _small(source: ModelSource, stamp: str) -> tuple[Any, Any | None]:
    """Build a model without weights, and its miniature, once for unchanged files."""
    model = hollow(source, "auto")
    return model, miniature(model)


def refuse_packed(source: ModelSource) -> None:
    """Raise ModelError if a model's weights are no single plain checkpoint; read no weights."""
    if source.adapter is not None:
        raise ModelError(
            f"model_args: {source.source} with an adapter beside its weights is no one checkpoint; "
            "merge it first: PeftModel.merge_and_unload(), then save_pretrained()"
        )
    config = read_config(source)
    quantised = getattr(config, "quantization_config", None) or any(
        name.startswith(BITS) for name in source.arguments
    )
    if quantised and not source.gguf_file:
        raise ModelError(
            f"{source.source} is quantised, and what layers lack would have to be packed anew: "
            "export the model in float32 or bfloat16, and quantise what is exported"
        )


def _try(small: PreTrainedModel, removed: Collection[int], repeated: Sequence[Change]) -> None:
    """Change, save and load a miniature; raise ModelError if the loaded one gives other logits."""
    from transformers import AutoModelForCausalLM

    name = type(small).__name__
    small.float()
    twin = without(small, removed, repeated)
    config = twin.config.get_text_config()
    # On loading, a class sets the row of the padding token to its own value.
    filler = getattr(config, "pad_token_id", None)
    tokens = [token for token in range(config.vocab_size) if token != filler]
    ids = torch.tensor([(tokens * PROBE)[:PROBE]])
    so = f"where {_clauses(removed, repeated)}" if repeated else f"without {_named(removed)}"

    def problem(text: str) -> Callable[[Exception], ModelError]:
        return lambda error: ModelError(f"{name} {text}: {first_line(error)}")

    with translate_errors(problem(f"does not run {so}")):
        said = _ask(twin, ids)
    reloading = translate_errors(problem(f"{so} cannot be saved and loaded"))
    with TemporaryDirectory() as folder, _no_bars(), reloading:
        twin.save_pretrained(folder)
        trust = {"trust_remote_code": _brings_code(small)}
        with TRANSFORMERS_LOCK:
            again, loading = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, **trust
            )
        left = [*loading["missing_keys"], *loading["unexpected_keys"]]
        heard = _ask(again.eval(), ids)
    far = float((said - heard)[..., tokens].abs().max())
    if left or not far <= ROUNDING * max(1.0, float(said.abs().max())):
        raise ModelError(
            f"{name} {so}, saved and loaded by plain transformers, is another "
            f"model (logits differ by {far:.3g}): {_difference(twin, again)}"
        )


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hide the progress bars of transformers until exit."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@torch.inference_mode()
def _ask(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _difference(one: PreTrainedModel, other: PreTrainedModel) -> str:
    """Return the first number of a module that differs because the class computes it."""
    theirs = dict(other.named_modules())
    for path, module in one.named_modules():
        computed = vars(theirs[path]) if path in theirs else {}
        for name, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str)) and name not in _IDLE
            if plain and computed.get(name) != value:
                return f"{path}.{name} was {value}, and its class computes {computed.get(name)}"
    return "its class computes something from where a layer stands"


def _clauses(removed: Collection[int], repeated: Sequence[Change]) -> str:
    """Describe the removed and repeated layers."""
    gone = f"{_named(removed)} {'is' if len(removed) == 1 else 'are'} gone"
    return " and ".join([gone] * bool(removed) + [stretch.clause for stretch in repeated])


def _named(removed: Collection[int]) -> str:
    layers = ", ".join(map(str, sorted(removed)))
    return f"layer{'s' if len(removed) > 1 else ''} {layers}"


def save(loaded: LoadedModel, twin: PreTrainedModel, folder: Path) -> None:
    """Save a copy of a loaded model with its tokenizer: weights, configurations, chat template.

    Args:
        loaded: The model.
        twin: The copy.
        folder: The folder to create.

    Raises:
        OSError: The disk refuses.
    """
    if getattr(twin, "hf_quantizer", None) is not None:
        # Weights of a GGUF file are dequantised, and only their markers are left.
        twin.hf_quantizer = None
        twin.is_quantized = False
        for config in (twin.config, twin.config.get_text_config()):
            vars(config).pop("quantization_config", None)
    if type(loaded.tokenizer).__module__.startswith(_TRANSFORMERS):
        loaded.tokenizer.init_kwargs.pop("auto_map", None)
    twin.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def release() -> None:
    """Release the accelerator memory of former models for use by another process."""
    gc.collect()
    empty_cache()


_OURS = ("transformers.", "accelerate.", "torch.")
"""Packages whose hooks are set again when a model is loaded."""
_TEXTS = (
    "The heart pumps blood",
    "Question: What is the capital of France?\nAnswer: Paris",
    "In 1969 two people walked on the Moon for the first time; a third one stayed in orbit, and "
    "all of them returned to Earth four days later. What they brought along were stones and dust.",
)
_LOGITS = "logits.f32"
"""File beside a copy with its logits of these texts' last tokens."""
_EXACT, _ROUNDED = 1e-3, 0.05
"""Tolerance of logits for rounding, relative to the largest: in float32, and in fewer bits."""


def save_once(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    trust_remote_code: bool = False,
) -> Path:
    """Save a model object and its tokenizer, unless the same ones are saved already.

    Args:
        model: A `PreTrainedModel` of transformers. It is not changed.
        tokenizer: Its tokenizer.
        folder: Folder of the folders of such models.
        trust_remote_code: Whether code that comes with the model may run when the copy is loaded.

    Returns:
        The model's folder, named by a fingerprint of its weights, configuration and tokenizer.

    Raises:
        ModelError: It is no model of transformers, or a saved copy is not the same model.
        WorkError: The folder cannot be written.
    """
    _refuse_what_is_lost(model, tokenizer)
    given = Path(str(getattr(model, "name_or_path", "") or type(model).__name__)).name
    name = re.sub(r"[^\w.-]+", "-", given).strip("-.") or "model"
    try:
        make_folder(folder)
        with TemporaryDirectory() as described:
            tokenizer.save_pretrained(described)
            model.config.save_pretrained(described)
            saved = folder / f"{name}-{_fingerprint(model, Path(described))[:12]}"
        is_new = not saved.is_dir()
        if is_new:
            with new_folder(saved) as temporary:
                tokenizer.save_pretrained(temporary)
                model.save_pretrained(temporary)
    except OSError as error:
        raise WorkError(
            f"the model cannot be saved in {folder}: {error.strerror or first_line(error)}"
        ) from None
    try:
        _refuse_other_logits(model, tokenizer, saved, trust_remote_code)
    except ModelError:
        if is_new:
            shutil.rmtree(saved, ignore_errors=True)
        raise
    return saved


def _refuse_other_logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, trusted: bool
) -> None:
    """Raise ModelError if a model's logits differ from those of its saved copy.

    The copy's logits are stored beside it. The copy is loaded if they are missing or differ, since
    they may have been computed on another device.
    """
    from tracker.models.load import load_model
    from tracker.models.sources import find_model

    # On a CPU, bitsandbytes 0.50 changes the weights of a model that has read a text and is saved.
    if getattr(model, "is_loaded_in_4bit", False) and model.device.type == "cpu":
        return
    with translate_errors(
        lambda error: ModelError(f"the model reads no text: {first_line(error)}")
    ):
        logits = _logits(model, tokenizer)
    with suppress(OSError, ValueError):
        before = np.fromfile(folder / _LOGITS, np.float32).reshape(logits.shape)
        if not _logit_difference(logits, before, model):
            return
    copy = load_model(find_model(str(folder), trusted), "auto", str(model.device))
    if any(tokenizer(text)["input_ids"] != copy.tokenizer(text)["input_ids"] for text in _TEXTS):
        raise ModelError("the tokenizer reads texts as other tokens than its saved copy does")
    saved = _logits(copy.model, copy.tokenizer)
    del copy
    gc.collect()
    if difference := _logit_difference(logits, saved, model):
        raise ModelError(
            f"the model's logits differ from those of its saved copy, by {difference}: another "
            "forward or activation is not saved; give a model whose modules its configuration tells"
        )
    write_bytes(folder / _LOGITS, saved.tobytes())


def _logits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.float32]:
    """Compute the logits of the last token of a few texts, and keep the model's modes."""
    modes = [(module, module.training) for module in model.modules()]
    texts = [torch.tensor([tokenizer(text)["input_ids"]], device=model.device) for text in _TEXTS]
    try:
        model.eval()
        with torch.no_grad():
            rows = [model(input_ids=ids).logits[0, -1].float().cpu() for ids in texts]
    finally:
        for module, mode in modes:
            module.training = mode
    return np.asarray(torch.stack(rows).numpy())


def _logit_difference(
    mine: NDArray[np.float32], copied: NDArray[np.float32], model: PreTrainedModel
) -> str:
    """Describe the largest difference of logits if it exceeds rounding; empty otherwise."""
    is_quantised = getattr(model, "hf_quantizer", None) is not None
    exact = model.dtype in (torch.float32, torch.float64) and not is_quantised
    largest = np.abs(copied[np.isfinite(copied)]).max(initial=0)
    bound = largest * (_EXACT if exact else _ROUNDED)
    if np.allclose(mine, copied, rtol=0, atol=bound, equal_nan=True):
        return ""
    return f"up to {np.abs(mine - copied).max():.3g} (the largest logit is {largest:.3g})"


def _fingerprint(model: PreTrainedModel, saved: Path) -> str:
    """Hash the weights, and the files of the configuration and the tokenizer."""
    digest = hashlib.sha256(file_hash(sorted(saved.iterdir())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _refuse_what_is_lost(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"model is a {type(model).__name__}; give a model of transformers, or the name or "
            "folder of one. A model of peft becomes one by model.merge_and_unload()"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError("a model object needs its tokenizer: tokenizer=AutoTokenizer.from_…")
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise ModelError("some of the model's weights are not in memory; load all of them, or save")
    quantiser = getattr(model, "hf_quantizer", None)
    if quantiser is not None and not quantiser.is_serializable():
        method = quantiser.quantization_config.quant_method
        raise ModelError(
            f"the model's weights are quantised by {getattr(method, 'value', method)}, and "
            "transformers cannot save them; give the file or folder that it was loaded from"
        )
    if changed := next(_changed_modules(model), None):
        raise ModelError(
            f"{changed} of the model has a hook or another forward, which a saved copy would lack; "
            "remove it"
        )


def _changed_modules(model: PreTrainedModel) -> Iterator[str]:
    """Yield the names of modules whose code was changed."""
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        whose = [f"{getattr(hook, '__module__', '')}." for hook in hooks]
        is_replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
        if is_replaced or not all(owner.startswith(_OURS) for owner in whose):
            yield name or "the whole"
