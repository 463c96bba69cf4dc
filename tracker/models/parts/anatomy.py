"""The parts of a model's layers, each kind found once, when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from tracker.core.changes import Ablation, Change
from tracker.core.errors import CellError, ExperimentError, ModelError
from tracker.core.grouping import grouped
from tracker.core.kinds import MAPS, Component
from tracker.core.weight_formats import FORMATS
from tracker.models.parts.embeddings import find_embeddings
from tracker.models.parts.experts import Experts, SharedExperts
from tracker.models.parts.heads import Heads
from tracker.models.parts.linear_maps import (
    LinearMap,
    RoundedWeights,
    linear_maps,
    map_at,
    round_layer,
)
from tracker.models.parts.probe import LayerPart, PartFinder
from tracker.models.parts.sublayers import Sublayers
from tracker.models.rounding import refuse_uninstalled

KIND_OF: Mapping[Component, type[LayerPart]] = {
    "attention": Sublayers,
    "mlp": Sublayers,
    "head": Heads,
    "kv_head": Heads,
    "expert": Experts,
    "shared_expert": SharedExperts,
}
"""Class of each component that is a part of a layer."""


@dataclass(frozen=True)
class LayerAnatomy(PartFinder):
    """The parts of a model's layers, and what changes them.

    Attributes:
        weights: Weights in formats that are kept.
    """

    weights: RoundedWeights = field(default_factory=lambda: RoundedWeights(0))

    @property
    def is_divided(self) -> bool:
        """Check whether its layers are divided into attention and MLP."""
        if Sublayers not in self.parts:
            try:
                self.find(Sublayers)
            except ModelError:
                self.parts[Sublayers] = ()
        return bool(self.parts[Sublayers])

    def linear_maps(self, layer: int) -> Mapping[str, LinearMap]:
        """List the linear maps of a layer by their paths; CellError as `linear_maps`."""
        key = ("linear maps", layer)
        if key not in self.parts:
            self.parts[key] = linear_maps(self.layers[layer], self.name(layer))
        maps: Mapping[str, LinearMap] = self.parts[key]
        return maps

    def map_at(self, layer: int, path: str) -> LinearMap:
        """Return a linear map of a layer, or one expert's; CellError where there is none."""
        return map_at(self.linear_maps(layer), path, self.name(layer))

    def formats(self, layer: int, rounded: Sequence[Change]) -> dict[str, str]:
        """Expand what is rounded of a layer to path of a linear map → format.

        Of a map that is named twice it is the last format. CellError where the layer has no such
        map, or holds other matrices, or weights that are quantised.
        """
        maps = self.linear_maps(layer)
        formats: dict[str, str] = {}
        for change in rounded:
            paths = [change.path] if change.path else [*maps]
            if change.path in MAPS:
                modules = {*self.at(Sublayers, layer).module(change.path).modules()}
                paths = [path for path, linear in maps.items() if linear.module in modules]
            for path in paths or [change.path]:
                self.map_at(layer, path)
            formats |= dict.fromkeys(paths, change.intervention)
        return formats

    def changes(
        self, ablation: Ablation, cache: RoundedWeights | None = None
    ) -> Iterator[tuple[int, Callable[[nn.Module], object]]]:
        """List what really changes parts of a copy's layers under an ablation.

        Args:
            ablation: The ablation; layers that it removes, repeats or replaces stay as they are.
            cache: As for `round_layer`.

        Yields:
            A layer, and the function that changes the copy of it.
        """
        for layer, changed in ablation.by_layer.items():
            if changed.rounded:
                formats = self.formats(layer, changed.rounded)
                yield layer, partial(round_layer, formats=formats, number=layer, cache=cache)
            removed = sorted(change for change in changed.changes if change.word in KIND_OF)
            for kind, parts in grouped(removed, lambda part: KIND_OF[part.component]).items():
                remove = self.at(kind, layer).remove
                yield layer, partial(remove, parts=parts, name=self.name(layer))

    def refuse_formats(self, ablations: Sequence[Ablation]) -> None:
        """Refuse formats that the model cannot be in, before anything is measured.

        Of a model on the meta device, attentions and MLPs as a whole are left for later: finding
        them takes a model that runs.

        Args:
            ablations: The ablations.

        Raises:
            ExperimentError: A map is not there, is quantised already, or has no whole blocks of a
                format; or the format's package is not installed.
        """
        for change in sorted({change for ablation in ablations for change in ablation.rounded}):
            if change.is_end or (
                change.layer < len(self.layers)
                and not (change.path in MAPS and self.device.type == "meta")
            ):
                try:
                    self._refuse_format(change)
                except CellError as error:
                    raise ExperimentError(str(error)) from None

    def _refuse_format(self, change: Change) -> None:
        form, where = FORMATS[change.intervention], self.name(change.layer)
        refuse_uninstalled(form)
        if change.is_end:
            where = type(self.model).__name__
            ends = find_embeddings(self.model)
            if ends.is_tied and change.path == "lm_head":
                raise ExperimentError(
                    f"the head of this {where} is its embedding, one tensor for both; name it by "
                    "'map' as embedding, which rounds it at both ends"
                )
            maps = {change.path: ends[change.path]}
        else:
            paths = self.formats(change.layer, [change])
            maps = {path: self.map_at(change.layer, path) for path in paths}
        for path, linear in maps.items():
            inputs = linear.shape[1]
            if form.for_rows(inputs) is None:
                raise ExperimentError(
                    f"{form.name} keeps {form.block} inputs together, and {path} of {where} has "
                    f"rows of {inputs}; take another format, or name other linear maps by 'map'"
                )
