"""Compute how well samples of documents agree on the order of layers.

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
from tracker.stats.arrays import Array, IntArray, Strata, safe_divide
from tracker.stats.rank_agreement import rounded_values, row_coefficients
from tracker.stats.resampling import SEED, jackknife_error, random_signs

DIFFERENCE_FLIPS = 19_999
_GROUPS = 10
"""Number of groups of documents, each of which is left out once for an interval."""


def stratified_orders(strata: Strata, n_draws: int, seed: int) -> Iterator[IntArray]:
    """Shuffle documents so that every part of the order has each stratum in proportion.

    Within a stratum all orders are equally likely. The strata are interleaved evenly: a part
    of the order contains each stratum's share of the documents, rounded up or down. With one
    stratum it is a plain shuffle.

    Args:
        strata: `[documents]`, e.g. each document's task.
        n_draws: Number of orders.
        seed: Seed of the generator.

    Yields:
        `[documents]`, the indexes of the documents in a new order.
    """
    _, stratum, sizes = np.unique(np.asarray(strata), return_inverse=True, return_counts=True)
    starts = np.cumsum(sizes) - sizes
    rng = np.random.default_rng(seed)
    for _ in range(n_draws):
        shuffled = np.lexsort((rng.random(len(stratum)), stratum))
        strata_in_order = stratum[shuffled]
        # Spread each stratum evenly over [0, 1], from a random offset, and sort by the position.
        ranks = np.arange(len(stratum)) - starts[strata_in_order]
        offsets = rng.random(len(sizes))[strata_in_order]
        yield shuffled[np.argsort((ranks + offsets) / sizes[strata_in_order], kind="stable")]


def disjoint_means(
    values: Array, weights: Array, strata: Strata, sizes: Sequence[int], n_draws: int, seed: int
) -> tuple[Array, Array]:
    """Average the layers' values over two disjoint samples of documents.

    Args:
        values: `[documents, layers]`.
        weights: `[documents]`, 0 or more.
        strata: `[documents]`, e.g. each document's task; see `stratified_orders`.
        sizes: Numbers of documents of each of the two samples, from 1 to all.
        n_draws: Number of draws of the two.
        seed: Seed of the generator; equal seeds draw equal documents.

    Returns:
        Both samples' weighted means, `[draws, sizes, layers]` each. The second is NaN if
        there are fewer than twice as many documents; both are NaN if their weights are 0.
    """
    weighted = np.where(weights[:, None] > 0, values * weights[:, None], 0)
    table = np.column_stack([weighted, weights])
    ends = np.array(sizes)
    fits = 2 * ends <= len(values)
    means = np.full((2, n_draws, len(sizes), values.shape[1]), np.nan)
    for draw, order in enumerate(stratified_orders(strata, n_draws, seed)):
        sums = np.cumsum(table[order], axis=0)
        first_sums = sums[ends - 1]
        second_sums = sums[2 * ends[fits] - 1] - first_sums[fits]
        means[0, draw] = safe_divide(first_sums[:, :-1], first_sums[:, -1:])
        means[1, draw, fits] = safe_divide(second_sums[:, :-1], second_sums[:, -1:])
    return means[0], means[1]


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


def extrapolate_documents(target: float, n_documents: float, reliability: float) -> float:
    """Compute the documents for a reliability by Spearman-Brown's formula.

    Args:
        target: Target reliability, between 0 and 1.
        n_documents: Number of measured documents.
        reliability: Reliability of the measured documents.

    Returns:
        The number, not rounded; NaN if the reliability is not between 0 and 1.

    Examples:
        >>> round(extrapolate_documents(0.9, 100, 0.6))
        600
    """
    if not 0 < reliability < 1:
        return math.nan
    return n_documents * target / (1 - target) * (1 - reliability) / reliability


def documents_to_reach(
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
        >>> n_documents, extrapolated = documents_to_reach([10, 100, 1000], [0.5, 0.8, 0.9], 0.85)
        >>> round(n_documents), extrapolated
        (316, False)
    """
    points = [(n, r) for n, r in zip(sizes, reliabilities, strict=True) if math.isfinite(r)]
    # The first point from which on the reliability stays at the target.
    index = max((i + 1 for i, (_, r) in enumerate(points) if r < target), default=0)
    if index == len(points):
        return extrapolate_documents(target, *(points[-1] if points else (0, math.nan))), True
    if not index:
        return float(points[0][0]), False
    (n, r), (m, s) = points[index - 1 : index + 1]
    return float(n * (m / n) ** ((target - r) / (s - r))), False


