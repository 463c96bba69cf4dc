"""Sharing over depth, computed: a model's layers pass on all streams of a plan as one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tracker.core.changes import Change
from tracker.core.grouping import grouped
from tracker.core.kinds import Action
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.masks import Masks, mask_place
from tracker.engine.scoring.stand_in import StandIn
from tracker.engine.scoring.streams import LayerStep, StreamPlan
from tracker.models.hooks import (
    call_with,
    first_of,
    learn_writes,
    nothing,
    protected,
    replaced_forward,
    state_of,
    with_first,
)
from tracker.models.offloaded import is_absent
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.experts import Experts, SharedExperts, routed
from tracker.models.parts.heads import Heads
from tracker.models.parts.linear_maps import LinearMap, holding, weights_in
from tracker.models.parts.probe import integer_tables
from tracker.models.parts.sublayers import Sublayers
from tracker.models.slices import neighbours, put, take

Observer = Callable[[int, Tensor, Tensor], None]
"""Called with a layer and the baseline's input and output of it, each [rows, tokens, hidden]."""
_Formats = tuple[tuple[str, str], ...]
"""Paths of the maps of a module that are rounded, each with its format."""
_Forks = Iterator[tuple[nn.Module, Callable[..., Any]]]
"""Modules of a layer, with what stands in for each."""


@contextmanager
def forking(
    layers: nn.ModuleList,
    plan: StreamPlan,
    anatomy: LayerAnatomy | None = None,
    observe: Observer | None = None,
    masks: Masks | None = None,
    stand_ins: Mapping[int, StandIn] | None = None,
    begun: Sequence[Tensor] = (),
    at_once: int | None = None,
    batched: bool = False,
) -> Iterator[None]:
    """Let a model's layers fork streams while the context is open.

    The streams are the batch. The model is called with `rows` rows, [rows, tokens, hidden] reach
    the first layer, and the batch grows on the way: a new stream starts from its parent's hidden
    state before the layer, a stream that passes goes through the layer, one that skips it keeps
    what it came with. Behind the last layer stand [streams × rows, tokens, hidden], stream by
    stream: block s of `rows` rows is stream s. Each is what the pruned model computes, because a
    layer treats the rows of a batch apart and everything between layers is in the hidden state;
    where either is not so, the pass is refused here or the check on a miniature finds it.

    What else a layer is given (masks, rotary embeddings, positions) is made by the model for `rows`
    rows, so it must broadcast over the batch, or with `batched` may have a row a stream.

    Args:
        layers: The model's decoder layers.
        plan: Where to fork.
        anatomy: The parts of the layers; those that the plan takes apart are found.
        observe: Sees the baseline's input and output of each layer.
        masks: What each layer gets in place of the model's own mask.
        stand_ins: What stands in for layers; the same.
        begun: What streams with other embeddings enter the first layer with, each [rows, tokens,
            …]: `plan.starts`, but for the model's own.
        at_once: How many streams pass a layer at once, but for those that it is taken apart for;
            None where all must: with a cache, or where a layer's weights come past.
        batched: Whether what a layer is given besides is cut to the streams that enter it.

    Yields:
        Nothing; on exit, also by an exception, the layers are what they were.
    """
    common = _Pass(at_once, observe, batched, masks, stand_ins or {}, begun, [], [])
    with ExitStack() as stack:
        # A fork holds all others, so that what they hold would stay until Python looks for cycles.
        stack.callback(common.forks.clear)
        for index, (layer, whole) in enumerate(zip(layers, plan.steps, strict=True)):
            step, apart = whole, whole.entering
            if at_once is not None and len(apart) > at_once:
                step, apart = whole.apart
            fork = _LayerFork(index, layer, whole, apart, layer.forward, common)
            common.forks.append(fork)
            stack.enter_context(replaced_forward(layer, fork))
            for module, part in _forks_inside(layer, index, step, anatomy, batched):
                stack.enter_context(fork.turn.apart(module, part))
        yield


