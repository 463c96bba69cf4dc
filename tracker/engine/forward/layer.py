"""Forward passes of layers for all streams, and interventions on whole layers.

A model's layers run all streams of a plan as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tracker.core.kinds import Action
from tracker.engine.forward.modules import (
    HeadFork,
    LayerSite,
    ModuleFork,
    RoundedFork,
    RouterFork,
    SharedExpertFork,
    SublayerFork,
    by_stream,
    cut,
    each_tensor,
    is_alibi,
)
from tracker.engine.forward.streams import LayerStep, StreamPlan
from tracker.engine.refusal import RefusalError
from tracker.models import hooks
from tracker.models.devices import neighbours, put, take
from tracker.models.offloaded import is_absent
from tracker.models.parts.anatomy import LayerAnatomy


class Replacement(Protocol):
    """A replacement of one layer."""

    def change(self, action: Action, state: Tensor) -> Tensor:
        """Compute the state [rows, tokens, …] behind the replacement, in the dtype of the input."""
        ...


@dataclass(frozen=True)
class FittedReplacement:
    """A replacement fitted on text, in float32 for models of any dtype.

    Attributes:
        mean: Mean update of the layer [width].
        scale: Factor of the layer's input.
        linear: Weight [width, width] and bias [width]; None if not fitted.
    """

    mean: Tensor
    scale: float
    linear: tuple[Tensor, Tensor] | None = None

    def change(self, action: Action, state: Tensor) -> Tensor:
        """Compute x + m, s·x or W·x + b; several parallel residual streams are one x."""
        flat = state.flatten(2).float()
        if action is Action.MEAN:
            after = flat + self.mean.to(state.device)
        elif action is Action.SCALE:
            after = flat * self.scale
        else:
            assert self.linear is not None
            weight, bias = (tensor.to(state.device) for tensor in self.linear)
            after = flat @ weight.T + bias
        return after.to(state.dtype).reshape(state.shape)

    def on(self, device: torch.device) -> FittedReplacement:
        """Return a copy with its tensors on a device."""
        linear = self.linear and (self.linear[0].to(device), self.linear[1].to(device))
        return FittedReplacement(self.mean.to(device), self.scale, linear)


@dataclass(frozen=True)
class RandomReplacement:
    """A replacement drawn at random, for a layer of a miniature model."""

    layer: int

    def change(self, action: Action, state: Tensor) -> Tensor:
        """Change a state of any width as `FittedReplacement` would."""
        width = state.flatten(2).shape[-1]
        draw = torch.Generator().manual_seed(self.layer)
        weight = torch.eye(width) + 0.3 * torch.randn(width, width, generator=draw) / width**0.5
        mean, bias = 0.3 * torch.randn(2, width, generator=draw)
        return FittedReplacement(mean, 0.7, (weight, bias)).change(action, state)


Observer = Callable[[int, Tensor, Tensor], None]
"""Called with a layer and the baseline's input and output of it, each [rows, tokens, hidden]."""


