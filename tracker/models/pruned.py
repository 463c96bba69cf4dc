"""Really pruned models: copies without some layers, as a saved checkpoint would be.

The copy shares the weights and nothing else, so that it runs beside the model it was made of.

When a model is built from its configuration, a class may compute factors, windows and tables from a
layer's position or from the number of layers. A copy in memory keeps those of the whole model; a
saved and loaded one has them computed anew.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tracker.core.changes import Change
from tracker.core.errors import ModelError, attempt, first_line
from tracker.models.hooks import call_with, first_of, returning
from tracker.models.layers import find_layers, owner

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

State = dict[tuple[str, str], Any]
"""(path of a module, attribute) → value."""
_ABSENT = "no such attribute"
"""Marker for an attribute that a module gets only when it is called."""
FIRST = "max_window_layers"
"""Qwen's number of first layers with full attention; no shape depends on it."""
_CUT = "_cut_from"
"""Attribute of a cut configuration's class that holds the original class."""
_LABELS = "id2label"
"""A configuration's table of a classifier's labels, whose keys are no layers."""
SMALL = 4096
"""Elements up to which a buffer is copied: rotary frequencies, which some models change in a call.
Larger ones are masks and the like, which copies share."""


def pruned(
    model: PreTrainedModel,
    removed: Collection[int] = (),
    fresh: State | None = None,
    stay: bool = False,
    changes: Iterable[tuple[int, Callable[[nn.Module], object]]] = (),
    repeated: Sequence[Change] = (),
) -> Any:
    """Copy a model without some of its layers, or with some of them repeated, all re-indexed.

    Data of layers are found by structure: a list in the configuration with one entry per layer, a
    number in each layer that is the layer's own index, a table whose keys are layer indices.

    Args:
        model: A causal language model of transformers.
        removed: The layers to remove, 0-based.
        fresh: Values that the copy gets in place of the model's, including parameters.
        stay: Whether the layers stay in place and pass on their input, for a model that cannot be
            cut.
        changes: Functions that change the copies of some layers, with the layers' indices in the
            model.
        repeated: Spans of layers that occur several times in the copy, one behind another.

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
    """List the layers of a copy by their original indices, in order; repeat repeated ones."""
    kept: list[int] = []
    for index in range(total):
        kept += [index] if index not in removed else []
        for stretch in repeated:
            if stretch.stop == index + 1:
                kept += [*stretch.layers] * (stretch.repeats - 1)
    return kept


def _shared(model: PreTrainedModel) -> Iterator[Any]:
    """Yield all that a copy shares with the model: weights, large buffers, weights on disk."""
    for module in model.modules():
        yield from (held for held in module._parameters.values() if held is not None)
        buffers = module._buffers.values()
        yield from (held for held in buffers if held is not None and held.numel() > SMALL)
        # Attributes of accelerate, for a model that is spread over devices.
        hook = getattr(module, "_hf_hook", None)
        for name in ("weights_map", "tied_params_map"):
            held = getattr(hook, name, None)
            if held is not None:
                yield held


def _take_out(twin: PreTrainedModel, layers: nn.ModuleList, kept: Sequence[int]) -> None:
    """Leave only the kept layers in a copy that has no other users; one may be kept twice."""
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
    setattr(parent, name, nn.ModuleList())  # only modules around the layers remain
    around = [m for m in twin.modules() if any(each is parent for each in m.modules())]
    layers = nn.ModuleList(own)
    setattr(parent, name, layers)
    # Modules around the layers may have lists with an entry per layer, and tables by index.
    for module in around:
        for attribute, value in _own(module, (list, tuple, dict, int)):
            counts = type(value) is int and value == total and "layer" in attribute
            setattr(module, attribute, len(kept) if counts else _cut(value, kept, total))
    for module in layers.modules():
        for attribute, value in _own(module, (dict,)):
            setattr(module, attribute, _cut(value, kept, total))
    cut_config(twin.config.get_text_config(), kept)


def _own(module: nn.Module, kinds: tuple[type, ...]) -> list[tuple[str, Any]]:
    """List a module's attributes of some types, without those of torch."""
    own = vars(module).items()
    return [(name, v) for name, v in own if isinstance(v, kinds) and not name.startswith("_")]


