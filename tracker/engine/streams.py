"""Sharing over depth: one forward pass in which each ablation forks off where it first differs.

With layer l removed, layers 0 to l−1 see what the baseline sees. So the ablations are the batch: a
stream is forked from its parent's *input* to the first layer that it skips, and the work for all
single layers is L(L+1)/2 layer passes instead of L² + L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tracker.ablations import Ablation

Observer = Callable[[int, Tensor, Tensor], None]
"""Called with a layer and the baseline's input and output of it, each [rows, tokens, hidden]."""


@dataclass(frozen=True)
class LayerStep:
    """What one layer does to the streams.

    Attributes:
        streams: Streams before the layer.
        passing: Streams that pass through the layer.
        forked: Streams whose input to the layer becomes a new stream behind all others.
    """

    streams: int
    passing: tuple[int, ...]
    forked: tuple[int, ...]


@dataclass(frozen=True)
class StreamPlan:
    """Where the streams fork.

    Attributes:
        steps: One step a layer.
        stream_of: For each ablation, in order, the stream that holds it after the last layer.
    """

    steps: tuple[LayerStep, ...]
    stream_of: tuple[int, ...]

    @property
    def layer_passes(self) -> int:
        """How many times a token passes a layer, all streams together."""
        return sum(len(step.passing) for step in self.steps)

    @property
    def streams(self) -> int:
        """Streams after the last layer."""
        return max(self.stream_of) + 1


def plan_streams(ablations: Sequence[Ablation], layers: int) -> StreamPlan:
    """Plan where each ablation forks off: at the first layer where its set differs.

    Args:
        ablations: The ablations; the baseline must be among them and becomes stream 0.
        layers: How many layers the model has.

    Returns:
        The plan.
    """
    intact = next(i for i, ablation in enumerate(ablations) if not ablation.layers)
    order = [intact, *(i for i in range(len(ablations)) if i != intact)]
    groups = [order]
    steps = []
    for layer in range(layers):
        passing, forked, new = [], [], []
        for stream, group in enumerate(groups):
            keeps = [i for i in group if layer not in ablations[i].layers]
            skips = [i for i in group if layer in ablations[i].layers]
            if keeps:
                passing.append(stream)
                groups[stream] = keeps
                if skips:
                    forked.append(stream)
                    new.append(skips)
        steps.append(LayerStep(len(groups), tuple(passing), tuple(forked)))
        groups = [*groups, *new]
    stream_of = {i: stream for stream, group in enumerate(groups) for i in group}
    return StreamPlan(tuple(steps), tuple(stream_of[i] for i in range(len(ablations))))


@contextmanager
def forking(
    layers: nn.ModuleList,
    plan: StreamPlan,
    observe: Observer | None = None,
) -> Iterator[None]:
    """Let a model's layers fork streams while the context is open.

    Inside, a forward pass over `rows` rows leaves the layers with `streams × rows` rows, stream by
    stream; everything else that a layer is given must broadcast over the batch.

    Args:
        layers: The model's decoder layers.
        plan: Where to fork.
        observe: Sees the baseline's input and output of each layer.

    Yields:
        Nothing; on exit, also by an exception, the hooks are gone.
    """
    hooks = []
    for index, (layer, step) in enumerate(zip(layers, plan.steps, strict=True)):
        fork = _Fork(index, step, observe)
        hooks.append(layer.register_forward_pre_hook(fork.before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(fork.after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Fork:
    """The two hooks of one layer."""

    def __init__(self, index: int, step: LayerStep, observe: Observer | None) -> None:
        self._index = index
        self._step = step
        self._observe = observe
        self._input = torch.empty(0)

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        named = "hidden_states" in kwargs
        hidden = kwargs["hidden_states"] if named else args[0]
        step = self._step
        self._input = hidden.unflatten(0, (step.streams, -1))
        if len(step.passing) == step.streams:
            return None
        passing = self._input[list(step.passing)].flatten(0, 1)
        return (
            (args, {**kwargs, "hidden_states": passing})
            if named
            else ((passing, *args[1:]), kwargs)
        )

    def after(self, module: nn.Module, args: Any, output: Any) -> Any:
        step = self._step
        before, self._input = self._input, torch.empty(0)
        hidden = output[0] if isinstance(output, tuple) else output
        passed = hidden.unflatten(0, (len(step.passing), -1))
        if self._observe is not None:
            self._observe(self._index, before[0], passed[0])
        if len(step.passing) < step.streams:
            merged = before.clone()
            merged[list(step.passing)] = passed
            passed = merged
        if step.forked:
            passed = torch.cat([passed, *(before[s : s + 1] for s in step.forked)])
        passed = passed.flatten(0, 1)
        return (passed, *output[1:]) if isinstance(output, tuple) else passed
