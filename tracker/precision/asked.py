"""Asks for linear maps, or layers, in formats: one at a time, of a cell's layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tracker.core.config import ONE_EACH, CellRequest
from tracker.core.model_parts import ModelParts, check_parts, with_all_parts
from tracker.models.maps import names_of_maps
from tracker.models.sources import find_model


def each_layer(cell: CellRequest, formats: Sequence[str]) -> CellRequest:
    """Ask for each of a cell's layers in each format, and for nothing else."""
    return cell.model_copy(update={**ONE_EACH, "interventions": tuple(formats)})


def each_map(
    cell: CellRequest, formats: Sequence[str], trust_remote_code: bool = False
) -> CellRequest:
    """Ask for each linear map of a cell's layers, or those that it names, in each format.

    ExperimentError for a map that the model has not.
    """
    wanted: dict[str, Any] = {"components": ("linear",), "maps": cell.maps}
    asked = each_layer(cell, formats).model_copy(update=wanted)
    source = find_model(cell.model, cell.revision, cell.model_args)
    names = names_of_maps(source, trust_remote_code)
    parts = ModelParts(len(names), maps=names)
    check_parts(asked, parts)
    return with_all_parts(asked, parts)
