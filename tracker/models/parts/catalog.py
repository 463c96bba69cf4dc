"""Parts that a model has by its configuration, listed without reading a weight."""

from __future__ import annotations

from functools import cache
from typing import Any

from tracker.core.errors import CellError, ModelError
from tracker.core.kinds import KINDS, NUMBERED, Component
from tracker.core.model_parts import experts_of_a_token
from tracker.core.search_parts import SearchParts
from tracker.models.load import hollow
from tracker.models.miniature import miniature
from tracker.models.parts.anatomy import LayerAnatomy
from tracker.models.parts.experts import Experts
from tracker.models.parts.heads import Heads
from tracker.models.sources import ModelSource, count_parts, parts_of, read_config

Shape = tuple[int, int]
"""Outputs, of experts those of all, and inputs."""


def linear_map_shapes(
    source: ModelSource, trust_remote_code: bool = False
) -> tuple[dict[str, Shape], ...]:
    """List the linear maps of each layer with their shapes.

    Args:
        source: The model; no weight is read.
        trust_remote_code: Whether code from the download may run.

    Returns:
        Of each layer the path of each map within it → its shape.

    Raises:
        ModelError: The configuration cannot be read, or a layer holds other matrices.
    """
    anatomy = LayerAnatomy.of(hollow(source, "auto", trust_remote_code))
    try:
        maps = [anatomy.linear_maps(layer) for layer in range(len(anatomy.layers))]
    except CellError as error:  # nothing is measured yet
        raise ModelError(f"{source.source}: {error}") from None
    return tuple({path: linear.shape for path, linear in of.items()} for of in maps)


@cache
def search_parts(
    source: ModelSource, unit: Component, trust_remote_code: bool = False
) -> SearchParts:
    """Find the parts of a model that a search may remove; once in a process.

    How many there are is in the configuration. Which layers have them is seen in a miniature of the
    same class, whose layers hold the same modules: no weights are read.

    Args:
        source: The model.
        unit: What parts.
        trust_remote_code: Whether code from a download may run.

    Returns:
        The parts. One head of each layer stays, or as many experts as its router chooses.

    Raises:
        ModelError: It has no such parts, or does not say how many.
    """
    counts = count_parts(source, trust_remote_code)
    if unit not in NUMBERED:
        return SearchParts(unit, counts.layers)
    count, many = counts.numbered(unit), KINDS[unit].many
    if count is None:
        raise ModelError(
            f"{source.source} has no {many} that its configuration counts; take another 'unit'"
        )
    stay = 1
    if unit == "expert":
        stay = experts_of_a_token(read_config(source, trust_remote_code))
    small = miniature(hollow(source, "auto", trust_remote_code))
    # Without a miniature the engine finds out, before it measures.
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


def _layers_with(small: Any, unit: Component) -> tuple[int, ...]:
    """List the layers of a miniature with as many parts as its configuration says."""
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
