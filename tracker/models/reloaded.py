"""What a model is once it is saved and loaded again: its class computes what no file holds.

From a layer's place, or from how many layers there are, a class may compute factors, windows and
tables when a model is made of its configuration. A copy in memory has them as they were in the
whole model; what is loaded has them anew.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from tracker.core.errors import ModelError, first_line
from tracker.models.layers import find_layers, owner
from tracker.models.pruned import FIRST, class_of, same

Shapes = Mapping[str, tuple[int, ...]]
"""Of each tensor of a checkpoint, by its name."""
_COUNTS = ("layer", "dense", "block")
"""Words in the names of numbers that may count the first layers of a kind."""
_TORCHS = frozenset(vars(nn.Module())) | {"config"}
"""What every module has, and no class computes."""
_HOW = ("_attn_implementation_internal", "_experts_implementation_internal")
"""By which kernels a model is computed, which no file holds and whoever loads it says."""


Lacking = tuple[nn.Module, str, Any]
"""A module of a copy, and an attribute that it would have if it were loaded."""


def as_made(model: Any) -> Any:
    """Make a model anew of its configuration, as that is read from a file, without its weights.

    ModelError where its class cannot.
    """
    return _made(model, range(len(find_layers(model))), shapes(model))


def reloaded(twin: Any, kept: Sequence[int], known: dict[str, Any] | None = None) -> Any:
    """Make what is loaded of a copy that lacks layers once it is saved.

    Args:
        twin: The copy, as of `pruned`; its configuration gets the numbers that count the first
            layers of a kind as of what is left.
        kept: The layers that it has, by their places in the model.
        known: What was made of configurations before, which calls must not change. Where it is
            None, the model gets weights of its own, since calls may change them.

    Returns:
        What its class makes of its configuration, read from a file, with the copy's weights; where
        it was known, what was returned before has them now.

    Raises:
        ModelError: No such model can be made; says why.
    """
    again = _made(twin, kept, shapes(twin), known)
    its = dict(twin.named_modules())
    if not {place for place, _ in again.named_modules()} <= its.keys():
        # Since a call, as BigBird.
        raise ModelError("its class makes it of other parts than it has")
    for place, module in again.named_modules():
        for kind in ("_parameters", "_buffers"):
            held, own = (vars(each)[kind] for each in (module, its[place]))
            for name in held.keys() - module._non_persistent_buffers_set:
                value = own[name]
                held[name] = value.clone() if value is not None and known is None else value
    return again.to(twin.device)


def as_loaded(model: Any, twin: Any, kept: Sequence[int]) -> None:
    """Give a copy that lacks layers what its class would compute if it were saved and loaded.

    Its configuration gets the numbers that count the first layers of a kind as of what is left.

    Args:
        model: The model that it is a copy of.
        twin: The copy, as of `pruned`.
        kept: The layers that it has, by their places in the model.

    Raises:
        ModelError: No such model can be made; says why. The copy is as it was.
    """
    if list(kept) == list(range(len(find_layers(model)))):
        return
    # Of a quantised model the class makes one that is not: what counts is that both are alike.
    whole = _made(model, kept, None)
    cut = _made(twin, kept, dict(_moved(shapes(whole), _prefix(model), kept)))
    for module, name, value in lacking(model, whole, twin, cut, kept):
        setattr(module, name, value)
    for config in (twin.config, twin.config.get_text_config()):
        config.__class__ = class_of(config)


def lacking(model: Any, whole: Any, twin: Any, cut: Any, kept: Sequence[int]) -> list[Lacking]:
    """List what a copy would have otherwise if it were saved and loaded.

    Args:
        model: The model that it is a copy of.
        whole: What its class makes of the model's configuration,
        twin: The copy.
        cut: and what of the copy's.
        kept: The layers that it has, by their places in the model.

    Returns:
        Numbers and the like, and tables that no file holds.
    """
    prefix = _prefix(model)
    was = dict(_moved(dict(model.named_modules()), prefix, kept))
    computed = dict(_moved(dict(whole.named_modules()), prefix, kept))
    its = dict(twin.named_modules())
    found: list[Lacking] = []
    # A list of another length (Granite's rotary tables, one for each theta) is not read by places.
    lists = {
        f"{place}."
        for place, anew in cut.named_modules()
        if isinstance(anew, nn.ModuleList) and len(anew) != len(its.get(place, anew))
    }
    for place, anew in cut.named_modules():
        # Another class is a weight that is packed, or has an adapter.
        if isinstance(anew, nn.Linear) or place.startswith(tuple(lists)):
            continue  # all that a linear map has is its shape
        if place in was and place in its and its[place].__class__ is anew.__class__:
            found += _lacking(its[place], was[place], computed[place], anew)
    return found


def _prefix(model: Any) -> str:
    """What the names of all that belongs to layers begin with."""
    parent, name = owner(model, find_layers(model))
    path = next(path for path, module in model.named_modules() if module is parent)
    return f"{path}.{name}." if path else f"{name}."


def _moved(each: Mapping[str, Any], prefix: str, kept: Sequence[int]) -> Iterator[tuple[str, Any]]:
    """Name what belongs to layers by the places that these have in a copy."""
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
    """List what a module's class computes anew, or what a copy changed in it without that."""
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


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, Enum, torch.dtype, Tensor))


