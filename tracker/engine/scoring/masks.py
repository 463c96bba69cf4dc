"""Attention masks of a row: a token sees its ancestors, within its layer's window.

A layer's window or chunk is not read from the configuration: the model gets a plain text, and the
mask that arrives at each layer is examined.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.rows import Row
from tracker.models.hooks import all_of, replaced_forward, state_of, with_first

ARGUMENT = "attention_mask"


@dataclass(frozen=True)
class AttentionWindows:
    """The attention window of each layer, for texts up to a length.

    Attributes:
        tokens: The length of the text for which it was found.
        first: The first position that each position sees, for each layer [tokens], on the device
            of the masks, the same tensor for layers with equal windows. None where a position sees
            all before it, or where the model gives the layer no such mask.
    """

    tokens: int
    first: tuple[Tensor | None, ...]


@torch.inference_mode()
def attention_windows(
    base: PreTrainedModel, layers: nn.ModuleList, tokens: int, device: torch.device
) -> AttentionWindows:
    """Find the mask that a model gives to each of its layers for a plain text of some length.

    The layers themselves do not run: each passes on its hidden state, with the other outputs that
    it returned for two tokens, so that the model goes on. A layer gets a mask [1, 1, tokens,
    tokens], or none.
    """
    shapes: dict[int, Any] = {}
    seen: list[Any] = [None] * len(layers)

    def noting(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        shapes[index] = forward(*args, **kwargs)
        return shapes[index]

    def passing(index: int, layer: nn.Module) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[index] = _given(layer, args, kwargs)
            return with_first(shapes[index], state_of(args, kwargs))

        call.is_weightless = True  # type: ignore[attr-defined]
        return call

    def read(length: int, forwards: Callable[[int, nn.Module], Callable[..., Any]]) -> None:
        ids = torch.zeros(1, length, dtype=torch.long, device=device)
        with all_of(replaced_forward(layer, forwards(n, layer)) for n, layer in enumerate(layers)):
            base(input_ids=ids, use_cache=False)

    read(2, lambda index, layer: partial(noting, index, layer.forward))
    if len(shapes) < len(layers):
        raise RefusalError(f"only {len(shapes)} of its {len(layers)} layers run on plain text")
    read(tokens, passing)
    firsts = [first_seen(mask, tokens) for mask in seen]
    kinds = {first.numpy().tobytes(): first.to(device) for first in firsts if first is not None}
    return AttentionWindows(
        tokens, tuple(f if f is None else kinds[f.numpy().tobytes()] for f in firsts)
    )


def _given(layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return the mask among a layer's arguments."""
    if ARGUMENT in kwargs:
        return kwargs[ARGUMENT]
    position = mask_position(layer)
    return args[position] if position is not None and position < len(args) else None


def mask_position(layer: nn.Module) -> int | None:
    """Return the position of the mask among a layer's arguments; None if it takes none."""
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    return names.index(ARGUMENT) if ARGUMENT in names else None


def first_seen(mask: object, tokens: int) -> Tensor | None:
    """Reduce a causal mask with one contiguous range per token to the begin of each range.

    [1, 1, tokens, tokens] becomes [tokens]; None where every token sees all before it, or the layer
    has no such mask. Other masks (a bias, a gap) are refused: their equivalent for a tree is
    unknown.
    """
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
    """The masks of one row, [1, 1, tokens, prefix + tokens], one for each kind of layer.

    A row holds a tree of requests, flattened: node i is a token, and `row.ancestors[i, j]` is True
    if j is an ancestor of i. In place of the model's triangle, a layer gets a mask in which a node
    sees the kept prefix and its ancestors, itself included, and no sibling. For the node, that is
    exactly the text that ends with it, at the positions of that text. A layer with a window or
    chunks sees less of it. `AttentionWindows.first` is the position p from which a token at some
    depth sees a plain text, so ancestors before p are hidden too. Depth counts, not the index in
    the row.
    Masked entries are the lowest number of the dtype, as in transformers; from a boolean mask,
    attention would compute such numbers in each layer. The same object goes to all layers with the
    same `first`. It is built on the device, from two numbers per node.

    `windows` must cover the depth of the row, and `row.spans` must be set: a row without them
    needs no mask. `of_layer` holds the mask of each layer.
    """

    def __init__(
        self, row: Row, windows: AttentionWindows, dtype: torch.dtype, device: torch.device
    ) -> None:
        row = row.on(device)
        ancestors, depth = row.ancestors, row.positions[0]
        assert ancestors is not None
        before = torch.ones(len(ancestors), row.prefix, dtype=torch.bool, device=device)
        ancestors = torch.cat([before, ancestors], dim=1)
        depths = torch.cat([torch.arange(row.prefix, device=device), depth])
        made: dict[int, Tensor] = {}
        for first in {id(first): first for first in windows.first}.values():
            seen = ancestors if first is None else ancestors & (depths >= first[depth][:, None])
            mask = torch.zeros(seen.shape, dtype=dtype, device=device)
            made[id(first)] = mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]
        self.of_layer = [made[id(first)] for first in windows.first]

    def put(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a layer's arguments with its mask in place of the model's own."""
        mask, position = self.of_layer[index], mask_position(layer)
        if position is not None and position < len(args):
            return (*args[:position], mask, *args[position + 1 :]), kwargs
        if position is not None or ARGUMENT in kwargs:
            return args, {**kwargs, ARGUMENT: mask}
        return args, kwargs
