"""Replacements of a layer: its mean update, a factor or a linear map of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tracker.core.kinds import Action


class Replacement(Protocol):
    """A replacement of one layer."""

    def change(self, action: Action, state: Tensor) -> Tensor:
        """Compute the state behind it of one [rows, tokens, …], in the same type."""
        ...


@dataclass(frozen=True)
class FittedReplacement:
    """A replacement fitted on text, in float32 for models of any type.

    Attributes:
        mean: The mean update [width].
        scale: The factor.
        linear: Weight [width, width] and bias [width]; None where it was not fitted.
    """

    mean: Tensor
    scale: float
    linear: tuple[Tensor, Tensor] | None = None

    def change(self, action: Action, state: Tensor) -> Tensor:
        """Compute x + m, s·x or W·x + b; several residual streams side by side are one x."""
        flat = state.flatten(2).float()
        if action is Action.MEAN:
            after = flat + self.mean.to(state.device)
        elif action is Action.SCALE:
            after = flat * self.scale
        else:
            assert self.linear is not None
            weight, bias = (tensor.to(state.device) for tensor in self.linear)
            after = flat @ weight.T + bias
        return after.to(state.dtype).reshape(state.shape)

    def on(self, device: torch.device) -> FittedReplacement:
        """Return the same with its tensors on a device."""
        linear = self.linear and (self.linear[0].to(device), self.linear[1].to(device))
        return FittedReplacement(self.mean.to(device), self.scale, linear)


@dataclass(frozen=True)
class RandomReplacement:
    """A replacement drawn at random, for a layer of a model that is only checked."""

    layer: int

    def change(self, action: Action, state: Tensor) -> Tensor:
        """Change a state of any width as `FittedReplacement` would."""
        width = state.flatten(2).shape[-1]
        draw = torch.Generator().manual_seed(self.layer)
        weight = torch.eye(width) + 0.3 * torch.randn(width, width, generator=draw) / width**0.5
        mean, bias = 0.3 * torch.randn(2, width, generator=draw)
        return FittedReplacement(mean, 0.7, (weight, bias)).change(action, state)
