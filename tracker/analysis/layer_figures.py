"""Figures of one whole layer, or why they are undefined."""

from __future__ import annotations

from tracker.core.changes import Change
from tracker.core.estimates import Estimate
from tracker.core.formats import defined
from tracker.core.records import CellRecord, RunRecord
from tracker.stats.combined import ratio
from tracker.stats.support import together


def layer_relevance(cell: CellRecord, layer: int) -> Estimate:
    """Find the accuracy relevance of one whole layer with its interval, or why it is undefined."""
    record = cell.runs_of().get(layer)
    found = relevance_estimate(cell, record) if record else Estimate(None)
    if defined(found.value):
        return found
    return Estimate(None, reason=why_undefined(cell, layer, "accuracy_relevance"))


def why_undefined(cell: CellRecord, layer: int, field: str) -> str:
    """Say why a field of one whole layer, measured or not, is undefined."""
    record = cell.runs_of().get(layer)
    return cell.reason_of(field, record) if record else cell.absence(Change(layers=(layer,)))


def sure(figure: Estimate) -> bool:
    """Say whether a figure's interval does not hold zero."""
    low, high = figure.low, figure.high
    return low is not None and high is not None and not low <= 0 <= high


def relative_depth(layer: int, layers: int) -> float:
    """Place a layer between the first (0) and the last (1); 0 in a model of one layer."""
    return layer / (layers - 1) if layers > 1 else 0.0


def relevance_estimate(cell: CellRecord, record: RunRecord, family: int = 1) -> Estimate:
    """Give a run's accuracy relevance its interval, which holds together with a family of others.

    The drop's interval is divided by that of the baseline above chance, as independent figures:
    they share their documents, so the interval is rather too wide than too narrow. There is none
    where the baseline's reaches down to chance.
    """
    value, chance = record.accuracy_relevance, cell.chance_accuracy
    if value is None:
        return Estimate(None, reason=record.reasons.get("accuracy_relevance", "not recorded"))
    drop, intact = together([record.drop, cell.baseline], [record.n, cell.n], family)
    if chance is None or intact.value is None or intact.low is None or intact.high is None:
        return Estimate(value)
    found = ratio(drop, Estimate(intact.value - chance, intact.low - chance, intact.high - chance))
    if found.low is None or found.high is None:
        return Estimate(value)
    return Estimate(value, min(found.low, 1.0), min(found.high, 1.0))
