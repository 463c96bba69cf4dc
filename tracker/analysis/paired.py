"""Compare the same documents with and without a change, by one measure.

Also estimate the variance of a cell's outcomes, which determines its statistical power.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from tracker.core.estimates import Estimate
from tracker.core.records import RunRecord
from tracker.stats.accuracy import OutcomeVariance, accuracy, accuracy_drop, drop_sd
from tracker.stats.arrays import Array


def outcome_variance(run: RunRecord) -> OutcomeVariance | None:
    """Read the outcome variance of a run from its record; None if it is undefined or 0."""
    if run.drop_sd is None or run.drop.value is None:
        return None
    binary = run.drop.p_value is not None
    # McNemar's variance is about 0, the sample's about its mean.
    square = run.drop_sd**2 * (run.n - 1) / run.n + run.drop.value**2
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


@dataclass(frozen=True)
class PairedOutcomes:
    """Outcomes of each document in the intact model and under each of some ablations.

    An outcome is NaN if lm-eval gives no finite score or names no gold answer. The drops of such a
    document are NaN too, and estimates are None with a reason. No such document is left out or
    counted as 0.

    Attributes:
        baseline: `[documents]`, outcomes of the intact model.
        ablated: `[documents, ablations]`, outcomes of the same documents under each ablation.
        weights: `[documents]`, weight of each document in the measure's mean, summing to 1.
        higher_is_better: Whether larger is better, as for an accuracy; False for a loss.
    """

    baseline: Array
    ablated: Array
    weights: Array
    higher_is_better: bool = True

    @property
    def scores(self) -> PairedOutcomes:
        """The same outcomes with the sign that makes larger values better."""
        if self.higher_is_better:
            return self
        turned = {"baseline": -self.baseline, "ablated": -self.ablated}
        return replace(self, **turned, higher_is_better=True)

    @property
    def drops(self) -> Array:
        """The decrease of each document's score by each ablation `[documents, ablations]`."""
        better = self.scores
        return better.baseline[:, None] - better.ablated

    @property
    def mean_drops(self) -> Array:
        """The measure's drop under each ablation `[ablations]`."""
        return np.asarray(self.weights @ self.drops)

    def level(self, place: int) -> Estimate:
        """Estimate the measure under one of the ablations, by its place."""
        return accuracy(self.ablated[:, place], self.weights)

    def drop(self, place: int) -> Estimate:
        """Estimate the drop of one of the ablations."""
        return accuracy_drop(*self._pair(place), self.weights)

    def drop_sd(self, place: int) -> Estimate:
        """Estimate how far the drops of single documents are apart under one of them."""
        return drop_sd(*self._pair(place), self.weights)

    def _pair(self, place: int) -> tuple[Array, Array]:
        """Return the two arrays whose difference is the drop; 0/1 outcomes stay 0 and 1."""
        before, after = self.baseline, self.ablated[:, place]
        return (before, after) if self.higher_is_better else (after, before)
