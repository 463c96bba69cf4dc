"""What stands in for a layer: its mean update, a factor or a linear map of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tracker.core.kinds import Action


class StandIn(Protocol):
    """Computes what stands in for one layer."""

    def change(self, action: Action, state: Tensor) -> Tensor:
        """Compute it of a state [rows, tokens, …], in the state's own type."""
        ...


@dataclass(frozen=True)
class Fitted:
    """What was fitted in place of one layer; float32, whatever the model computes in.

    Attributes:
        mean: The mean update [width].
        scale: The factor.
        linear: Weight [width, width] and bias [width]; None where it was not asked for.
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
            weight, bias = (each.to(state.device) for each in self.linear)
            after = flat @ weight.T + bias
        return after.to(state.dtype).reshape(state.shape)

    def on(self, device: torch.device) -> Fitted:
        """Return the same with its tensors on a device."""
        linear = self.linear and (self.linear[0].to(device), self.linear[1].to(device))
        return Fitted(self.mean.to(device), self.scale, linear)


@dataclass(frozen=True)
class MadeUp:
    """What was fitted on nothing, drawn for a layer of a model that is only to be checked."""

    layer: int

    def change(self, action: Action, state: Tensor) -> Tensor:
        """Change a state of any width as `Fitted` would."""
        width = state.flatten(2).shape[-1]
        draw = torch.Generator().manual_seed(self.layer)
        weight = torch.eye(width) + 0.3 * torch.randn(width, width, generator=draw) / width**0.5
        mean, bias = 0.3 * torch.randn(2, width, generator=draw)
        return Fitted(mean, 0.7, (weight, bias)).change(action, state)
