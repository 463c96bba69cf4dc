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

from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.grouping import grouped
from tracker.core.kinds import Action

_OF_PARTS = (Action.PASS, Action.NO_ATTENTION, Action.NO_MLP, Action.NO_PARTS)
_TAKEN_APART = (*_OF_PARTS[1:], Action.ROUNDED)


@dataclass(frozen=True)
class LayerStep:
    """What one layer does to the streams.

    Attributes:
        streams: Streams before the layer.
        forked: Whose input to the layer becomes a new stream, behind all others.
        done: What happens to each stream, the new ones included.
        divided: Whether streams may fork between its attention and its MLP.
    """

    streams: int
    forked: tuple[int, ...]
    done: tuple[Ablation, ...]
    divided: bool = True

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """What happens to each stream, in a word."""
        return tuple(done.action for done in self.done)

    @cached_property
    def entering(self) -> tuple[int, ...]:
        """Streams that enter the layer: of those that repeat a span of layers behind it, only
        one for which no other stream with its state does."""
        behind = {stream for stream, source, _ in self.repeating if source != stream}
        return tuple(i for i, a in enumerate(self.actions) if a.enters and i not in behind)

    @cached_property
    def repeating(self) -> tuple[tuple[int, int, Change], ...]:
        """Streams that pass a span again, each with the stream whose output it begins with."""
        first: dict[int, int] = {}
        for stream, action in enumerate(self.actions):
            if action in (Action.PASS, Action.REPEAT):
                first.setdefault(self.origin(stream), stream)
        return tuple(
            (stream, first[self.origin(stream)], span)
            for stream, done in enumerate(self.done)
            for span in done.repeated
        )

    @cached_property
    def apart(self) -> tuple[LayerStep, tuple[int, ...]]:
        """What happens to those streams alone that a layer must be taken apart for, and which they
        are: with them are all that enter it with the same state, and the baseline; none where the
        layer stays whole."""
        asked = [stream for stream in self.entering if self.actions[stream] in _TAKEN_APART]
        states = {0, *map(self.origin, asked)} if asked else set()
        found = [stream for stream in range(len(self.done)) if self.origin(stream) in states]
        place = {stream: number for number, stream in enumerate(found)}
        forked = [stream for stream in found if stream >= self.streams]
        step = LayerStep(
            len(found) - len(forked),
            tuple(place[self.origin(stream)] for stream in forked),
            tuple(self.done[stream] for stream in found),
            self.divided,
        )
        return step, tuple(found[each] for each in step.entering)

    @cached_property
    def has_sublayers(self) -> bool:
        """Check whether some stream forks within the layer, at a sublayer or a part of one."""
        return self.divided and any(self.actions[i] in _OF_PARTS[1:] for i in self.entering)

    @cached_property
    def components(self) -> set[str]:
        """Components that some stream lacks, and `rounded` for weights in formats."""
        changes = {change for done in self.done for change in done.changes}
        return {c.component if c.action is not Action.ROUNDED else c.action.value for c in changes}

    def origin(self, stream: int) -> int:
        """The stream before the layer whose state a stream enters with."""
        return stream if stream < self.streams else self.forked[stream - self.streams]

    @cached_property
    def attention(self) -> tuple[int | None, ...]:
        """For each entering stream, the place among them whose attention it takes; None = none.

        Streams that enter with the same state share one attention, those that remove parts alone.
        """
        computed: dict[tuple[int, Ablation | None], int] = {}
        found: list[int | None] = []
        for place, stream in enumerate(self.entering):
            action = self.actions[stream]
            if action is Action.NO_ATTENTION:
                found.append(None)
                continue
            done = None if action in _OF_PARTS and self.divided else self.done[stream]
            found.append(computed.setdefault((self.origin(stream), done), place))
        return tuple(found)

    @cached_property
    def heads(self) -> tuple[tuple[int, tuple[Change, ...]], ...]:
        """What is made of the computed attentions: of which place's, and without which heads."""
        made = {
            (source, self.done[stream].heads): None
            for stream, source in zip(self.entering, self.attention, strict=True)
            if source is not None
        }
        return tuple(sorted(made))

    @cached_property
    def projected(self) -> tuple[int | None, ...]:
        """For each entering stream, which of `heads` it takes; None = no attention."""
        place_of = {made: number for number, made in enumerate(self.heads)}
        return tuple(
            None if source is None else place_of[source, self.done[stream].heads]
            for stream, source in zip(self.entering, self.attention, strict=True)
        )

    @cached_property
    def computed(self) -> tuple[int, ...]:
        """Places among the entering streams whose attention is computed."""
        return tuple(sorted({source for source in self.attention if source is not None}))

    @cached_property
    def mlps(self) -> tuple[int, ...]:
        """Places among the entering streams whose MLP is computed: no two streams share one."""
        actions = enumerate(self.actions[stream] for stream in self.entering)
        return tuple(place for place, action in actions if action is not Action.NO_MLP)

    @cached_property
    def experts(self) -> tuple[tuple[Change, ...], ...]:
        """For each computed MLP, the experts that it lacks."""
        return tuple(self.done[self.entering[place]].experts for place in self.mlps)

    @cached_property
    def without_shared(self) -> list[int]:
        """Which of the computed MLPs lack the shared experts."""
        return [
            n
            for n, place in enumerate(self.mlps)
            if self.done[self.entering[place]].removed("shared_expert")
        ]

    @cached_property
    def mlp(self) -> tuple[int | None, ...]:
        """For each entering stream, which of the computed MLPs it takes; None = none."""
        place_of = {place: number for number, place in enumerate(self.mlps)}
        return tuple(place_of.get(place) for place in range(len(self.entering)))


