"""The forward pass of one layer for all streams."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tracker.engine.forward.base import by_stream, cut
from tracker.engine.forward.replacements import Replacement
from tracker.engine.forward.streams import LayerStep
from tracker.engine.refusal import RefusalError
from tracker.models.hooks import first_of, learn_writes, protected, with_first
from tracker.models.slices import neighbours, put, take

Observer = Callable[[int, Tensor, Tensor], None]
"""Called with a layer and the baseline's input and output of it, each [rows, tokens, hidden]."""


class InputMasks(Protocol):
    """Attention masks that layers get in place of the model's own."""

    def put(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a layer with its mask."""
        ...


class LayerChange(Protocol):
    """An intervention on whole layers."""

    def forward(self, fork: LayerFork, before: Tensor, after: Tensor) -> None:
        """Write into `after` the states behind the layer of the streams that have it.

        `before` and `after` are [streams, rows, tokens, …] before and behind the layer. The streams
        that the layer's own modules compute are in `after`.
        """
        ...


@dataclass(frozen=True)
class ForwardPass:
    """Settings and records that the forks of all layers share.

    Attributes:
        changes: Interventions on whole layers.
        at_once: Number of streams that pass a layer at once; None for all.
        observe: Called with the baseline's input and output of each layer.
        batched: Whether each stream has a row of its own in all inputs of a layer.
        masks: Masks in place of the model's own.
        replacements: Replacements of layers.
        embedded: Inputs to the first layer of streams with other embeddings.
        outputs: Outputs of earlier layers besides the hidden state.
        forks: The forks, in the order of their layers.
    """

    changes: Sequence[LayerChange]
    at_once: int | None
    observe: Observer | None
    batched: bool
    masks: InputMasks | None
    replacements: Mapping[int, Replacement]
    embedded: Sequence[Tensor]
    outputs: list[Tensor] = field(default_factory=list)
    forks: list[LayerFork] = field(default_factory=list)


@dataclass(frozen=True)
class LayerInputs:
    """Arguments of a layer besides the hidden state.

    Attributes:
        is_named: Whether the hidden state is given by its name.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    is_named: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def cut(self, streams: int, entering: list[int]) -> LayerInputs:
        """Return those of the streams that enter, where each stream has a row of its own."""
        args, kwargs = cut((self.args, self.kwargs), streams, entering)
        return LayerInputs(self.is_named, args, kwargs)

    def repeated(self, rows: tuple[int, ...], streams: int) -> LayerInputs:
        """Return them for several streams of some rows [rows, tokens, …]."""
        args = tuple(_repeated("", value, rows, streams) for value in self.args)
        kwargs = {name: _repeated(name, v, rows, streams) for name, v in self.kwargs.items()}
        return LayerInputs(self.is_named, args, kwargs)

    def call(self, layer: Callable[..., Any], state: Tensor) -> Any:
        """Call a layer with them and a hidden state."""
        if self.is_named:
            return layer(*self.args, **{**self.kwargs, "hidden_states": state})
        return layer(state, *self.args, **self.kwargs)


@dataclass
class LayerFork:
    """The forward pass of one layer over all streams, in place of `layer.forward`.

    Its input is [streams × rows, tokens, hidden], viewed as `before` [streams, rows, tokens,
    hidden]. The streams that enter the layer are taken from it, a new one by its parent's place:
    first those whose modules are computed `apart`, as one batch, then the others, `at_once` at a
    time, which keeps intermediate results in the processor's cache. Their output fills their places
    in `after` [streams after, rows, tokens, hidden]; interventions on the whole layer fill those of
    other streams. Nothing is added up between streams, so each place holds what its stream alone
    would compute.

    A layer that is given another output of an earlier one than the hidden state, while streams
    fork, is refused: it would be another stream's.

    Attributes:
        index: The number of the layer.
        module: The layer.
        step: What happens to the streams at it.
        apart: Streams for which its modules are computed apart.
        original: Its own forward pass.
        common: What the forks of all layers share.
        is_whole: Whether the streams that pass at the moment are not among those `apart`.
        inputs: Arguments of the current pass besides the hidden state.
    """

    index: int
    module: nn.Module
    step: LayerStep
    apart: Sequence[int]
    original: Callable[..., Any]
    common: ForwardPass
    is_whole: bool = field(default=False, init=False)
    inputs: LayerInputs = field(init=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take and return a hidden state [streams × rows, tokens, hidden], as the layer does."""
        before = self._begin(args, kwargs)
        output, after = self._enter(before)
        for change in self.common.changes:
            change.forward(self, before, after)
        if self.common.observe is not None:
            self.common.observe(self.index, before[0].to(after.device), after[0])
        return with_first(output, after.flatten(0, 1))

    def run(self, states: Tensor) -> Tensor:
        """Pass states [streams, rows, tokens, …] through the layer as it is, by turns."""
        self.is_whole = True
        for streams in evenly(range(len(states)), self.common.at_once):
            rows = tuple(states.shape[1:])
            output = self._forward(take(states, streams).flatten(0, 1), rows, len(streams))
            passed = by_stream(first_of(output), len(streams))
            put(states, streams, passed.to(states.device))
        self.is_whole = False
        return states

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Separate the hidden state from the other inputs, and view it by stream."""
        step, common = self.step, self.common
        if self.index == 0:
            common.outputs.clear()
        given = (*args, *kwargs.values())
        if len(step.actions) > 1 and any(a is b for a in given for b in common.outputs):
            raise RefusalError("its layers hand more to each other than the hidden state")
        if common.masks is not None:
            args, kwargs = common.masks.put(self.index, self.module, args, kwargs)
        is_named = "hidden_states" in kwargs
        hidden: Tensor = kwargs.pop("hidden_states") if is_named else args[0]
        if self.index == 0 and common.embedded:
            hidden = torch.cat([hidden, *common.embedded])
        if len(hidden) % step.streams:
            raise RefusalError("something between its layers changes the batch")
        self.inputs = LayerInputs(is_named, args if is_named else args[1:], kwargs)
        if common.batched and step.entering != tuple(range(step.streams)):
            self.inputs = self.inputs.cut(step.streams, list(step.entering))
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
            copied = protected(self.module, state) if is_view else state
            returned = self._forward(copied, rows, len(streams))
            learn_writes(self.module, copied, state)
            passed = first_of(returned)
            if output is None:
                output, after = returned, passed.new_empty(len(step.actions), *rows)
                if passed is not output:
                    tensors = (item for item in output[1:] if isinstance(item, Tensor))
                    self.common.outputs.extend(tensors)
            put(after, streams, by_stream(passed, len(streams)))
        self.is_whole = False
        return output, after

    def _batches(self) -> Iterator[Sequence[int]]:
        """Yield the entering streams that pass the layer together."""
        if self.apart:
            yield self.apart
        yield from evenly(sorted({*self.step.entering} - {*self.apart}), self.common.at_once)

    def _forward(self, state: Tensor, rows: tuple[int, ...], streams: int) -> Any:
        """Run the layer for some streams; refuse an output that is no hidden state."""
        inputs = self.inputs
        if streams > 1 and not self.common.batched:
            inputs = inputs.repeated(rows, streams)
        output = inputs.call(self.original, state)
        passed = first_of(output)
        if not isinstance(passed, Tensor) or passed.shape != state.shape:
            raise RefusalError(
                f"layer {self.index} returns something else than a hidden state of the shape "
                "that it was given"
            )
        return output


def evenly(streams: Sequence[int], most: int | None) -> Iterator[Sequence[int]]:
    """Split streams into as few groups of so many at most as there can be, of about one size."""
    groups = -(-len(streams) // most) if most else 1
    size = -(-len(streams) // groups) if streams else 1
    yield from (streams[start : start + size] for start in range(0, len(streams), size))


def _repeated(name: str, value: Any, rows: tuple[int, ...], streams: int) -> Any:
    """Repeat for each stream what does not broadcast: Zamba 2's embeddings, Bloom's ALiBi."""
    if not isinstance(value, Tensor):
        return value
    if value.shape == rows or (name == "alibi" and value.ndim == 3):
        return value.repeat(streams, 1, 1)
    return value
