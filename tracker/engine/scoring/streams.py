"""Sharing over depth, planned: each ablation is a stream that forks off where it first differs.

With layer l removed, layers 0 to l−1 see what the baseline sees. So the ablations are the batch: a
stream is forked from its parent's *input* to the first layer at which it differs, and the work for
all single layers is L(L+1)/2 layer passes instead of L² + L. Inside a layer the streams share too:
with its MLP removed, its attention is the baseline's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tracker.core.ablations import INTACT, Ablation
from tracker.core.kinds import Action

_OF_PARTS = (Action.PASS, Action.NO_ATTENTION, Action.NO_MLP)


@dataclass(frozen=True)
class LayerStep:
    """What one layer does to the streams.

    Attributes:
        streams: Streams before the layer.
        forked: Whose input to the layer becomes a new stream, behind all others.
        actions: What happens to each stream, the new ones included.
    """

    streams: int
    forked: tuple[int, ...]
    actions: tuple[Action, ...]

    @cached_property
    def entering(self) -> tuple[int, ...]:
        """Streams that enter the layer."""
        return tuple(i for i, action in enumerate(self.actions) if action.enters)

    def places(self, *actions: Action) -> list[int]:
        """Say where among the entering streams some actions happen."""
        return [p for p, stream in enumerate(self.entering) if self.actions[stream] in actions]

    @cached_property
    def has_sublayers(self) -> bool:
        """Whether some stream skips a sublayer alone."""
        return bool(self.places(Action.NO_ATTENTION, Action.NO_MLP))

    def origin(self, stream: int) -> int:
        """The stream before the layer whose state a stream enters with."""
        return stream if stream < self.streams else self.forked[stream - self.streams]

    @cached_property
    def attention(self) -> tuple[int | None, ...]:
        """For each entering stream, the place among them whose attention it takes; None = none.

        Streams that enter with the same state share one attention, those that remove parts alone.
        """
        computed: dict[tuple[int, Action | None], int] = {}
        found: list[int | None] = []
        for place, stream in enumerate(self.entering):
            action = self.actions[stream]
            if action is Action.NO_ATTENTION:
                found.append(None)
                continue
            own = None if action in _OF_PARTS else action
            found.append(computed.setdefault((self.origin(stream), own), place))
        return tuple(found)

    @cached_property
    def mlp(self) -> tuple[int | None, ...]:
        """The same for the MLP, which no two streams share."""
        without = self.places(Action.NO_MLP)
        return tuple(None if p in without else p for p in range(len(self.entering)))


@dataclass(frozen=True)
class StreamPlan:
    """Where the streams fork.

    Attributes:
        steps: One step a layer.
        paths: For each layer and each ablation, in order, the stream that holds it in the layer.
    """

    steps: tuple[LayerStep, ...]
    paths: tuple[tuple[int, ...], ...]

    @property
    def stream_of(self) -> tuple[int, ...]:
        """For each ablation, in order, the stream that holds it after the last layer."""
        return self.paths[-1]

    @property
    def attention_of(self) -> Iterator[tuple[int | None, ...]]:
        """For each layer and ablation, which of the computed attentions it takes; None = none."""
        for step, path in zip(self.steps, self.paths, strict=True):
            computed = sorted({source for source in step.attention if source is not None})
            of = {
                stream: computed.index(source)
                for stream, source in zip(step.entering, step.attention, strict=True)
                if source is not None
            }
            yield tuple(of.get(stream) for stream in path)

    @property
    def attention_passes(self) -> int:
        """How many times a token passes an attention, all streams together."""
        return sum(len({*step.attention} - {None}) for step in self.steps) + self.repeats

    @property
    def mlp_passes(self) -> int:
        """How many times a token passes an MLP, all streams together."""
        return sum(len({*step.mlp} - {None}) for step in self.steps) + self.repeats

    @property
    def layer_passes(self) -> float:
        """The same for layers: an attention or an MLP alone is half of one."""
        return (self.attention_passes + self.mlp_passes) / 2

    @property
    def has_sublayers(self) -> bool:
        """Whether some stream skips a sublayer alone."""
        return any(step.has_sublayers for step in self.steps)

    @property
    def repeats(self) -> int:
        """How many times a stream passes a layer twice."""
        return sum(len(step.places(Action.REPEAT)) for step in self.steps)

    @property
    def streams(self) -> int:
        """Streams after the last layer."""
        return max(self.stream_of) + 1


def plan_streams(ablations: Sequence[Ablation], layers: int) -> StreamPlan:
    """Plan where each ablation forks off: at the first layer where its set differs.

    The baseline must be among the ablations and becomes stream 0.
    """
    intact = ablations.index(INTACT)
    groups = [[intact, *(i for i in range(len(ablations)) if i != intact)]]
    steps, paths = [], []
    for layer in range(layers):
        own, new = [], []
        for stream, group in enumerate(groups):
            by_action: dict[Action, list[int]] = {}
            for i in group:
                by_action.setdefault(ablations[i].at(layer), []).append(i)
            # A stream that passes stays where it is, so that the baseline remains stream 0.
            first, *others = sorted(by_action, key=lambda action: action is not Action.PASS)
            own.append((stream, first, by_action[first]))
            new += [(stream, action, by_action[action]) for action in others]
        forked, actions = tuple(s for s, *_ in new), tuple(a for _, a, _ in (*own, *new))
        steps.append(LayerStep(len(groups), forked, actions))
        groups = [members for *_, members in (*own, *new)]
        stream_of = {i: stream for stream, group in enumerate(groups) for i in group}
        paths.append(tuple(stream_of[i] for i in range(len(ablations))))
    return StreamPlan(tuple(steps), tuple(paths))


def plain_passes(ablations: Sequence[Ablation], layers: int) -> tuple[int, int]:
    """Count the attentions and MLPs that a token passes where each ablation is run on its own."""
    actions = [ablation.at(layer) for ablation in ablations for layer in range(layers)]
    entered = sum(action.enters for action in actions) + actions.count(Action.REPEAT)
    return entered - actions.count(Action.NO_ATTENTION), entered - actions.count(Action.NO_MLP)