def _made(
    model: Any, kept: Sequence[int], wanted: Shapes | None, known: dict[str, Any] | None = None
) -> Any:
    """Make a model of another's class and configuration that holds tensors of the wanted shapes.

    ModelError where there is none. Numbers that count layers are tried as of the kept ones; where
    that helps, the configuration keeps them.
    """
    config = model.config.get_text_config()
    first = None
    for counts in chain([{}], counted(config, kept)):
        before = {name: getattr(config, name) for name in counts}
        vars(config).update(counts)
        try:
            key = "" if known is None else model.config.to_json_string()
            made = (known or {}).get(key) or _fresh(type(model), model.config, model.dtype)
            if known is not None:
                known[key] = made
            why = None if wanted is None else misfit(shapes(made), wanted)
        except Exception as error:  # noqa: BLE001  whatever a class says to a number of layers
            why = first_line(error)
        if why is None:
            return made
        vars(config).update(before)
        first = first or why
    raise ModelError(first or "")


def counted(config: Any, kept: Sequence[int]) -> Iterator[dict[str, int]]:
    """Numbers that count the first layers of a kind, as of the kept ones: each alone, and all.

    Such as `first_k_dense_replace`: the first so many layers have no experts.
    """
    total = len(kept)
    changed = {}
    for name, value in vars(config).items():
        # `FIRST` is counted anew already.
        counts = any(word in name for word in _COUNTS) and "hidden_layers" not in name
        if counts and name != FIRST and type(value) is int and value > 0 and value != total:
            left = sum(layer < value for layer in kept)
            if left != value:
                changed[name] = left
    for name, left in changed.items():
        yield {name: left}
    if len(changed) > 1:
        yield changed


def _fresh(kind: type, config: Any, dtype: torch.dtype) -> Any:
    """Make a model of a configuration as it is read from a file; its weights are nothing yet."""
    from transformers.initialization import no_init_weights
    from transformers.modeling_utils import local_torch_dtype

    again = _reread(config)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), no_init_weights():
        warnings.simplefilter("ignore")
        # Wider tables than a file's loader computes would be other ones.
        usual = torch.float32 if dtype == torch.float64 else dtype
        with local_torch_dtype(usual), torch.device("cpu"):
            made = kind(again).eval()
    return made.double() if dtype == torch.float64 else made


def _reread(config: Any) -> Any:
    """Read a configuration from the file that it is saved to."""
    with TemporaryDirectory() as folder:
        config.to_json_file(Path(folder) / "config.json")
        again = class_of(config).from_pretrained(folder)
    _compute_alike(config, again)
    return again


def _compute_alike(config: Any, again: Any) -> None:
    for name, value in vars(config).items():
        if name in _HOW:
            vars(again)[name] = value
        elif hasattr(value, "to_json_file") and name in vars(again):
            _compute_alike(value, vars(again)[name])


def shapes(model: Any) -> Shapes:
    """Look up the shapes of what a checkpoint of a model holds."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def misfit(found: Shapes, wanted: Shapes) -> str | None:
    """Say in what a model made of a configuration holds other tensors than are there."""
    for name in sorted(found.keys() | wanted.keys()):
        if name not in wanted:
            return f"it asks for {name}, which is not left"
        if name not in found:
            return f"it has no place for {name}"
        if found[name] != wanted[name]:
            return f"{name} is {list(wanted[name])}, and it says {list(found[name])}"
    return None