class InputMasks(Protocol):
    """Attention masks that replace the model's own."""

    def put(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> hooks.Arguments:
        """Return the arguments of a layer with its mask replaced."""
        ...


class LayerChange(Protocol):
    """An intervention on whole layers."""

    def forward(self, fork: LayerFork, before: Tensor, after: Tensor) -> None:
        """Write the states behind the layer into `after`, for the streams with this intervention.

        `before` and `after` are [streams, rows, tokens, …] before and behind the layer. `after`
        already holds the streams that the layer's own modules compute.
        """
        ...


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass of a model in which its layers fork streams.

    The streams are the batch. The model is called with `rows` rows, so the first layer gets [rows,
    tokens, hidden], and the batch grows layer by layer. A new stream starts from its parent's
    hidden state before the layer. A stream that passes goes through the layer; one that skips it
    keeps its state. Behind the last layer are [streams × rows, tokens, hidden], ordered by stream:
    block s of `rows` rows is stream s. Each block is what the pruned model computes, because a
    layer treats the rows of a batch separately and the hidden state is all that connects layers.
    Where either assumption fails, the pass is refused here or the check on a miniature detects it.

    The model makes the other inputs of a layer (masks, rotary embeddings, positions) for `rows`
    rows. They must broadcast over the batch, or with `batched` may have one row per stream.

    Attributes:
        layers: The model's decoder layers.
        plan: The plan of the forks.
        anatomy: The parts of the layers, found for all that the plan takes apart.
        observe: Called with the baseline's input and output of each layer.
        masks: Masks that replace the model's own.
        replacements: Replacements of layers, by layer.
        embedded: Inputs to the first layer of streams with other embeddings, each [rows, tokens,
            …]: those of `plan.starts`, without the model's own.
        at_once: Maximum number of streams per pass of a layer, besides those for which it is taken
            apart. None = all: with a cache, or where weights are loaded a layer at a time.
        batched: Whether the other inputs of a layer are cut to the streams that enter it.
        outputs: Outputs of earlier layers besides the hidden state.
        forks: The forks, in the order of their layers.
    """

    layers: nn.ModuleList
    plan: StreamPlan
    anatomy: LayerAnatomy | None = None
    observe: Observer | None = None
    masks: InputMasks | None = None
    replacements: Mapping[int, Replacement] = field(default_factory=dict)
    embedded: Sequence[Tensor] = ()
    at_once: int | None = None
    batched: bool = False
    outputs: list[Tensor] = field(default_factory=list, init=False)
    forks: list[LayerFork] = field(default_factory=list, init=False)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Make the layers fork streams until exit, including exit by an exception."""
        with ExitStack() as stack:
            # Forks refer to each other: without this, only the garbage collector would free them.
            stack.callback(self.forks.clear)
            for index, (layer, whole) in enumerate(zip(self.layers, self.plan.steps, strict=True)):
                step, apart = whole, whole.entering
                if self.at_once is not None and len(apart) > self.at_once:
                    step, apart = whole.apart
                fork = LayerFork(index, layer, whole, apart, layer.forward, self)
                self.forks.append(fork)
                stack.enter_context(hooks.replaced_forward(layer, fork))
                if self.anatomy is not None:
                    site = LayerSite(index, layer, step, self.anatomy, self.batched)
                    for intervention in MODULE_FORKS:
                        for part in intervention.of_layer(site):
                            stack.enter_context(part.installed(fork))
            yield


@dataclass
class LayerFork:
    """The forward pass of one layer over all streams, in place of `layer.forward`.

    Its input is [streams × rows, tokens, hidden], viewed as `before` [streams, rows, tokens,
    hidden]. The streams that enter the layer are selected from it, a new one by its parent's index.
    First come those whose modules are computed `apart`, as one batch, then the others, `at_once` at
    a time, which keeps intermediate results in the processor's cache. Their output fills their
    slots in `after` [streams after, rows, tokens, hidden]; interventions on the whole layer fill
    those of other streams. Nothing is summed across streams, so each slot holds what its stream
    alone would compute.

    While streams fork, a layer is refused if its input includes an output of an earlier layer other
    than the hidden state: it would belong to another stream.

    Attributes:
        index: The number of the layer.
        module: The layer.
        step: The effect of the layer on each stream.
        apart: Streams for which its modules are computed separately.
        original: The layer's own forward pass.
        common: The state that the forks of all layers share.
        is_whole: Whether the streams in the current pass are outside `apart`.
        arguments: Arguments of the current pass, without the hidden state.
    """

    index: int
    module: nn.Module
    step: LayerStep
    apart: Sequence[int]
    original: Callable[..., Any]
    common: ForwardPass
    is_whole: bool = field(default=False, init=False)
    arguments: hooks.Arguments = field(init=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the hidden state [streams × rows, tokens, hidden], with the layer's signature."""
        before = self._begin(args, kwargs)
        output, after = self._enter(before)
        for change in LAYER_CHANGES:
            change.forward(self, before, after)
        if self.common.observe is not None:
            self.common.observe(self.index, before[0].to(after.device), after[0])
        return hooks.with_first(output, after.flatten(0, 1))

    def run(self, states: Tensor) -> Tensor:
        """Run states [streams, rows, tokens, …] through the unchanged layer, in batches."""
        self.is_whole = True
        for streams in evenly(range(len(states)), self.common.at_once):
            rows = tuple(states.shape[1:])
            output = self._forward(take(states, streams).flatten(0, 1), rows, len(streams))
            passed = by_stream(hooks.first_of(output), len(streams))
            put(states, streams, passed.to(states.device))
        self.is_whole = False
        return states

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Separate the hidden state from the other inputs and view it by stream."""
        step, common = self.step, self.common
        if self.index == 0:
            common.outputs.clear()
        given = (*args, *kwargs.values())
        if len(step.actions) > 1 and any(a is b for a in given for b in common.outputs):
            raise RefusalError("its layers hand more to each other than the hidden state")
        if common.masks is not None:
            args, kwargs = common.masks.put(self.index, self.module, args, kwargs)
        hidden: Tensor = hooks.state_of(args, kwargs)
        if self.index == 0 and common.embedded:
            hidden = torch.cat([hidden, *common.embedded])
        if len(hidden) % step.streams:
            raise RefusalError("something between its layers changes the batch")
        self.arguments = hooks.with_state(args, kwargs, None)
        if common.batched and step.entering != tuple(range(step.streams)):
            self.arguments = cut(self.arguments, step.streams, list(step.entering))
        return by_stream(hidden, step.streams)

    def _enter(self, before: Tensor) -> tuple[Any, Tensor]:
        """Compute the streams that enter the layer; return its output, and states by stream."""
        step, rows = self.step, tuple(before.shape[1:])
        output: Any = None
        after = before
        for streams in self._batches():
            self.is_whole = streams is not self.apart
            origins = [step.origin(stream) for stream in streams]
            near = neighbours(origins)
            is_view = len(near) == 1
            state = (before[near[0]] if is_view else take(before, origins)).flatten(0, 1)
            copied = hooks.protected(self.module, state) if is_view else state
            returned = self._forward(copied, rows, len(streams))
            hooks.learn_writes(self.module, copied, state)
            passed = hooks.first_of(returned)
            if output is None:
                output, after = returned, passed.new_empty(len(step.actions), *rows)
                if passed is not output:
                    tensors = (item for item in output[1:] if isinstance(item, Tensor))
                    self.common.outputs.extend(tensors)
            put(after, streams, by_stream(passed, len(streams)))
        self.is_whole = False
        return output, after

    def _batches(self) -> Iterator[Sequence[int]]:
        """Yield the entering streams in groups that pass the layer together."""
        if self.apart:
            yield self.apart
        yield from evenly(sorted({*self.step.entering} - {*self.apart}), self.common.at_once)

    def _forward(self, state: Tensor, rows: tuple[int, ...], streams: int) -> Any:
        """Run the layer for some streams, and refuse an output that is not a hidden state."""

        def repeated(name: str, value: Tensor) -> Tensor:
            """Repeat inputs that do not broadcast for each stream: Zamba 2's embeddings, ALiBi."""
            is_own = value.shape == rows or is_alibi(name, value)
            return value.repeat(streams, 1, 1) if is_own else value

        arguments = self.arguments
        if streams > 1 and not self.common.batched:
            arguments = each_tensor(arguments, repeated)
        output = hooks.call_with(self.original, state, *arguments)
        passed = hooks.first_of(output)
        if not isinstance(passed, Tensor) or passed.shape != state.shape:
            raise RefusalError(
                f"layer {self.index} returns something else than a hidden state of the shape "
                "that it was given"
            )
        return output


def evenly(streams: Sequence[int], most: int | None) -> Iterator[Sequence[int]]:
    """Split streams into the fewest groups of at most `most`, of about equal size."""
    groups = -(-len(streams) // most) if most else 1
    size = -(-len(streams) // groups) if streams else 1
    yield from (streams[start : start + size] for start in range(0, len(streams), size))


class SkippedLayer:
    """A removed layer: the stream keeps its state."""

    def forward(self, fork: LayerFork, before: Tensor, after: Tensor) -> None:
        """Copy the states of streams without the layer."""
        for stream, action in enumerate(fork.step.actions):
            if action is Action.SKIP:
                after[stream] = before[fork.step.origin(stream)]


class ReplacedLayer:
    """A layer replaced by a mean update, a factor or a linear map."""

    def forward(self, fork: LayerFork, before: Tensor, after: Tensor) -> None:
        """Compute the replacement for the streams that have one."""
        for stream, action in enumerate(fork.step.actions):
            if action.is_fitted:
                replacement = fork.common.replacements[fork.index]
                after[stream] = replacement.change(action, before[fork.step.origin(stream)])


class RepeatedSpan:
    """Layers that are run again behind the last of them.

    Besides the hidden state, each gets the same inputs as in the pass of all streams.
    """

    def forward(self, fork: LayerFork, before: Tensor, after: Tensor) -> None:
        """Run the spans again that end at the layer."""
        repeating = fork.step.repeating
        if not repeating:
            return
        if fork.common.batched:
            raise RefusalError("a layer that is passed again would need a cache of its own")
        states = take(after, [source for _, source, _ in repeating])
        spans = [span for *_, span in repeating]
        for time in range(1, max(span.repeats for span in spans)):
            for layer in range(min(span.layer for span in spans), fork.index + 1):
                streams = [
                    stream
                    for stream, span in enumerate(spans)
                    if span.layer <= layer and time < span.repeats
                ]
                if streams:
                    repeated = fork.common.forks[layer]
                    if any(map(is_absent, repeated.module.parameters())):
                        raise RefusalError(
                            "layers that rest elsewhere cannot be passed again together"
                        )
                    put(states, streams, repeated.run(take(states, streams)))
        put(after, [stream for stream, *_ in repeating], states)


LAYER_CHANGES: tuple[LayerChange, ...] = (RepeatedSpan(), SkippedLayer(), ReplacedLayer())
"""Interventions on whole layers."""
MODULE_FORKS: tuple[type[ModuleFork], ...] = (
    SublayerFork,
    RoundedFork,
    HeadFork,
    RouterFork,
    SharedExpertFork,
)
"""Interventions within layers. Of two on one module, the later one calls the earlier one."""
