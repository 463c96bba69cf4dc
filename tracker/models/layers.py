"""Find a model's decoder layers by structure."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

from torch import nn

from tracker.core.errors import ModelError


def find_layers(model: nn.Module) -> nn.ModuleList:
    """Find the list of decoder layers: as many modules of one kind as the configuration says.

    Raises ModelError if no list, or more than one, fits; the message lists the candidates.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    wanted = getattr(config, "num_hidden_layers", None)
    if wanted is None:
        raise ModelError(
            f"{type(model).__name__}: its configuration does not say how many decoder layers there "
            "are (num_hidden_layers)"
        )
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    fitting = [
        n for n, m in lists.items() if len(m) == wanted and any(True for _ in m.parameters())
    ]
    outermost = [n for n in fitting if not n.startswith(tuple(f"{other}." for other in fitting))]
    if len(outermost) > 1:
        # A vision part may have as many layers; the text model is the one that the text
        # configuration describes.
        around = {name: model.get_submodule(name.rpartition(".")[0]) for name in outermost}
        text = [name for name, m in around.items() if getattr(m, "config", None) is config]
        outermost = text or outermost
    if len(outermost) != 1:
        found = ", ".join(f"{name} ({len(modules)})" for name, modules in lists.items()) or "none"
        raise ModelError(
            f"{type(model).__name__}: cannot tell which modules are its {wanted} decoder layers; "
            f"lists of modules found: {found}"
        )
    return lists[outermost[0]]


def layers_beyond(model: nn.Module, weights: Iterable[str]) -> set[int]:
    """Find layers that weights belong to by their names, and that a model does not have.

    In some files, layers that predict further tokens follow its own (`num_nextn_predict_layers`).
    """
    layers = find_layers(model)
    path = _path(model, layers)
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    count = len(layers) + (getattr(config, "num_nextn_predict_layers", None) or 0)
    numbers = (re.fullmatch(r"(.*?)\.(\d+)\..*", name) for name in weights)
    named = ((match[1], int(match[2])) for match in numbers if match)
    return {n for above, n in named if n >= count and f".{path}".endswith(f".{above}")}


def find_base(model: nn.Module) -> nn.Module:
    """Find the part of a causal language model below its head: from token ids to hidden states.

    Its forward runs the layers and returns `last_hidden_state`. It is the part that the head calls,
    which is not always `model.base_model`: OPT's head calls the decoder inside it, and Llama 4's
    text model has none of that name. Bert's layers are in an encoder that takes no token ids; its
    base is the part around that.
    """
    path = _path(model, find_layers(model))
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if "input_ids" in inspect.signature(module.forward).parameters:
            return module
    return model


def owner(model: nn.Module, layers: nn.ModuleList) -> tuple[nn.Module, str]:
    """Find the module that holds a list of layers, and the attribute that holds it."""
    parent, _, name = _path(model, layers).rpartition(".")
    return model.get_submodule(parent), name


def _path(model: nn.Module, layers: nn.ModuleList) -> str:
    return str(next(name for name, module in model.named_modules() if module is layers))