def _forks_inside(
    layer: nn.Module, index: int, step: LayerStep, anatomy: LayerAnatomy | None, batched: bool
) -> _Forks:
    """Give modules of a layer with what stands in for each, made when those before it stand in."""
    if anatomy is None:
        return
    name = anatomy.name(index)
    # Which of the entering streams each part of the layer computes.
    computing: list[tuple[nn.Module, Sequence[int]]] = []
    if step.has_sublayers:
        parts = anatomy.at(Sublayers, index)
        for module, computed, taken, made in (
            (parts.attention, step.computed, step.projected, len(step.heads)),
            (parts.mlp, step.mlps, step.mlp, len(step.mlps)),
        ):
            computing.append((module, computed))
            yield module, _SublayerFork(module, computed, taken, made, module.forward, batched)
    heads = anatomy.at(Heads, index) if "heads" in step.changes else None
    if heads is not None:
        projection = layer.get_submodule(heads.projection)
        computing.insert(0, (projection, [source for source, _ in step.heads]))
    if "rounded" in step.changes:
        yield from _rounded_forks(index, step, anatomy, computing)
    if heads is not None:
        columns = [[heads.columns(part, name) for part in gone] for _, gone in step.heads]
        of = [step.computed.index(source) for source, _ in step.heads]
        yield projection, _HeadFork(of, columns, projection.forward)
    if "experts" in step.changes:
        experts = anatomy.at(Experts, index)
        router = layer.get_submodule(experts.router)
        kept = [experts.without(gone, name) if gone else None for gone in step.experts]
        yield router, _RouterFork(router, experts, kept, router.forward)
    if "shared" in step.changes:
        for path in anatomy.at(SharedExperts, index).paths:
            module = layer.get_submodule(path)
            yield module, _SharedFork(step, module.forward)


def _rounded_forks(
    index: int,
    step: LayerStep,
    anatomy: LayerAnatomy,
    computing: Sequence[tuple[nn.Module, Sequence[int]]],
) -> _Forks:
    """Give the modules with other weights in some streams; `computing` says which pass a module."""
    forms = [anatomy.formats(index, step.done[stream].rounded) for stream in step.entering]
    maps = {path: anatomy.map_at(index, path) for form in forms for path in form}
    weights = partial(anatomy.weights.of, index)
    for module, held in grouped(maps.items(), lambda each: each[1].module).items():
        mine = [s for part, s in computing if any(m is module for m in part.modules())]
        asked = [
            tuple((path, forms[source][path]) for path, _ in held if path in forms[source])
            for source in (mine[0] if mine else range(len(step.entering)))
        ]
        fork = _ExpertsFork if held[0][1].experts else _LinearFork
        yield module, fork(module, maps, asked, weights, module.forward)


@dataclass
class _Turn:
    """What a layer's own modules must know of the pass, and what those behind it of the layer.

    Attributes:
        whole: Whether streams pass the layer for which it is not taken apart.
        given: What the layer was given besides the hidden state, by place and by name, and whether
            that came by name, where a stretch that is passed again holds the layer.
    """

    whole: bool = False
    given: tuple[bool, Any, Any] | None = None

    def apart(self, module: nn.Module, fork: Callable[..., Any]) -> AbstractContextManager[None]:
        """Let a fork stand in for a module, but where streams pass the layer whole."""
        own = module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            return own(*args, **kwargs) if self.whole else fork(*args, **kwargs)

        return replaced_forward(module, call)


@dataclass(frozen=True)
class _Pass:
    """Settings and records that the forks of all layers share.

    Attributes:
        at_once: How many streams pass a layer at once; None for all.
        observe: Sees the baseline's input and output of each layer.
        batched: Whether what a layer is given besides is cut to the streams that enter it.
        masks: What each layer gets in place of the model's own mask.
        stand_ins: What stands in for layers.
        begun: What streams with other embeddings enter the first layer with.
        handed: What earlier layers of the pass returned besides the hidden state.
        forks: The forks, in the order of their layers.
    """

    at_once: int | None
    observe: Observer | None
    batched: bool
    masks: Masks | None
    stand_ins: Mapping[int, StandIn]
    begun: Sequence[Tensor]
    handed: list[Tensor]
    forks: list[_LayerFork]


