"""Run a layer's modules (e.g. the MLP) for several ablations in one batch.

There is a class for each kind of change, e.g. removing sublayers or quantising weights. The part of
the batch that computes one ablation is called a stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from tracker.engine.forward.streams import LayerStep
from tracker.engine.refusal import RefusalError
from tracker.models import hooks
from tracker.models.devices import consecutive_slices, put_entries, take_entries
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.experts import Experts, SharedExperts, call_reduced_router
from tracker.models.parts.heads import Heads
from tracker.models.parts.linear_maps import LinearMap, copy_with_weights, rounded_parameters
from tracker.models.parts.neurons import Neurons
from tracker.models.parts.probe import integer_tables
from tracker.models.parts.projection import Columns
from tracker.models.parts.sublayers import Sublayers
from tracker.schema.changes import Change
from tracker.schema.grouping import group_by

HEAD_COMPONENTS = ("head", "kv_head")


@dataclass(frozen=True)
class LayerSite:
    """A layer, and the streams that need changes inside the layer.

    Attributes:
        index: The number of the layer.
        layer: The layer's module.
        step: Plan of the layer for the streams with changes inside the layer.
        anatomy: Object that finds the modules (e.g. the MLP) of each layer.
        batched: Whether masks and positions have one row per stream.
    """

    index: int
    layer: nn.Module
    step: LayerStep
    anatomy: LayerAnatomy
    batched: bool

    @property
    def name(self) -> str:
        """The name of the layer for error messages."""
        return self.anatomy.layer_name(self.index)

    def list_streams(self, module: nn.Module) -> Sequence[int]:
        """List the streams for which a module computes an output, as indices into `step.entrants`.

        Of several streams with the same output, only one is listed.
        """
        step = self.step
        if not step.components.isdisjoint(HEAD_COMPONENTS):
            heads = self.anatomy.get_part(Heads, self.index)
            if module in {*self.layer.get_submodule(heads.projection).modules()}:
                return [source for source, _ in step.projections]
        if step.has_sublayers:
            parts = self.anatomy.get_part(Sublayers, self.index)
            for sublayer, streams in ((parts.attention, step.attentions), (parts.mlp, step.mlps)):
                if module in {*sublayer.modules()}:
                    return streams
        return range(len(step.entrants))


class LayerState(Protocol):
    """Interface for the state of a layer during a forward pass.

    Attributes:
        is_whole: True while the layer computes only streams without changes inside the layer.
    """

    is_whole: bool


@dataclass
class ModuleFork(ABC):
    """Replacement of a module's `forward` method that computes some streams differently.

    For example, the subclass `ProjectionFork` removes heads.

    Attributes:
        module: The module.
        original: The module's `forward` method before the replacement was installed.
    """

    module: nn.Module
    original: Callable[..., Any] = field(init=False, repr=False)

    @classmethod
    @abstractmethod
    def make_forks(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield a replacement for each module of the layer that this class must change."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module's output for all streams, ordered by stream."""

    def install(self, layer_state: LayerState) -> AbstractContextManager[None]:
        """Replace the module's `forward` method in a `with` block.

        The original method runs for streams without changes in the layer (`layer_state.is_whole`).
        """
        self.original = self.module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            forward = self.original if layer_state.is_whole else self.forward
            return forward(*args, **kwargs)

        return hooks.replaced_forward(self.module, call)


def view_streams(batch: Tensor, n_streams: int, tensor_name: str = "a tensor") -> Tensor:
    """Reshape a batch [streams × n, …] to [streams, n, …].

    Raises RefusalError if the number of rows is not a multiple of `n_streams`. `tensor_name` is
    used in the error message.
    """
    if len(batch) % n_streams:
        raise RefusalError(
            f"{tensor_name} has {len(batch)} rows, which cannot be divided evenly among ablations"
        )
    return batch.reshape(n_streams, -1, *batch.shape[1:])


