"""A model without some of its layers, or with some again, as an ordinary checkpoint.

Plain transformers loads it. The layers are those of `pruned`, as wherever else a model is really
changed. What is added here:
the configuration says in numbers and lists all that the model is, or the model is refused.

And how much faster one model reads than another, measured by turns in one process. A model that a
notebook holds is saved once, under a name made of what it is.
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
from tracker.models.load import LoadedModel, hollow
from tracker.models.miniature import miniature
from tracker.models.pruned import Shapes, as_loaded, left, misfit, pruned, shapes
from tracker.models.sources import BITS, ModelSource, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SECONDS = 4.0
"""What the two are given at least."""
TURNS = 8
MOST = 1.15
"""How far apart the ends of the turns' middle half may be, as a factor: else the machine did other
work, now for the one and now for the other."""


@torch.inference_mode()
def times_as_fast(
    model: PreTrainedModel, base: PreTrainedModel, batch: int, length: int
) -> tuple[float, float, float] | None:
    """Let two models read the same tokens by turns.

    Args:
        model: A causal language model.
        base: The one that it is compared with, on the same device.
        batch: Texts at a time.
        length: Tokens of each.

    Returns:
        How many times as fast the first one reads, as `ratio` says.
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
    """Say how many times as fast the first of two is.

    Other work that slows both in a turn leaves their ratio as it is.

    Args:
        turns: The seconds of both, turn by turn.

    Returns:
        The median of the turns' ratios, and the ends of their middle half; None where these are
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
"""Of the largest logit: what two ways of computing a miniature's experts differ by."""
_IDLE = ("name_or_path", "training")
"""Of a module: what has no bearing on what it computes here."""
_TRANSFORMERS = "transformers."
"""Where its own classes are, and those of downloads are not."""


def without(
    model: PreTrainedModel, removed: Collection[int], repeated: Sequence[Change] = ()
) -> Any:
    """Copy a model without some layers, or with some again, and say so in its configuration.

    Args:
        model: A causal language model of transformers.
        removed: The layers to take out, 0-based.
        repeated: Stretches of layers that are passed several times.

    Returns:
        The copy; it shares the weights, but for a layer's further passes, which have their own: a
        file of safetensors holds what is shared once, and the class would look for it twice.

    Raises:
        ModelError: Its configuration cannot say what is left; says why.
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
        # It points to code that was not used, and would be where somebody trusts it.
        for each in (twin.config, config):
            vars(each).pop("auto_map", None)
    with suppress(ModelError):  # what follows says why
        as_loaded(model, twin, kept)
    why = _misfit(twin.config, shapes(twin), kind)
    if why:
        said = _clauses(removed, repeated)
        raise ModelError(f"{type(model).__name__}: its configuration cannot say that {said}: {why}")
    return twin


def resized(model: PreTrainedModel, twin: PreTrainedModel) -> tuple[str, ...]:
    """Name what a copy's configuration says anew besides how many layers there are."""
    before, after = (each.config.get_text_config().to_dict() for each in (model, twin))
    idle = ("num_hidden_layers", "auto_map")
    return tuple(sorted(n for n in after if n not in idle and after[n] != before.get(n)))


def _brings_code(model: PreTrainedModel) -> bool:
    """Whether a download's code made it, which then is trusted; else it must not run."""
    return not all(
        type(each).__module__.startswith(_TRANSFORMERS) for each in (model, model.config)
    )


def _misfit(config: PreTrainedConfig, wanted: Shapes, kind: type | None) -> str | None:
    """Say what of a model its configuration, once it is saved and read, does not describe.

    `kind` is its class where that is trusted code; None where transformers is to find it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    def read_back() -> Shapes:
        with TemporaryDirectory() as folder, torch.device("meta"):
            config.save_pretrained(folder)
            read = AutoConfig.from_pretrained(folder, trust_remote_code=kind is not None)
            return shapes(kind(read) if kind else AutoModelForCausalLM.from_config(read))

    found = attempt(read_back)  # a class may refuse lists of another length
    return first_line(found) if isinstance(found, Exception) else misfit(found, wanted)


def refuse_unsizable(
    source: ModelSource,
    removed: Collection[int] | None = None,
    repeated: Sequence[Change] = (),
) -> None:
    """Refuse what plain transformers could not load without some layers, or with some again.

    Reads no weights. A miniature of the model, made once, is cut, saved, loaded and run, which
    takes a second.

    Args:
        source: The model.
        removed: The layers; None before it is known which: then one at the beginning and one in the
            middle, each alone.
        repeated: Stretches of layers that are passed several times.

    Raises:
        ModelError: Its configuration cannot say what would be left, or what loads is another model.
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
    """Make a model without weights, and its miniature, as long as its files are the same."""
    model = hollow(source, "auto")
    return model, miniature(model)


