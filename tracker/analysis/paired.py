"""Compare a metric of the same documents in the intact model and in ablated models.

This module also estimates the variance of outcomes, which determines the statistical power of a
comparison.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import NormalDist, median

import numpy as np

from tracker.schema.estimates import Estimate
from tracker.schema.records import RunRecord
from tracker.stats.accuracy import (
    LEVEL,
    OutcomeVariance,
    accuracy,
    accuracy_drop,
    cluster_means,
    drop_sd,
    mean_interval,
    undefined_mean_reason,
)
from tracker.stats.arrays import Array, IntArray


def outcome_variance(run: RunRecord) -> OutcomeVariance | None:
    """Compute the variance of a run's drop over documents; None if undefined or 0."""
    if run.drop_sd is None or run.drop.value is None:
        return None
    is_binary = run.drop.p_value is not None and run.clusters is None
    # McNemar's variance is about 0, the sample's about its mean.
    square = run.drop_sd**2 * (run.n - 1) / run.n + run.drop.value**2
    variance = min(square, 1.0) if is_binary else run.drop_sd**2
    return OutcomeVariance(variance, is_binary) if variance > 0 else None


def choice_variance(run: RunRecord) -> OutcomeVariance | None:
    """Estimate the variance of the drop in choice probability over documents.

    Returns None if the drop has no confidence interval.
    """
    drop = run.choice_drop
    if drop.low is None or drop.high is None or drop.high <= drop.low:
        return None
    error = (drop.high - drop.low) / (2 * NormalDist().inv_cdf((1 + LEVEL) / 2))
    return OutcomeVariance(error**2 * run.n, binary=False)


def variance_summary(runs: Iterable[RunRecord]) -> tuple[OutcomeVariance, OutcomeVariance] | None:
    """Return the median and the largest variance of the runs' drops over documents.

    Returns None if no run has a defined variance above 0.
    """
    spreads = [spread for run in runs if (spread := outcome_variance(run))]
    if not spreads:
        return None
    is_binary = all(spread.binary for spread in spreads)
    variances = [spread.variance for spread in spreads]
    return OutcomeVariance(median(variances), is_binary), OutcomeVariance(max(variances), is_binary)


@dataclass(frozen=True)
class PairedOutcomes:
    """Outcomes of each document in the intact model and under each of several ablations.

    An outcome is NaN if lm-eval computes no finite score, or if the document has no gold answer. An
    estimate that includes a NaN outcome is undefined, and contains the reason.

    Attributes:
        baseline: Outcomes of the intact model, as `[documents]`.
        ablated: Outcomes under each ablation, as `[documents, ablations]`.
        weights: Weight of each document in the mean outcome; the weights sum to 1.
        higher_is_better: Whether larger outcomes are better, e.g. for an accuracy; False for a
            loss.
        clusters: Number of each document's cluster; None if all documents are independent.
            Documents of the same cluster depend on each other.
    """

    baseline: Array
    ablated: Array
    weights: Array
    higher_is_better: bool = True
    clusters: IntArray | None = None

    @property
    def scores(self) -> PairedOutcomes:
        """Outcomes with negated losses, so that larger values are always better."""
        if self.higher_is_better:
            return self
        return replace(self, baseline=-self.baseline, ablated=-self.ablated, higher_is_better=True)

    @property
    def drops(self) -> Array:
        """Array `[documents, ablations]` of the decrease of each document's score."""
        paired = self.scores
        with np.errstate(invalid="ignore"):  # −∞ minus −∞ is undefined
            return paired.baseline[:, None] - paired.ablated

    @property
    def mean_drops(self) -> Array:
        """Array `[ablations]` of the weighted mean drop over the documents."""
        return np.asarray(self.weights @ self.drops)

    def level(self, index: int) -> Estimate:
        """Estimate the mean outcome under the ablation in column `index`."""
        return accuracy(*cluster_means(self.ablated[:, index], self.weights, self.clusters))

    def drop(self, index: int) -> Estimate:
        """Estimate the mean drop under the ablation in column `index`."""
        return accuracy_drop(*self._drop_terms(index))

    def drop_sd(self, index: int) -> Estimate:
        """Estimate a drop's standard deviation over documents, for the ablation in column `index`.

        With clusters, independent documents with the returned standard deviation would have an
        equally uncertain mean.
        """
        terms = self._drop_terms(index)
        spread, ratio = drop_sd(*terms), len(self.weights) / max(len(terms[-1]), 1)
        scaled = None if spread.value is None else spread.value * math.sqrt(ratio)
        return replace(spread, value=scaled)

    def mean_drop(self, outcome_name: str) -> Estimate:
        """Estimate the mean drop of probabilities or log-probabilities in column 0 (one ablation).

        If an outcome is missing, the mean is undefined, and the reason contains `outcome_name`.
        """
        drops = self.drops[:, 0]
        if reason := undefined_mean_reason(drops, outcome_name):
            return Estimate(None, reason=reason)
        interval = mean_interval(*cluster_means(drops, self.weights, self.clusters))
        return Estimate(float(self.mean_drops[0]), *interval)

    def _drop_terms(self, index: int) -> tuple[Array, Array, Array]:
        """Return two arrays of outcomes whose difference is the drop, and their weights.

        The first array belongs to the intact model, the second to the ablated model. For a loss,
        the arrays are swapped. If documents form clusters, the arrays contain cluster means.
        """
        intact, ablated = self.baseline, self.ablated[:, index]
        terms = (intact, ablated) if self.higher_is_better else (ablated, intact)
        (first, weights), (second, _) = (
            cluster_means(term, self.weights, self.clusters) for term in terms
        )
        return first, second, weights
