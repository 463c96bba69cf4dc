"""Models that a notebook holds: saved once, under a name made of what they are."""

from __future__ import annotations

import gc
import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tracker.core.errors import ModelError, WorkError, first_line
from tracker.core.provenance import file_hash
from tracker.ledger.files import make_folder, new_folder, write_bytes

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


def save_once(model: Any, tokenizer: Any, folder: Path, trust_remote_code: bool = False) -> Path:
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


def _refuse_other_logits(model: Any, tokenizer: Any, folder: Path, trusted: bool) -> None:
    """Raise ModelError where a model's logits are not those of its saved copy.

    The copy's logits are kept beside it. It is loaded where there are none, or they differ: then
    they may be another device's.
    """
    from tracker.models.load import load_model
    from tracker.models.sources import find_model

    # There bitsandbytes 0.50 changes the weights when a text is read and they are saved later.
    if getattr(model, "is_loaded_in_4bit", False) and model.device.type == "cpu":
        return
    try:
        logits = _logits(model, tokenizer)
    except Exception as error:  # noqa: BLE001  whatever somebody's forward makes of a text
        raise ModelError(f"the model reads no text: {first_line(error)}") from None
    with suppress(OSError, ValueError):
        before = np.fromfile(folder / _LOGITS, np.float32).reshape(logits.shape)
        if not _difference(logits, before, model):
            return
    copy = load_model(find_model(str(folder)), "auto", str(model.device), trusted)
    if any(tokenizer(text)["input_ids"] != copy.tokenizer(text)["input_ids"] for text in _TEXTS):
        raise ModelError("the tokenizer reads texts as other tokens than its saved copy does")
    kept = _logits(copy.model, copy.tokenizer)
    del copy
    gc.collect()
    if difference := _difference(logits, kept, model):
        raise ModelError(
            f"the model's logits differ from those of its saved copy, by {difference}: another "
            "forward or activation is not saved; give a model whose modules its configuration tells"
        )
    write_bytes(folder / _LOGITS, kept.tobytes())


def _logits(model: Any, tokenizer: Any) -> NDArray[np.float32]:
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


def _difference(mine: NDArray[np.float32], copied: NDArray[np.float32], model: Any) -> str:
    """State the largest difference of logits where it is more than rounding; else empty."""
    is_quantised = getattr(model, "hf_quantizer", None) is not None
    exact = model.dtype in (torch.float32, torch.float64) and not is_quantised
    largest = np.abs(copied[np.isfinite(copied)]).max(initial=0)
    bound = largest * (_EXACT if exact else _ROUNDED)
    if np.allclose(mine, copied, rtol=0, atol=bound, equal_nan=True):
        return ""
    return f"up to {np.abs(mine - copied).max():.3g} (the largest logit is {largest:.3g})"


def _fingerprint(model: Any, saved: Path) -> str:
    """Hash weights, and the files of the configuration and the tokenizer."""
    digest = hashlib.sha256(file_hash(sorted(saved.iterdir())).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _refuse_what_is_lost(model: Any, tokenizer: Any) -> None:
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
    if changed := next(_changed(model), None):
        raise ModelError(
            f"{changed} of the model has a hook or another forward, which a saved copy would lack; "
            "remove it"
        )


def _changed(model: Any) -> Iterator[str]:
    """Name the modules whose code somebody changed."""
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        whose = [f"{getattr(hook, '__module__', '')}." for hook in hooks]
        own = "forward" in vars(module) and not hasattr(module, "_hf_hook")
        if own or not all(each.startswith(_OURS) for each in whose):
            yield name or "the whole"
