"""Make the requests for linear maps, or layers, in formats, and observe their errors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from tracker.core.changes import Ablation, Change
from tracker.core.config import ONE_EACH, CellRequest
from tracker.core.documents import Document
from tracker.core.model_parts import ModelParts, check_parts, with_all_parts
from tracker.engine.observers.divergence import divergences
from tracker.engine.observers.rounding_error import rounding_errors, weight_errors
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.shards import Arrays
from tracker.measuring.observing import Observe
from tracker.models.parts.catalog import linear_map_shapes
from tracker.models.sources import find_model


def each_layer(cell: CellRequest, formats: Sequence[str], ends: Sequence[str] = ()) -> CellRequest:
    """Ask for each of a cell's layers in each format, for some ends, and for nothing else."""
    asked = cell.model_copy(update={**ONE_EACH, "interventions": tuple(formats)})
    if not ends:
        return asked
    return asked.model_copy(update={"components": ("layer", "linear"), "maps": tuple(ends)})


def each_map(
    cell: CellRequest,
    formats: Sequence[str],
    trust_remote_code: bool = False,
    ends: Sequence[str] = (),
) -> CellRequest:
    """Ask for each linear map of a cell's layers, or those that it names, in each format.

    Args:
        cell: The cell.
        formats: The formats.
        trust_remote_code: Whether code from the download may run.
        ends: Which of `kinds.ENDS` are asked for besides.

    Returns:
        The request.

    Raises:
        ExperimentError: The model has no such map.
    """
    wanted: dict[str, Any] = {"components": ("linear",), "maps": cell.maps}
    asked = each_layer(cell, formats).model_copy(update=wanted)
    source = find_model(cell.model, cell.revision, cell.model_args)
    names = tuple(map(tuple, linear_map_shapes(source, trust_remote_code)))
    parts = ModelParts(len(names), maps=names)
    check_parts(asked, parts)
    asked = with_all_parts(asked, parts)
    if ends:
        more: dict[str, Any] = {"maps": (*asked.maps, *ends)}
        if asked.changes is not None:  # layers differ in their maps
            of_ends = (Change.parse(f"{form}:{end}") for form, end in product(formats, ends))
            more["changes"] = (*asked.changes, *of_ends)
        asked = asked.model_copy(update=more)
    return asked


def errors_of(engine: Engine, maps: Sequence[Change], kl: bool = False) -> Observe:
    """Make what observes a document's `rounding_errors`, with `weight_error` the same for all.

    With `kl` also the divergence of what the model says, which takes a pass for each map.
    """
    weights = weight_errors(engine, maps)
    ablations = [Ablation.of(each) for each in maps]

    def watch(document: Document) -> Arrays:
        found = {**rounding_errors(engine, document, maps), "weight_error": weights}
        if kl:
            found["kl"] = divergences(engine, document, ablations)["kl"]
        return {name: np.asarray(value) for name, value in found.items()}

    return watch
