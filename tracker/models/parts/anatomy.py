"""The parts of a model's layers, each kind found once, when it is first needed.

Parts given by a model's configuration are listed without reading a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING

from torch import nn

from tracker.core.changes import Ablation, Change
from tracker.core.errors import CellError, ExperimentError, ModelError
from tracker.core.grouping import grouped
from tracker.core.kinds import KINDS, MAPS, NUMBERED, Component
from tracker.core.model_parts import experts_of_a_token
from tracker.core.search_parts import SearchParts
from tracker.core.weight_formats import FORMATS
from tracker.models.load import hollow
from tracker.models.miniature import miniature
from tracker.models.parts.experts import Experts, SharedExperts
from tracker.models.parts.heads import Heads
from tracker.models.parts.linear_maps import (
    LinearMap,
    RoundedWeights,
    find_embeddings,
    linear_maps,
    map_at,
    round_layer,
)
from tracker.models.parts.probe import LayerPart, PartFinder
from tracker.models.parts.sublayers import Sublayers
from tracker.models.rounding import refuse_uninstalled
from tracker.models.sources import ModelSource, count_parts, parts_of, read_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
    """The parts of a model's layers, and the functions that change them.

    Attributes:
        weights: Cache of weights in formats.
    """

    weights: RoundedWeights = field(default_factory=lambda: RoundedWeights(0))

    @property
    def is_divided(self) -> bool:
        """True if its layers are divided into attention and MLP."""
        if Sublayers not in self.parts:
            try:
                self.find(Sublayers)
            except ModelError:
                self.parts[Sublayers] = ()
        return bool(self.parts[Sublayers])

    def linear_maps(self, layer: int) -> Mapping[str, LinearMap]:
        """Return the linear maps of a layer by their paths; raise CellError as `linear_maps`."""
        key = ("linear maps", layer)
        if key not in self.parts:
            self.parts[key] = linear_maps(self.layers[layer], self.name(layer))
        maps: Mapping[str, LinearMap] = self.parts[key]
        return maps

    def map_at(self, layer: int, path: str) -> LinearMap:
        """Return a linear map of a layer, or one expert's; raise CellError if there is none."""
        return map_at(self.linear_maps(layer), path, self.name(layer))

    def formats(self, layer: int, rounded: Sequence[Change]) -> dict[str, str]:
        """Expand the rounded parts of a layer to path of a linear map → format.

        For a map that is named twice, the last format counts. Raises CellError if the layer has no
        such map, holds other matrices, or has quantised weights.
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
        """Yield the real changes of parts of a copy's layers under an ablation.

        Args:
            ablation: The ablation; layers that it removes, repeats or replaces are not changed.
            cache: Cache of weights in formats, as for `round_layer`.

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
        """Refuse formats that the model cannot have, before anything is measured.

        For a model on the meta device, attentions and MLPs as a whole are checked later: finding
        them takes a model that runs.

        Args:
            ablations: The ablations.

        Raises:
            ExperimentError: A map does not exist, is quantised already, or has no whole blocks of a
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


Shape = tuple[int, int]
"""Number of outputs (for experts, of all together), and number of inputs."""


def linear_map_shapes(source: ModelSource) -> tuple[dict[str, Shape], ...]:
    """List the linear maps of each layer with their shapes.

    Args:
        source: The model; no weight is read.

    Returns:
        Path of each map within its layer → its shape, layer by layer.

    Raises:
        ModelError: The configuration cannot be read, or a layer holds other matrices.
    """
    anatomy = LayerAnatomy.of(hollow(source, "auto"))
    try:
        maps = [anatomy.linear_maps(layer) for layer in range(len(anatomy.layers))]
    except CellError as error:  # nothing has been measured yet
        raise ModelError(f"{source.source}: {error}") from None
    return tuple({path: linear.shape for path, linear in of.items()} for of in maps)


@cache
def search_parts(source: ModelSource, unit: Component) -> SearchParts:
    """Find the parts of a model that a search may remove; once per process.

    Their number is in the configuration. A miniature of the same class, whose layers hold the same
    modules, shows which layers have them, so no weights are read.

    Args:
        source: The model.
        unit: The kind of parts.

    Returns:
        The parts. One head of each layer stays, or as many experts as its router chooses.

    Raises:
        ModelError: It has no such parts, or its configuration does not give their number.
    """
    counts = count_parts(source)
    if unit not in NUMBERED:
        return SearchParts(unit, counts.layers)
    count, many = counts.numbered(unit), KINDS[unit].many
    if count is None:
        raise ModelError(
            f"{source.source} has no {many} that its configuration counts; take another 'unit'"
        )
    stay = 1
    if unit == "expert":
        stay = experts_of_a_token(read_config(source))
    small = miniature(hollow(source, "auto"))
    # Without a miniature, the engine finds the layers before it measures.
    layers = tuple(range(counts.layers)) if small is None else _layers_with(small, unit)
    if not layers or stay >= count:
        why = f": of {count} in a layer {stay} must stay"
        if not layers:
            router = f"{Experts.NEEDS}, in no groups and by no fixed table"
            why = f" (needed: {router if unit == 'expert' else Heads.NEEDS})"
        raise ModelError(
            f"{source.source} has no {many} that could be taken out alone{why}; take another 'unit'"
        )
    return SearchParts(unit, counts.layers, count, layers, stay)


def _layers_with(small: PreTrainedModel, unit: Component) -> tuple[int, ...]:
    """Return the layers of a miniature with as many parts as its configuration says."""
    config, anatomy = small.config.get_text_config(), LayerAnatomy.of(small)
    count = parts_of(config).numbered(unit)
    if unit != "expert":
        heads = enumerate(anatomy.find(Heads))
        return tuple(layer for layer, part in heads if part and part.count(unit) == count)
    chosen = experts_of_a_token(config)
    return tuple(
        layer
        for layer, part in enumerate(anatomy.find(Experts))
        if part and part.removable and (part.count, part.chosen) == (count, chosen)
    )
