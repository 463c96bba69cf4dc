"""Sharing over depth, computed: a model's layers pass on all streams of a plan as one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tracker.core.kinds import Action
from tracker.engine.refusal import RefusalError
from tracker.engine.scoring.masks import Masks, mask_place
from tracker.engine.scoring.stand_in import StandIn
from tracker.engine.scoring.streams import LayerStep, StreamPlan
from tracker.models.quantised import linear_maps, outputs_first, quantised
from tracker.models.sublayers import (
    Sublayers,
    first_of,
    lent,
    nothing,
    replaced_forward,
    returned,
    state_of,
    with_first,
)

Observer = Callable[[int, Tensor, Tensor], None]
"""Called with a layer and the baseline's input and output of it, each [rows, tokens, hidden]."""


@contextmanager
def forking(
    layers: nn.ModuleList,
    plan: StreamPlan,
    sublayers: Sequence[Sublayers] | None = None,
    observe: Observer | None = None,
    batched: bool = False,
    masks: Masks | None = None,
    stand_ins: Mapping[int, StandIn] | None = None,
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
        sublayers: Each layer's attention and MLP; needed where the plan removes one alone.
        observe: Sees the baseline's input and output of each layer.
        batched: Whether what a layer is given besides is cut to the streams that enter it.
        masks: What each layer gets in place of the model's own mask.
        stand_ins: What stands in for layers; needed where the plan asks for it.

    Yields:
        Nothing; on exit, also by an exception, the layers are what they were.
    """
    handed: list[Tensor] = []
    with ExitStack() as stack:
        for index, (layer, step) in enumerate(zip(layers, plan.steps, strict=True)):
            turn = _Turn()
            fork = _LayerFork(
                index,
                layer,
                step,
                layer.forward,
                observe,
                batched,
                masks,
                mask_place(layer),
                handed,
                stand_ins.get(index) if stand_ins else None,
                turn,
            )
            stack.enter_context(replaced_forward(layer, fork))
            inside: list[tuple[nn.Module, tuple[int | None, ...]]] = []
            if step.has_sublayers:
                assert sublayers is not None
                parts = sublayers[index]
                inside = [(parts.attention, step.attention), (parts.mlp, step.mlp)]
            for module, sources in inside:
                part = _SublayerFork(module, sources, module.forward, batched, turn)
                stack.enter_context(replaced_forward(module, part))
            if any(action.bits for action in step.actions):
                for each in linear_maps(layer, f"layer {index}"):
                    mine = [s for module, s in inside if any(m is each for m in module.modules())]
                    own = _QuantisedFork(each, step, mine[0] if mine else None, each.forward, turn)
                    stack.enter_context(replaced_forward(each, own))
        yield


@dataclass
class _Turn:
    """Whether a layer is passed for the first time, by all who enter it, or by those once more."""

    second: bool = False


@dataclass(frozen=True)
class _LayerFork:
    """One layer's forward pass over all streams: it stands in for `layer.forward`.

    In come [streams × rows, tokens, hidden], seen as `before` [streams, rows, tokens, hidden]. The
    streams that enter the layer are picked from it, a new one by its parent's place, and pass the
    layer as one batch `going`. Its output fills their places in `after` [streams after, rows,
    tokens, hidden]; a stream that skips the layer gets its own `before` there, or what stands in
    for the layer makes of it. Nothing is added up between streams, so each place holds what the
    layer, or nothing, makes of it alone. Streams that repeat the layer pass it once more, as a
    smaller batch, before their places are filled.

    `handed` holds what earlier layers of the pass returned besides the hidden state. A layer that
    is given one of those, while streams fork, is refused: it would be another stream's.
    """

    index: int
    module: nn.Module
    step: LayerStep
    layer: Callable[..., Any]
    observe: Observer | None
    batched: bool
    masks: Masks | None
    mask_place: int | None
    handed: list[Tensor]
    stand_in: StandIn | None
    turn: _Turn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take and return a hidden state [streams × rows, tokens, hidden], as the layer does."""
        if self.index == 0:
            self.handed.clear()
        step = self.step
        given = (*args, *kwargs.values())
        if len(step.actions) > 1 and any(a is b for a in given for b in self.handed):
            raise RefusalError("its layers hand more to each other than the hidden state")
        if self.masks is not None:
            args, kwargs = self.masks.put(self.index, self.mask_place, args, kwargs)
        named = "hidden_states" in kwargs
        hidden: Tensor = kwargs.pop("hidden_states") if named else args[0]
        rest = args if named else args[1:]
        if len(hidden) % step.streams:
            raise RefusalError("something between its layers changes the batch")
        before = _by_stream(hidden, step.streams)
        entering, origins = list(step.entering), [step.origin(stream) for stream in step.entering]
        everyone = origins == list(range(step.streams))
        going = lent(self.module, hidden) if everyone else before[origins].flatten(0, 1)
        if self.batched and not everyone:
            rest, kwargs = _cut((rest, kwargs), step.streams, entering)
        rows = tuple(before.shape[1:])
        output = self._passed(going, named, rest, kwargs, rows, len(entering))
        if everyone:
            returned(self.module, going, hidden)
        passed = first_of(output)
        if passed is not output:
            self.handed.extend(other for other in output[1:] if isinstance(other, Tensor))
        after = passed.new_empty(len(step.actions), *before.shape[1:])
        passed = _by_stream(passed, len(entering))
        if repeating := step.places(Action.REPEAT):
            if self.batched:
                raise RefusalError("a layer that is passed twice would need two caches")
            self.turn.second = True
            once = passed[repeating].flatten(0, 1)
            twice = self._passed(once, named, rest, kwargs, rows, len(repeating))
            self.turn.second = False
            passed[repeating] = _by_stream(first_of(twice), len(repeating))
        if entering == list(range(len(entering))):
            after[: len(entering)] = passed
        else:
            after[entering] = passed
        for stream, action in enumerate(step.actions):
            if action is Action.SKIP:
                after[stream] = before[step.origin(stream)]
            elif action.is_fitted:
                assert self.stand_in is not None
                after[stream] = self.stand_in.change(action, before[step.origin(stream)])
        if self.observe is not None:
            self.observe(self.index, before[0].to(after.device), after[0])
        return with_first(output, after.flatten(0, 1))

    def _passed(
        self,
        going: Tensor,
        named: bool,
        rest: Any,
        kwargs: Any,
        rows: tuple[int, ...],
        streams: int,
    ) -> Any:
        """Let streams pass the layer, and refuse what it returns where that is no hidden state."""
        if streams > 1 and not self.batched:
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
class _QuantisedFork:
    """One linear map of a layer, in which some streams have quantised weights.

    In come [streams × rows, tokens, inputs], or all of a stream's tokens in a row, of the streams
    that the part of the layer computes: those that `sources` names where a sublayer is removed from
    others, else all that enter. Everything is mapped once, and what comes of the quantised streams
    is computed again with the weights that they have, which are made anew in each call: kept, they
    would take as much memory as the model.
    """

    module: nn.Module
    step: LayerStep
    sources: tuple[int | None, ...] | None
    forward: Callable[..., Any]
    turn: _Turn

    def __call__(self, given: Tensor) -> Tensor:
        """Take and return what the linear map does."""
        output: Tensor = self.forward(given)
        if self.turn.second:
            return output
        entering = range(len(self.step.entering))
        computed = sorted({*(entering if self.sources is None else self.sources)} - {None})
        if len(given) % len(computed):
            raise RefusalError("a linear map of its layers has no row a stream")
        ours, found = _by_stream(given, len(computed)), _by_stream(output, len(computed))
        actions = [self.step.actions[stream] for stream in self.step.entering]
        for bits in {action.bits for action in actions if action.bits is not None}:
            places = [computed.index(i) for i, action in enumerate(actions) if action.bits == bits]
            if places:
                weight = quantised(outputs_first(self.module), bits)
                bias = cast("Tensor | None", self.module.bias)
                found[places] = linear(ours[places], weight, bias)
        return found.reshape(output.shape)


@dataclass(frozen=True)
class _SublayerFork:
    """One sublayer's forward pass over the streams in its layer: it stands in for `module.forward`.

    Streams that fork within the layer enter it with the same state, so the attention of such a
    state is computed once: with its MLP removed, a stream takes the attention of the baseline.
    `sources` names for each entering stream the place whose output it takes, and None where the
    sublayer is removed. The input [entering × rows, tokens, hidden] is cut to the places that are
    computed, the sublayer runs on these, and its output is dealt out to [entering × rows, tokens,
    hidden] again. For None stands what a silent sublayer gives: zeros where the layer adds to the
    residual stream, the residual stream itself where the sublayer does. What else the sublayer is
    given is cut along with it, if it has a row a stream.
    """

    module: nn.Module
    sources: tuple[int | None, ...]
    forward: Callable[..., Any]
    batched: bool
    turn: _Turn

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take and return what the sublayer does, computing only what the streams need."""
        entering = len(self.sources)
        computed = sorted({source for source in self.sources if source is not None})
        if self.turn.second or computed == list(range(entering)):
            return self.forward(*args, **kwargs)
        given = (args, kwargs)
        if self.batched:
            args, kwargs = _cut((args, kwargs), entering, computed)
        else:
            hidden: Tensor = state_of(args, kwargs)
            args = tuple(self._chosen(value, hidden, computed) for value in args)
            kwargs = {name: self._chosen(v, hidden, computed) for name, v in kwargs.items()}
            alibi = kwargs.get("alibi")
            if isinstance(alibi, Tensor) and alibi.ndim == 3:
                kwargs["alibi"] = _by_stream(alibi, entering)[computed].flatten(0, 1)
        output = self.forward(*args, **kwargs)
        # Never of no stream: the baseline passes everything.
        added = first_of(output)
        each = _by_stream(added, len(computed))
        silent = nothing(self.module, *given, added, len(added) * entering // len(computed))
        nil = _by_stream(silent, entering)
        merged = torch.stack(
            [
                nil[place] if source is None else each[computed.index(source)]
                for place, source in enumerate(self.sources)
            ]
        ).flatten(0, 1)
        return with_first(output, merged)

    def _chosen(self, value: Any, hidden: Tensor, computed: list[int]) -> Any:
        """Cut what has a row a stream and a column a token, as the hidden states have."""
        if not isinstance(value, Tensor) or value.shape[:2] != hidden.shape[:2]:
            return value
        return _by_stream(value, len(self.sources))[computed].flatten(0, 1)


def _cut(value: Any, streams: int, entering: list[int]) -> Any:
    """Cut whatever has a row a stream to the streams that enter."""
    if isinstance(value, Tensor):
        return value[entering] if value.ndim and len(value) == streams else value
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


def _by_stream(batch: Tensor, streams: int) -> Tensor:
    """View a batch stream by stream: [streams × n, …] as [streams, n, …]."""
    return batch.reshape(streams, -1, *batch.shape[1:])