def select_streams(value: Any, n_streams: int, entrants: list[int]) -> Any:
    """Select the entries of the streams `entrants` from all tensors in a value.

    `value` is a tensor, or a tuple or dictionary of values. Tensors whose first axis has another
    length than `n_streams` are returned unchanged.
    """
    if isinstance(value, Tensor):
        return take_entries(value, entrants) if value.ndim and len(value) == n_streams else value
    if isinstance(value, tuple):
        return tuple(select_streams(item, n_streams, entrants) for item in value)
    if isinstance(value, dict):
        return {name: select_streams(item, n_streams, entrants) for name, item in value.items()}
    return value


def is_alibi(name: str, value: Tensor) -> bool:
    """Return whether a layer's argument is the ALiBi tensor of a Bloom model."""
    return name == "alibi" and value.ndim == 3


def map_tensors(
    arguments: hooks.CallArguments, function: Callable[[str, Tensor], Tensor]
) -> hooks.CallArguments:
    """Replace each tensor argument by `function(name, tensor)`.

    For a positional argument, the name is empty.
    """

    def change(name: str, value: Any) -> Any:
        return function(name, value) if isinstance(value, Tensor) else value

    args, kwargs = arguments
    return tuple(change("", v) for v in args), {n: change(n, v) for n, v in kwargs.items()}


