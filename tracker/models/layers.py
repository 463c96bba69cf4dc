"""Find a model's decoder layers by structure."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

from torch import nn

from tracker.schema.errors import ModelError


def find_layers(model: nn.Module) -> nn.ModuleList:
    """Find a model's decoder layers: the module list with `num_hidden_layers` entries.

    Raises ModelError if no module list has this length, or if several lists have this length.
    """
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    n_layers = getattr(config, "num_hidden_layers", None)
    if n_layers is None:
        raise ModelError(
            f"{type(model).__name__}: its configuration does not say how many decoder layers there "
            "are (num_hidden_layers)"
        )
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    names = [n for n, m in lists.items() if len(m) == n_layers and [*m.parameters()]]
    inner_prefixes = tuple(f"{name}." for name in names)
    candidates = [name for name in names if not name.startswith(inner_prefixes)]
    if len(candidates) > 1:
        # A vision part may have as many layers; the text model is the one that the text
        # configuration describes.
        parents = {name: model.get_submodule(name.rpartition(".")[0]) for name in candidates}
        text_names = [name for name, m in parents.items() if getattr(m, "config", None) is config]
        candidates = text_names or candidates
    if len(candidates) != 1:
        listing = ", ".join(f"{name} ({len(modules)})" for name, modules in lists.items()) or "none"
        raise ModelError(
            f"{type(model).__name__}: cannot tell which modules are its {n_layers} decoder layers; "
            f"lists of modules found: {listing}"
        )
    return lists[candidates[0]]


def find_extra_layers(model: nn.Module, weights: Iterable[str]) -> set[int]:
    """Find layers that occur in the names of weights but not in the model.

    The result does not include layers for multi-token prediction (`num_nextn_predict_layers`).
    """
    layers = find_layers(model)
    path = _layers_path(model, layers)
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    n_known = len(layers) + (getattr(config, "num_nextn_predict_layers", None) or 0)
    matches = (re.fullmatch(r"(.*?)\.(\d+)\..*", name) for name in weights)
    # A weight's name may lack the prefix that the layers have in the whole model.
    numbers = {int(m[2]) for m in matches if m and f".{path}".endswith(f".{m[1]}")}
    return {number for number in numbers if number >= n_known}


def find_base(model: nn.Module) -> nn.Module:
    """Find the module of a causal language model that maps token ids to hidden states.

    The forward pass of this base module runs the layers and returns `last_hidden_state`. The base
    module is not always `model.base_model`: in OPT, it is the decoder inside `base_model`.
    """
    path = _layers_path(model, find_layers(model))
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if "input_ids" in inspect.signature(module.forward).parameters:
            return module
    return model


def find_layers_parent(model: nn.Module, layers: nn.ModuleList) -> tuple[nn.Module, str]:
    """Find the module that contains a list of layers.

    Returns the module, and the name of the attribute that contains the list.
    """
    parent, _, name = _layers_path(model, layers).rpartition(".")
    return model.get_submodule(parent), name


def _layers_path(model: nn.Module, layers: nn.ModuleList) -> str:
    return str(next(name for name, module in model.named_modules() if module is layers))
