"""How much the outcomes of a cell's documents change: what its power rests on."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import median

from tracker.core.records import RunRecord
from tracker.stats.power import OutcomeVariance


def outcome_variance(run: RunRecord) -> OutcomeVariance | None:
    """Read a run's spread off its record; None where it is undefined, or nothing has changed."""
    if run.drop_sd is None or run.accuracy_drop is None:
        return None
    binary = run.mcnemar_p is not None
    # McNemar's variance is about 0, the sample's about its mean.
    square = run.drop_sd**2 * (run.n - 1) / run.n + run.accuracy_drop**2
    variance = min(square, 1.0) if binary else run.drop_sd**2
    return OutcomeVariance(variance, binary) if variance > 0 else None


def spreads_of(runs: Iterable[RunRecord]) -> tuple[OutcomeVariance, OutcomeVariance] | None:
    """Find the spread of the median removal, and that of the one that changes most.

    None where nothing changes under any, or it is undefined.
    """
    found = [spread for run in runs if (spread := outcome_variance(run))]
    if not found:
        return None
    binary = all(spread.binary for spread in found)
    variances = [spread.variance for spread in found]
    return OutcomeVariance(median(variances), binary), OutcomeVariance(max(variances), binary)
