"""Read and change the arguments and outputs of module calls; replace modules temporarily."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from threading import RLock
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
CallArguments = tuple[Args, Kwargs]
"""The positional arguments and the keyword arguments of a call."""
TRANSFORMERS_LOCK = RLock()
"""Lock held while a model is loaded or built: transformers replaces functions of its classes then.

Without the lock, two threads could leave the replacements behind. Later models of the process would
have untied or uninitialised weights.
"""
_READ_ONLY_LAYERS: WeakSet[nn.Module] = WeakSet()
"""Layers that were observed not to write into their input."""


def input_state(args: Args, kwargs: Kwargs) -> Any:
    """Return the hidden state from the arguments of a layer's call."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def replace_state(args: Args, kwargs: Kwargs, state: Any) -> CallArguments:
    """Return the arguments of a layer's call with `state` in place of the hidden state."""
    if "hidden_states" in kwargs:
        return (*args,), {**kwargs, "hidden_states": state}
    return (state, *args[1:]), {**kwargs}


def call_with(forward: Callable[..., Any], state: Tensor, args: Args, kwargs: Kwargs) -> Any:
    """Call a layer's `forward` with `state` in place of the hidden state in its arguments."""
    args, kwargs = replace_state(args, kwargs, state)
    return forward(*args, **kwargs)


def first_output(output: Any) -> Any:
    """Return a module's output, or its first entry if the output is a tuple or a list."""
    return output[0] if isinstance(output, (tuple, list)) else output


def replace_first_output(output: Any, first: Any) -> Any:
    """Return a module's output with `first` in place of its first (or only) entry."""
    if not isinstance(output, (tuple, list)):
        return first
    # A named tuple is not built from one sequence, unlike other tuples.
    make_tuple = getattr(type(output), "_make", type(output))
    return make_tuple((first, *output[1:]))


@contextmanager
def enter_all(contexts: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter several contexts, and leave all of them on exit, even after an exception."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


def shallow_copy(module: nn.Module, **state: Any) -> nn.Module:
    """Copy a module and set some attributes of the copy to the values in `state`.

    The copy shares all other attributes with the module.
    """
    copied_module = copy.copy(module)
    vars(copied_module).pop("forward", None)  # a replacement of the class's own
    vars(copied_module).update(state)
    return copied_module


@contextmanager
def replaced_attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of an object, and restore their old values when the context exits."""
    originals = {name: getattr(owner, name) for name in values}
    try:
        for name, value in values.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in originals.items():
            setattr(owner, name, value)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace the `forward` method of one module until the context exits."""
    old_forward = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if old_forward is not None:
            module.forward = old_forward


def silenced_sublayers(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Make sublayers add nothing to the residual stream until the context exits."""
    return enter_all(m.register_forward_hook(silence_output, with_kwargs=True) for m in modules)


def silence_output(module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
    """Make a sublayer add nothing to the residual stream; a forward hook of the sublayer."""
    added = first_output(output)
    return replace_first_output(output, neutral_output(module, args, kwargs, added, len(added)))


def neutral_output(
    module: nn.Module, args: Args, kwargs: Kwargs, example: Tensor, n_rows: int
) -> Tensor:
    """Return a replacement for a sublayer's output that leaves the residual stream unchanged.

    Args:
        module: The sublayer.
        args: Positional arguments of the sublayer's call.
        kwargs: Keyword arguments of the sublayer's call.
        example: Output of the sublayer for some rows of the batch.
        n_rows: Number of rows in the batch.

    Returns:
        Zeros with the dtype and width of `example`, or the residual stream if the sublayer itself
        adds its output to the residual stream (as in Bloom).
    """
    names = _parameter_names(type(module).forward)
    if "residual" in names:
        residual: Tensor = (dict(zip(names, args, strict=False)) | dict(kwargs))["residual"]
        return residual
    return example.new_zeros((n_rows, *example.shape[1:]))


@cache
def _parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """List the names of a method's parameters without `self`."""
    return tuple(inspect.signature(function).parameters)[1:]


def replace_output(layer: nn.Module, make: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
    """Make a layer return the result of `make(input)` instead of its output.

    Returns the handles of the installed hooks.
    """
    states: list[Tensor] = []

    def record_input(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        state = input_state(args, kwargs)
        # Cloned, since the layer may write into it.
        states[:] = [state.clone() if isinstance(state, Tensor) else state]

    def return_result(module: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        return replace_first_output(output, make(states.pop()))

    return [
        layer.register_forward_pre_hook(record_input, with_kwargs=True),
        layer.register_forward_hook(return_result, with_kwargs=True),
    ]


def protect_input(layer: nn.Module, state: Tensor) -> Tensor:
    """Copy a layer's input, unless `record_read_only` found that the layer does not change it."""
    return state if layer in _READ_ONLY_LAYERS else state.clone()


def record_read_only(layer: nn.Module, passed_state: Tensor, state: Tensor) -> None:
    """Record that a layer leaves its input unchanged, if a call has left a copy unchanged.

    `passed_state` is the input of the call, a copy of `state`. If the call was without a copy
    (`passed_state` is `state`), nothing is recorded.
    """
    if passed_state is not state and torch.equal(passed_state, state):
        _READ_ONLY_LAYERS.add(layer)


def call_protected(
    layer: nn.Module, forward: Callable[..., Any], args: Args, kwargs: Kwargs
) -> tuple[Tensor, Any]:
    """Call a layer on a copy of its input; return the unchanged input, and the output."""
    state: Tensor = input_state(args, kwargs)
    passed_state = protect_input(layer, state)
    output = call_with(forward, passed_state, args, kwargs)
    record_read_only(layer, passed_state, state)
    return state, output
