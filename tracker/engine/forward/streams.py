"""Plan the sharing of layers: each ablation starts its own stream at its first changed layer.

If layer l is removed, layers 0 to l−1 compute the same as in the baseline. Therefore all ablations
run in one batch. The part of the batch that computes one ablation is called a stream. At the first
layer that an ablation changes, a new stream starts from the *input* of this layer. Measuring the
removal of each single layer of L layers takes L(L+1)/2 layer passes instead of L². Inside a layer,
streams also share sublayers: removing only the MLP does not change the attention's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from tracker.schema.changes import INTACT, Ablation, Change
from tracker.schema.grouping import group_by
from tracker.schema.kinds import Action

Ablations = Sequence[Ablation]
_PART_ACTIONS = (Action.PASS, Action.NO_ATTENTION, Action.NO_MLP, Action.NO_PARTS)
_DIVIDING_ACTIONS = (*_PART_ACTIONS[1:], Action.ROUNDED)


@dataclass(frozen=True)
class LayerStep:
    """The computation plan of one layer for all streams (parts of a batch).

    Attributes:
        n_streams: Number of streams before the layer.
        parents: For each stream that starts at this layer, the stream whose input is copied.
        ablations: Changes of this layer (e.g. removed heads) in each stream, including new streams.
        divided: Whether the attention and the MLP can run for different sets of streams.
    """

    n_streams: int
    parents: tuple[int, ...]
    ablations: tuple[Ablation, ...]
    divided: bool = True

    @cached_property
    def actions(self) -> tuple[Action, ...]:
        """For each stream, the action at the layer, e.g. to skip the layer."""
        return tuple(ablation.action for ablation in self.ablations)

    @cached_property
    def entrants(self) -> tuple[int, ...]:
        """Indices of the streams that run the layer's modules.

        Streams that skip or replace the layer, or copy another stream's output, are left out.
        """
        copies = {stream for stream, source, _ in self.repeated_spans if source != stream}
        return tuple(i for i, a in enumerate(self.actions) if a.runs_modules and i not in copies)

    @cached_property
    def repeated_spans(self) -> tuple[tuple[int, int, Change], ...]:
        """(stream, source, change) for each repeated range of layers that ends at this layer.

        `stream` copies the hidden states of the stream `source`. Then `stream` runs the layers of
        `change` again.
        """
        first_streams: dict[int, int] = {}
        for stream, action in enumerate(self.actions):
            if action in (Action.PASS, Action.REPEAT):
                first_streams.setdefault(self.origin(stream), stream)
        return tuple(
            (stream, first_streams[self.origin(stream)], span)
            for stream, ablation in enumerate(self.ablations)
            for span in ablation.repetitions
        )

    @cached_property
    def divided_step(self) -> tuple[LayerStep, tuple[int, ...]]:
        """A plan of this layer for only the streams that change modules inside the layer.

        The plan includes the baseline, and all streams with the same input as an included stream.
        Returns the plan, and the indices of the included streams that run modules. Both are empty
        if no stream changes modules.
        """
        origins = {self.origin(i) for i in self.entrants if self.actions[i] in _DIVIDING_ACTIONS}
        origins |= {0} if origins else set()
        streams = [i for i in range(len(self.ablations)) if self.origin(i) in origins]
        index_of = {stream: number for number, stream in enumerate(streams)}
        new_streams = [stream for stream in streams if stream >= self.n_streams]
        step = LayerStep(
            len(streams) - len(new_streams),
            tuple(index_of[self.origin(stream)] for stream in new_streams),
            tuple(self.ablations[stream] for stream in streams),
            self.divided,
        )
        return step, tuple(streams[index] for index in step.entrants)

    @cached_property
    def has_sublayers(self) -> bool:
        """True if any stream removes a part of this layer, e.g. the MLP or heads."""
        return self.divided and any(self.actions[i] in _PART_ACTIONS[1:] for i in self.entrants)

    @cached_property
    def components(self) -> set[str]:
        """Kinds of parts that streams change in the layer, such as `head` or `expert`.

        For quantised weights, the kind is `rounded`.
        """
        changes = {change for ablation in self.ablations for change in ablation.changes}
        return {c.component if c.action is not Action.ROUNDED else c.action.value for c in changes}

    def origin(self, stream: int) -> int:
        """Return the stream whose hidden states are the input of `stream` at this layer."""
        return stream if stream < self.n_streams else self.parents[stream - self.n_streams]

    @cached_property
    def attention_sources(self) -> tuple[int | None, ...]:
        """For each stream in `entrants`, the stream whose attention output is used.

        Streams with equal attention share one output. An entry is an index into `entrants`, or None
        if the attention is removed.
        """
        index_of: dict[tuple[int, Ablation | None], int] = {}
        sources: list[int | None] = []
        for index, stream in enumerate(self.entrants):
            action = self.actions[stream]
            if action is Action.NO_ATTENTION:
                sources.append(None)
                continue
            ablation = None if action in _PART_ACTIONS and self.divided else self.ablations[stream]
            sources.append(index_of.setdefault((self.origin(stream), ablation), index))
        return tuple(sources)

    @cached_property
    def _projection_pairs(self) -> tuple[tuple[int, tuple[Change, ...]] | None, ...]:
        """For each stream in `entrants`, the stream that computes its attention, and removed heads.

        The pair is None if the attention is removed.
        """
        return tuple(
            None if source is None else (source, self.ablations[stream].heads)
            for stream, source in zip(self.entrants, self.attention_sources, strict=True)
        )

    @cached_property
    def projections(self) -> tuple[tuple[int, tuple[Change, ...]], ...]:
        """Distinct pairs: index of a stream that computes its attention, and the heads to remove.

        The attention's output projection is computed once for each pair.
        """
        return tuple(sorted({pair for pair in self._projection_pairs if pair}))

    @cached_property
    def head_sources(self) -> tuple[int | None, ...]:
        """For each stream in `entrants`, its index in `projections`; None without attention."""
        index_of = {pair: index for index, pair in enumerate(self.projections)}
        return tuple(pair and index_of[pair] for pair in self._projection_pairs)

    @cached_property
    def attentions(self) -> tuple[int, ...]:
        """The streams whose attention is computed, as indices into `entrants`."""
        return tuple(sorted({source for source in self.attention_sources if source is not None}))

    @cached_property
    def mlps(self) -> tuple[int, ...]:
        """The streams whose MLP is computed, as indices into `entrants`."""
        actions = enumerate(self.actions[stream] for stream in self.entrants)
        return tuple(index for index, action in actions if action is not Action.NO_MLP)

    @property
    def mlp_ablations(self) -> list[Ablation]:
        """The changes of this layer in each stream that computes the MLP."""
        return [self.ablations[self.entrants[index]] for index in self.mlps]

    @cached_property
    def mlp_sources(self) -> tuple[int | None, ...]:
        """For each stream in `entrants`, its index in `mlps`; None if the MLP is removed."""
        index_of = {entrant: number for number, entrant in enumerate(self.mlps)}
        return tuple(map(index_of.get, range(len(self.entrants))))


@dataclass(frozen=True)
class StreamPlan:
    """Plan that assigns each ablation to a stream (part of a batch).

    Attributes:
        steps: The plan of each layer.
        paths: For each layer and ablation, the index of the stream that computes the ablation.
        embedding_formats: Embedding format of each stream before the first layer; None if
            unchanged.
        head_formats: Format of the output head for each ablation; empty if no logits are computed.
    """

    steps: tuple[LayerStep, ...]
    paths: tuple[tuple[int, ...], ...]
    embedding_formats: tuple[str | None, ...] = (None,)
    head_formats: tuple[str | None, ...] = ()

    @property
    def final_streams(self) -> tuple[int, ...]:
        """For each ablation, the index of the ablation's stream after the last layer."""
        return self.paths[-1]

    @cached_property
    def head_streams(self) -> dict[str | None, list[int]]:
        """Weight formats of the output head, with the streams that use each format.

        The format None is the unchanged output head.
        """
        pairs = sorted((head or "", stream) for stream, head in set(self._answers))
        by_head = group_by(pairs, lambda pair: pair[0] or None)
        return {head: [stream for _, stream in group] for head, group in by_head.items()}

    @property
    def _answers(self) -> Iterator[tuple[int, str | None]]:
        """Yield a pair for each ablation: its last stream and its output head's format."""
        return zip(self.final_streams, self.head_formats, strict=True)

    @cached_property
    def answer_indices(self) -> tuple[int, ...]:
        """For each ablation, the index of its result among the output head's results.

        Ablations with the same last stream and head format share one result.
        """
        answers = ((s, head) for head, streams in self.head_streams.items() for s in streams)
        index_of = {answer: index for index, answer in enumerate(answers)}
        return tuple(index_of[answer] for answer in self._answers)

    @property
    def n_answers(self) -> int:
        """Number of results that the output head computes for each predicted token."""
        return sum(map(len, self.head_streams.values()))

    @property
    def has_rounded_embeddings(self) -> bool:
        """True if some ablation has a quantised embedding or output head."""
        return any((*self.embedding_formats, *self.head_formats))

    @property
    def attention_indices(self) -> Iterator[tuple[int | None, ...]]:
        """Yield for each layer a tuple: the index of the attention output of each ablation.

        Ablations with the same attention have the same index. The index is None if an ablation
        computes no attention in the layer.
        """
        for step, path in zip(self.steps, self.paths, strict=True):
            index_of = {
                stream: step.attentions.index(source)
                for stream, source in zip(step.entrants, step.attention_sources, strict=True)
                if source is not None
            }
            yield tuple(index_of.get(stream) for stream in path)

    @property
    def attention_passes(self) -> int:
        """The number of attention computations per token, summed over all layers and streams."""
        return sum(len(step.attentions) for step in self.steps) + self.n_repeats

    @property
    def mlp_passes(self) -> int:
        """The number of MLP computations per token, summed over all layers and streams."""
        return sum(len(step.mlps) for step in self.steps) + self.n_repeats

    @property
    def layer_passes(self) -> float:
        """Number of layers that run per token, for all streams; an attention or MLP counts half."""
        return (self.attention_passes + self.mlp_passes) / 2

    @property
    def has_groups_of_maps(self) -> bool:
        """True if any ablation quantises a whole attention or a whole MLP."""
        return any(done.has_map_groups for step in self.steps for done in step.ablations)

    @property
    def n_repeats(self) -> int:
        """Number of layers that run per token in addition because of repeated layers."""
        return sum(span.extra for step in self.steps for _, _, span in step.repeated_spans)

    @property
    def n_streams(self) -> int:
        """The number of streams after the last layer."""
        return max(self.final_streams) + 1


