"""Finding the two sublayers of a decoder layer by structure, and proving that they are the two."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tracker.core.errors import CellError, ModelError

T = TypeVar("T")
TOKENS = 6
"""Length of the text that the proof runs on."""


@dataclass(frozen=True)
class Sublayers:
    """The modules whose outputs a layer adds to the residual stream.

    Attributes:
        attention: Mixes tokens.
        mlp: Works on each token alone; the last of its modules where it is not one.
    """

    attention: nn.Module
    mlp: nn.Module


def find_sublayers(
    model: Any, layers: nn.ModuleList, device: torch.device | None = None
) -> list[Sublayers]:
    """Find the attention and the MLP of every layer.

    They are the first and the last child that holds a matrix. That is then proven on a short text:
    without both, every layer returns its input; without attention anywhere, no token sees another;
    without MLPs they still do.

    Args:
        model: A causal language model of transformers.
        layers: Its decoder layers.
        device: Where its inputs go; None = where its weights are.

    Returns:
        One pair a layer.

    Raises:
        ModelError: The layers are not built of two such sublayers; says what was found.
    """
    found = []
    for layer in layers:
        parts = [part for part in layer.children() if any(p.ndim > 1 for p in part.parameters())]
        if len(parts) < 2:
            raise _unknown(model, layer, "there are no two parts with matrices")
        found.append(Sublayers(parts[0], parts[-1]))
    _prove(model, layers, found, device or model.device)
    return found


def read_a_text(model: Any, tokens: int, device: torch.device, what: str, components: str) -> None:
    """Let a model read a short text, while hooks look for parts of its layers.

    Args:
        model: A causal language model of transformers.
        tokens: Length of the text.
        device: Where its inputs go.
        what: What is looked for.
        components: What to leave out where it cannot be found.

    Raises:
        ModelError: The model does not take it.
    """
    try:
        model(torch.arange(1, tokens + 1, device=device)[None], use_cache=False)
    except Exception as error:
        raise ModelError(
            f"{type(model).__name__}: its {what} cannot be told apart ({error}); leave "
            f"{components} out of 'component'"
        ) from error


def part_at(
    found: Sequence[T | None], layer: int, name: str, what: str, components: str, needs: str = ""
) -> T:
    """Give what was found of a layer's parts; CellError where it has none.

    Args:
        found: One entry a layer.
        layer: Which layer.
        name: What the model, or the layer, is called.
        what: What the parts are.
        components: What to leave out where no layer has any.
        needs: What a layer must have, or do, for its parts to be found.

    Returns:
        The entry.
    """
    part = found[layer]
    if part is not None:
        return part
    alike = [str(place) for place, each in enumerate(found) if each is None]
    why = f"no {what} that could be taken out alone{needs and f' (needed: {needs})'}"
    if len(alike) == len(found):
        raise CellError(f"{name} has {why}; leave {components} out of 'component'")
    raise CellError(
        f"layer {layer} of {name} has {why}; leave such layers out of 'layer': {', '.join(alike)}"
    )


@contextmanager
def all_of(contexts: Iterable[AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter contexts in turn, and leave all of them on exit, also by an exception."""
    with ExitStack() as stack:
        for each in contexts:
            stack.enter_context(each)
        yield