@dataclass(frozen=True)
class _LayerFork:
    """One layer's forward pass over all streams: it stands in for `layer.forward`.

    In come [streams × rows, tokens, hidden], seen as `before` [streams, rows, tokens, hidden]. The
    streams that enter the layer are picked from it, a new one by its parent's place: first those
    that it is taken `apart` for, as one batch, then the others, `at_once` at a time, which keeps
    what is between two operations in the processor's cache. Their output fills their places in
    `after` [streams after, rows, tokens, hidden]; a stream that skips the layer gets its own
    `before` there, or what stands in for the layer makes of it. Nothing is added up between
    streams, so each place holds what the layer, or nothing, makes of it alone. Streams that repeat
    a stretch of layers which ends here pass it again before their places are filled: each layer of
    it with what it was given besides the hidden state when all passed it.

    A layer that is given what an earlier one returned besides the hidden state, while streams fork,
    is refused: it would be another stream's.
    """

    index: int
    module: nn.Module
    step: LayerStep
    apart: Sequence[int]
    layer: Callable[..., Any]
    common: _Pass
    turn: _Turn = field(default_factory=_Turn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take and return a hidden state [streams × rows, tokens, hidden], as the layer does."""
        step, common = self.step, self.common
        if self.index == 0:
            common.handed.clear()
        given = (*args, *kwargs.values())
        if len(step.actions) > 1 and any(a is b for a in given for b in common.handed):
            raise RefusalError("its layers hand more to each other than the hidden state")
        if common.masks is not None:
            args, kwargs = common.masks.put(self.index, mask_place(self.module), args, kwargs)
        named = "hidden_states" in kwargs
        hidden: Tensor = kwargs.pop("hidden_states") if named else args[0]
        rest = args if named else args[1:]
        if self.index == 0 and common.begun:
            hidden = torch.cat([hidden, *common.begun])
        if len(hidden) % step.streams:
            raise RefusalError("something between its layers changes the batch")
        before = _by_stream(hidden, step.streams)
        rows = tuple(before.shape[1:])
        if common.batched and step.entering != tuple(range(step.streams)):
            rest, kwargs = _cut((rest, kwargs), step.streams, list(step.entering))
        self.turn.given = (named, rest, kwargs)
        output: Any = None
        after = hidden
        for some in self._batches():
            self.turn.whole = some is not self.apart
            origins = [step.origin(stream) for stream in some]
            near = neighbours(origins)
            is_view = len(near) == 1
            state = (before[near[0]] if is_view else take(before, origins)).flatten(0, 1)
            going = protected(self.module, state) if is_view else state
            given = self._passed(going, rows, len(some))
            learn_writes(self.module, going, state)
            passed = first_of(given)
            if output is None:
                output, after = given, passed.new_empty(len(step.actions), *rows)
                if passed is not output:
                    common.handed.extend(item for item in output[1:] if isinstance(item, Tensor))
            put(after, some, _by_stream(passed, len(some)))
        self.turn.whole = False
        if step.repeating:
            if common.batched:
                raise RefusalError("a layer that is passed again would need a cache of its own")
            stretches = [stretch for *_, stretch in step.repeating]
            states = take(after, [source for _, source, _ in step.repeating])
            again = self._again(states, stretches, rows)
            put(after, [stream for stream, *_ in step.repeating], again)
        for stream, action in enumerate(step.actions):
            if action is Action.SKIP:
                after[stream] = before[step.origin(stream)]
            elif action.is_fitted:
                stand_in = common.stand_ins[self.index]
                after[stream] = stand_in.change(action, before[step.origin(stream)])
        if common.observe is not None:
            common.observe(self.index, before[0].to(after.device), after[0])
        return with_first(output, after.flatten(0, 1))

    def _batches(self) -> Iterator[Sequence[int]]:
        """Give the streams that enter, as they pass the layer together."""
        if self.apart:
            yield self.apart
        yield from _evenly(sorted({*self.step.entering} - {*self.apart}), self.common.at_once)

    def _again(self, states: Tensor, stretches: Sequence[Change], rows: tuple[int, ...]) -> Tensor:
        """Let streams [streams, rows, tokens, …] pass stretches again that end at this layer."""
        for time in range(1, max(stretch.repeats for stretch in stretches)):
            for layer in range(min(stretch.layer for stretch in stretches), self.index + 1):
                some = [
                    place
                    for place, stretch in enumerate(stretches)
                    if stretch.layer <= layer and time < stretch.repeats
                ]
                if not some:
                    continue
                fork = self.common.forks[layer]
                if any(map(is_absent, fork.module.parameters())):
                    raise RefusalError("layers that rest elsewhere cannot be passed again together")
                fork.turn.whole = True
                for few in _evenly(some, self.common.at_once):
                    going = take(states, few).flatten(0, 1)
                    passed = first_of(fork._passed(going, rows, len(few)))
                    put(states, few, _by_stream(passed, len(few)).to(states.device))
                fork.turn.whole = False
        return states

    def _passed(self, going: Tensor, rows: tuple[int, ...], streams: int) -> Any:
        """Let streams pass the layer, and refuse what it returns where that is no hidden state."""
        assert self.turn.given is not None
        named, rest, kwargs = self.turn.given
        if streams > 1 and not self.common.batched:
            rest = tuple(_per_stream("", value, rows, streams) for value in rest)
            kwargs = {n: _per_stream(n, v, rows, streams) for n, v in kwargs.items()}
        if named:
            output = self.layer(*rest, **{**kwargs, "hidden_states": going})
        else:
            output = self.layer(going, *rest, **kwargs)
        passed = first_of(output)
        if not isinstance(passed, Tensor) or passed.shape != going.shape:
            raise RefusalError(
                f"layer {self.index} returns something else than a hidden state of the shape "
                "that it was given"
            )
        return output


@dataclass(frozen=True)
class _RoundedFork:
    """A module of a layer that has in some streams weights in formats.

    In come the rows of the streams that the part of the layer computes, stream by stream; `asked`
    names for each the paths of its maps that are rounded, with their formats.
    """

    module: nn.Module
    maps: Mapping[str, LinearMap]
    asked: Sequence[_Formats]
    weights: Callable[[str, LinearMap, str], Tensor]
    forward: Callable[..., Any]

    @property
    def alike(self) -> dict[_Formats, list[int]]:
        """Give the places of streams that have the same weights, by these."""
        return grouped(range(len(self.asked)), lambda place: self.asked[place])


class _LinearFork(_RoundedFork):
    """One linear map of a layer.

    In come [streams × rows, tokens, inputs], or all of a stream's tokens in a row. Everything is
    mapped once by the module, and what comes of streams with other weights is computed again with
    these.
    """

    def __call__(self, given: Tensor) -> Tensor:
        """Take and return what the linear map does."""
        output: Tensor = self.forward(given)
        ours = _by_stream(given, len(self.asked), "a linear map of its layers has")
        mapped = _by_stream(output, len(self.asked))
        for formats, places in self.alike.items():
            for path, form in formats:
                bias = cast("Tensor | None", self.module.bias)
                weight = self.weights(path, self.maps[path], form)
                put(mapped, places, linear(take(ours, places), weight, bias))
        return mapped.reshape(output.shape)


class _ExpertsFork(_RoundedFork):
    """The experts of a mixture.

    In come the tokens, all of a stream's in a row, and to which experts each goes with what
    weights. Streams with the same weights are computed together.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take what the experts take, and return what they return, of all streams."""
        streams, state = len(self.asked), state_of(args, kwargs)
        choices = integer_tables((*args, *kwargs.values()))
        if not choices or len(choices[0]) % streams or len(state) % streams:
            raise RefusalError("what its experts are given has no row a stream")

        def of(places: list[int], value: Any) -> Any:
            is_table = isinstance(value, Tensor) and value.shape == choices[0].shape
            if value is not state and not is_table:
                return value
            return take(_by_stream(value, streams), places).flatten(0, 1)

        found: dict[int, Tensor] = {}
        for formats, places in self.alike.items():
            forward = self.forward
            if formats:
                weights = weights_in(self.maps, dict(formats), self.weights)
                own = {name: weight for (_, name), weight in weights.items()}
                forward = holding(self.module, own).forward
            given = [of(places, value) for value in args]
            output = forward(*given, **{name: of(places, v) for name, v in kwargs.items()})
            found |= zip(places, _by_stream(output, len(places)), strict=True)
        return torch.cat([found[place] for place in range(streams)])


@dataclass(frozen=True)
class _SublayerFork:
    """One sublayer's forward pass over the streams in its layer: it stands in for `module.forward`.

    Streams that fork within the layer enter it with the same state, so the attention of such a
    state is computed once: with its MLP removed, a stream takes the attention of the baseline.
    The input [entering × rows, tokens, hidden] is cut to the places that are `computed`, the
    sublayer runs on these, and gives `made` outputs: one for each, or more where some lack heads.
    `taken` names for each entering stream the one that it takes, and None where the sublayer is
    removed: the outputs are dealt out to [entering × rows, tokens, hidden] again. For None stands
    what a silent sublayer gives: zeros where the layer adds to the residual stream, the residual
    stream itself where the sublayer does. What else the sublayer is given is cut along with it, if
    it has a row a stream.
    """

    module: nn.Module
    computed: Sequence[int]
    taken: tuple[int | None, ...]
    made: int
    forward: Callable[..., Any]
    batched: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take and return what the sublayer does, computing only what the streams need."""
        entering, computed = len(self.taken), list(self.computed)
        if self.taken == tuple(range(entering)) == tuple(computed):
            return self.forward(*args, **kwargs)
        given = (args, kwargs)
        if self.batched:
            args, kwargs = _cut((args, kwargs), entering, computed)
        else:
            hidden: Tensor = state_of(args, kwargs)
            args = tuple(self._chosen("", value, hidden) for value in args)
            kwargs = {name: self._chosen(name, value, hidden) for name, value in kwargs.items()}
        output = self.forward(*args, **kwargs)
        # Never of no stream: the baseline passes everything.
        added = first_of(output)
        each = _by_stream(added, self.made, "what its attention makes of its heads has")
        silent = nothing(self.module, *given, added, len(added) * entering // self.made)
        nil = _by_stream(silent, entering)
        sources = enumerate(self.taken)
        merged = [nil[place] if source is None else each[source] for place, source in sources]
        return with_first(output, torch.stack(merged).flatten(0, 1))

    def _chosen(self, name: str, value: Any, hidden: Tensor) -> Any:
        """Cut what has a row a stream: the hidden states, what has their shape, Bloom's ALiBi."""
        if not isinstance(value, Tensor):
            return value
        if value.shape[:2] == hidden.shape[:2] or (name == "alibi" and value.ndim == 3):
            return take(_by_stream(value, len(self.taken)), self.computed).flatten(0, 1)
        return value


@dataclass(frozen=True)
class _HeadFork:
    """An attention's output projection, before which some streams lose heads.

    In come [computed × rows, tokens, columns], all heads side by side; `of` names for each output
    which of these it is made of, and `columns` which columns of it are zero. A checkpoint whose
    projection has zeros there computes the same.
    """

    of: list[int]
    columns: Sequence[Sequence[slice]]
    forward: Callable[..., Any]

    def __call__(self, given: Tensor) -> Any:
        """Take what all heads give, and return what the projection makes of it, an output each."""
        streams = max(self.of) + 1
        states = take(_by_stream(given, streams, "the heads of its attention have"), self.of)
        for state, gone in zip(states, self.columns, strict=True):
            for columns in gone:
                state[..., columns] = 0
        return self.forward(states.flatten(0, 1))


@dataclass(frozen=True)
class _RouterFork:
    """A mixture's router, which in some streams chooses among fewer experts.

    In come the tokens of the streams whose MLPs are computed, stream by stream; `kept` names for
    each the experts that are left, None for all. What the router says of each stream is what it
    says where it has rows for these experts alone, in the numbers of all: so the experts are
    called once.
    """

    module: nn.Module
    experts: Experts
    kept: Sequence[list[int] | None]
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take what the router takes, and return what it returns, of all streams."""
        streams = len(self.kept)
        state: Tensor = state_of(args, kwargs)
        each, given = _by_stream(state, streams, "the router of its experts has"), (args, kwargs)
        all_of_them = [place for place, kept in enumerate(self.kept) if kept is None]
        # Never of no stream: the baseline lacks none.
        whole = call_with(self.forward, take(each, all_of_them).flatten(0, 1), *given)
        parted = zip(*(_by_stream(one, len(all_of_them)) for one in whole), strict=True)
        said = [
            next(parted)
            if kept is None
            else routed(self.module, self.experts, kept, whole, state, given)
            for kept, state in zip(self.kept, each, strict=True)
        ]
        make = getattr(type(whole), "_make", type(whole))
        return make(torch.cat(parts) for parts in zip(*said, strict=True))


@dataclass(frozen=True)
class _SharedFork:
    """A shared expert, which in some streams gives zeros.

    In come the tokens of the streams whose MLPs are computed, stream by stream.
    """

    step: LayerStep
    forward: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take what the expert takes, and return what it returns, of all streams."""
        output = self.forward(*args, **kwargs)
        added = first_of(output)
        by_stream = _by_stream(added, len(self.step.mlps), "its shared experts have").clone()
        for run in neighbours(self.step.without_shared):
            by_stream[run] = 0
        return with_first(output, by_stream.reshape(added.shape))


def _cut(value: Any, streams: int, entering: list[int]) -> Any:
    """Cut whatever has a row a stream to the streams that enter."""
    if isinstance(value, Tensor):
        return take(value, entering) if value.ndim and len(value) == streams else value
    if isinstance(value, tuple):
        return tuple(_cut(item, streams, entering) for item in value)
    if isinstance(value, dict):
        return {name: _cut(item, streams, entering) for name, item in value.items()}
    return value


def _per_stream(name: str, value: Any, rows: tuple[int, ...], streams: int) -> Any:
    """Repeat for each stream what does not broadcast: Zamba 2's embeddings, Bloom's ALiBi."""
    if not isinstance(value, Tensor):
        return value
    if value.shape == rows or (name == "alibi" and value.ndim == 3):
        return value.repeat(streams, 1, 1)
    return value


def _evenly(streams: Sequence[int], most: int | None) -> Iterator[Sequence[int]]:
    """Part streams into as few groups of so many at most as there can be, of about one size."""
    groups = -(-len(streams) // most) if most else 1
    size = -(-len(streams) // groups) if streams else 1
    yield from (streams[start : start + size] for start in range(0, len(streams), size))


def _by_stream(batch: Tensor, streams: int, owner: str = "a batch has") -> Tensor:
    """View a batch stream by stream: [streams × n, …] as [streams, n, …].

    RefusalError that its `owner` has no row a stream, where the rows cannot be divided so.
    """
    if len(batch) % streams:
        raise RefusalError(f"{owner} no row a stream")
    return batch.reshape(streams, -1, *batch.shape[1:])
