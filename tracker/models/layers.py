"""Finding a model's decoder layers by structure, and taking some of them out."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tracker.errors import ModelError


def find_layers(model: nn.Module) -> nn.ModuleList:
    """Find the list of decoder layers: as many modules as the configuration says, all of a kind.

    Args:
        model: A causal language model of transformers.

    Returns:
        The model's own `ModuleList`.

    Raises:
        ModelError: No list, or more than one, fits; says what was found.
    """
    wanted = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    fitting = {
        name: modules
        for name, modules in lists.items()
        if len(modules) == wanted and any(True for _ in modules.parameters())
    }
    outermost = {
        name: modules
        for name, modules in fitting.items()
        if not any(name.startswith(f"{other}.") for other in fitting if other != name)
    }
    if len(outermost) != 1:
        found = ", ".join(f"{name} ({len(modules)})" for name, modules in lists.items()) or "none"
        raise ModelError(
            f"{type(model).__name__}: cannot tell which modules are its {wanted} decoder layers; "
            f"lists of modules found: {found}"
        )
    return next(iter(outermost.values()))


@contextmanager
def layers_removed(model: nn.Module, removed: Collection[int]) -> Iterator[None]:
    """Take layers really out of a model for a while, the others re-indexed.

    Args:
        model: A causal language model of transformers.
        removed: The layers to take out, 0-based.

    Yields:
        Nothing; on exit, also by an exception, the model is what it was.
    """
    layers = find_layers(model)
    parent, name = _owner(model, layers)
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    kept = [index for index in range(len(layers)) if index not in removed]
    indexed = [
        (module, module.layer_idx)
        for layer in layers
        for module in layer.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    ]
    # Some configurations compute the types from what else they hold; then there is none to keep.
    types = vars(config).get("layer_types")
    try:
        setattr(parent, name, nn.ModuleList(layers[index] for index in kept))
        for new, old in enumerate(kept):
            for module in layers[old].modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    module.layer_idx = new  # type: ignore[assignment]
        config.num_hidden_layers = len(kept)
        if types is not None:
            config.layer_types = [types[index] for index in kept]
        yield
    finally:
        setattr(parent, name, layers)
        for module, index in indexed:
            module.layer_idx = index
        config.num_hidden_layers = len(layers)
        if types is not None:
            config.layer_types = types


def _owner(model: nn.Module, layers: nn.ModuleList) -> tuple[nn.Module, str]:
    path = next(name for name, module in model.named_modules() if module is layers)
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def layer_device(layer: nn.Module) -> torch.device:
    """Say where a layer's weights are."""
    return next(layer.parameters()).device