def _places(layers: nn.ModuleList) -> dict[tuple[str, str], set[int]]:
    """Find attributes of layers that hold the layer's index: path and attribute → layers.

    An attribute holds the index if it equals it in every layer that has the attribute.
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
    """Cut values with one entry per layer or layer indices as keys; return others unchanged."""
    if isinstance(value, (list, tuple)) and len(value) == total:
        return type(value)(value[index] for index in kept)
    if isinstance(value, dict) and value and all(key in range(total) for key in value):
        return type(value)((new, value[p]) for new, p in enumerate(kept) if p in value)
    return value


def cut_config(config: PreTrainedConfig, kept: Sequence[int]) -> None:
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
        # The class computes it from the number of layers, as if the last ones were removed.
        own = type(config)
        config.__class__ = type(own.__name__, (own,), {**computed, _CUT: class_of(config)})


def class_of(config: PreTrainedConfig) -> type[Any]:
    """Return the class of a configuration as it is read from a file."""
    return getattr(type(config), _CUT, type(config))


def _cut_entry(value: Any, kept: Sequence[int], total: int) -> Any:
    """Cut an entry of a configuration and its nested values; rope factors are not per layer."""
    if isinstance(value, dict) and not any(type(key) is int for key in value):
        if "rope_type" in value:
            return value
        return {name: _cut_entry(item, kept, total) for name, item in value.items()}
    return _cut(value, kept, total)


def _are_places(value: Sequence[Any], total: int) -> bool:
    """Return whether a list holds the indices of some of the layers."""
    return (
        0 < len(value) <= total
        and all(type(place) is int and 0 <= place < total for place in value)
        and list(value) == sorted(set(value))
    )


def _computed(config: PreTrainedConfig) -> Iterator[tuple[str, Any]]:
    """Yield the properties of a configuration's class with their values."""
    for kind in type(config).__mro__:
        for name, member in vars(kind).items():
            if isinstance(member, property) and not name.startswith("_"):
                value = attempt(partial(getattr, config, name))
                if not isinstance(value, Exception):  # some do not apply to this kind of model
                    yield name, value


