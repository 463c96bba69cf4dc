"""Plan the sharing over depth: an ablation is a stream that forks where it first differs.

With layer l removed, layers 0 to l−1 see what the baseline sees. So the ablations are the batch: a
stream is forked from its parent's *input* to the first layer at which it differs. The work for all
single layers is L(L+1)/2 layer passes instead of L² + L. Inside a layer the streams share too:
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
    """The effect of one layer on each stream.

    Attributes:
        streams: Number of streams before the layer.
        forked: The parent of each new stream; new streams follow the existing ones.
        done: The ablation of this layer in each stream, new streams included.
        divided: Whether streams may fork between its attention and its MLP.
    """

    streams: int
    forked: tuple[int, ...]
    done: tuple[Ablation, ...]
    divided: bool = True

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """The action of the layer in each stream."""
        return tuple(done.action for done in self.done)

    @cached_property
    def entering(self) -> tuple[int, ...]:
        """The streams that enter the layer.

        Of the streams with one state that repeat a span behind the layer, only one enters."""
        behind = {stream for stream, source, _ in self.repeating if source != stream}
        return tuple(i for i, a in enumerate(self.actions) if a.enters and i not in behind)

    @cached_property
    def repeating(self) -> tuple[tuple[int, int, Change], ...]:
        """The streams that pass a span again, each with the stream whose output it starts from."""
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
        """The step and the numbers of the streams for which the layer is taken apart.

        Included are the baseline and all streams that enter with the same state. Both are empty
        where the layer stays whole."""
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
        """True if some stream forks within the layer, at a sublayer or a part of one."""
        return self.divided and any(self.actions[i] in _OF_PARTS[1:] for i in self.entering)

    @cached_property
    def components(self) -> set[str]:
        """The components that some stream lacks, and `rounded` for weights in formats."""
        changes = {change for done in self.done for change in done.changes}
        return {c.component if c.action is not Action.ROUNDED else c.action.value for c in changes}

    def origin(self, stream: int) -> int:
        """Return the stream before the layer whose state a stream enters with."""
        return stream if stream < self.streams else self.forked[stream - self.streams]

    @cached_property
    def attention(self) -> tuple[int | None, ...]:
        """The index of the entering stream whose attention each entering stream uses; None = none.

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
        """The computed attentions to project, each with the heads that are removed from it."""
        made = {
            (source, self.done[stream].heads): None
            for stream, source in zip(self.entering, self.attention, strict=True)
            if source is not None
        }
        return tuple(sorted(made))

    @cached_property
    def projected(self) -> tuple[int | None, ...]:
        """The index into `heads` for each entering stream; None = no attention."""
        place_of = {made: number for number, made in enumerate(self.heads)}
        return tuple(
            None if source is None else place_of[source, self.done[stream].heads]
            for stream, source in zip(self.entering, self.attention, strict=True)
        )

    @cached_property
    def computed(self) -> tuple[int, ...]:
        """The indices of the entering streams whose attention is computed."""
        return tuple(sorted({source for source in self.attention if source is not None}))

    @cached_property
    def mlps(self) -> tuple[int, ...]:
        """The indices of the entering streams whose MLP is computed: no two streams share one."""
        actions = enumerate(self.actions[stream] for stream in self.entering)
        return tuple(place for place, action in actions if action is not Action.NO_MLP)

    @cached_property
    def experts(self) -> tuple[tuple[Change, ...], ...]:
        """The removed experts of each computed MLP."""
        return tuple(self.done[self.entering[place]].experts for place in self.mlps)

    @cached_property
    def without_shared(self) -> list[int]:
        """The indices of the computed MLPs that lack the shared experts."""
        return [
            n
            for n, place in enumerate(self.mlps)
            if self.done[self.entering[place]].removed("shared_expert")
        ]

    @cached_property
    def mlp(self) -> tuple[int | None, ...]:
        """The index of the computed MLP that each entering stream uses; None = none."""
        place_of = {place: number for number, place in enumerate(self.mlps)}
        return tuple(place_of.get(place) for place in range(len(self.entering)))