@dataclass(frozen=True)
class StreamPlan:
    """Where the streams fork.

    Attributes:
        steps: One step a layer.
        paths: For each layer and each ablation, in order, the stream that holds it in the layer.
        starts: For each stream before the first layer, in order, the format of its embedding.
        heads: For each ablation, in order, the format of its head; empty where none is passed.
    """

    steps: tuple[LayerStep, ...]
    paths: tuple[tuple[int, ...], ...]
    starts: tuple[str | None, ...] = (None,)
    heads: tuple[str | None, ...] = ()

    @property
    def stream_of(self) -> tuple[int, ...]:
        """For each ablation, in order, the stream that holds it after the last layer."""
        return self.paths[-1]

    @cached_property
    def passing(self) -> dict[str | None, list[int]]:
        """Which streams pass a head in which format, the model's own first; some pass several."""
        found: dict[str | None, set[int]] = {}
        for stream, head in zip(self.stream_of, self.heads, strict=True):
            found.setdefault(head, set()).add(stream)
        return {head: sorted(found[head]) for head in sorted(found, key=lambda head: head or "")}

    @cached_property
    def answer_of(self) -> tuple[int, ...]:
        """For each ablation, in order, which of the answers is its own: of `passing`, in order."""
        every = ((s, head) for head, streams in self.passing.items() for s in streams)
        places = {answer: place for place, answer in enumerate(every)}
        return tuple(places[answer] for answer in zip(self.stream_of, self.heads, strict=True))

    @property
    def answers(self) -> int:
        """How often a token that predicts something passes a head, all streams together."""
        return sum(map(len, self.passing.values()))

    @property
    def has_ends(self) -> bool:
        """Whether an embedding or a head has a format somewhere."""
        return any((*self.starts, *self.heads))

    @property
    def attention_of(self) -> Iterator[tuple[int | None, ...]]:
        """For each layer and ablation, which of the computed attentions it takes; None = none."""
        for step, path in zip(self.steps, self.paths, strict=True):
            of = {
                stream: step.computed.index(source)
                for stream, source in zip(step.entering, step.attention, strict=True)
                if source is not None
            }
            yield tuple(of.get(stream) for stream in path)

    @property
    def attention_passes(self) -> int:
        """How many times a token passes an attention, all streams together."""
        return sum(len(step.computed) for step in self.steps) + self.repeats

    @property
    def mlp_passes(self) -> int:
        """How many times a token passes an MLP, all streams together."""
        return sum(len(step.mlps) for step in self.steps) + self.repeats

    @property
    def layer_passes(self) -> float:
        """The same for layers: an attention or an MLP alone is half of one."""
        return (self.attention_passes + self.mlp_passes) / 2

    @property
    def is_divided(self) -> bool:
        """Check whether streams may fork between the attention and the MLP of a layer."""
        return self.steps[0].divided

    @property
    def has_groups_of_maps(self) -> bool:
        """Check whether an attention's or an MLP's linear maps are rounded as a whole."""
        return any(done.has_groups_of_maps for step in self.steps for done in step.done)

    @property
    def repeats(self) -> int:
        """How many times a stream passes a layer again."""
        return sum(span.extra for step in self.steps for _, _, span in step.repeating)

    @property
    def streams(self) -> int:
        """Streams after the last layer."""
        return max(self.stream_of) + 1


def plan_streams(
    ablations: Sequence[Ablation], layers: int, tied: bool = False, divided: bool = True
) -> StreamPlan:
    """Plan where each ablation forks off: at the first layer where its set differs.

    The baseline must be among the ablations and becomes stream 0. An embedding in a format forks
    in front of the first layer, and a head behind the last one: one that is `tied` does both.
    Layers that are not `divided` into an attention and an MLP are passed whole by each stream.
    """
    intact = ablations.index(INTACT)
    order = [intact, *(i for i in range(len(ablations)) if i != intact)]
    started = grouped(order, lambda i: ablations[i].ends.get("embedding"))
    groups = [*started.values()]
    steps, paths = [], []
    for layer in range(layers):
        own, new = [], []
        for stream, group in enumerate(groups):
            by_done: dict[Ablation, list[int]] = {}
            for i in group:
                by_done.setdefault(ablations[i].at(layer), []).append(i)
            # A stream that passes stays where it is, so that the baseline remains stream 0.
            first, *others = sorted(by_done, key=lambda done: done.action is not Action.PASS)
            own.append((stream, first, by_done[first]))
            new += [(stream, done, by_done[done]) for done in others]
        forked, done = tuple(s for s, *_ in new), tuple(d for _, d, _ in (*own, *new))
        steps.append(LayerStep(len(groups), forked, done, divided))
        groups = [members for *_, members in (*own, *new)]
        stream_of = {i: stream for stream, group in enumerate(groups) for i in group}
        paths.append(tuple(stream_of[i] for i in range(len(ablations))))
    head = "embedding" if tied else "lm_head"
    heads = tuple(ablation.ends.get(head) for ablation in ablations)
    return StreamPlan(tuple(steps), tuple(paths), tuple(started), heads)


def plain_passes(ablations: Sequence[Ablation], layers: int) -> tuple[int, int]:
    """Count the attentions and MLPs that a token passes where each ablation is run on its own."""
    actions = [ablation.at(layer).action for ablation in ablations for layer in range(layers)]
    again = sum(span.extra for ablation in ablations for span in ablation.repeated)
    entered = sum(action.enters for action in actions) + again
    return entered - actions.count(Action.NO_ATTENTION), entered - actions.count(Action.NO_MLP)
