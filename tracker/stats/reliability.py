"""Compute how well rankings of layers from different documents agree.

The value of a layer is a weighted mean over documents. Two disjoint samples of documents give two
rankings of the layers. The rank correlation of these two rankings is called the reliability of a
ranking at the size of the samples.

A cheap measure can use more documents than an expensive measure. Two measures are therefore
compared at equal total cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from tracker.schema.estimates import Estimate
from tracker.stats.accuracy import LEVEL
from tracker.stats.arrays import Array, IntArray, Strata, safe_divide
from tracker.stats.rank_agreement import rounded_values, row_coefficients
from tracker.stats.resampling import SEED, jackknife_error, random_signs

DIFFERENCE_FLIPS = 19_999
_GROUPS = 10
"""Number of groups of documents in the jackknife."""


def stratified_orders(strata: Strata, n_draws: int, seed: int) -> Iterator[IntArray]:
    """Yield random orders of documents that spread the documents of each stratum evenly.

    All orders of the documents of a stratum are equally likely. If there is only one stratum, each
    order is a uniformly random permutation.

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
    """Compute the mean values of layers in pairs of disjoint random samples of documents.

    Args:
        values: `[documents, layers]`, the value of each document for each layer.
        weights: `[documents]`, 0 or more.
        strata: `[documents]`, e.g. each document's task; see `stratified_orders`.
        sizes: Sample sizes, as numbers of documents. The two samples have the same size.
        n_draws: Number of random pairs of samples for each size.
        seed: Seed of the generator; equal seeds draw the same documents.

    Returns:
        The weighted means of the first samples and of the second samples, each `[draws, sizes,
        layers]`. Means of second samples are NaN for sizes above half of the documents. Means are
        also NaN if all weights of a sample are 0.
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
    """Predict the reliability (correlation of two samples) for `factor` times as many documents.

    The formula is r' = f · r / (1 + (f - 1) · r). The formula is an approximation if the
    reliability is a rank correlation.

    Args:
        reliability: The correlation of two samples of the measured size.
        factor: Ratio of the predicted to the measured sample size, above 0.

    Returns:
        The predicted correlation of two samples.

    References:
        C. Spearman, British Journal of Psychology 3 (1910) 271-295. W. Brown, British Journal of
        Psychology 3 (1910) 296-322.

    Examples:
        >>> round(spearman_brown(0.6, 2), 4)
        0.75
    """
    return factor * reliability / (1 + (factor - 1) * reliability)


def extrapolate_documents(target: float, n_documents: float, reliability: float) -> float:
    """Extrapolate from one reliability how many documents reach a target reliability.

    Args:
        target: Target reliability, between 0 and 1.
        n_documents: Number of documents of the measured samples.
        reliability: Reliability at this number of documents.

    Returns:
        The number of documents by the Spearman-Brown formula, not rounded; NaN if the reliability
        is not between 0 and 1.

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
    """Compute the number of documents that are required for a target reliability.

    Args:
        sizes: Measured sample sizes, as numbers of documents, ascending.
        reliabilities: Reliability at each sample size; NaN if undefined.
        target: Target reliability, between 0 and 1.

    Returns:
        The number of documents, and whether this number is extrapolated. Between two measured
        sizes, the number is interpolated on a logarithmic scale. Beyond the largest size, the
        number is extrapolated by the Spearman-Brown formula. An extrapolated number is NaN if the
        last defined reliability is not between 0 and 1.

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
    """Test whether layers have different means; return the p-value.

    The test statistic is the sum of the squared deviations of the layer means from the mean of all
    layers. Under the null hypothesis, the deviations of a document are equally likely with reversed
    signs. The test therefore reverses the signs for randomly chosen documents.

    Args:
        values: `[documents, layers]`, the value of each document for each layer.
        weights: `[documents]`, 0 or more.
        seed: Seed of the random signs.

    Returns:
        The p-value, from `DIFFERENCE_FLIPS` random sign combinations.

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
    """Compute a positive statistic, and its interval by a jackknife over documents.

    The jackknife omits one tenth of the documents at a time. The interval is symmetric on the
    logarithmic scale.

    Args:
        figure: Function that computes the statistic from the indexes of some documents; NaN if
            undefined.
        strata: `[documents]`, e.g. each document's task; two documents or more.
        seed: Seed of the grouping of documents; see `jackknife_error`.

    Returns:
        The statistic with its 95 % interval. The value is None with a reason if the statistic is
        undefined on all documents together, or in one step of the jackknife.
    """
    value = figure(np.arange(len(strata)))
    error = jackknife_error(lambda indexes: float(np.log(figure(indexes))), strata, _GROUPS, seed)
    if not (math.isfinite(value) and math.isfinite(error)):
        reason = "the statistic is undefined for all documents or without a tenth of them"
        return Estimate(None, reason=reason)
    df = min(_GROUPS, len(strata)) - 1
    factor = math.exp(float(stats.t.ppf((1 + LEVEL) / 2, df)) * error)
    return Estimate(value, value / factor, value * factor)


HALF_SPLITS = 100


@dataclass(frozen=True)
class LayerMeasure:
    """A measure, such as a proxy, with one value for each document and layer.

    The value of a layer is the weighted mean over documents.

    Attributes:
        values: `[documents, layers]`, the value of each document for each layer.
        weights: `[documents]`, the weight of each document in the mean.
        price: Cost of measuring one document, in forward passes.
    """

    values: Array
    weights: Array
    price: float

    def means(self) -> Array:
        """Return an array `[layers]` with the weighted mean over all documents."""
        return np.asarray(_running_means(self, np.arange(len(self.values)))[-1])


def prediction_by_budget(
    measures: Mapping[str, LayerMeasure], truth: LayerMeasure, budgets: Sequence[float]
) -> dict[str, list[float]]:
    """Estimate how well measures of equal cost predict the true ranking of layers.

    The documents are split at random into two halves, `HALF_SPLITS` times. On one half, the measure
    `truth` gives the true ranking of the layers. On the other half, each measure ranks the layers
    by (budget / price) documents.

    Args:
        measures: The measures by name, all with the same documents.
        truth: Measure that gives the true ranking; its price is ignored.
        budgets: Budgets for computation, in forward passes.

    Returns:
        For each measure and budget, Spearman's coefficient with the true ranking, averaged over the
        splits. The mean is NaN if the budget pays for no document or for more than half of the
        documents, or if the coefficient is undefined in more than half of the splits.
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
    """Return each layer's weighted mean over the first k documents in `order`, for each k.

    The result is an array `[documents, layers]`; the last row is the mean over all documents.
    """
    weights = measure.weights[order, None]
    values = np.where(weights > 0, measure.values[order], 0.0)
    return safe_divide(np.cumsum(weights * values, axis=0), np.cumsum(weights, axis=0))