@dataclass(frozen=True)
class StreamPlan:
    """The layers at which streams fork, and the stream of each ablation.

    Attributes:
        steps: One step per layer.
        paths: For each layer, the stream that holds each ablation in that layer, in order.
        starts: The format of the embedding of each stream before the first layer, in order.
        heads: The format of the output head of each ablation, in order; empty where none is passed.
    """

    steps: tuple[LayerStep, ...]
    paths: tuple[tuple[int, ...], ...]
    starts: tuple[str | None, ...] = (None,)
    heads: tuple[str | None, ...] = ()

    @property
    def stream_of(self) -> tuple[int, ...]:
        """The stream that holds each ablation after the last layer, in order."""
        return self.paths[-1]

    @cached_property
    def passing(self) -> dict[str | None, list[int]]:
        """Format of the head → streams that pass it, the model's own first; some pass several."""
        found: dict[str | None, set[int]] = {}
        for stream, head in zip(self.stream_of, self.heads, strict=True):
            found.setdefault(head, set()).add(stream)
        return {head: sorted(found[head]) for head in sorted(found, key=lambda head: head or "")}

    @cached_property
    def answer_of(self) -> tuple[int, ...]:
        """The index of each ablation's answer among the answers of `passing`, in order."""
        every = ((s, head) for head, streams in self.passing.items() for s in streams)
        places = {answer: place for place, answer in enumerate(every)}
        return tuple(places[answer] for answer in zip(self.stream_of, self.heads, strict=True))

    @property
    def answers(self) -> int:
        """The number of head passes of each predicting token, summed over all streams."""
        return sum(map(len, self.passing.values()))

    @property
    def has_ends(self) -> bool:
        """True if an embedding or an output head has a format somewhere."""
        return any((*self.starts, *self.heads))

    @property
    def attention_of(self) -> Iterator[tuple[int | None, ...]]:
        """The computed attention that each ablation uses, layer by layer; None = none."""
        for step, path in zip(self.steps, self.paths, strict=True):
            of = {
                stream: step.computed.index(source)
                for stream, source in zip(step.entering, step.attention, strict=True)
                if source is not None
            }
            yield tuple(of.get(stream) for stream in path)

    @property
    def attention_passes(self) -> int:
        """The number of attention passes of each token, summed over all streams."""
        return sum(len(step.computed) for step in self.steps) + self.repeats

    @property
    def mlp_passes(self) -> int:
        """The number of MLP passes of each token, summed over all streams."""
        return sum(len(step.mlps) for step in self.steps) + self.repeats

    @property
    def layer_passes(self) -> float:
        """The number of layer passes of each token; an attention or an MLP alone counts as half."""
        return (self.attention_passes + self.mlp_passes) / 2

    @property
    def is_divided(self) -> bool:
        """True if streams may fork between the attention and the MLP of a layer."""
        return self.steps[0].divided

    @property
    def has_groups_of_maps(self) -> bool:
        """True if an attention's or an MLP's linear maps are rounded as a whole."""
        return any(done.has_groups_of_maps for step in self.steps for done in step.done)

    @property
    def repeats(self) -> int:
        """The number of additional layer passes of repeated layers."""
        return sum(span.extra for step in self.steps for _, _, span in step.repeating)

    @property
    def streams(self) -> int:
        """The number of streams after the last layer."""
        return max(self.stream_of) + 1


def plan_streams(
    ablations: Sequence[Ablation], layers: int, tied: bool = False, divided: bool = True
) -> StreamPlan:
    """Plan the layer at which each ablation forks: the first where its set of changes differs.

    The baseline must be among the ablations and becomes stream 0. An embedding in a format forks
    in front of the first layer, an output head in a format behind the last one, and a `tied` one at
    both. Without `divided`, each stream passes the layers whole.
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
            # A stream that passes the layer keeps its number: the baseline remains stream 0.
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
    """Count the attention and MLP passes of a token if each ablation runs separately."""
    actions = [ablation.at(layer).action for ablation in ablations for layer in range(layers)]
    again = sum(span.extra for ablation in ablations for span in ablation.repeated)
    entered = sum(action.enters for action in actions) + again
    return entered - actions.count(Action.NO_ATTENTION), entered - actions.count(Action.NO_MLP)
