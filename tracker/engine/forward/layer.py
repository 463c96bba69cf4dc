"""Run layers for all streams, and apply interventions on whole layers.

A stream is the part of a batch that computes one ablation. Each layer of the model runs all streams
as one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tracker.engine.forward.modules import (
    LayerSite,
    ProjectionFork,
    RoundedFork,
    RouterFork,
    SharedExpertFork,
    SublayerFork,
    is_alibi,
    map_tensors,
    select_streams,
    view_streams,
)
from tracker.engine.forward.streams import LayerStep, StreamPlan
from tracker.engine.refusal import RefusalError
from tracker.models import hooks
from tracker.models.devices import consecutive_slices, put_entries, take_entries
from tracker.models.offloaded import is_absent
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.schema.kinds import Action


class Replacement(Protocol):
    """Interface of the functions that can replace one layer, e.g. a fitted linear map."""

    def apply(self, action: Action, state: Tensor) -> Tensor:
        """Compute a substitute for the layer's output from the layer's input `state`."""
        ...


@dataclass(frozen=True)
class FittedReplacement:
    """Fitted functions that can replace one layer, in float32.

    Attributes:
        mean: Mean of the layer's output minus the layer's input [width].
        scale: Factor by which the layer's input is multiplied to approximate the output.
        linear: Weight [width, width] and bias [width] of a linear map; None if no map was fitted.
    """

    mean: Tensor
    scale: float
    linear: tuple[Tensor, Tensor] | None = None

    def apply(self, action: Action, state: Tensor) -> Tensor:
        """Compute state + mean, scale · state or linear(state); `action` selects the formula."""
        flat_state = state.flatten(2).float()
        if action is Action.MEAN:
            result = flat_state + self.mean.to(state.device)
        elif action is Action.SCALE:
            result = flat_state * self.scale
        else:
            assert self.linear is not None
            weight, bias = (tensor.to(state.device) for tensor in self.linear)
            result = flat_state @ weight.T + bias
        return result.to(state.dtype).reshape(state.shape)

    def to_device(self, device: torch.device) -> FittedReplacement:
        """Return a copy of this fitted replacement with its tensors on a device."""
        linear = self.linear and (self.linear[0].to(device), self.linear[1].to(device))
        return FittedReplacement(self.mean.to(device), self.scale, linear)


@dataclass(frozen=True)
class RandomReplacement:
    """Random functions that replace a layer, for self-checks on a miniature model."""

    layer: int

    def apply(self, action: Action, state: Tensor) -> Tensor:
        """Shift, scale or linearly map the input `state` at random, depending on `action`."""
        width = state.flatten(2).shape[-1]
        rng = torch.Generator().manual_seed(self.layer)
        weight = torch.eye(width) + 0.3 * torch.randn(width, width, generator=rng) / width**0.5
        mean, bias = 0.3 * torch.randn(2, width, generator=rng)
        return FittedReplacement(mean, 0.7, (weight, bias)).apply(action, state)


Observer = Callable[[int, Tensor, Tensor], None]
"""Called with a layer's number and its input and output in the baseline [rows, tokens, hidden]."""


ReplaceMask = Callable[[int, nn.Module, tuple[Any, ...], dict[str, Any]], hooks.CallArguments]
"""Function that replaces the attention mask in the arguments of a layer, given its number."""


@dataclass(frozen=True)
class ForwardPass:
    """A forward pass of a model that computes several ablations as streams in one batch.

    The model is called with `rows` texts, so the first layer gets hidden states of the shape [rows,
    tokens, hidden]. The batch grows whenever a new stream starts. The output of the last layer has
    the shape [streams × rows, tokens, hidden] and is ordered by stream. A stream's rows
    equal the output of a copy of the model with the stream's ablation. Two conditions must hold: a
    layer treats the rows of a batch separately, and layers pass only the hidden state to each
    other.

    The other inputs of a layer (e.g. masks and positions) must broadcast over the rows of all
    streams.

    Attributes:
        layers: The model's decoder layers.
        plan: The plan that gives the layer at which each stream starts.
        anatomy: The modules of the layers, including all modules that the plan changes.
        observe: Function that is called for each layer with the layer's input and output in the
            intact model.
        replace_mask: Function that replaces the model's own attention masks.
        replacements: Functions that replace layers, by layer number.
        embeddings: Inputs to the first layer for streams with quantised embeddings, one for each
            format.
        max_streams: Maximum number of streams that a layer computes in one call; None for no limit.
        batched: Whether masks, positions and other inputs can have one row per stream.
        extra_outputs: Tensors that earlier layers returned in addition to the hidden state.
        forks: The objects that replace the layers' `forward` methods, in the order of the layers.
    """

    layers: nn.ModuleList
    plan: StreamPlan
    anatomy: LayerAnatomy | None = None
    observe: Observer | None = None
    replace_mask: ReplaceMask | None = None
    replacements: Mapping[int, Replacement] = field(default_factory=dict)
    embeddings: Sequence[Tensor] = ()
    max_streams: int | None = None
    batched: bool = False
    extra_outputs: list[Tensor] = field(default_factory=list, init=False)
    forks: list[LayerFork] = field(default_factory=list, init=False)

    @contextmanager
    def install(self) -> Iterator[None]:
        """Replace the layers' `forward` methods until exit, so that the layers run all streams."""
        with ExitStack() as stack:
            # Forks refer to each other: without this, only the garbage collector would free them.
            stack.callback(self.forks.clear)
            for index, (layer, step) in enumerate(zip(self.layers, self.plan.steps, strict=True)):
                divided_step, divided_streams = step, step.entrants
                if self.max_streams is not None and len(divided_streams) > self.max_streams:
                    divided_step, divided_streams = step.divided_step
                fork = LayerFork(index, layer, step, divided_streams, layer.forward, self)
                self.forks.append(fork)
                stack.enter_context(hooks.replaced_forward(layer, fork))
                if self.anatomy is not None:
                    site = LayerSite(index, layer, divided_step, self.anatomy, self.batched)
                    for fork_class in MODULE_FORKS:
                        for module_fork in fork_class.make_forks(site):
                            stack.enter_context(module_fork.install(fork))
            yield


