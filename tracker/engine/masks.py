"""The attention masks of a row: a token sees its ancestors, as far as its layer lets it.

How far that is, each layer's window or chunk, is not read from the configuration: the model is
given a plain text, and each layer's own mask is looked at as it arrives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracker.engine.refusal import RefusalError
from tracker.engine.rows import Row
from tracker.models.sublayers import replaced_forward

ARGUMENT = "attention_mask"


@dataclass(frozen=True)
class Sight:
    """How far each layer sees.

    Attributes:
        tokens: Up to which length of text this is known.
        first: For each layer the first position that each position sees [tokens]; None where it
            sees all before it, or where the model gives the layer no such mask.
    """

    tokens: int
    first: tuple[Tensor | None, ...]


@torch.inference_mode()
def look(base: Any, layers: nn.ModuleList, tokens: int, device: torch.device) -> Sight:
    """See which mask a model gives to each of its layers for a plain text.

    The layers themselves do not run: each hands on what it got.

    Args:
        base: The model below its head.
        layers: Its decoder layers.
        tokens: The text's length.
        device: Where its inputs go.

    Returns:
        What they see.
    """
    shapes: dict[int, Any] = {}
    seen: list[Any] = [None] * len(layers)

    def noting(index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            shapes[index] = forward(*args, **kwargs)
            return shapes[index]

        return call

    def passing(index: int, shape: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            seen[index] = _given(layers[index], args, kwargs)
            if isinstance(shape, (tuple, list)):
                return type(shape)((hidden, *shape[1:]))
            return hidden

        return call

    def text(length: int) -> dict[str, Any]:
        return {"input_ids": torch.zeros(1, length, dtype=torch.long, device=device)}

    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(replaced_forward(layer, noting(index, layer.forward)))
        base(**text(2), use_cache=False)
    if len(shapes) < len(layers):
        raise RefusalError(f"only {len(shapes)} of its {len(layers)} layers run on plain text")
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(replaced_forward(layer, passing(index, shapes[index])))
        base(**text(tokens), use_cache=False)
    known: dict[int, Tensor | None] = {}
    return Sight(
        tokens,
        tuple(known.setdefault(id(mask), _first_seen(mask, tokens)) for mask in seen),
    )


def _given(layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The mask among a layer's arguments."""
    if ARGUMENT in kwargs:
        return kwargs[ARGUMENT]
    place = mask_place(layer)
    return args[place] if place is not None and place < len(args) else None


def mask_place(layer: nn.Module) -> int | None:
    """Say which positional argument of a layer is its mask; None where it takes none.

    Args:
        layer: A decoder layer.

    Returns:
        The place, 0-based, `self` not counted.
    """
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    return names.index(ARGUMENT) if ARGUMENT in names else None


def _first_seen(mask: Any, tokens: int) -> Tensor | None:
    """Reduce a causal mask in which each token sees an unbroken stretch to where that begins."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2:] != (tokens, tokens):
        return None
    shown = mask[0, 0].cpu()
    if shown.dtype != torch.bool:
        if ((shown != 0) & (shown > -1e4)).any():
            raise RefusalError("its attention masks say more than which token is seen")
        shown = shown == 0
    first = shown.int().argmax(-1)
    places = torch.arange(tokens)
    stretch = (places[None, :] >= first[:, None]) & (places[None, :] <= places[:, None])
    if not torch.equal(shown, stretch):
        raise RefusalError("a token sees others than an unbroken stretch before it")
    return first if first.any() else None


class Masks:
    """The masks of one row, one for each kind of layer.

    Args:
        row: The row; without `ancestors` it needs none.
        sight: How far each layer sees, at least as far as the row is deep.
        dtype: The model's numbers.
        device: Where the masks go.
    """

    def __init__(self, row: Row, sight: Sight, dtype: torch.dtype, device: torch.device) -> None:
        assert row.ancestors is not None
        depth = row.positions[0]
        before = torch.ones(len(row.ancestors), row.prefix, dtype=torch.bool)
        ancestors = torch.cat([before, row.ancestors], dim=1)
        places = torch.cat([torch.arange(row.prefix), depth])
        made: dict[bytes | None, Tensor] = {}
        self._of_layer = []
        for first in sight.first:
            key = None if first is None else first.numpy().tobytes()
            if key not in made:
                seen = ancestors
                if first is not None:
                    seen = ancestors & (places[None, :] >= first[depth][:, None])
                mask = torch.zeros(seen.shape, dtype=dtype)
                mask.masked_fill_(~seen, torch.finfo(dtype).min)
                made[key] = mask[None, None].to(device)
            self._of_layer.append(made[key])

    def put(
        self, layer: int, place: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give a layer its mask in place of the one that the model made.

        Args:
            layer: The layer.
            place: `mask_place` of it.
            args: Its arguments.
            kwargs: Its arguments by name.

        Returns:
            Both, with the mask.
        """
        mask = self._of_layer[layer]
        if place is not None and place < len(args):
            return (*args[:place], mask, *args[place + 1 :]), kwargs
        if place is not None or ARGUMENT in kwargs:
            return args, {**kwargs, ARGUMENT: mask}
        return args, kwargs
