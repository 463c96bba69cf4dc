"""Find and cache the parts of a model's layers, such as sublayers and heads.

Parts whose number is in the model's configuration can be listed without reading weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING

from torch import nn

from tracker.models.load import build_hollow
from tracker.models.miniature import build_miniature
from tracker.models.parts.experts import Experts, SharedExperts
from tracker.models.parts.heads import Heads
from tracker.models.parts.linear_maps import (
    LinearMap,
    RoundedWeights,
    find_embeddings,
    find_linear_maps,
    find_map,
    round_layer,
)
from tracker.models.parts.neurons import Neurons
from tracker.models.parts.probe import LayerPart, PartFinder
from tracker.models.parts.sublayers import Sublayers
from tracker.models.rounding import check_installed
from tracker.models.sources import ModelSource, count_parts, parts_of_config, read_config
from tracker.schema.changes import Ablation, Change
from tracker.schema.errors import CellError, ExperimentError, ModelError
from tracker.schema.grouping import group_by
from tracker.schema.kinds import KIND_STYLES, MAP_GROUPS, NUMBERED_COMPONENTS, Component
from tracker.schema.model_parts import experts_per_token, mlp_width
from tracker.schema.search_parts import SearchParts
from tracker.schema.weight_formats import FORMATS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PART_CLASSES: Mapping[Component, type[LayerPart]] = {
    "attention": Sublayers,
    "mlp": Sublayers,
    "head": Heads,
    "kv_head": Heads,
    "expert": Experts,
    "neuron": Neurons,
    "shared_expert": SharedExperts,
}
"""Classes of layer parts, by the component to which the parts belong."""


NumberedParts = Heads | Experts | Neurons
"""Parts of which a layer has several."""


@dataclass(frozen=True)
class LayerAnatomy(PartFinder):
    """Finder of the parts of a model's layers: sublayers, heads, experts, neurons, linear maps.

    Attributes:
        weights: Cache of quantised weights.
    """

    weights: RoundedWeights = field(default_factory=lambda: RoundedWeights(0))

    @property
    def has_sublayers(self) -> bool:
        """True if each layer of the model consists of one attention and one MLP."""
        if Sublayers not in self.parts:
            try:
                self.find(Sublayers)
            except ModelError:
                self.parts[Sublayers] = ()
        return bool(self.parts[Sublayers])

    def linear_maps(self, layer: int) -> Mapping[str, LinearMap]:
        """Return the linear maps of a layer by their paths in the layer.

        The result is cached.
        """
        key = ("linear maps", layer)
        if key not in self.parts:
            self.parts[key] = find_linear_maps(self.layers[layer], self.layer_name(layer))
        maps: Mapping[str, LinearMap] = self.parts[key]
        return maps

    def get_map(self, layer: int, path: str) -> LinearMap:
        """Return the linear map at a path in a layer; raise CellError if there is no such map."""
        return find_map(self.linear_maps(layer), path, self.layer_name(layer))

    def expand_formats(self, layer: int, rounding_changes: Sequence[Change]) -> dict[str, str]:
        """Return the linear maps of a layer that `rounding_changes` quantises: path → format.

        If several changes concern the same map, the format of the last change is returned. Raises
        CellError if a map does not exist in the layer, or if the layer is already quantised.
        """
        maps = self.linear_maps(layer)
        formats: dict[str, str] = {}
        for change in rounding_changes:
            paths = [change.path] if change.path else [*maps]
            if change.path in MAP_GROUPS:
                modules = {*self.get_part(Sublayers, layer).module(change.path).modules()}
                paths = [path for path, linear in maps.items() if linear.module in modules]
            for path in paths or [change.path]:
                self.get_map(layer, path)
            formats |= dict.fromkeys(paths, change.intervention)
        return formats

    def part_changes(
        self, ablation: Ablation, cache: RoundedWeights | None = None
    ) -> Iterator[tuple[int, Callable[[nn.Module], object]]]:
        """Yield functions that remove or quantise an ablation's parts of layers in a copied model.

        Args:
            ablation: The ablation, whose changes of whole layers are ignored.
            cache: Cache of quantised weights, as for `round_layer`.

        Yields:
            The index of a layer, and a function that removes or quantises parts of this layer in a
            copy of the model.
        """
        for layer, layer_changes in ablation.by_layer.items():
            if layer_changes.roundings:
                formats = self.expand_formats(layer, layer_changes.roundings)
                yield layer, partial(round_layer, formats=formats, number=layer, cache=cache)
            removed = sorted(part for part in layer_changes.changes if part.word in PART_CLASSES)
            by_class = group_by(removed, lambda part: PART_CLASSES[part.component])
            for part_class, parts in by_class.items():
                remove = self.get_part(part_class, layer).remove
                yield layer, partial(remove, parts=parts, name=self.layer_name(layer))

    def check_formats(self, ablations: Sequence[Ablation]) -> None:
        """Raise ExperimentError if the model does not support a requested quantisation format.

        For a model on the meta device, changes of a whole attention or MLP are not checked.

        Args:
            ablations: The ablations whose formats are checked.

        Raises:
            ExperimentError: A linear map does not exist or cannot be quantised, or a required
                package is not installed.
        """
        for change in sorted({change for ablation in ablations for change in ablation.roundings}):
            if change.is_outer or (
                change.layer < len(self.layers)
                and not (change.path in MAP_GROUPS and self.device.type == "meta")
            ):
                try:
                    self._check_format(change)
                except CellError as error:
                    raise ExperimentError(str(error)) from None

    def _check_format(self, change: Change) -> None:
        form, owner = FORMATS[change.intervention], self.layer_name(change.layer)
        check_installed(form)
        if change.is_outer:
            owner = type(self.model).__name__
            embeddings = find_embeddings(self.model)
            if embeddings.is_tied and change.path == "lm_head":
                raise ExperimentError(
                    f"the output head and the embedding of this {owner} share one weight; write "
                    "embedding in 'map', which rounds the weight in both places"
                )
            maps = {change.path: embeddings[change.path]}
        else:
            paths = self.expand_formats(change.layer, [change])
            maps = {path: self.get_map(change.layer, path) for path in paths}
        for path, linear in maps.items():
            inputs = linear.shape[1]
            if form.for_rows(inputs) is None:
                raise ExperimentError(
                    f"{form.name} rounds blocks of {form.block} weights, but each row of {path} of "
                    f"{owner} has {inputs} weights; use another format, or name other maps in 'map'"
                )


MapShape = tuple[int, int]
"""Number of outputs (for experts, the total of all experts), and number of inputs."""


def linear_map_shapes(source: ModelSource) -> tuple[dict[str, MapShape], ...]:
    """List the linear maps of each layer with their shapes.

    Args:
        source: The model; only its configuration is read.

    Returns:
        A dictionary for each layer, with the shape of each linear map by its path.

    Raises:
        ModelError: The configuration cannot be read, or a layer contains matrices that are not
            linear maps.
    """
    anatomy = LayerAnatomy.of(build_hollow(source, "auto"))
    try:
        maps = [anatomy.linear_maps(layer) for layer in range(len(anatomy.layers))]
    except CellError as error:  # nothing has been measured yet
        raise ModelError(f"{source.source}: {error}") from None
    return tuple({path: linear.shape for path, linear in layer_maps.items()} for layer_maps in maps)


@cache
def find_search_parts(source: ModelSource, unit: str) -> SearchParts:
    """Find the layers, heads or other parts of a model that a search is allowed to remove.

    No weights are read. The result is cached until the process ends.

    Args:
        source: The model.
        unit: The kind of parts, such as layers, heads or neurons.

    Returns:
        The parts, and the minimum number of parts that must stay in each layer.

    Raises:
        ModelError: The model has no parts of this kind, or the configuration does not state their
            number.
    """
    counts = count_parts(source)
    if unit not in NUMBERED_COMPONENTS:
        return SearchParts(unit, counts.layers)
    count, plural = counts.count_of(unit), KIND_STYLES[unit].plural
    if count is None:
        raise ModelError(
            f"the configuration of {source.source} does not state the number of {plural}; use "
            "another 'unit'"
        )
    n_staying = experts_per_token(read_config(source)) if unit == "expert" else 1
    small = build_miniature(build_hollow(source, "auto"))
    # Without a miniature, the engine finds the layers before it measures.
    layers = tuple(range(counts.layers)) if small is None else _layers_with_parts(small, unit)
    if not layers or n_staying >= count:
        reason = f"Each layer has {count} {plural}; at least {n_staying} cannot be removed."
        if not layers:
            router = " The router must not choose experts by groups or by a fixed table."
            reason = f"{PART_CLASSES[unit].NEEDS}{router if unit == 'expert' else ''}"
        raise ModelError(
            f"{source.source} has no {plural} that can be removed one by one; use another 'unit'. "
            f"{reason}"
        )
    return SearchParts(unit, counts.layers, count, layers, n_staying)


def find_configured_parts(source: ModelSource, unit: Component) -> dict[int, NumberedParts]:
    """Return the heads, experts or neurons of each layer, according to the configuration.

    `unit` is the kind of parts. The result has no entries for layers without parts of this kind.
    Paths in these objects are empty, because the model's modules are not searched. Raises
    ModelError if no layer has parts of this kind, or if the configuration does not state the number
    of parts.
    """
    parts, config = find_search_parts(source, unit), read_config(source)
    counts, number = parts_of_config(config), parts.per_layer
    part: NumberedParts
    if unit == "expert":
        part = Experts("", "", number, parts.min_kept, removable=True)
    elif unit == "neuron":
        part = Neurons("", (mlp_width(config) or 0) // number, number)
    else:
        heads, groups = counts.head or 1, counts.kv_head or counts.head or 1
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        part = Heads("", heads, groups, width)
    return dict.fromkeys(parts.used_layers or (), part)


def _layers_with_parts(small_model: PreTrainedModel, unit: Component) -> tuple[int, ...]:
    """List the layers from which parts of the kind `unit`, e.g. heads, can be removed.

    `small_model` is a small random model with the architecture of the user's model.
    """
    config, anatomy = small_model.config.get_text_config(), LayerAnatomy.of(small_model)
    count, n_chosen = parts_of_config(config).count_of(unit), experts_per_token(config)

    def is_configured(part: LayerPart | None) -> bool:
        if isinstance(part, Experts) and (part.removable, part.n_chosen) != (True, n_chosen):
            return False
        return isinstance(part, NumberedParts) and part.counts[unit] == count

    parts = enumerate(anatomy.find(PART_CLASSES[unit]))
    return tuple(layer for layer, part in parts if is_configured(part))
