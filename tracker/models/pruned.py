"""A model whose layers are really taken out: a copy of its own, as a saved checkpoint would be.

The copy shares the weights and nothing else, so that it runs beside the model it was made of.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tracker.core.changes import Change
from tracker.core.errors import ModelError
from tracker.models.hooks import call_with, first_of, returning
from tracker.models.layers import find_layers, owner

State = dict[tuple[str, str], Any]
"""(path of a module, attribute) → value."""
_ABSENT = "no such attribute"
"""Stands for what a module gets only when it is called."""
FIRST = "max_window_layers"
"""Qwen's first so many layers, which see all; no shape depends on it."""
_CUT = "_cut_from"
"""Of a configuration's class that computes what is left: the class that it was."""
_LABELS = "id2label"
"""A configuration's table of a classifier's labels, whose numbers are no layers."""
SMALL = 4096
"""Elements up to which a buffer is copied: rotary frequencies, which some models change in a call;
larger ones are masks and the like, of which every copy would take its own."""


def pruned(
    model: Any,
    removed: Collection[int] = (),
    fresh: State | None = None,
    stay: bool = False,
    changes: Iterable[tuple[int, Callable[[nn.Module], object]]] = (),
    repeated: Sequence[Change] = (),
) -> Any:
    """Copy a model without some of its layers, or with some of them again, all re-indexed.

    What belongs to a layer is found by its shape: a list in the configuration with one entry a
    layer, a number in each layer that is the layer's own place, a table whose keys are places.

    Args:
        model: A causal language model of transformers.
        removed: The layers to take out, 0-based.
        fresh: What the copy gets for its own in place of the model's, parameters too.
        stay: Whether the layers stay where they are and hand on their input, for a model that
            cannot be cut.
        changes: What changes the copies of some layers, with the layer's place in the model.
        repeated: Stretches of layers that stand several times in the copy, one behind another.

    Returns:
        The copy.
    """
    layers = find_layers(model)
    memo = {id(each): each for each in _shared(model)}
    fresh = fresh or {}
    for (path, name), value in fresh.items():
        old = model.get_submodule(path)._parameters.get(name)
        if old is not None:
            memo[id(old)] = nn.Parameter(value.clone(), requires_grad=False)
    twin = copy.deepcopy(model, memo)
    put_back(twin, fresh)
    own = find_layers(twin)
    for index, change in changes:
        change(own[index])
    kept = left(len(layers), removed, repeated)
    if stay:
        for index in removed:
            returning(own[index], lambda state: state)
        for stretch in repeated:
            if len(stretch.layers) > 1:
                raise ModelError(
                    f"{type(model).__name__} cannot be cut, so its layers {stretch.layer} to "
                    f"{stretch.stop - 1} cannot be passed again together"
                )
            hook = partial(_again, stretch.repeats)
            own[stretch.layer].register_forward_hook(hook, with_kwargs=True)
    elif kept != list(range(len(layers))):
        _take_out(twin, own, kept)
    return twin


def left(total: int, removed: Collection[int] = (), repeated: Sequence[Change] = ()) -> list[int]:
    """List which of so many layers a copy has, in order; repeated ones several times."""
    kept: list[int] = []
    for index in range(total):
        kept += [index] if index not in removed else []
        for stretch in repeated:
            if stretch.stop == index + 1:
                kept += [*stretch.layers] * (stretch.repeats - 1)
    return kept


def _shared(model: Any) -> Iterator[Any]:
    """All that a copy has in common with the model: weights, large buffers, what lies on disk."""
    for module in model.modules():
        yield from (held for held in module._parameters.values() if held is not None)
        buffers = module._buffers.values()
        yield from (held for held in buffers if held is not None and held.numel() > SMALL)
        # accelerate's, of a model that is spread over devices
        hook = getattr(module, "_hf_hook", None)
        for name in ("weights_map", "tied_params_map"):
            held = getattr(hook, name, None)
            if held is not None:
                yield held


def _take_out(twin: Any, layers: nn.ModuleList, kept: Sequence[int]) -> None:
    """Leave only the kept layers in a copy, which nobody else uses; one may be kept again."""
    total = len(layers)
    parent, name = owner(twin, layers)
    places = _places(layers)
    own = [layers[index] for index in kept]
    for new, index in enumerate(kept):
        if index in kept[:new]:
            own[new] = copy.deepcopy(own[new], {id(held): held for held in _shared(own[new])})
    for (path, attribute), holders in places.items():
        for new, index in enumerate(kept):
            if index in holders:
                setattr(own[new].get_submodule(path), attribute, new)
    setattr(parent, name, nn.ModuleList())  # so that only what holds the layers is looked at
    around = [m for m in twin.modules() if any(each is parent for each in m.modules())]
    layers = nn.ModuleList(own)
    setattr(parent, name, layers)
    # What holds the layers may have lists with an entry for each, what is in them tables by place.
    for module in around:
        for attribute, value in _own(module, (list, tuple, dict, int)):
            counts = type(value) is int and value == total and "layer" in attribute
            setattr(module, attribute, len(kept) if counts else _cut(value, kept, total))
    for module in layers.modules():
        for attribute, value in _own(module, (dict,)):
            setattr(module, attribute, _cut(value, kept, total))
    cut_config(twin.config.get_text_config(), kept)


def _own(module: nn.Module, kinds: tuple[type, ...]) -> list[tuple[str, Any]]:
    """List what a module holds of some kinds, but for what is torch's."""
    own = vars(module).items()
    return [(name, v) for name, v in own if isinstance(v, kinds) and not name.startswith("_")]


