"""What stands in for a layer: its mean update, a factor or a linear map of its input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from tracker.core.ablations import Ablation, Done
from tracker.core.grouping import grouped
from tracker.core.kinds import Action
from tracker.models.experts import Experts, experts_at, take_experts
from tracker.models.heads import Heads, heads_at, take_out
from tracker.models.quantised import RoundedWeights, quantise
from tracker.models.sublayers import returning


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


def changes(
    ablation: Ablation,
    stand_ins: Mapping[int, StandIn],
    heads: Sequence[Heads | None],
    experts: Sequence[Experts | None],
    formats: Mapping[int, Mapping[str, str]],
    name: str,
    kept: RoundedWeights | None = None,
) -> dict[int, Callable[[nn.Module], None]]:
    """List what really changes the layers that an ablation neither removes nor repeats.

    Args:
        ablation: What is done.
        stand_ins: Layer → what stands in for it.
        heads: The heads of each layer's attention; needed where some are taken out.
        experts: The routed experts of each layer's MLP; the same.
        formats: Layer → which of its linear maps have weights in which format.
        name: The model's class.
        kept: As for `quantise`.

    Returns:
        Layer → what changes the layer of a copy: its weights, or what it returns.
    """
    found: dict[int, Callable[[nn.Module], None]] = {
        layer: partial(_replace, Action(done), stand_ins.get(layer))
        for done, layer in ablation.replaced
    }
    for layer, own_formats in formats.items():
        where = f"layer {layer} of {name}"
        found[layer] = partial(quantise, formats=own_formats, name=where, number=layer, kept=kept)
    for layer, parts in grouped(ablation.parts, lambda part: part.layer).items():
        done, where = Done(Action.NO_PARTS, tuple(parts)), f"layer {layer} of {name}"
        lost: list[Callable[[nn.Module], None]] = []
        if done.heads:
            own = heads_at(heads, layer, name)
            columns = [own.columns(part, name) for part in done.heads]
            lost.append(partial(take_out, heads=own, columns=columns, name=where))
        if done.experts:
            those = experts_at(experts, layer, name)
            left = those.left(done.experts, name)
            lost.append(partial(take_experts, experts=those, kept=left, name=where))
        found[layer] = partial(_one_by_one, lost)
    return found


def _one_by_one(changes: Sequence[Callable[[nn.Module], None]], layer: nn.Module) -> None:
    for change in changes:
        change(layer)


def _replace(action: Action, stand_in: StandIn | None, layer: nn.Module) -> None:
    """Let something stand in for a layer, which still runs; its output is dropped."""
    assert stand_in is not None
    returning(layer, partial(stand_in.change, action))
