"""A layer's weights, quantised and made numbers again, as a checkpoint with such weights computes.

Symmetric and rounded to nearest, as torchao's weight-only configurations do it: int8 with a scale a
row of the weight (an output), int4 with one for each `GROUP` inputs of a row. The rounding is
torch's own `fake_quantize_per_channel_affine`, and the weights are those of torchao 0.18's
`IntxWeightOnlyConfig` to the bit in float32; activations are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tracker.core.errors import CellError
from tracker.models.offloaded import is_absent

GROUP = 32
"""Inputs that share a scale in int4."""
_LEVELS = {4: (-8, 7), 8: (-128, 127)}


def quantised(weight: Tensor, bits: int) -> Tensor:
    """Quantise a weight [outputs, inputs] to 4 or 8 bits, and make numbers of it again.

    Inputs that fill no group of 32 share the scale of the largest group that divides them.
    """
    outputs, inputs = weight.shape
    group = inputs if bits == 8 else next(g for g in range(GROUP, 0, -1) if inputs % g == 0)
    rows = weight.detach().float().reshape(-1, group)
    low, high = _LEVELS[bits]
    # torchao's: the largest weight of a group is half of the levels away from 0.
    scale = (rows.abs().amax(1) / ((high - low) / 2)).clamp_min(torch.finfo(torch.float32).eps)
    zero = torch.zeros_like(scale, dtype=torch.int32)
    whole = torch.fake_quantize_per_channel_affine(rows, scale, zero, 0, low, high)
    return whole.reshape(outputs, inputs).to(weight.dtype)


def outputs_first(module: nn.Module) -> Tensor:
    """View the weight of a linear map as [outputs, inputs]; GPT-2's has it the other way."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def quantise(layer: nn.Module, bits: int, name: str) -> None:
    """Give a layer, called `name`, quantised weights of its own."""
    reweighted(layer, linear_maps(layer, name), partial(quantised, bits=bits))


def reweighted(
    layer: nn.Module, maps: Sequence[nn.Module], change: Callable[[Tensor], Tensor]
) -> None:
    """Give linear maps of a layer weights of their own.

    Args:
        layer: The layer.
        maps: Linear maps of it.
        change: Makes a weight [outputs, inputs] of a weight [outputs, inputs].
    """

    def give(*_: Any) -> None:
        for module in maps:
            weight = change(outputs_first(module).detach())
            own = weight.T if isinstance(module, Conv1D) else weight
            module.weight = nn.Parameter(own, requires_grad=False)

    theirs = [module.weight for module in maps]
    if not any(is_absent(weight) for weight in theirs):
        give()
        return

    def take_back(*_: Any) -> None:
        for module, weight in zip(maps, theirs, strict=True):
            module.weight = weight

    # They are there while the layer is called, and then they go.
    layer.register_forward_pre_hook(give)
    layer.register_forward_hook(take_back, always_call=True)


def linear_maps(layer: nn.Module, name: str) -> list[nn.Module]:
    """List the linear maps of a layer, whose weights are quantised.

    CellError where the layer, called `name`, holds other matrices, or weights that are quantised
    already.
    """
    maps = [each for each in layer.modules() if isinstance(each, (nn.Linear, Conv1D))]
    ours = {id(each.weight) for each in maps}
    for path, parameter in layer.named_parameters():
        why = "" if parameter.is_floating_point() else "is quantised already"
        if parameter.ndim > 1 and id(parameter) not in ours:
            why = "is no linear map, so it cannot be quantised"
        if why:
            raise CellError(f"{path} of {name} {why}; leave int8 and int4 out of 'intervention'")
    return maps
