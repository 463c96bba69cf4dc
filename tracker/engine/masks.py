"""The attention masks of a row: a token sees its ancestors, in a sliding window the near ones."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from tracker.engine.rows import Row
from tracker.models.layers import find_base


def attention_mask(model: Any, row: Row, device: torch.device) -> Any:
    """Build the additive mask that a model needs for a row.

    Args:
        model: A causal language model of transformers.
        row: The row; without `ancestors` it needs none.
        device: Where the masks go.

    Returns:
        None, a mask [1, 1, tokens, prefix + tokens], or for models whose layers differ a dict of
        masks by layer type, as transformers takes it.
    """
    if row.ancestors is None:
        return None
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None

    def additive(seen: Tensor) -> Tensor:
        mask = torch.zeros(seen.shape, dtype=model.dtype)
        mask.masked_fill_(~seen, torch.finfo(model.dtype).min)
        return mask[None, None].to(device)

    full = torch.cat([torch.ones(len(row.ancestors), row.prefix).bool(), row.ancestors], dim=1)
    depth = row.positions[0]
    keys = torch.cat([torch.arange(row.prefix), depth])
    seen = {"full_attention": full}
    if window is not None:
        seen["sliding_attention"] = full & (depth[:, None] - keys[None, :] < window)
    if chunk := getattr(config, "attention_chunk_size", None):
        seen["chunked_attention"] = full & (depth[:, None] // chunk == keys[None, :] // chunk)
    if _takes_mask_by_type(model):
        # A layer of another type (recurrent) finds no mask here, so that the model refuses.
        return {kind: additive(which) for kind, which in seen.items()}
    return additive(seen.get("sliding_attention", full))


def _takes_mask_by_type(model: Any) -> bool:
    """Whether the model looks its mask up by the layer's type."""
    return "causal_mask_mapping" in inspect.getsource(type(find_base(model)).forward)