def _again(
    times: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Run a layer again on its output, `times` times in all."""
    for _ in range(times - 1):
        output = call_with(module.forward, first_of(output), args, kwargs)
    return output


@torch.no_grad()
def remember(model: nn.Module, attributes: Collection[str] | None = None) -> State:
    """Record what a call might change: tensors, and the numbers and strings of modules.

    Returns (path of a module, attribute) → a copy of its value. `attributes` selects attributes by
    name; None = all, for a small model.
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
    """Return the keys whose values differ between two states of a model, or are in only one."""
    return {
        key
        for key in before.keys() | after.keys()
        if key not in before or key not in after or not same(before[key], after[key])
    }


def same(one: object, other: object) -> bool:
    """Return whether two values of a module are equal; tensors on the meta device by shape."""
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
    """Restore the values of `remember` in a model's modules, except parameters."""
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


Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor of a checkpoint, by its name."""
_COUNTS = ("layer", "dense", "block")
"""Words in the names of numbers that may count the first layers of a kind."""
_TORCHS = frozenset(vars(nn.Module())) | {"config"}
"""Attributes that every module has, and no class computes."""
_HOW = ("_attn_implementation_internal", "_experts_implementation_internal")
"""Attributes that select kernels, which no file holds; they are chosen on loading."""


Lacking = tuple[nn.Module, str, Any]
"""A module of a copy, and an attribute that it would have if it were loaded."""


def as_made(model: PreTrainedModel) -> Any:
    """Build a model from its configuration as read from a file, without its weights.

    Raises ModelError if its class cannot.
    """
    return _made(model, range(len(find_layers(model))), shapes(model))


def reloaded(
    twin: PreTrainedModel, kept: Sequence[int], known: dict[str, Any] | None = None
) -> Any:
    """Build the model that loading a saved copy without some layers would give.

    Args:
        twin: The copy, as of `pruned`; numbers in its configuration that count the first layers of
            a kind are set for the remaining layers.
        kept: The indices of its layers in the original model.
        known: Models built from configurations before, which calls must not change. If it is None,
            the model gets its own weights, since calls may change them.

    Returns:
        The class's model of the configuration, read from a file, with the copy's weights. A model
        in `known` is reused and gets these weights.

    Raises:
        ModelError: No such model can be built; the message gives the reason.
    """
    again = _made(twin, kept, shapes(twin), known)
    its = dict(twin.named_modules())
    if not {place for place, _ in again.named_modules()} <= its.keys():
        # Added by a call, as in BigBird.
        raise ModelError("its class makes it of other parts than it has")
    for place, module in again.named_modules():
        for kind in ("_parameters", "_buffers"):
            held, own = (vars(each)[kind] for each in (module, its[place]))
            for name in held.keys() - module._non_persistent_buffers_set:
                value = own[name]
                held[name] = value.clone() if value is not None and known is None else value
    return again.to(twin.device)


def as_loaded(model: PreTrainedModel, twin: PreTrainedModel, kept: Sequence[int]) -> None:
    """Give a copy without some layers the values that its class would compute on loading.

    Numbers in its configuration that count the first layers of a kind are set for the remaining
    layers.

    Args:
        model: The original model.
        twin: The copy, as of `pruned`.
        kept: The indices of its layers in the original model.

    Raises:
        ModelError: No such model can be built; the message gives the reason. The copy is unchanged.
    """
    if list(kept) == list(range(len(find_layers(model)))):
        return
    # For a quantised model the class builds one that is not; both must only be built alike.
    whole = _made(model, kept, None)
    cut = _made(twin, kept, dict(_moved(shapes(whole), _prefix(model), kept)))
    for module, name, value in lacking(model, whole, twin, cut, kept):
        setattr(module, name, value)
    for config in (twin.config, twin.config.get_text_config()):
        config.__class__ = class_of(config)


def lacking(
    model: PreTrainedModel,
    whole: PreTrainedModel,
    twin: PreTrainedModel,
    cut: PreTrainedConfig,
    kept: Sequence[int],
) -> list[Lacking]:
    """List the attributes of a copy that would differ if it were saved and loaded.

    Args:
        model: The original model.
        whole: Model built from the original configuration.
        twin: The copy.
        cut: Model built from the copy's configuration.
        kept: The indices of the copy's layers in the original model.

    Returns:
        Numbers and the like, and tables that no file holds.
    """
    prefix = _prefix(model)
    was = dict(_moved(dict(model.named_modules()), prefix, kept))
    computed = dict(_moved(dict(whole.named_modules()), prefix, kept))
    its = dict(twin.named_modules())
    found: list[Lacking] = []
    # Lists of another length (Granite's rotary tables, one per theta) are not read by index.
    lists = {
        f"{place}."
        for place, anew in cut.named_modules()
        if isinstance(anew, nn.ModuleList) and len(anew) != len(its.get(place, anew))
    }
    for place, anew in cut.named_modules():
        # Another class means a packed weight, or one with an adapter.
        if isinstance(anew, nn.Linear) or place.startswith(tuple(lists)):
            continue  # a linear map has only its shape
        if place in was and place in its and its[place].__class__ is anew.__class__:
            found += _lacking(its[place], was[place], computed[place], anew)
    return found


def _prefix(model: PreTrainedModel) -> str:
    """Return the common prefix of the names of all that belongs to layers."""
    parent, name = owner(model, find_layers(model))
    path = next(path for path, module in model.named_modules() if module is parent)
    return f"{path}.{name}." if path else f"{name}."


def _moved(each: Mapping[str, Any], prefix: str, kept: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """Yield items under the names that they have in a copy, by its layer indices."""
    for name, value in each.items():
        place, dot, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix):
            yield name, value
            continue
        for new, old in enumerate(kept):
            if old == int(place):
                yield f"{prefix}{new}{dot}{rest}", value


def _lacking(
    own: nn.Module, was: nn.Module, computed: nn.Module, anew: nn.Module
) -> Iterator[Lacking]:
    """Yield attributes that a module's class computes anew, or that a copy changed by itself."""
    for name, value in vars(anew).items():
        if name in _TORCHS or not _is_plain(value):
            continue
        mine = vars(own).get(name)
        as_before = same(value, vars(computed).get(name)) and same(mine, vars(was).get(name))
        if not as_before and not same(mine, value):
            yield own, name, copy.deepcopy(value)
    for name in anew._non_persistent_buffers_set:
        value, before, mine = (each._buffers.get(name) for each in (anew, computed, own))
        if value is not None and mine is not None and not same(value, before):
            value = value.to(mine.device, mine.dtype)
            if not same(mine, value):
                yield own, name, value


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Enum, torch.dtype, Tensor))