def _places(layers: nn.ModuleList) -> dict[tuple[str, str], set[int]]:
    """Find where layers hold their places: path of a module and attribute → which layers do.

    A place is a number that is, wherever the layers have it, the layer's own index.
    """
    found: defaultdict[tuple[str, str], dict[int, int]] = defaultdict(dict)
    for index, layer in enumerate(layers):
        for path, module in layer.named_modules():
            for attribute, value in vars(module).items():
                if type(value) is int:
                    found[path, attribute][index] = value
    return {
        (path, attribute): set(values)
        for (path, attribute), values in found.items()
        if all(index == value for index, value in values.items())
        and (len(values) > 1 or "layer" in attribute or "idx" in attribute)
    }


def _cut(value: Any, kept: Sequence[int], total: int) -> Any:
    """Cut what has one entry a layer, or places as its keys; anything else stays as it is."""
    if isinstance(value, (list, tuple)) and len(value) == total:
        return type(value)(value[index] for index in kept)
    if isinstance(value, dict) and value and all(key in range(total) for key in value):
        return type(value)((new, value[p]) for new, p in enumerate(kept) if p in value)
    return value


def cut_config(config: Any, kept: Sequence[int]) -> None:
    """Change a text model's configuration to describe only the kept layers, ascending."""
    total = config.num_hidden_layers
    computed = {
        name: _cut(value, kept, total)
        for name, value in _computed(config)
        if isinstance(value, (list, tuple)) and len(value) == total
    }
    for name, value in list(vars(config).items()):
        if name.startswith("_") or name == _LABELS:
            continue
        if name == FIRST and type(value) is int:
            setattr(config, name, sum(layer < value for layer in kept))
        elif "layer" in name and isinstance(value, list) and _are_places(value, total):
            setattr(config, name, [new for new, place in enumerate(kept) if place in value])
        else:
            setattr(config, name, _cut_entry(value, kept, total))
    config.num_hidden_layers = len(kept)
    if computed:
        # Computed by the class from how many layers there are, as if the last ones were removed.
        own = type(config)
        config.__class__ = type(own.__name__, (own,), {**computed, _CUT: class_of(config)})


def class_of(config: Any) -> type[Any]:
    """Say of which class a configuration is, as it is read from a file."""
    return getattr(type(config), _CUT, type(config))


def _cut_entry(value: Any, kept: Sequence[int], total: int) -> Any:
    """Cut a configuration's entry, and what is nested in it; rope's factors are not a layer's."""
    if isinstance(value, dict) and not any(type(key) is int for key in value):
        if "rope_type" in value:
            return value
        return {name: _cut_entry(item, kept, total) for name, item in value.items()}
    return _cut(value, kept, total)


def _are_places(value: Sequence[Any], total: int) -> bool:
    """Whether a list holds the numbers of some of the layers."""
    return (
        0 < len(value) <= total
        and all(type(place) is int and 0 <= place < total for place in value)
        and list(value) == sorted(set(value))
    )


def _computed(config: Any) -> Iterator[tuple[str, Any]]:
    """The properties of a configuration's class, with their values."""
    for kind in type(config).__mro__:
        for name, member in vars(kind).items():
            if isinstance(member, property) and not name.startswith("_"):
                try:
                    yield name, getattr(config, name)
                except Exception:  # noqa: BLE001 - a property of transformers that is not for us
                    continue


def _again(times: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Let a layer run again on what it returned, so many times in all."""
    for _ in range(times - 1):
        output = call_with(module.forward, first_of(output), args, kwargs)
    return output


@torch.no_grad()
def remember(model: nn.Module, attributes: Collection[str] | None = None) -> State:
    """Take down what a call might change: tensors, and the numbers and words of modules.

    (path of a module, attribute) → a copy of its value. `attributes` names which; None = all, for a
    model that is small.
    """
    found: State = {}
    for path, module in model.named_modules():
        for name, value in {**vars(module), **module._parameters, **module._buffers}.items():
            if attributes is not None and name not in attributes:
                continue
            if isinstance(value, Tensor):
                found[path, name] = value.clone()
            elif isinstance(value, (bool, int, float, str)) or value is None:
                found[path, name] = value
        for name in attributes or ():
            if not hasattr(module, name):
                found[path, name] = _ABSENT
    return found


def changed(before: State, after: State) -> set[tuple[str, str]]:
    """Name what differs between two states of a model, or is not in both."""
    return {
        key
        for key in before.keys() | after.keys()
        if key not in before or key not in after or not same(before[key], after[key])
    }


def same(one: Any, other: Any) -> bool:
    """Whether two values of a module are the same; of tensors without numbers, their shapes."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.is_meta or other.is_meta:
            return one.shape == other.shape
        return torch.equal(one, other)
    try:
        return type(one) is type(other) and bool(one == other)
    except RuntimeError:  # a list of tensors
        return False


@torch.no_grad()
def put_back(model: nn.Module, state: State) -> None:
    """Give a model's modules the values of `remember`; parameters among them are left alone."""
    modules = dict(model.named_modules())
    for (path, name), value in state.items():
        module = modules[path]
        if name in module._parameters:
            continue
        if value is _ABSENT:
            if hasattr(module, name):
                delattr(module, name)
            continue
        own = value.clone() if isinstance(value, Tensor) else value
        if name in module._buffers:
            module._buffers[name] = own
        else:
            object.__setattr__(module, name, own)
