"""How much a layer changes each token's hidden state: the cheap proxies of its importance.

Every function takes the residual stream before and after a layer and answers per token, whatever
the model computes in: the update in float32, the cosine in float64 (in float32 on a device that
knows nothing wider, Apple's), since a layer that turns a token by 1e-4 has a cosine of 1 - 5e-9,
which float32 calls 1. Which tokens are averaged is the caller's: each document's context plus gold
continuation, once, never padding. A token whose hidden state is all zeros has no direction, so its
figures are NaN and so is every mean that includes it; torch's own cosine would call it 0, "turned
by a right angle".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cosine_similarity(before: Tensor, after: Tensor) -> Tensor:
    """Return the cosine of the angle between each token's layer input and output.

    It is taken from the distance between both directions, 1 - ‖u - v‖² / 2: the sum of products
    u · v would lose 1 - cosine to rounding where a layer hardly turns its input. Two inputs of
    float32 give 1 - cosine to about 1e-7 of itself, 1e-16 apart. Rounding may carry it below -1 by
    1e-15.

    Args:
        before: `[..., tokens, hidden]`, the layer's input.
        after: `[..., tokens, hidden]`, the layer's output in the residual stream, before any final
            norm.

    Returns:
        `[..., tokens]`, float64; NaN where either is all zeros.

    Examples:
        >>> cosine_similarity(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]]))
        tensor([0.9600], dtype=torch.float64)
    """
    _check(before, after)
    wide = torch.float32 if before.device.type == "mps" else torch.float64
    apart = _directions(before.to(wide)).sub_(_directions(after.to(wide)))
    return 1 - apart.square_().sum(-1) / 2


def angular_distance(cosine: Tensor) -> Tensor:
    """Return the angle between layer input and output as a fraction of a half turn.

    arccos is steep at 1: a cosine that rounding leaves 1e-16 short of 1 reads as 5e-9.

    Args:
        cosine: Cosine similarities of any shape; clamped to [-1, 1].

    Returns:
        arccos(cosine) / π, of the same shape: 0 = same direction, 0.5 = orthogonal, 1 = opposite.

    References:
        Gromov et al., The Unreasonable Ineffectiveness of the Deeper Layers, arXiv 2403.17887.

    Examples:
        >>> angular_distance(torch.tensor([1.0, 0.0, -1.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return torch.arccos(cosine.clamp(-1, 1)) / math.pi


def relative_update(before: Tensor, after: Tensor) -> Tensor:
    """Return how large the layer's update is beside its input: ‖after - before‖ / ‖before‖.

    It sees what cosine cannot: a change of magnitude along the input's own direction.

    Args:
        before: `[..., tokens, hidden]`, the layer's input.
        after: `[..., tokens, hidden]`, the layer's output in the residual stream.

    Returns:
        `[..., tokens]`, float32; 0 = unchanged; NaN where the input is all zeros.

    Examples:
        >>> relative_update(torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]]))
        tensor([1.])
    """
    _check(before, after)
    first, second = before.float(), after.float()
    size = torch.linalg.vector_norm(first, dim=-1)
    update = torch.linalg.vector_norm(second - first, dim=-1) / size
    return torch.where(size > 0, update, torch.nan)


def _directions(states: Tensor) -> Tensor:
    """Return the states at length 1, NaN where they have none."""
    length = torch.linalg.vector_norm(states, dim=-1, keepdim=True)
    return states / torch.where(length > 0, length, torch.nan)


def _check(before: Tensor, after: Tensor) -> None:
    if before.shape != after.shape or before.ndim < 2:
        raise ValueError(
            "before and after must share one shape [..., tokens, hidden], "
            f"not {list(before.shape)} and {list(after.shape)}"
        )
