"""Calls of modules: their arguments and outputs, and temporary replacements."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a call, positional and by keyword."""
_READ_ONLY: WeakSet[nn.Module] = WeakSet()
"""Layers that were seen not to write into their input."""


def state_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the residual stream among a layer's arguments."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def with_state(args: Sequence[Any], kwargs: Mapping[str, Any], state: Any) -> Arguments:
    """Return the arguments of a layer with another residual stream."""
    if "hidden_states" in kwargs:
        return (*args,), {**kwargs, "hidden_states": state}
    return (state, *args[1:]), {**kwargs}


def call_with(
    forward: Callable[..., Any], state: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Call a layer's forward pass with another residual stream."""
    args, kwargs = with_state(args, kwargs, state)
    return forward(*args, **kwargs)


def first_of(output: Any) -> Any:
    """Return a module's output, or its first entry if there are several."""
    return output[0] if isinstance(output, (tuple, list)) else output


def with_first(output: Any, first: Any) -> Any:
    """Return a module's output with its first entry, or all of it, replaced."""
    if not isinstance(output, (tuple, list)):
        return first
    # A named tuple is not built from one sequence, unlike other tuples.
    make = getattr(type(output), "_make", type(output))
    return make((first, *output[1:]))


@contextmanager
def all_of(contexts: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter contexts in turn, and leave all of them on exit, including exit by an exception."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def shallow_copy(module: nn.Module, **state: Any) -> nn.Module:
    """Copy a module with other values of some attributes, sharing everything else."""
    twin = copy.copy(module)
    vars(twin).pop("forward", None)  # a replacement of the class's own
    vars(twin).update(state)
    return twin


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's forward pass until exit, including exit by an exception."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def silenced(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Silence sublayers until exit: they run, but add nothing to the residual stream."""
    return all_of(module.register_forward_hook(add_nothing, with_kwargs=True) for module in modules)


def add_nothing(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Return a sublayer's output with nothing added to the residual stream: a forward hook."""
    added = first_of(output)
    return with_first(output, nothing(module, args, kwargs, added, len(added)))


def nothing(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], like: Tensor, batch: int
) -> Tensor:
    """Return the output of a sublayer that adds nothing.

    Args:
        module: The sublayer.
        args: Positional arguments of its call.
        kwargs: Keyword arguments of its call.
        like: Its output for some of the batch, or another tensor of that shape.
        batch: Number of rows of the whole batch.

    Returns:
        The residual stream if the sublayer itself adds to it (as Bloom's do). Otherwise zeros, to
        which something may be added in place (Llama 4 adds the routed experts to the shared one).
    """
    names = _parameters(type(module).forward)
    if "residual" in names:
        residual: Tensor = (dict(zip(names, args, strict=False)) | dict(kwargs))["residual"]
        return residual
    return like.new_zeros((batch, *like.shape[1:]))


@cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """List the names of a method's parameters without `self`."""
    return tuple(inspect.signature(function).parameters)[1:]


def returning(layer: nn.Module, make: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
    """Make a layer return a function of its input until the handles are removed; it still runs."""
    states: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = state_of(args, kwargs)
        # Cloned, since the layer may write into it.
        states[:] = [state.clone() if isinstance(state, Tensor) else state]

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return with_first(output, make(states.pop()))

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
    ]


def protected(layer: nn.Module, state: Tensor) -> Tensor:
    """Return a layer's input, or a copy as long as the layer may write into it (`x += f(x)`)."""
    return state if layer in _READ_ONLY else state.clone()


def learn_writes(layer: nn.Module, copied: Tensor, state: Tensor) -> None:
    """Record that a layer wrote nothing into the copy of its input, if so."""
    if copied is not state and torch.equal(copied, state):
        _READ_ONLY.add(layer)


def call_protected(
    layer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Any]:
    """Call a layer's forward pass; return its original input and its output."""
    state: Tensor = state_of(args, kwargs)
    copied = protected(layer, state)
    output = call_with(forward, copied, args, kwargs)
    learn_writes(layer, copied, state)
    return state, output