def plan_streams(
    ablations: Ablations, n_layers: int, is_tied: bool = False, divided: bool = True
) -> StreamPlan:
    """Plan for each layer which parts of the batch (streams) compute which ablations.

    The baseline must be among the ablations and becomes stream 0. `is_tied` states that embedding
    and output head have the same weights. `divided` states that streams with different changes in a
    layer can share one attention.
    """
    baseline_index = ablations.index(INTACT)
    order = [baseline_index, *(i for i in range(len(ablations)) if i != baseline_index)]
    by_embedding = group_by(order, lambda i: ablations[i].outer_formats.get("embedding"))
    groups = [*by_embedding.values()]
    steps, paths = [], []
    for layer in range(n_layers):
        changes = [ablation.at_layer(layer) for ablation in ablations]
        old_forks, new_forks = [], []  # parent stream, its change, the ablations with that change
        for stream, group in enumerate(groups):
            members = group_by(group, changes.__getitem__)
            # A stream that passes the layer keeps its number: the baseline remains stream 0.
            first, *others = sorted(members, key=lambda change: change.action is not Action.PASS)
            old_forks.append((stream, first, members[first]))
            new_forks += [(stream, change, members[change]) for change in others]
        parents, forks = tuple(stream for stream, *_ in new_forks), [*old_forks, *new_forks]
        steps.append(LayerStep(len(groups), parents, tuple(c for _, c, _ in forks), divided))
        groups = [group for *_, group in forks]
        stream_of = {i: stream for stream, group in enumerate(groups) for i in group}
        paths.append(tuple(stream_of[i] for i in range(len(ablations))))
    head = "embedding" if is_tied else "lm_head"
    head_formats = tuple(ablation.outer_formats.get(head) for ablation in ablations)
    return StreamPlan(tuple(steps), tuple(paths), tuple(by_embedding), head_formats)


def count_unshared_computations(ablations: Ablations, n_layers: int) -> tuple[int, int]:
    """Count attention and MLP computations per token if each ablation runs alone.

    Returns the number of attentions and the number of MLPs, over all layers and ablations.
    """
    actions = [a.at_layer(layer).action for a in ablations for layer in range(n_layers)]
    n_repeated = sum(span.extra for ablation in ablations for span in ablation.repetitions)
    n_entered = sum(action.runs_modules for action in actions) + n_repeated
    return n_entered - actions.count(Action.NO_ATTENTION), n_entered - actions.count(Action.NO_MLP)
