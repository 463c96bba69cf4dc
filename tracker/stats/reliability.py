"""Compute how well samples of documents agree on the order of layers, and how many are needed.

A layer's figure is a weighted mean over documents. Two samples without a common document give two
orders of the same layers. Their rank correlation is the reliability of the order at that sample
size. A sample and the whole set that contains it agree better, because they overlap.

A cheap measure can use more documents for the same compute than an expensive one. Measures are
therefore compared at equal cost, on documents that the true order does not use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from tracker.core.estimates import Estimate
from tracker.stats.accuracy import LEVEL
from tracker.stats.arrays import Array, Numbers, Strata, divided
from tracker.stats.rank_agreement import rounded, row_coefficients
from tracker.stats.resampling import SEED, jackknife_error

FLIPS = 19_999
_CHUNK = 1000
"""Signs that are held in memory at once."""
_GROUPS = 10
"""Parts of the documents that are left out in turn, for an interval."""


def stratified_orders(strata: Strata, draws: int, seed: int) -> Iterator[Numbers]:
    """Shuffle documents so that every part of the order contains each stratum by its share.

    Within a stratum all orders are equally likely. The strata are interleaved evenly: a part
    of the order contains each stratum's share of the documents, rounded up or down. With one
    stratum it is a plain shuffle.

    Args:
        strata: `[documents]`, e.g. each document's task.
        draws: Number of orders.
        seed: Seed of the generator.

    Yields:
        `[documents]`, the indexes of the documents in a new order.
    """
    _, stratum, sizes = np.unique(np.asarray(strata), return_inverse=True, return_counts=True)
    starts = np.cumsum(sizes) - sizes
    generator = np.random.default_rng(seed)
    for _ in range(draws):
        shuffled = np.lexsort((generator.random(len(stratum)), stratum))
        within = np.arange(len(stratum)) - starts[stratum[shuffled]]
        offsets = generator.random(len(sizes))[stratum[shuffled]]
        yield shuffled[np.argsort((within + offsets) / sizes[stratum[shuffled]], kind="stable")]


def disjoint_means(
    values: Array, weights: Array, strata: Strata, sizes: Sequence[int], draws: int, seed: int
) -> tuple[Array, Array]:
    """Average the layers' values over two disjoint samples of documents.

    Args:
        values: `[documents, layers]`.
        weights: `[documents]`, 0 or more.
        strata: `[documents]`, e.g. each document's task; see `stratified_orders`.
        sizes: Numbers of documents of each of the two samples, from 1 to all.
        draws: Number of draws of the two.
        seed: Seed of the generator; equal seeds draw equal documents.

    Returns:
        Both samples' weighted means, `[draws, sizes, layers]` each. The second is NaN if
        there are fewer than twice as many documents; both are NaN if their weights are 0.
    """
    bounds = sorted({0, *sizes, *(2 * n for n in sizes if 2 * n <= len(values))})
    at = {bound: place for place, bound in enumerate(bounds)}
    table = np.column_stack([np.where(weights[:, None] > 0, values * weights[:, None], 0), weights])
    both = np.full((2, draws, len(sizes), values.shape[1]), np.nan)
    for draw, order in enumerate(stratified_orders(strata, draws, seed)):
        pieces = np.add.reduceat(table[order], bounds[:-1], axis=0)
        # The last piece reaches to the end of the table, beyond the last bound.
        pieces[-1] = table[order[bounds[-2] : bounds[-1]]].sum(axis=0)
        sums = np.vstack([np.zeros(table.shape[1]), np.cumsum(pieces, axis=0)])
        for place, n in enumerate(sizes):
            parts = [sums[at[n]]]
            if 2 * n in at:
                parts.append(sums[at[2 * n]] - sums[at[n]])
            for sample, part in zip(both, parts, strict=False):
                if part[-1] > 0:
                    sample[draw, place] = part[:-1] / part[-1]
    return both[0], both[1]


def spearman_brown(reliability: float, factor: float) -> float:
    """Predict the reliability of a sample that is `factor` times as large.

    Exact for the covariance ratio of means over exchangeable documents (identically drawn,
    so that each adds noise of the same variance): r' = f · r / (1 + (f - 1) · r). For a mean of
    rank correlations, whose figures are tied and bounded, it is an approximation.

    Args:
        reliability: The correlation of two samples of the size that was measured.
        factor: Ratio of the sample sizes, above 0.

    Returns:
        The predicted correlation.

    References:
        C. Spearman, British Journal of Psychology 3 (1910) 271-295. W. Brown, the same, 296-322.

    Examples:
        >>> round(spearman_brown(0.6, 2), 4)
        0.75
    """
    return factor * reliability / (1 + (factor - 1) * reliability)


def documents_for(target: float, documents: float, reliability: float) -> float:
    """Compute the documents that reach a reliability, by the inverse Spearman-Brown formula.

    Args:
        target: Target reliability, between 0 and 1.
        documents: Number of measured documents.
        reliability: Reliability of the measured documents.

    Returns:
        The number, not rounded; NaN if the reliability is not between 0 and 1.

    Examples:
        >>> round(documents_for(0.9, 100, 0.6))
        600
    """
    if not 0 < reliability < 1:
        return math.nan
    return documents * target / (1 - target) * (1 - reliability) / reliability


def documents_needed(
    sizes: Sequence[int], reliabilities: Sequence[float], target: float
) -> tuple[float, bool]:
    """Compute the number of documents that reach a reliability and keep it.

    Args:
        sizes: Numbers of documents, ascending.
        reliabilities: Reliability at each size; NaN if undefined.
        target: Target reliability, between 0 and 1.

    Returns:
        The number, and whether it is extrapolated. Between two measured sizes it is interpolated on
        the logarithm; it is the smallest size if that is enough. Beyond the last size it follows
        from the Spearman-Brown formula, NaN if that has no solution.

    Examples:
        >>> documents, extrapolated = documents_needed([10, 100, 1000], [0.5, 0.8, 0.9], 0.85)
        >>> round(documents), extrapolated
        (316, False)
    """
    known = [(n, r) for n, r in zip(sizes, reliabilities, strict=True) if math.isfinite(r)]
    below = [place for place, (_, r) in enumerate(known) if r < target]
    if not known or (below and below[-1] == len(known) - 1):
        last = known[-1] if known else (0, math.nan)
        return documents_for(target, *last), True
    if not below:
        return float(known[0][0]), False
    (n, r), (m, s) = known[below[-1]], known[below[-1] + 1]
    return float(n * (m / n) ** ((target - r) / (s - r))), False


def differ(values: Array, weights: Array, seed: int) -> float:
    """Test whether layers have different means at all.

    Each document's figures are taken less their own mean over layers. If layers do not differ, and
    a document's deviations are as likely to be x as −x, all signs of the documents are equally
    likely; p is the share of signs under which the squares of the layers' means sum to as much as
    was found.

    Args:
        values: `[documents, layers]`.
        weights: `[documents]`, 0 or more; a document of weight 0 does not count.
        seed: Seed of the signs.

    Returns:
        The p-value, from `FLIPS` drawn signs.

    References:
        R. A. Fisher, The Design of Experiments (1935), section 21. B. Phipson, G. K. Smyth,
        Statistical Applications in Genetics and Molecular Biology 9 (2010) 39.

    Examples:
        >>> differ(np.tile([0.0, 0.0, 1.0], (20, 1)), np.ones(20), 0) < 0.001
        True
    """
    counted = weights > 0
    apart = values[counted] - values[counted].mean(axis=1, keepdims=True)
    weighed = apart * weights[counted, None]
    found = float((rounded(weighed.sum(axis=0)) ** 2).sum())
    generator = np.random.default_rng(seed)
    as_far = 0
    for first in range(0, FLIPS, _CHUNK):
        size = (min(_CHUNK, FLIPS - first), len(weighed))
        sums = generator.choice((-1.0, 1.0), size) @ weighed
        as_far += int(((sums**2).sum(axis=1) >= found * (1 - 1e-9)).sum())
    return (as_far + 1) / (FLIPS + 1)


def positive_estimate(figure: Callable[[Numbers], float], strata: Strata, seed: int) -> Estimate:
    """Estimate a positive figure of documents by leaving out a tenth of them in turn.

    The interval is on the logarithm, with Student's t of one degree of freedom less than groups. It
    covers the values that other documents of the same benchmark would give. The tests simulate
    benchmarks to check its coverage of the number of documents needed.

    Args:
        figure: Function of the indexes of some documents; NaN if undefined for them.
        strata: `[documents]`, e.g. each document's task; two documents or more.
        seed: Seed of the grouping of documents; see `jackknife_error`.

    Returns:
        The figure with its 95 % interval; None if it is undefined for all documents, or for a group
        less.
    """
    value = figure(np.arange(len(strata)))
    error = jackknife_error(lambda kept: float(np.log(figure(kept))), strata, _GROUPS, seed)
    if not (math.isfinite(value) and math.isfinite(error)):
        return Estimate(None, reason="it is not defined for all documents, or without some of them")
    freedom = min(_GROUPS, len(strata)) - 1
    factor = math.exp(float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error)
    return Estimate(value, value / factor, value * factor)


DRAWS = 100


@dataclass(frozen=True)
class LayerMeasure:
    """A measure that orders the layers.

    Attributes:
        values: `[documents, layers]`, values of each document.
        weights: `[documents]`, weights of their mean.
        price: Cost of one document, in forward passes.
    """

    values: Array
    weights: Array
    price: float

    def means(self) -> Array:
        """Average over the documents `[layers]`."""
        return np.asarray(self.weights @ _known(self) / self.weights.sum(), dtype=np.float64)


def at_equal_cost(
    measures: Mapping[str, LayerMeasure], truth: LayerMeasure, budgets: Sequence[float]
) -> dict[str, list[float]]:
    """Estimate how well each measure predicts the truth on other documents, by budget.

    The documents are halved at random, `DRAWS` times. The truth is computed on one half. A measure
    uses as many documents of the other half as a budget pays for.

    Args:
        measures: Name → measure, all on the same documents.
        truth: Measure to predict; its price is ignored.
        budgets: Budgets, in forward passes.

    Returns:
        Name → for each budget the mean over halves of Spearman's coefficient; NaN where a budget
        pays for no document, or for more than there are, or where fewer than half of the halves
        have a coefficient.
    """
    count = len(truth.values)
    half = count // 2
    generator = np.random.default_rng(SEED)
    orders = [generator.permutation(count) for _ in range(DRAWS)]
    targets = np.array([_running(truth, order[half:])[-1] for order in orders])
    means = {}
    for name, measure in measures.items():
        drawn = np.full((DRAWS, len(budgets)), np.nan)
        paid = [int(budget / measure.price) for budget in budgets]
        fits = [i for i, documents in enumerate(paid) if 1 <= documents <= half]
        if fits:
            last = [paid[i] - 1 for i in fits]
            rows = np.concatenate([_running(measure, order[:half])[last] for order in orders])
            # In one call: ranking a table takes hardly longer than ranking a row.
            values = row_coefficients(rows, targets.repeat(len(fits), axis=0), "spearman")
            drawn[:, fits] = values.reshape(DRAWS, len(fits))
        known = np.isfinite(drawn).sum(axis=0)
        enough = np.where(2 * known >= DRAWS, known, 0)
        means[name] = divided(np.nansum(drawn, axis=0), enough).tolist()
    return means


def _running(measure: LayerMeasure, order: Numbers) -> Array:
    """Weighted means of the first 1, 2, … documents of an order `[documents, layers]`."""
    weights = measure.weights[order]
    sums = np.cumsum(weights[:, None] * _known(measure)[order], axis=0)
    return divided(sums, np.cumsum(weights)[:, None])


def _known(measure: LayerMeasure) -> Array:
    """Return the values whose weights are above 0."""
    return np.where(measure.weights[:, None] > 0, measure.values, 0.0)
