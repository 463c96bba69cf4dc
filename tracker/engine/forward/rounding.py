"""Weights in formats: linear maps and experts that some streams compute with other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from tracker.core.grouping import grouped
from tracker.engine.forward.base import LayerSite, ModuleFork, by_stream
from tracker.engine.refusal import RefusalError
from tracker.models.hooks import state_of
from tracker.models.parts.linear_maps import LinearMap, holding, weights_in
from tracker.models.parts.probe import integer_tables
from tracker.models.slices import put, take

_Formats = tuple[tuple[str, str], ...]
"""Paths of the maps of a module that are rounded, each with its format."""


@dataclass
class RoundedFork(ModuleFork):
    """A module of a layer that has weights in formats in some streams.

    Attributes:
        maps: The rounded linear maps of the layer, by their paths.
        formats: For each stream that the module computes its rounded maps, with their formats.
        weights: Returns the weights of a map in a format.
    """

    maps: Mapping[str, LinearMap]
    formats: Sequence[_Formats]
    weights: Callable[[str, LinearMap, str], Tensor]

    @classmethod
    def of_layer(cls, site: LayerSite) -> Iterator[ModuleFork]:
        """Yield the forks of all modules with rounded weights."""
        step, index = site.step, site.index
        if "rounded" not in step.changes:
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
        """The streams that have the same weights, by these."""
        return grouped(range(len(self.formats)), lambda stream: self.formats[stream])


class LinearFork(RoundedFork):
    """One linear map of a layer.

    Its input is [streams × rows, tokens, inputs], or all of a stream's tokens in a row. Everything
    is mapped once by the module, and the rows of streams with other weights once more with these.
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

    Their input are the tokens, all of a stream's in a row, and for each token its experts with
    their weights. Streams with the same weights are computed together.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the experts, each stream with its weights."""
        count, state = len(self.formats), state_of(args, kwargs)
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
