"""Finding a model's decoder layers by structure, and taking some of them out."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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
    parent, name = owner(model, layers)
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    kept = [index for index in range(len(layers)) if index not in removed]
    changed = [
        (module, name, getattr(module, name))
        for layer in layers
        for module in layer.modules()
        for name in ("layer_idx", "layer_dic")
        if isinstance(getattr(module, name, None), (int, dict))
    ]
    with _layer_types(config, kept):
        try:
            setattr(parent, name, nn.ModuleList(layers[index] for index in kept))
            for new, old in enumerate(kept):
                for module in layers[old].modules():
                    if isinstance(getattr(module, "layer_idx", None), int):
                        module.layer_idx = new  # type: ignore[assignment]
                    # Zamba 2 looks its adapters up by the layer's place in the stack.
                    if isinstance(by_place := getattr(module, "layer_dic", None), dict):
                        module.layer_dic = {  # type: ignore[assignment]
                            kept.index(place): what
                            for place, what in by_place.items()
                            if place in kept
                        }
            config.num_hidden_layers = len(kept)
            yield
        finally:
            setattr(parent, name, layers)
            for module, attribute, value in changed:
                setattr(module, attribute, value)
            config.num_hidden_layers = len(layers)


@contextmanager
def _layer_types(config: Any, kept: Sequence[int]) -> Iterator[None]:
    """Let a configuration name the types of the kept layers only, if it names types at all."""
    name = (getattr(config, "attribute_map", None) or {}).get("layer_types", "layer_types")
    types = getattr(config, name, None)
    remaining = None if types is None else [types[index] for index in kept]
    own = type(config)
    if types is None:
        yield
    elif name in vars(config):
        setattr(config, name, remaining)
        try:
            yield
        finally:
            setattr(config, name, types)
    else:
        # Computed by the class from how many layers there are, as if the last ones were removed.
        config.__class__ = type(own.__name__, (own,), {name: remaining})
        try:
            yield
        finally:
            config.__class__ = own


def find_base(model: nn.Module) -> nn.Module:
    """Find the part of a causal language model below its head: the one that holds the layers.

    It is the part that the head asks, which is not always `model.base_model`: OPT's head asks the
    decoder inside it, and Llama 4's text model has none of that name.

    Args:
        model: A causal language model of transformers.

    Returns:
        The submodule whose forward runs the layers and returns `last_hidden_state`.
    """
    return owner(model, find_layers(model))[0]


def owner(model: nn.Module, layers: nn.ModuleList) -> tuple[nn.Module, str]:
    path = next(name for name, module in model.named_modules() if module is layers)
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name
