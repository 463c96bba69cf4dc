"""Build attention masks for a row of requests that share tokens in a prefix tree.

A token of the tree attends only to itself and to its ancestors within the layer's attention window.
The windows are read from the model's own masks for a plain text.
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
from tracker.models.hooks import enter_all, input_state, replace_first_output, replaced_forward

MASK_ARGUMENT = "attention_mask"


@dataclass(frozen=True)
class AttentionWindows:
    """The attention window of each layer, for texts up to a length.

    Attributes:
        tokens: The maximum length of texts for which the windows are valid.
        starts: For each layer, a tensor [tokens] with the first position that each token attends
            to. The entry is None for a layer without a window, or without a mask of shape [1, 1,
            tokens, tokens].
    """

    tokens: int
    starts: tuple[Tensor | None, ...]


@torch.inference_mode()
def find_attention_windows(
    base: PreTrainedModel, layers: nn.ModuleList, tokens: int, device: torch.device
) -> AttentionWindows:
    """Find each layer's attention window from the masks that the model builds for a text.

    The model reads a text of `tokens` tokens, while functions that only record the attention mask
    replace the layers. `base` is the module that runs the layers.
    """
    layer_outputs: dict[int, Any] = {}
    masks: list[Any] = [None] * len(layers)

    def record(index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        layer_outputs[index] = forward(*args, **kwargs)
        return layer_outputs[index]

    def make_skip(index: int, layer: nn.Module) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            masks[index] = _find_mask(layer, args, kwargs)
            return replace_first_output(layer_outputs[index], input_state(args, kwargs))

        call.is_weightless = True  # type: ignore[attr-defined]
        return call

    def read_text(length: int, forwards: Sequence[Callable[..., Any]]) -> None:
        ids = torch.zeros(1, length, dtype=torch.long, device=device)
        with enter_all(map(replaced_forward, layers, forwards)):
            base(input_ids=ids, use_cache=False)

    read_text(2, [partial(record, index, layer.forward) for index, layer in enumerate(layers)])
    if (n_run := len(layer_outputs)) < len(layers):
        raise RefusalError(f"the model calls only {n_run} of {len(layers)} layers on plain text")
    read_text(tokens, [make_skip(index, layer) for index, layer in enumerate(layers)])
    # Layers with equal windows get the same tensor, so that rows make one mask for all of them.
    starts = [find_first_visible(layer_mask, tokens) for layer_mask in masks]
    keys = [None if start is None else start.numpy().tobytes() for start in starts]
    start_of = dict(zip(keys, starts, strict=True))
    moved = {key: start if start is None else start.to(device) for key, start in start_of.items()}
    return AttentionWindows(tokens, tuple(moved[key] for key in keys))


def _find_mask(layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Return the attention mask from a layer's arguments; None if there is no mask."""
    if MASK_ARGUMENT in kwargs:
        return kwargs[MASK_ARGUMENT]
    position = mask_position(layer)
    return args[position] if position is not None and position < len(args) else None


def mask_position(layer: nn.Module) -> int | None:
    """Return the position of the mask in a layer's signature; None if the layer takes no mask."""
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    return names.index(MASK_ARGUMENT) if MASK_ARGUMENT in names else None


def find_first_visible(mask: object, tokens: int) -> Tensor | None:
    """Find the first position that each token attends to in an attention mask.

    The mask has the shape [1, 1, tokens, tokens], and the returned tensor has the shape [tokens].
    Returns None if every token attends to all earlier tokens, or if the mask has another shape.
    Raises RefusalError if the mask adds a bias, or if a token attends to several separate ranges of
    positions.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2:] != (tokens, tokens):
        return None
    visible = mask[0, 0].cpu()
    if visible.dtype != torch.bool:
        if ((visible != 0) & (visible > -1e4)).any():
            raise RefusalError("the attention masks add a bias to the attention scores")
        visible = visible == 0
    starts = visible.int().argmax(-1)
    positions = torch.arange(tokens)
    contiguous = (positions >= starts[:, None]) & (positions <= positions[:, None])
    if not torch.equal(visible, contiguous):
        raise RefusalError("a token attends to several separate ranges of earlier tokens")
    return starts if starts.any() else None


class Masks:
    """The attention masks of one row; layers with equal attention windows share one mask.

    A row contains a prefix tree of requests, and each node of the tree is a token. A mask has the
    shape [1, 1, tokens, prefix + tokens]. A node attends to the cached prefix, its ancestors and
    itself, but not to its siblings. In a layer with an attention window, a node attends only to
    itself and the nearest tokens before itself. Masked entries contain the lowest number of the
    dtype, as in transformers.

    `windows` must cover the longest text of the row, and `row.spans` must be set. `layer_masks`
    contains the mask of each layer.
    """

    def __init__(
        self, row: Row, windows: AttentionWindows, dtype: torch.dtype, device: torch.device
    ) -> None:
        row = row.to_device(device)
        ancestors, depth = row.ancestors, row.positions[0]
        assert ancestors is not None
        prefix_visible = torch.ones(len(ancestors), row.prefix, dtype=torch.bool, device=device)
        ancestors = torch.cat([prefix_visible, ancestors], dim=1)
        depths = torch.cat([torch.arange(row.prefix, device=device), depth])
        masks: dict[Tensor | None, Tensor] = {}
        for starts in dict.fromkeys(windows.starts):
            visible = ancestors
            if starts is not None:
                visible = ancestors & (depths >= starts[depth][:, None])
            mask = torch.zeros(1, 1, *visible.shape, dtype=dtype, device=device)
            masks[starts] = mask.masked_fill_(~visible, torch.finfo(dtype).min)
        self.layer_masks = [masks[starts] for starts in windows.starts]

    def replace_mask(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a layer's call arguments, with the model's mask replaced by the row's mask."""
        mask, position = self.layer_masks[index], mask_position(layer)
        if position is not None and position < len(args):
            return (*args[:position], mask, *args[position + 1 :]), kwargs
        if position is not None or MASK_ARGUMENT in kwargs:
            return args, {**kwargs, MASK_ARGUMENT: mask}
        return args, kwargs
