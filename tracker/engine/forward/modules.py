"""Forward passes of the modules of a layer in which streams differ.

There is one class for each intervention: removed sublayers, heads and experts, and weights in
formats.
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

from tracker.core.grouping import grouped
from tracker.engine.forward.streams import LayerStep
from tracker.engine.refusal import RefusalError
from tracker.models import hooks
from tracker.models.devices import neighbours, put, take
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.experts import Experts, SharedExperts, routed
from tracker.models.parts.heads import Heads
from tracker.models.parts.linear_maps import LinearMap, holding, weights_in
from tracker.models.parts.probe import integer_tables
from tracker.models.parts.sublayers import Sublayers

HEADS = ("head", "kv_head")


@dataclass(frozen=True)
class LayerSite:
    """One layer with the streams for which its modules are computed apart.

    Attributes:
        index: The number of the layer.
        layer: The layer.
        step: The changes of these streams at the layer.
        anatomy: The parts of the layers.
        batched: Whether each stream has its own row in all inputs of the layer.
    """

    index: int
    layer: nn.Module
    step: LayerStep
    anatomy: LayerAnatomy
    batched: bool

    @property
    def name(self) -> str:
        """The name of the layer in messages."""
        return self.anatomy.name(self.index)

    def streams_of(self, module: nn.Module) -> Sequence[int]:
        """List the indices of the entering streams that a module of the layer computes."""
        step = self.step
        if not step.components.isdisjoint(HEADS):
            heads = self.anatomy.at(Heads, self.index)
            if module in {*self.layer.get_submodule(heads.projection).modules()}:
                return [source for source, _ in step.heads]
        if step.has_sublayers:
            parts = self.anatomy.at(Sublayers, self.index)
            for sublayer, streams in ((parts.attention, step.computed), (parts.mlp, step.mlps)):
                if module in {*sublayer.modules()}:
                    return streams
        return range(len(step.entering))


class LayerState(Protocol):
    """Progress of the pass through one layer.

    Attributes:
        is_whole: Whether the current streams pass the layer without any module computed apart.
    """

    is_whole: bool


@dataclass
class ModuleFork(ABC):
    """The forward pass of one module of a layer, in which some streams differ.

    Each intervention within a layer is a subclass. A module may have several forks: the later one
    calls the earlier one as its `original`.

    Attributes:
        module: The module.
        original: Its forward pass without this fork, set on installation.
    """

    module: nn.Module
    original: Callable[..., Any] = field(init=False, repr=False)

    @classmethod
    @abstractmethod
    def of_layer(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield the forks that a layer needs; none if no stream has the intervention."""

    @abstractmethod
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's output for all streams, stream by stream."""

    def installed(self, layer: LayerState) -> AbstractContextManager[None]:
        """Replace the module's forward pass until exit, except while its layer is passed whole."""
        self.original = self.module.forward

        def call(*args: Any, **kwargs: Any) -> Any:
            forward = self.original if layer.is_whole else self.forward
            return forward(*args, **kwargs)

        return hooks.replaced_forward(self.module, call)


def by_stream(batch: Tensor, streams: int, owner: str = "a batch has") -> Tensor:
    """View a batch by stream: [streams × n, …] as [streams, n, …].

    Raises RefusalError if the rows cannot be divided; `owner` begins its message.
    """
    if len(batch) % streams:
        raise RefusalError(f"{owner} no row a stream")
    return batch.reshape(streams, -1, *batch.shape[1:])


def cut(value: Any, streams: int, entering: list[int]) -> Any:
    """Select the entering streams in all tensors that have one row per stream."""
    if isinstance(value, Tensor):
        return take(value, entering) if value.ndim and len(value) == streams else value
    if isinstance(value, tuple):
        return tuple(cut(item, streams, entering) for item in value)
    if isinstance(value, dict):
        return {name: cut(item, streams, entering) for name, item in value.items()}
    return value


def is_alibi(name: str, value: Tensor) -> bool:
    """Check whether an argument is Bloom's ALiBi, which has a row for each head and text."""
    return name == "alibi" and value.ndim == 3


def each_tensor(
    arguments: hooks.Arguments, change: Callable[[str, Tensor], Tensor]
) -> hooks.Arguments:
    """Apply a function to the tensors of arguments with their names (empty if positional)."""
    args, kwargs = arguments
    return (
        tuple(change("", value) if isinstance(value, Tensor) else value for value in args),
        {
            n: change(n, value) if isinstance(value, Tensor) else value
            for n, value in kwargs.items()
        },
    )


