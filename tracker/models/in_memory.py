"""Models that a notebook holds: saved once, under a name made of what they are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tracker.core.errors import ModelError, WorkError, first_line
from tracker.core.provenance import file_hash
from tracker.ledger.files import make_folder, new_folder

_OURS = ("transformers.", "accelerate.", "torch.")
"""Whose hooks are there again when a model is loaded."""


def save_once(model: Any, tokenizer: Any, folder: Path) -> Path:
    """Save a model object and its tokenizer, unless the same ones are saved already.

    Args:
        model: A `PreTrainedModel` of transformers. It stays as it is.
        tokenizer: Its tokenizer.
        folder: Holds a folder for each such model.

    Returns:
        The model's folder, named by a fingerprint of its weights, configuration and tokenizer.

    Raises:
        ModelError: It is no model of transformers, or a saved copy would not be the same model.
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
        if not saved.is_dir():
            with new_folder(saved) as temporary:
                tokenizer.save_pretrained(temporary)
                model.save_pretrained(temporary)
    except OSError as error:
        raise WorkError(
            f"the model cannot be saved in {folder}: {error.strerror or first_line(error)}"
        ) from None
    return saved


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