def layer_difference_p(values: Array, weights: Array, seed: int) -> float:
    """Test whether any layers have different means.

    The mean over layers is subtracted from each document's values. If layers do not differ, and a
    document's deviations are as likely to be x as −x, all signs of the documents are equally
    likely. p is the share of signs for which the sum of squared layer means is at least the
    observed sum.

    Args:
        values: `[documents, layers]`.
        weights: `[documents]`, 0 or more; a document of weight 0 does not count.
        seed: Seed of the signs.

    Returns:
        The p-value, from `DIFFERENCE_FLIPS` drawn signs.

    References:
        R. A. Fisher, The Design of Experiments (1935), section 21. B. Phipson, G. K. Smyth,
        Statistical Applications in Genetics and Molecular Biology 9 (2010) 39.

    Examples:
        >>> layer_difference_p(np.tile([0.0, 0.0, 1.0], (20, 1)), np.ones(20), 0) < 0.001
        True
    """
    is_counted = weights > 0
    deviations = values[is_counted] - values[is_counted].mean(axis=1, keepdims=True)
    weighted = deviations * weights[is_counted, None]
    observed = float((rounded_values(weighted.sum(axis=0)) ** 2).sum())
    n_as_far = 0
    for signs in random_signs(weighted.shape, DIFFERENCE_FLIPS, seed):
        square_sums = ((signs @ weighted) ** 2).sum(axis=1)
        n_as_far += int((square_sums >= observed * (1 - 1e-9)).sum())
    return (n_as_far + 1) / (DIFFERENCE_FLIPS + 1)


def positive_estimate(figure: Callable[[IntArray], float], strata: Strata, seed: int) -> Estimate:
    """Estimate a positive figure; its interval comes from leaving out tenths of the documents.

    The interval is on the logarithm, with Student's t of (groups − 1) degrees of freedom. It
    covers the values that other documents of the same benchmark would give. The tests simulate
    benchmarks to check its coverage of the number of documents needed.

    Args:
        figure: Function of the indexes of some documents; NaN if undefined for them.
        strata: `[documents]`, e.g. each document's task; two documents or more.
        seed: Seed of the grouping of documents; see `jackknife_error`.

    Returns:
        The figure with its 95 % interval; None if it is undefined for all documents, or if a group
        is left out.
    """
    value = figure(np.arange(len(strata)))
    error = jackknife_error(lambda indexes: float(np.log(figure(indexes))), strata, _GROUPS, seed)
    if not (math.isfinite(value) and math.isfinite(error)):
        return Estimate(None, reason="the figure is undefined, for all documents or for a subset")
    df = min(_GROUPS, len(strata)) - 1
    factor = math.exp(float(stats.t.ppf((1 + LEVEL) / 2, df)) * error)
    return Estimate(value, value / factor, value * factor)


HALF_SPLITS = 100


@dataclass(frozen=True)
class LayerMeasure:
    """Measure that ranks the layers by a weighted mean over documents.

    Attributes:
        values: `[documents, layers]`, values of each document.
        weights: `[documents]`, weights of their mean.
        price: Cost of one document, in forward passes.
    """

    values: Array
    weights: Array
    price: float

    def means(self) -> Array:
        """Return the weighted mean over the documents `[layers]`."""
        return np.asarray(_running_means(self, np.arange(len(self.values)))[-1])


def prediction_by_budget(
    measures: Mapping[str, LayerMeasure], truth: LayerMeasure, budgets: Sequence[float]
) -> dict[str, list[float]]:
    """Estimate how well each measure predicts the true ranking, for each compute budget.

    The documents are halved at random, `HALF_SPLITS` times. The truth is computed on one half. A
    measure uses as many documents of the other half as a budget pays for.

    Args:
        measures: Name → measure, all on the same documents.
        truth: Measure to predict; its price is ignored.
        budgets: Budgets, in forward passes.

    Returns:
        Name → for each budget the mean over halves of Spearman's coefficient; NaN where a budget
        pays for no document, or for more than there are, or where fewer than half of the halves
        have a coefficient.
    """
    n_documents = len(truth.values)
    half_size = n_documents // 2
    rng = np.random.default_rng(SEED)
    orders = [rng.permutation(n_documents) for _ in range(HALF_SPLITS)]
    targets = np.array([_running_means(truth, order[half_size:])[-1] for order in orders])
    means = {}
    for name, measure in measures.items():
        paid = np.array([int(budget / measure.price) for budget in budgets])
        (fits,) = np.nonzero((paid >= 1) & (paid <= half_size))
        coefficients = np.full((HALF_SPLITS, len(budgets)), np.nan)
        if len(fits):
            # In one call: ranking a table takes hardly longer than ranking a row.
            samples = (_running_means(measure, order[:half_size]) for order in orders)
            rows = np.concatenate([sample[paid[fits] - 1] for sample in samples])
            values = row_coefficients(rows, targets.repeat(len(fits), axis=0), "spearman")
            coefficients[:, fits] = values.reshape(HALF_SPLITS, len(fits))
        n_defined = np.isfinite(coefficients).sum(axis=0)
        denominators = np.where(2 * n_defined >= HALF_SPLITS, n_defined, 0)
        means[name] = safe_divide(np.nansum(coefficients, axis=0), denominators).tolist()
    return means


def _running_means(measure: LayerMeasure, order: IntArray) -> Array:
    """Return the weighted means of the first 1, 2, … documents of an order."""
    weights = measure.weights[order, None]
    values = np.where(weights > 0, measure.values[order], 0.0)
    return safe_divide(np.cumsum(weights * values, axis=0), np.cumsum(weights, axis=0))