@dataclass
class SublayerFork(ModuleFork):
    """The attention or the MLP of a layer.

    Streams that fork within the layer enter it with the same state, so the attention of such a
    state is computed once: with its MLP removed, a stream uses the attention of the baseline.
    The input [entering × rows, tokens, hidden] is cut to the streams that are computed. The outputs
    are distributed to [entering × rows, tokens, hidden] again. A stream without the sublayer gets
    the output of a silent sublayer: zeros if the layer adds to the residual stream, the residual
    stream itself if the sublayer does.

    Attributes:
        computed: Indices of the entering streams that the sublayer computes.
        taken: The output that each entering stream uses; None = the sublayer is removed.
        outputs: Number of outputs: one for each computed stream, or more if some lack heads.
        batched: Whether each stream has its own row in all inputs of the layer.
    """

    computed: Sequence[int]
    taken: tuple[int | None, ...]
    outputs: int
    batched: bool

    @classmethod
    def of_layer(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield the forks of both sublayers."""
        step = site.step
        if step.has_sublayers:
            parts = site.anatomy.at(Sublayers, site.index)
            yield cls(parts.attention, step.computed, step.projected, len(step.heads), site.batched)
            yield cls(parts.mlp, step.mlps, step.mlp, len(step.mlps), site.batched)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the sublayer, computing only what the streams need."""
        entering, computed = len(self.taken), list(self.computed)
        if self.taken == tuple(range(entering)) == tuple(computed):
            return self.original(*args, **kwargs)
        given = (args, kwargs)
        if self.batched:
            args, kwargs = cut((args, kwargs), entering, computed)
        else:
            rows = hooks.state_of(args, kwargs).shape[:2]

            def computed_rows(name: str, value: Tensor) -> Tensor:
                """Select the computed rows of per-stream inputs: hidden states, or ALiBi."""
                if value.shape[:2] != rows and not is_alibi(name, value):
                    return value
                return take(by_stream(value, entering), computed).flatten(0, 1)

            args, kwargs = each_tensor(given, computed_rows)
        output = self.original(*args, **kwargs)
        # There is always a stream: the baseline passes everything.
        added = hooks.first_of(output)
        outputs = by_stream(added, self.outputs, "what its attention makes of its heads has")
        silent = hooks.nothing(self.module, *given, added, len(added) * entering // self.outputs)
        nil = by_stream(silent, entering)
        sources = enumerate(self.taken)
        merged = [nil[stream] if source is None else outputs[source] for stream, source in sources]
        return hooks.with_first(output, torch.stack(merged).flatten(0, 1))


@dataclass
class HeadFork(ModuleFork):
    """The output projection of an attention, before which some streams lose heads.

    Its input is [computed × rows, tokens, columns], all heads side by side. A checkpoint whose
    projection has zeros in the columns of removed heads computes the same.

    Attributes:
        sources: The computed attention from which each output is made.
        columns: The input columns that are zero for each output.
    """

    sources: list[int]
    columns: Sequence[Sequence[slice]]

    @classmethod
    def of_layer(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield the fork of the projection, if some stream lacks heads."""
        step = site.step
        if not step.components.isdisjoint(HEADS):
            heads = site.anatomy.at(Heads, site.index)
            columns = [[heads.columns(part, site.name) for part in gone] for _, gone in step.heads]
            sources = [step.computed.index(source) for source, _ in step.heads]
            yield cls(site.layer.get_submodule(heads.projection), sources, columns)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the projection of the remaining heads for each output."""
        (given,) = (*args, *kwargs.values())
        streams = max(self.sources) + 1
        states: Tensor = take(
            by_stream(given, streams, "the heads of its attention have"), self.sources
        )
        for state, removed in zip(states, self.columns, strict=True):
            for columns in removed:
                state[..., columns] = 0
        return self.original(states.flatten(0, 1))


@dataclass
class RouterFork(ModuleFork):
    """The router of a mixture, which in some streams chooses among fewer experts.

    Its input are the tokens of the streams whose MLPs are computed, ordered by stream. Its output
    for a stream is that of a router with rows for the remaining experts alone, with the numbers of
    all experts, so the experts are called once.

    Attributes:
        experts: The experts of the layer.
        remaining: The remaining experts of each computed MLP; None for all.
    """

    experts: Experts
    remaining: Sequence[list[int] | None]

    @classmethod
    def of_layer(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield the fork of the router, if some stream lacks experts."""
        if "expert" in site.step.components:
            experts = site.anatomy.at(Experts, site.index)
            remaining = [
                experts.without(gone, site.name) if gone else None for gone in site.step.experts
            ]
            yield cls(site.layer.get_submodule(experts.router), experts, remaining)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the router's choices for all streams."""
        streams, given = len(self.remaining), (args, kwargs)
        states = by_stream(hooks.state_of(args, kwargs), streams, "the router of its experts has")
        intact = [stream for stream, remaining in enumerate(self.remaining) if remaining is None]
        # There is always a stream: the baseline lacks none.
        whole = hooks.call_with(self.original, take(states, intact).flatten(0, 1), *given)
        parted = zip(*(by_stream(table, len(intact)) for table in whole), strict=True)
        choices = [
            next(parted)
            if remaining is None
            else routed(self.module, self.experts, remaining, whole, state, given)
            for remaining, state in zip(self.remaining, states, strict=True)
        ]
        make = getattr(type(whole), "_make", type(whole))
        return make(torch.cat(tables) for tables in zip(*choices, strict=True))


@dataclass
class SharedExpertFork(ModuleFork):
    """A shared expert, whose output is zeros in some streams.

    Attributes:
        streams: Number of computed MLPs, whose tokens are its input, ordered by stream.
        removed: Indices of the streams that lack the expert.
    """

    streams: int
    removed: Sequence[int]

    @classmethod
    def of_layer(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield a fork of each shared expert, if some stream lacks them."""
        step = site.step
        if "shared_expert" in step.components:
            for path in site.anatomy.at(SharedExperts, site.index).paths:
                yield cls(site.layer.get_submodule(path), len(step.mlps), step.without_shared)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the expert, with zeros for the streams that lack it."""
        output = self.original(*args, **kwargs)
        added: Tensor = hooks.first_of(output)
        outputs = by_stream(added, self.streams, "its shared experts have").clone()
        for run in neighbours(self.removed):
            outputs[run] = 0
        return hooks.with_first(output, outputs.reshape(added.shape))


_Formats = tuple[tuple[str, str], ...]
"""Paths of the maps of a module that are rounded, each with its format."""


@dataclass
class RoundedFork(ModuleFork):
    """A module of a layer that has weights in formats in some streams.

    Attributes:
        maps: The rounded linear maps of the layer, by their paths.
        formats: The rounded maps with their formats, for each stream that the module computes.
        weights: Function that returns the weights of a map in a format.
    """

    maps: Mapping[str, LinearMap]
    formats: Sequence[_Formats]
    weights: Callable[[str, LinearMap, str], Tensor]

    @classmethod
    def of_layer(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield the forks of all modules with rounded weights."""
        step, index = site.step, site.index
        if "rounded" not in step.components:
            return
        formats = [site.anatomy.formats(index, step.done[s].rounded) for s in step.entering]
        maps = {path: site.anatomy.map_at(index, path) for paths in formats for path in paths}
        weights = partial(site.anatomy.weights.of, index)
        for module, group in grouped(maps.items(), lambda item: item[1].module).items():
            rounded = [
                tuple((path, formats[stream][path]) for path, _ in group if path in formats[stream])
                for stream in site.streams_of(module)
            ]
            fork = ExpertsFork if group[0][1].experts else LinearFork
            yield fork(module, maps, rounded, weights)

    @property
    def alike(self) -> dict[_Formats, list[int]]:
        """Group the streams by their formats: streams in a group have the same weights."""
        return grouped(range(len(self.formats)), lambda stream: self.formats[stream])


class LinearFork(RoundedFork):
    """One linear map of a layer.

    Its input is [streams × rows, tokens, inputs], or all tokens of a stream in one row. The module
    maps everything once, and the rows of streams with other weights again with these.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the map, each stream with its weights."""
        (given,) = (*args, *kwargs.values())
        output: Tensor = self.original(given)
        inputs = by_stream(given, len(self.formats), "a linear map of its layers has")
        mapped = by_stream(output, len(self.formats))
        for formats, streams in self.alike.items():
            for path, form in formats:
                bias = cast("Tensor | None", self.module.bias)
                weight = self.weights(path, self.maps[path], form)
                put(mapped, streams, linear(take(inputs, streams), weight, bias))
        return mapped.reshape(output.shape)


class ExpertsFork(RoundedFork):
    """The experts of a mixture.

    Its input are the tokens, all of a stream in one row, and for each token its experts with
    their weights. Streams with the same weights are computed together.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the experts, each stream with its weights."""
        count, state = len(self.formats), hooks.state_of(args, kwargs)
        choices = integer_tables((*args, *kwargs.values()))
        if not choices or len(choices[0]) % count or len(state) % count:
            raise RefusalError("what its experts are given has no row a stream")

        def rows(streams: list[int], value: Any) -> Any:
            is_table = isinstance(value, Tensor) and value.shape == choices[0].shape
            if value is not state and not is_table:
                return value
            return take(by_stream(value, count), streams).flatten(0, 1)

        outputs: dict[int, Tensor] = {}
        for formats, streams in self.alike.items():
            forward = self.original
            if formats:
                weights = weights_in(self.maps, dict(formats), self.weights)
                rounded = {name: weight for (_, name), weight in weights.items()}
                forward = holding(self.module, rounded).forward
            output = forward(
                *(rows(streams, value) for value in args),
                **{name: rows(streams, value) for name, value in kwargs.items()},
            )
            outputs |= zip(streams, by_stream(output, len(streams)), strict=True)
        return torch.cat([outputs[stream] for stream in range(count)])
