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
    layers: nn.ModuleList, plan: StreamPlan, observe: Observer | None = None
) -> Iterator[None]:
    """Let a model's layers fork streams while the context is open.

    Inside, a forward pass over `rows` rows leaves the layers with `streams × rows` rows, stream by
    stream; everything else that a layer is given must broadcast over the batch.

    Args:
        layers: The model's decoder layers.
        plan: Where to fork.
        observe: Sees the baseline's input and output of each layer.

    Yields:
        Nothing; on exit, also by an exception, the layers are what they were.
    """
    own = [vars(layer).get("forward") for layer in layers]
    try:
        for index, (layer, step) in enumerate(zip(layers, plan.steps, strict=True)):
            layer.forward = _Fork(index, step, layer.forward, observe)
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


@dataclass(frozen=True)
class _Fork:
    """One layer's forward pass over all streams."""

    index: int
    step: LayerStep
    layer: Callable[..., Any]
    observe: Observer | None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take and return a hidden state [streams × rows, tokens, hidden], as the layer does."""
        named = "hidden_states" in kwargs
        hidden: Tensor = kwargs.pop("hidden_states") if named else args[0]
        rest = () if named else args[1:]
        step = self.step
        before = hidden.reshape(step.streams, -1, *hidden.shape[1:])
        after = hidden.new_empty(step.streams + len(step.forked), *before.shape[1:])
        passing = list(step.passing)
        everyone = len(passing) == step.streams
        going = hidden if everyone else before[passing].flatten(0, 1)
        output = self.layer(going, *rest, **kwargs)
        passed = output[0] if isinstance(output, tuple) else output
        passed = passed.reshape(-1, *before.shape[1:])
        if everyone:
            after[: step.streams] = passed
        else:
            after[: step.streams] = before
            after[passing] = passed
        for new, stream in enumerate(step.forked, start=step.streams):
            after[new] = before[stream]
        if self.observe is not None:
            self.observe(self.index, before[0], after[0])
        merged = after.flatten(0, 1)
        return (merged, *output[1:]) if isinstance(output, tuple) else merged
