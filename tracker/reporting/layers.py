"""Figures of one whole layer, or why they are undefined."""

from __future__ import annotations

from tracker.metrics.accuracy import Estimate
from tracker.records import CellRecord, RunIdentity
from tracker.reporting.formats import defined
from tracker.reporting.leaderboard import relevance_estimate

PANELS = {
    "cosine_score": "cosine score (1 − cos)",
    "angular_distance": "angular distance (÷ π)",
    "relative_update": "relative update",
}
"""Each proxy with its unit."""


def layer_relevance(cell: CellRecord, layer: int) -> Estimate:
    """Find the accuracy relevance of one whole layer, with its interval.

    Args:
        cell: The cell.
        layer: The layer, measured or not.

    Returns:
        The relevance, or the reason why it is undefined.
    """
    record = cell.runs_of().get(layer)
    found = relevance_estimate(cell, record) if record else Estimate(None)
    if defined(found.value):
        return found
    return Estimate(None, reason=why_undefined(cell, layer, "accuracy_relevance"))


def why_undefined(cell: CellRecord, layer: int, field: str) -> str:
    """Say why a figure of one whole layer is undefined.

    Args:
        cell: The cell.
        layer: The layer, measured or not.
        field: The field's name.

    Returns:
        The reason.
    """
    record = cell.runs_of().get(layer)
    return cell.reason_of(field, record) if record else cell.absence(RunIdentity(layer=layer))


def relative_depth(layer: int, layers: int) -> float:
    """Place a layer between the first (0) and the last (1).

    Args:
        layer: 0-based.
        layers: How many layers the model has.

    Returns:
        layer / (layers - 1); 0 in a model of one layer.
    """
    return layer / (layers - 1) if layers > 1 else 0.0