def refuse_packed(source: ModelSource) -> None:
    """Refuse a model whose weights are no one plain checkpoint: ModelError; reads no weights."""
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
    """Change, save and load a miniature; ModelError where what is loaded says something else."""
    from transformers import AutoModelForCausalLM

    name = type(small).__name__
    small.float()
    twin = without(small, removed, repeated)
    config = twin.config.get_text_config()
    # The row of the token that fills up is whatever a class sets it to when it loads.
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
    """Keep the bars of transformers from being shown for a miniature."""
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
    """Name the first number of a module that differs: what the class computes by itself."""
    theirs = dict(other.named_modules())
    for path, module in one.named_modules():
        computed = vars(theirs[path]) if path in theirs else {}
        for name, value in vars(module).items():
            plain = isinstance(value, (bool, int, float, str)) and name not in _IDLE
            if plain and computed.get(name) != value:
                return f"{path}.{name} was {value}, and its class computes {computed.get(name)}"
    return "its class computes something from where a layer stands"


def _clauses(removed: Collection[int], repeated: Sequence[Change]) -> str:
    """Say what was done to which layers."""
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
        folder: Where; it is made.

    Raises:
        OSError: The disk refuses.
    """
    if getattr(twin, "hf_quantizer", None) is not None:
        # What a GGUF file held is dequantised, and only its marks are left.
        twin.hf_quantizer = None
        twin.is_quantized = False
        for config in (twin.config, twin.config.get_text_config()):
            vars(config).pop("quantization_config", None)
    if type(loaded.tokenizer).__module__.startswith(_TRANSFORMERS):
        loaded.tokenizer.init_kwargs.pop("auto_map", None)
    twin.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)


def release() -> None:
    """Give back what models have left of an accelerator's memory, for another process to use."""
    gc.collect()
    empty_cache()


_OURS = ("transformers.", "accelerate.", "torch.")
"""Whose hooks are there again when a model is loaded."""
_TEXTS = (
    "The heart pumps blood",
    "Question: What is the capital of France?\nAnswer: Paris",
    "In 1969 two people walked on the Moon for the first time; a third one stayed in orbit, and "
    "all of them returned to Earth four days later. What they brought along were stones and dust.",
)
_LOGITS = "logits.f32"
"""File beside a copy that holds its logits of these texts' last tokens."""
_EXACT, _ROUNDED = 1e-3, 0.05
"""Share of the largest logit by which rounding moves one: in float32, and in fewer bits."""


def save_once(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    trust_remote_code: bool = False,
) -> Path:
    """Save a model object and its tokenizer, unless the same ones are saved already.

    Args:
        model: A `PreTrainedModel` of transformers. It stays as it is.
        tokenizer: Its tokenizer.
        folder: Holds a folder for each such model.
        trust_remote_code: Whether code that comes with the model may run when the copy is loaded.

    Returns:
        The model's folder, named by a fingerprint of its weights, configuration and tokenizer.

    Raises:
        ModelError: It is no model of transformers, or a saved copy is not the same model.
        WorkError: It cannot be written.
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
    """Raise ModelError where a model's logits are not those of its saved copy.

    The copy's logits are kept beside it. It is loaded where there are none, or they differ: then
    they may be another device's.
    """
    from tracker.models.load import load_model
    from tracker.models.sources import find_model

    # There bitsandbytes 0.50 changes the weights when a text is read and they are saved later.
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
    """Compute the logits of the last token of a few texts; the model's modes stay as they are."""
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
    """State the largest difference of logits where it is more than rounding; else empty."""
    is_quantised = getattr(model, "hf_quantizer", None) is not None
    exact = model.dtype in (torch.float32, torch.float64) and not is_quantised
    largest = np.abs(copied[np.isfinite(copied)]).max(initial=0)
    bound = largest * (_EXACT if exact else _ROUNDED)
    if np.allclose(mine, copied, rtol=0, atol=bound, equal_nan=True):
        return ""
    return f"up to {np.abs(mine - copied).max():.3g} (the largest logit is {largest:.3g})"


def _fingerprint(model: PreTrainedModel, saved: Path) -> str:
    """Hash weights, and the files of the configuration and the tokenizer."""
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
    """Name the modules whose code somebody changed."""
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        whose = [f"{getattr(hook, '__module__', '')}." for hook in hooks]
        is_replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
        if is_replaced or not all(owner.startswith(_OURS) for owner in whose):
            yield name or "the whole"