@dataclass
class LayerFork:
    """Replacement of a layer's `forward` method that runs the layer for all streams.

    The input is [streams × rows, tokens, hidden]. A new stream copies the input of its parent
    stream. The layer first computes the `divided_streams` as one batch, and then the remaining
    streams in groups of at most `max_streams`. For streams that skip or replace the layer,
    `replace_layers` writes the outputs.

    With several streams, RefusalError is raised if an earlier layer passes other tensors than the
    hidden state to this layer.

    Attributes:
        index: The number of the layer.
        module: The layer's module.
        step: The plan for this layer.
        divided_streams: Streams that are computed first, including all streams with changes inside
            the layer.
        original: The layer's original `forward` method.
        parent: The forward pass of the whole model, whose state all layers share.
        is_whole: Whether the layer currently computes streams outside `divided_streams`.
        arguments: Arguments of the layer in the current pass, without the hidden state.
    """

    index: int
    module: nn.Module
    step: LayerStep
    divided_streams: Sequence[int]
    original: Callable[..., Any]
    parent: ForwardPass
    is_whole: bool = field(default=False, init=False)
    arguments: hooks.CallArguments = field(init=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer for all streams, and return its output for all streams.

        The hidden state in the output has the shape [streams × rows, tokens, hidden].
        """
        inputs = self._extract_hidden_states(args, kwargs)
        output, outputs = self._run_streams(inputs)
        repeat_spans(self, outputs)
        replace_layers(self, inputs, outputs)
        if self.parent.observe is not None:
            self.parent.observe(self.index, inputs[0].to(outputs.device), outputs[0])
        return hooks.replace_first_output(output, outputs.flatten(0, 1))

    def run(self, states: Tensor) -> Tensor:
        """Run the unchanged layer on `states` [streams, …], and overwrite `states`."""
        self.is_whole = True
        for streams in split_evenly(range(len(states)), self.parent.max_streams):
            shape = tuple(states.shape[1:])
            batch = take_entries(states, streams).flatten(0, 1)
            output = self._run_layer(batch, shape, len(streams))
            batch_states = view_streams(hooks.first_output(output), len(streams))
            put_entries(states, streams, batch_states.to(states.device))
        self.is_whole = False
        return states

    def _extract_hidden_states(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the layer's input [streams, rows, tokens, …] from the arguments of a call.

        All other arguments are stored in the attribute `arguments`.
        """
        step, parent = self.step, self.parent
        if self.index == 0:
            parent.extra_outputs.clear()
        values = (*args, *kwargs.values())
        if len(step.actions) > 1 and any(a is b for a in values for b in parent.extra_outputs):
            raise RefusalError("a layer passes more than the hidden state to the next layer")
        if parent.replace_mask is not None:
            args, kwargs = parent.replace_mask(self.index, self.module, args, kwargs)
        hidden: Tensor = hooks.input_state(args, kwargs)
        if self.index == 0 and parent.embeddings:
            hidden = torch.cat([hidden, *parent.embeddings])
        if len(hidden) % step.n_streams:
            raise RefusalError("the model changes the batch size between its layers")
        self.arguments = hooks.replace_state(args, kwargs, None)
        if parent.batched and step.entrants != tuple(range(step.n_streams)):
            self.arguments = select_streams(self.arguments, step.n_streams, list(step.entrants))
        return view_streams(hidden, step.n_streams)

    def _run_streams(self, inputs: Tensor) -> tuple[Any, Tensor]:
        """Run the layer's modules for all streams that need them (`step.entrants`).

        Returns the output of the layer's first call, and new hidden states [streams, rows, tokens,
        …]. The states of all other streams are uninitialised.
        """
        step, shape = self.step, tuple(inputs.shape[1:])
        output: Any = None
        outputs = inputs
        other_streams = sorted({*step.entrants} - {*self.divided_streams})
        batches = split_evenly(other_streams, self.parent.max_streams)
        divided_batch = [self.divided_streams] if self.divided_streams else []
        for streams in (*divided_batch, *batches):
            self.is_whole = streams is not self.divided_streams
            origins = [step.origin(stream) for stream in streams]
            ranges = consecutive_slices(origins)
            is_view = len(ranges) == 1
            batch = inputs[ranges[0]] if is_view else take_entries(inputs, origins)
            batch = batch.flatten(0, 1)
            layer_input = hooks.protect_input(self.module, batch) if is_view else batch
            result = self._run_layer(layer_input, shape, len(streams))
            hooks.record_read_only(self.module, layer_input, batch)
            batch_states = hooks.first_output(result)
            if output is None:
                output, outputs = result, batch_states.new_empty(len(step.actions), *shape)
                if batch_states is not output:
                    tensors = (item for item in output[1:] if isinstance(item, Tensor))
                    self.parent.extra_outputs.extend(tensors)
            put_entries(outputs, streams, view_streams(batch_states, len(streams)))
        self.is_whole = False
        return output, outputs

    def _run_layer(self, state: Tensor, shape: tuple[int, ...], n_streams: int) -> Any:
        """Run the layer once on a batch of `n_streams` streams, and return the layer's output.

        `shape` is the shape of one stream. Raises RefusalError if the layer changes the shape of
        the batch.
        """

        def repeat_rows(name: str, value: Tensor) -> Tensor:
            """Repeat an input that cannot broadcast (e.g. an ALiBi tensor) once per stream."""
            is_per_row = value.shape == shape or is_alibi(name, value)
            return value.repeat(n_streams, 1, 1) if is_per_row else value

        arguments = self.arguments
        if n_streams > 1 and not self.parent.batched:
            arguments = map_tensors(arguments, repeat_rows)
        output = hooks.call_with(self.original, state, *arguments)
        states = hooks.first_output(output)
        if not isinstance(states, Tensor) or states.shape != state.shape:
            raise RefusalError(f"layer {self.index} does not return a state shaped like its input")
        return output


def split_evenly(streams: Sequence[int], max_size: int | None) -> Iterator[Sequence[int]]:
    """Split streams into about equally large groups of at most `max_size` streams."""
    n_groups = -(-len(streams) // max_size) if max_size else 1
    size = -(-len(streams) // n_groups) if streams else 1
    yield from (streams[start : start + size] for start in range(0, len(streams), size))


def replace_layers(fork: LayerFork, inputs: Tensor, outputs: Tensor) -> None:
    """Overwrite a layer's outputs in streams that skip or replace the layer.

    A skipped layer returns its input; a replaced layer, a function of its input. `inputs` and
    `outputs` have the shape [streams, rows, tokens, …]; `outputs` is changed in place.
    """
    for stream, action in enumerate(fork.step.actions):
        if action is Action.SKIP:
            outputs[stream] = inputs[fork.step.origin(stream)]
        elif action.is_fitted:
            replacement = fork.parent.replacements[fork.index]
            outputs[stream] = replacement.apply(action, inputs[fork.step.origin(stream)])


def repeat_spans(fork: LayerFork, outputs: Tensor) -> None:
    """Compute the repetitions of layer ranges that end at this layer.

    In streams that repeat a range, `outputs` is overwritten with the result. Masks and positions
    stay the same in each repetition.
    """
    repeats = fork.step.repeated_spans
    if not repeats:
        return
    if fork.parent.batched:
        raise RefusalError("repeated layers would need a key-value cache for each repetition")
    states = take_entries(outputs, [source for _, source, _ in repeats])
    spans = [span for *_, span in repeats]
    for repetition in range(1, max(span.repeats for span in spans)):
        for layer in range(min(span.layer for span in spans), fork.index + 1):
            are_entered = [span.layer <= layer and repetition < span.repeats for span in spans]
            if streams := [stream for stream, enters in enumerate(are_entered) if enters]:
                layer_fork = fork.parent.forks[layer]
                if any(map(is_absent, layer_fork.module.parameters())):
                    raise RefusalError(
                        "an offloaded layer cannot run twice for only some of the ablations"
                    )
                put_entries(states, streams, layer_fork.run(take_entries(states, streams)))
    put_entries(outputs, [stream for stream, *_ in repeats], states)


MODULE_FORKS = (RoundedFork, ProjectionFork, RouterFork, SharedExpertFork, SublayerFork)
"""Interventions within layers. If two change one module, the later one calls the earlier one.

The MLP of OPT is one linear map: `SublayerFork` selects its streams before the others run."""