@dataclass
class SublayerFork(ModuleFork):
    """Replacement for an attention or MLP that some streams skip.

    Streams with the same input and the same attention use one attention output. For example, an
    ablation that removes the MLP uses the attention output of the intact model. A stream without
    the sublayer gets an output that leaves the residual stream unchanged.

    Attributes:
        computed_streams: Indices of the streams for which the sublayer is computed.
        sources: Index of the output that each stream uses; None if the sublayer is removed.
        batched: Whether masks and positions have one row per stream.
    """

    computed_streams: Sequence[int]
    sources: tuple[int | None, ...]
    batched: bool

    @classmethod
    def make_forks(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield replacements of attention and MLP, if a stream removes a part of the layer."""
        step = site.step
        if step.has_sublayers:
            parts = site.anatomy.get_part(Sublayers, site.index)
            yield cls(parts.attention, step.attentions, step.head_sources, site.batched)
            yield cls(parts.mlp, step.mlps, step.mlp_sources, site.batched)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the attention's or MLP's output for all streams."""
        n_entering, streams = len(self.sources), list(self.computed_streams)
        if self.sources == tuple(range(n_entering)) == tuple(streams):
            return self.original(*args, **kwargs)
        arguments = (args, kwargs)
        if self.batched:
            args, kwargs = select_streams((args, kwargs), n_entering, streams)
        else:
            shape = hooks.input_state(args, kwargs).shape[:2]

            def select_rows(name: str, value: Tensor) -> Tensor:
                """Select the rows of the computed streams if the input has rows for all streams."""
                if value.shape[:2] != shape and not is_alibi(name, value):
                    return value
                return take_entries(view_streams(value, n_entering), streams).flatten(0, 1)

            args, kwargs = map_tensors(arguments, select_rows)
        output = self.original(*args, **kwargs)
        # There is always a stream: the baseline passes everything.
        states, n_outputs = hooks.first_output(output), len({*self.sources} - {None})
        outputs = view_streams(states, n_outputs, "the attention's output")
        n_rows = len(states) * n_entering // n_outputs
        fill = hooks.neutral_output(self.module, *arguments, states, n_rows)
        fills = view_streams(fill, n_entering)
        pairs = zip(self.sources, fills, strict=True)
        parts = [fill if source is None else outputs[source] for source, fill in pairs]
        return hooks.replace_first_output(output, torch.stack(parts).flatten(0, 1))


@dataclass
class ProjectionFork(ModuleFork):
    """Replacement for an output projection if some streams lack heads or neurons.

    The projection ends an attention or MLP. Its input has one part for each computed attention or
    MLP: [parts × rows, tokens, columns]. Columns of removed heads and neurons are set to zero.

    Attributes:
        sources: For each output to compute, the index of the part of the input.
        columns: For each output to compute, the columns of the removed heads or neurons.
    """

    sources: Sequence[int]
    columns: Sequence[Sequence[Columns]]

    @classmethod
    def make_forks(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield replacements of output projections, if a stream removes heads or neurons."""
        step, projections = site.step, site.step.projections
        if not step.components.isdisjoint(HEAD_COMPONENTS):
            sources = [step.attentions.index(source) for source, _ in projections]
            yield cls._make(site, Heads, sources, [removed for _, removed in projections])
        if "neuron" in step.components:
            removed = [ablation.neurons for ablation in step.mlp_ablations]
            yield cls._make(site, Neurons, range(len(removed)), removed)

    @classmethod
    def _make(
        cls,
        site: LayerSite,
        kind: type[Heads | Neurons],
        sources: Sequence[int],
        removed: Sequence[Sequence[Change]],
    ) -> ModuleFork:
        """Build a replacement of an output projection that leaves out heads or neurons.

        Args:
            site: The layer.
            kind: `Heads` for the attention, `Neurons` for the MLP.
            sources: For each output to compute, the index of the part of the projection's input.
            removed: For each output to compute, the heads or neurons to remove.

        Returns:
            The replacement.
        """
        parts = site.anatomy.get_part(kind, site.index)
        columns = [[parts.columns(part, site.name) for part in group] for group in removed]
        return cls(site.layer.get_submodule(parts.projection), sources, columns)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the projection's outputs without the removed heads or neurons."""
        (inputs,) = (*args, *kwargs.values())
        computed = view_streams(inputs, max(self.sources) + 1, "the output projection's input")
        states = take_entries(computed, self.sources)
        for state, removed_columns in zip(states, self.columns, strict=True):
            for columns in removed_columns:
                state[..., columns] = 0
        return self.original(states.flatten(0, 1))


@dataclass
class RouterFork(ModuleFork):
    """Replacement for the router of a mixture of experts if some streams lack experts.

    In each stream, the router chooses only among the remaining experts. Experts keep their numbers.

    Attributes:
        experts: Paths of the router and the experts' module, and the number of experts.
        remaining: For each computed MLP, the numbers of the experts that stay; None if all stay.
    """

    experts: Experts
    remaining: Sequence[list[int] | None]

    @classmethod
    def make_forks(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield a replacement of the router if any ablation removes experts."""
        if "expert" in site.step.components:
            experts = site.anatomy.get_part(Experts, site.index)
            remaining = [
                experts.remaining_experts(ablation.experts, site.name) if ablation.experts else None
                for ablation in site.step.mlp_ablations
            ]
            yield cls(site.layer.get_submodule(experts.router), experts, remaining)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Choose experts and routing weights for each token, without the removed experts."""
        arguments, hidden = (args, kwargs), hooks.input_state(args, kwargs)
        states = view_streams(hidden, len(self.remaining), "the router's input")
        intact = [stream for stream, experts in enumerate(self.remaining) if experts is None]
        # There is always a stream: the baseline lacks none.
        intact_states = take_entries(states, intact).flatten(0, 1)
        output = hooks.call_with(self.original, intact_states, *arguments)
        intact_tables = zip(*(view_streams(table, len(intact)) for table in output), strict=True)
        choices = [
            next(intact_tables)
            if experts is None
            else call_reduced_router(self.module, self.experts, experts, output, state, arguments)
            for experts, state in zip(self.remaining, states, strict=True)
        ]
        make_output = getattr(type(output), "_make", type(output))
        return make_output(torch.cat(tables) for tables in zip(*choices, strict=True))


@dataclass
class SharedExpertFork(ModuleFork):
    """Replacement for a shared expert that some streams lack.

    In streams without the expert, the expert's output is zero.

    Attributes:
        is_removed: For each computed MLP, whether the shared expert is removed.
    """

    is_removed: Sequence[bool]

    @classmethod
    def make_forks(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield a replacement for each shared expert of a layer, if an ablation removes any."""
        if "shared_expert" in site.step.components:
            is_removed = [bool(a.removed("shared_expert")) for a in site.step.mlp_ablations]
            for path in site.anatomy.get_part(SharedExperts, site.index).paths:
                yield cls(site.layer.get_submodule(path), is_removed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the expert's output, and set the output to zero in streams without the expert."""
        output = self.original(*args, **kwargs)
        states: Tensor = hooks.first_output(output)
        outputs = view_streams(states, len(self.is_removed), "the shared expert's output").clone()
        # Slices, because an index tensor would have to be copied to an accelerator.
        for part in consecutive_slices([i for i, lacks in enumerate(self.is_removed) if lacks]):
            outputs[part] = 0
        return hooks.replace_first_output(output, outputs.reshape(states.shape))


_Formats = tuple[tuple[str, str], ...]
"""Pairs of the path and the format of each quantised linear map of a module."""


@dataclass
class RoundedFork(ModuleFork):
    """Replacement for a module that has quantised weights in some streams.

    Attributes:
        maps: All quantised linear maps of the layer, by path.
        formats: For each computed stream, pairs of a linear map's path and its weight format.
        make_weight: Function that returns the quantised weights of a linear map.
    """

    maps: Mapping[str, LinearMap]
    formats: Sequence[_Formats]
    make_weight: Callable[[str, LinearMap, str], Tensor]

    @classmethod
    def make_forks(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield a replacement for each module with weights that an ablation quantises."""
        step, index = site.step, site.index
        if "rounded" not in step.components:
            return
        roundings = (step.ablations[stream].roundings for stream in step.entrants)
        formats = [site.anatomy.expand_formats(index, changes) for changes in roundings]
        maps = {path: site.anatomy.get_map(index, path) for paths in formats for path in paths}
        make_weight = partial(site.anatomy.weights.get_weight, index)
        for module, group in group_by(maps.items(), lambda item: item[1].module).items():
            stream_formats = [
                tuple((path, formats[stream][path]) for path, _ in group if path in formats[stream])
                for stream in site.list_streams(module)
            ]
            fork_class = ExpertsFork if group[0][1].experts else LinearFork
            yield fork_class(module, maps, stream_formats, make_weight)

    @property
    def streams_by_formats(self) -> dict[_Formats, list[int]]:
        """Formats of the module's quantised linear maps → the streams that use these formats."""
        return group_by(range(len(self.formats)), lambda stream: self.formats[stream])


class LinearFork(RoundedFork):
    """Replacement for a linear map that has quantised weights in some streams.

    The module runs once for all streams. Then the outputs of streams with quantised weights are
    overwritten.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the linear map's output, with exact or quantised weights in each stream."""
        (inputs,) = (*args, *kwargs.values())
        output: Tensor = self.original(inputs)
        stream_inputs = view_streams(inputs, len(self.formats), "the linear map's input")
        stream_outputs = view_streams(output, len(self.formats))
        for formats, streams in self.streams_by_formats.items():
            for path, form in formats:
                bias = cast("Tensor | None", self.module.bias)
                weight = self.make_weight(path, self.maps[path], form)
                rounded = linear(take_entries(stream_inputs, streams), weight, bias)
                put_entries(stream_outputs, streams, rounded)
        return stream_outputs.reshape(output.shape)


class ExpertsFork(RoundedFork):
    """Replacement for the module of all experts, if some streams quantise its weights."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the experts' output, with exact or quantised weights in each stream."""
        n_streams, state = len(self.formats), hooks.input_state(args, kwargs)
        choices = integer_tables((*args, *kwargs.values()))
        if not choices or len(choices[0]) % n_streams or len(state) % n_streams:
            raise RefusalError("the experts' inputs cannot be divided among the ablations")

        def select_rows(streams: list[int], value: Any) -> Any:
            is_table = isinstance(value, Tensor) and value.shape == choices[0].shape
            if value is not state and not is_table:
                return value
            return take_entries(view_streams(value, n_streams), streams).flatten(0, 1)

        outputs: dict[int, Tensor] = {}
        for formats, streams in self.streams_by_formats.items():
            forward = self.original
            if formats:
                weights = rounded_parameters(self.maps, dict(formats), self.make_weight)
                rounded_weights = {name: weight for (_, name), weight in weights.items()}
                forward = copy_with_weights(self.module, rounded_weights).forward
            output = forward(
                *(select_rows(streams, value) for value in args),
                **{name: select_rows(streams, value) for name, value in kwargs.items()},
            )
            outputs |= zip(streams, view_streams(output, len(streams)), strict=True)
        return torch.cat([outputs[stream] for stream in range(n_streams)])