def _made(
    model: PreTrainedModel,
    kept: Sequence[int],
    wanted: Shapes | None,
    known: dict[str, Any] | None = None,
) -> Any:
    """Build a model of another's class and configuration with tensors of the wanted shapes.

    Raises ModelError if there is none. Numbers that count layers are tried for the kept ones too;
    if that helps, the configuration keeps them.
    """
    config = model.config.get_text_config()
    first = None
    for counts in chain([{}], counted(config, kept)):
        before = {name: getattr(config, name) for name in counts}
        vars(config).update(counts)
        made = attempt(partial(_fresh_once, model, known))
        if isinstance(made, Exception):  # a class may refuse a number of layers
            why: str | None = first_line(made)
        else:
            why = None if wanted is None else misfit(shapes(made), wanted)
        if why is None:
            return made
        vars(config).update(before)
        first = first or why
    raise ModelError(first or "")


def _fresh_once(model: PreTrainedModel, known: dict[str, Any] | None) -> Any:
    """Build a model of another's class and configuration, or reuse the one in `known`."""
    key = "" if known is None else model.config.to_json_string()
    made = (known or {}).get(key) or _fresh(type(model), model.config, model.dtype)
    if known is not None:
        known[key] = made
    return made


def counted(config: PreTrainedConfig, kept: Sequence[int]) -> Iterator[dict[str, int]]:
    """Yield numbers that count the first layers of a kind, for the kept layers: single, and all.

    An example is `first_k_dense_replace`: the number of first layers without experts.
    """
    total = len(kept)
    changed = {}
    for name, value in vars(config).items():
        # `FIRST` is already set for the kept layers.
        counts = any(word in name for word in _COUNTS) and "hidden_layers" not in name
        if counts and name != FIRST and type(value) is int and value > 0 and value != total:
            left = sum(layer < value for layer in kept)
            if left != value:
                changed[name] = left
    for name, left in changed.items():
        yield {name: left}
    if len(changed) > 1:
        yield changed


def _fresh(kind: type, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """Build a model from a configuration as read from a file; its weights are uninitialised."""
    from transformers.initialization import no_init_weights
    from transformers.modeling_utils import local_torch_dtype

    again = _reread(config)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), no_init_weights():
        warnings.simplefilter("ignore")
        # Tables wider than those that a file's loader computes would differ.
        usual = torch.float32 if dtype == torch.float64 else dtype
        with local_torch_dtype(usual), torch.device("cpu"):
            made = kind(again).eval()
    return made.double() if dtype == torch.float64 else made


def _reread(config: PreTrainedConfig) -> Any:
    """Save a configuration to a file and read it back."""
    with TemporaryDirectory() as folder:
        config.to_json_file(Path(folder) / "config.json")
        again = class_of(config).from_pretrained(folder)
    _compute_alike(config, again)
    return again


def _compute_alike(config: PreTrainedConfig, again: PreTrainedConfig) -> None:
    for name, value in vars(config).items():
        if name in _HOW:
            vars(again)[name] = value
        elif hasattr(value, "to_json_file") and name in vars(again):
            _compute_alike(value, vars(again)[name])


def shapes(model: PreTrainedModel) -> Shapes:
    """Return the shapes of the tensors that a checkpoint of a model holds."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def misfit(found: Shapes, wanted: Shapes) -> str | None:
    """Describe the first tensor that differs between a configuration's model and the wanted one."""
    for name in sorted(found.keys() | wanted.keys()):
        if name not in wanted:
            return f"it asks for {name}, which is not left"
        if name not in found:
            return f"it has no place for {name}"
        if found[name] != wanted[name]:
            return f"{name} is {list(wanted[name])}, and it says {list(found[name])}"
    return None