def silenced(modules: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Let attentions or MLPs add nothing to the residual stream for a while; they still run."""
    return all_of(module.register_forward_hook(add_nothing, with_kwargs=True) for module in modules)


def add_nothing(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Hook by which a sublayer, which still runs, adds nothing to the residual stream."""
    added = first_of(output)
    return with_first(output, nothing(module, args, kwargs, added, len(added)))


def first_of(output: Any) -> Any:
    """Give what a module returned, alone or before others."""
    return output[0] if isinstance(output, (tuple, list)) else output


def state_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Give the residual stream that a layer is called with."""
    return kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


def call_with(
    forward: Callable[..., Any], state: Tensor, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """Call a layer's forward pass with another residual stream than it was called with."""
    if "hidden_states" in kwargs:
        return forward(*args, **{**kwargs, "hidden_states": state})
    return forward(state, *args[1:], **kwargs)


def with_first(output: Any, first: Any) -> Any:
    """Give what a module returned, alone or before others, with something else in its place."""
    if not isinstance(output, (tuple, list)):
        return first
    # A named tuple is not made of one sequence, as others are.
    make = getattr(type(output), "_make", type(output))
    return make((first, *output[1:]))


def returning(layer: nn.Module, make: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
    """Let a layer, which still runs, return what is made of its input; the handles end it."""
    given: list[Tensor] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        state = state_of(args, kwargs)
        # Cloned, since the layer may write into it.
        given[:] = [state.clone() if isinstance(state, Tensor) else state]

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        return with_first(output, make(given.pop()))

    return [
        layer.register_forward_pre_hook(before, with_kwargs=True),
        layer.register_forward_hook(after, with_kwargs=True),
    ]


_READING: WeakSet[nn.Module] = WeakSet()
"""Layers that were seen to write nothing into their input."""


def lent(layer: nn.Module, state: Tensor) -> Tensor:
    """Give a layer its input, or a copy for as long as it may write into it (`x += f(x)`)."""
    return state if layer in _READING else state.clone()


def returned(layer: nn.Module, given: Tensor, state: Tensor) -> None:
    """Look whether a layer wrote into what `lent` gave it; if not, that is known from now on."""
    if given is not state and torch.equal(given, state):
        _READING.add(layer)


def undisturbed(
    layer: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Any]:
    """Call a layer's forward pass; its input as it was before, and what it returns."""
    state: Tensor = state_of(args, kwargs)
    given = lent(layer, state)
    output = call_with(forward, given, args, kwargs)
    returned(layer, given, state)
    return state, output


def nothing(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], like: Tensor, batch: int
) -> Tensor:
    """Give what a sublayer returns when it adds nothing.

    Args:
        module: The sublayer.
        args: What it was called with.
        kwargs: What it was called with by name.
        like: What it returned for some of the batch, or another tensor of that shape.
        batch: The rows of the whole batch.

    Returns:
        The residual stream where the sublayer itself adds to it (Bloom's do); elsewhere zeros, to
        which something may be added in place (Llama 4 adds the routed experts to the shared one).
    """
    names = _parameters(type(module).forward)
    if "residual" in names:
        residual: Tensor = (dict(zip(names, args, strict=False)) | dict(kwargs))["residual"]
        return residual
    return like.new_zeros((batch, *like.shape[1:]))


@cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Names of a method's parameters, `self` left out."""
    return tuple(inspect.signature(function).parameters)[1:]


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let another function be a module's forward pass until exit, also by an exception."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


@torch.inference_mode()
def _prove(
    model: Any, layers: nn.ModuleList, found: Sequence[Sublayers], device: torch.device
) -> None:
    attention = [parts.attention for parts in found]
    mlp = [parts.mlp for parts in found]
    text = torch.arange(1, TOKENS + 1, device=device)[None]
    other = text.clone()
    other[0, 0] += 1
    unchanged: list[bool] = []

    def comparing(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        # Not `undisturbed`: with its parts silent a layer that writes seems to read only.
        before = state_of(args, kwargs).clone()
        output = forward(*args, **kwargs)
        unchanged.append(torch.equal(before, first_of(output).to(before.device)))
        return output

    compared = (replaced_forward(layer, partial(comparing, layer.forward)) for layer in layers)
    with silenced([*attention, *mlp]), all_of(compared):
        model(text, use_cache=False)
    if not all(unchanged):
        layer = layers[unchanged.index(False)]
        raise _unknown(model, layer, "without both its first and last part it changes its input")

    def seen() -> Tensor:
        """How much the last token says otherwise where the first one is another."""
        one, two = (model(ids, use_cache=False).logits[0, -1] for ids in (text, other))
        distance: Tensor = (one - two).norm()
        return distance

    # Experts see their tokens in other company, so equal inputs may differ by rounding.
    rounding = 1e-2 * seen()

    with silenced(attention):
        if seen() > rounding:
            raise _unknown(model, layers[0], "its first part is not all that mixes tokens")
    with silenced(mlp):
        if not seen() > rounding:
            raise _unknown(model, layers[0], "its first part does not mix tokens")


def _unknown(model: Any, layer: nn.Module, why: str) -> ModelError:
    parts = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
    return ModelError(
        f"{type(model).__name__}: attention and MLP of {type(layer).__name__} cannot be told "
        f"apart, {why}; its parts: {parts}. Use component: {{value: layer}}"
    )
