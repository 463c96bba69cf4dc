"""Compute accuracies, drops, their intervals, and statistical power.

All values are fractions, never percentage points. Accuracies and drops are computed from the
outcomes of documents. An outcome is a number in [0, 1], or NaN if the model gave no finite score.
The functions also accept losses (e.g. bits per byte) as outcomes. An undefined value is returned as
None with a reason, never as 0.

Some metrics are ratios of two sums over all documents, such as log-likelihood per byte. The
functions compute a ratio of sums as the weighted mean of the documents' ratios.

The module also computes the smallest change that a test can detect, and the number of documents
that a test needs. A change is detectable if a two-sided test at the level `ALPHA` has at least the
power `TEST_POWER`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median

import numpy as np
import scipy  # imports its slow submodules on first use
from numpy.typing import ArrayLike

from tracker.schema.estimates import Estimate
from tracker.stats.arrays import Array, IntArray, safe_divide

RATIO = "ratio"
"""Name of the aggregation that divides one sum by another sum."""
RATIO_SCALES = {RATIO: 1.0, "bits_per_byte": -1 / math.log(2)}
"""Name of an aggregation that is a ratio of sums → factor by which the ratio is multiplied."""


def document_ratios(aggregation: str, sums: Array, units: Array) -> Array:
    """Compute each document's ratio, such as log-likelihood per byte.

    For log-likelihood per byte, the sums are log-likelihoods of texts, and the units are bytes.

    Args:
        aggregation: Name of the metric's aggregation, a key of `RATIO_SCALES`.
        sums: `[documents]`, the sum of each document.
        units: `[documents]`, the number of units of each document, 0 or more.

    Returns:
        `[documents]`, the ratios times the scale of the aggregation. The ratio is 0 if the sum and
        the units are both 0, and NaN if only the units are 0.

    Examples:
        >>> document_ratios("ratio", np.array([1.0, 0.0]), np.array([2.0, 0.0])).tolist()
        [0.5, 0.0]
    """
    empty = np.where((units == 0) & (sums == 0), 0.0, np.nan)
    return safe_divide(RATIO_SCALES[aggregation] * sums, units, empty)


LEVEL = 0.95
"""The confidence level of every interval in this module."""

MAX_CONCENTRATION = 0.75
"""Largest sum of squared weights for which a variance is estimated; 0.5 for two equal weights."""
_TOLERANCE = 1e-9
"""Accuracies and weights that differ by less than this value count as equal."""


def weights_by_task(tasks: Sequence[str], by_size: bool, units: Array | None = None) -> Array:
    """Compute the weight of each document in the benchmark's metric.

    For a group of tasks, lm-eval averages over all documents if `weight_by_size` is true.
    Otherwise, lm-eval averages the accuracies of the tasks.

    Args:
        tasks: The task of every document.
        by_size: Whether every document has the same weight; otherwise every task has the same total
            weight.
        units: `[documents]`, the number of units (e.g. bytes) of each document if the metric is a
            ratio of sums; otherwise None.

    Returns:
        `[documents]`, the weights, which sum to 1. If `units` is given, the weights of the
        documents of a task are proportional to their numbers of units.

    Examples:
        >>> weights_by_task(["law", "law", "art"], by_size=False).tolist()
        [0.25, 0.25, 0.5]
    """
    if not len(tasks):
        return np.empty(0)
    _, task, sizes = np.unique(np.asarray(tasks), return_inverse=True, return_counts=True)
    weights = np.full(len(sizes), 1 / len(tasks)) if by_size else 1 / (len(sizes) * sizes)
    if units is None:
        return np.asarray(weights[task], dtype=np.float64)
    known_units = np.nan_to_num(units)
    totals = np.bincount(task, known_units).astype(np.float64)[task]
    return (weights * sizes)[task] * safe_divide(known_units, totals, 1 / sizes[task])


def accuracy(outcomes: Array, weights: Array | None = None) -> Estimate:
    """Estimate the accuracy from the outcomes of independent documents.

    For 0/1 outcomes of equal weight, the function returns Wilson's interval. For 0/1 outcomes of
    unequal weight, the function returns Agresti & Coull's "plus four" interval. If any outcome is
    not 0 or 1, the function returns the t interval of the weighted mean. Wilson's interval is
    always within [0, 1]. The "plus four" interval and the t interval can exceed this range.

    Args:
        outcomes: `[documents]`, in [0, 1]; NaN if the model gave no finite score.
        weights: `[documents]`, summing to 1; None for equal weights.

    Returns:
        The weighted mean and its interval, without a p-value.

    References:
        E. B. Wilson, JASA 22 (1927) 209-212. A. Agresti, B. A. Coull, The American Statistician 52
        (1998) 119-126.

    Examples:
        >>> estimate = accuracy(np.array([1.0] * 81 + [0.0] * 182))
        >>> round(estimate.value, 4), round(estimate.low, 4), round(estimate.high, 4)
        (0.308, 0.2553, 0.3662)
    """
    array, shares = _weighted_arrays(outcomes, weights)
    if reason := undefined_mean_reason(array):
        return Estimate(None, reason=reason)
    if not _is_binary(array):
        low, high = mean_interval(array, shares)
    elif _has_equal_weights(shares):
        test = scipy.stats.binomtest(int(array.sum()), len(array))
        low, high = map(float, test.proportion_ci(LEVEL, "wilson"))
    else:
        low, high = mean_interval(array, shares, (1.0, 1.0, 0.0, 0.0))
    return Estimate(_weighted_mean(array, shares), low, high)


def accuracy_drop(baseline: Array, ablated: Array, weights: Array | None = None) -> Estimate:
    """Estimate the accuracy drop of an ablation from outcomes on the same documents.

    A positive drop means that the ablated model is worse. For 0/1 outcomes, the interval is Bonett
    & Price's adjusted Wald interval for paired proportions. This interval is not centred on the
    estimate. For other outcomes, the interval is the paired t interval. The intervals are not
    clipped to [-1, 1].

    The p-value is from the exact two-sided McNemar test, which ignores the weights. The p-value is
    None for outcomes other than 0/1.

    Args:
        baseline: `[documents]`, the intact model's outcomes; NaN if the model gave no finite score.
        ablated: `[documents]`, the ablated model's outcomes on the same documents.
        weights: `[documents]`, summing to 1; None for equal weights.

    Returns:
        The weighted mean of baseline minus ablated, its interval and the p-value.

    References:
        D. G. Bonett, R. M. Price, Journal of Educational and Behavioral Statistics 37 (2012)
        479-488. Q. McNemar, Psychometrika 12 (1947) 153-157.

    Examples:
        The removal makes six of 20 answers wrong, and one other answer right.

        >>> baseline = np.array([1.0] * 12 + [0.0] * 8)
        >>> ablated = np.array([1.0] * 6 + [0.0] * 6 + [1.0] + [0.0] * 7)
        >>> drop = accuracy_drop(baseline, ablated)
        >>> drop.value, drop.p_value
        (0.25, 0.125)
        >>> round(drop.low, 3), round(drop.high, 3)
        (-0.023, 0.477)
    """
    intact, shares = _weighted_arrays(baseline, weights)
    changed, _ = _weighted_arrays(ablated, None)
    drops = intact - changed
    if reason := undefined_mean_reason(drops):
        return Estimate(None, reason=reason)
    value = _weighted_mean(drops, shares)
    if not (_is_binary(intact) and _is_binary(changed)):
        is_bounded = min(intact.min(), changed.min()) >= 0 and max(intact.max(), changed.max()) <= 1
        # If all documents change alike, the t interval has no width.
        is_alike = len(drops) > 1 and np.ptp(drops) == 0
        extra = (1.0, -1.0) if is_alike and is_bounded else ()
        return Estimate(value, *mean_interval(drops, shares, extra))
    n_lost, n_changed = int((drops > 0).sum()), int((drops != 0).sum())
    p_value = float(scipy.stats.binomtest(n_lost, n_changed).pvalue) if n_changed else 1.0
    return Estimate(value, *mean_interval(drops, shares, (1.0, -1.0)), p_value)


def cluster_means(values: Array, weights: Array, clusters: IntArray | None) -> tuple[Array, Array]:
    """Average the documents of each cluster, such as the questions on one passage.

    The documents of a cluster can depend on each other. An interval that is computed from the
    cluster averages is valid if the clusters are independent of each other.

    Args:
        values: `[documents]` or `[documents, k]`.
        weights: `[documents]`, 0 or more.
        clusters: `[documents]`, the number of each document's cluster; None = every document is a
            cluster of its own.

    Returns:
        The weighted mean of each cluster, and the sum of each cluster's weights.

    References:
        E. Miller, arXiv 2411.00640. K.-Y. Liang, S. L. Zeger, Biometrika 73 (1986) 13-22.

    Examples:
        >>> outcomes, clusters = np.array([1.0, 0.0, 1.0]), np.array([0, 0, 5])
        >>> means, shares = cluster_means(outcomes, np.ones(3), clusters)
        >>> means.tolist(), shares.tolist()
        ([0.5, 1.0], [2.0, 1.0])
    """
    if clusters is None:
        return values, weights
    _, indexes = np.unique(clusters, return_inverse=True)
    shares = np.bincount(indexes, weights).astype(np.float64)
    sums = np.zeros((len(shares), *values.shape[1:]))
    np.add.at(sums, indexes, (np.where(weights > 0, values.T, 0.0) * weights).T)
    return safe_divide(sums.T, shares, 0.0).T, shares


def budget_excess(
    baseline: Array,
    ablated: Array,
    weights: Array | None = None,
    max_drop: float = 0.0,
    kept_share: float = 1.0,
) -> Estimate:
    """Estimate by how much the accuracy loss of an ablation exceeds the allowed loss.

    The estimate (the excess) is `kept_share` · baseline − ablated − `max_drop`. The loss is
    significantly within the budget if the upper end of the excess's interval is at most 0.

    The interval is Bonett & Price's interval with one additional lost document. Without the
    additional document, the interval is too narrow if a removal only makes right answers wrong. The
    additional document reduces the largest probability of a wrong result "within the budget" from
    6.7 % to 3.0 % (computed by `python -m tests.tools.accuracy_budget`).

    Args:
        baseline: `[documents]`, the intact model's outcomes, in [0, 1].
        ablated: `[documents]`, the ablated model's outcomes on the same documents.
        weights: `[documents]`, summing to 1; None for equal weights.
        max_drop: The largest acceptable drop.
        kept_share: Fraction of the intact model's accuracy with which the ablated model is
            compared.

    Returns:
        The excess and its 95 % interval, without a p-value.

    Examples:
        The removal makes six of 400 answers wrong and two right. The loss is significantly below 5
        pp.

        >>> baseline = np.array([1.0] * 6 + [0.0] * 394)
        >>> ablated = np.array([0.0] * 6 + [1.0] * 2 + [0.0] * 392)
        >>> excess = budget_excess(baseline, ablated, max_drop=0.05)
        >>> round(excess.value, 3), round(excess.high, 3)
        (-0.04, -0.022)
    """
    intact, shares = _weighted_arrays(baseline, weights)
    excesses = kept_share * intact - _weighted_arrays(ablated, None)[0] - max_drop
    if reason := undefined_mean_reason(excesses):
        return Estimate(None, reason=reason)
    lost, won = kept_share - max_drop, -1.0 - max_drop
    low, high = mean_interval(excesses, shares, (lost, lost, won))
    return Estimate(_weighted_mean(excesses, shares), low, high)


def drop_below_p(lost: int, won: int, n_documents: int, margin: float) -> float:
    """Test whether an accuracy drop is below a margin; return the p-value of Tango's score test.

    The null hypothesis is that the accuracy drop is at least the margin. Unlike Wald intervals, the
    score test is valid even if almost no outcome changes.

    Args:
        lost: Number of documents that only the first model answers right.
        won: Number of documents that only the second model answers right.
        n_documents: Number of documents, 1 or more.
        margin: The margin, between 0 and 1.

    Returns:
        The one-sided p-value.

    References:
        T. Tango, Statistics in Medicine 17 (1998) 891-908.

    Examples:
        Tango's example compares two methods to disinfect contact lenses. The methods are effective
        for 43 and 44 of 44 lenses. The margin is 10 percentage points.

        >>> round(drop_below_p(lost=1, won=0, n_documents=44, margin=0.1), 3)
        0.044
    """
    # Tango's equation for the restricted estimate of the share of won documents.
    linear = (2 * n_documents - lost + won) * margin - lost - won
    constant = -won * margin * (1 - margin)
    root = math.sqrt(linear**2 - 8 * n_documents * constant)
    won_share = max(root - linear, 0.0) / (4 * n_documents)
    variance = n_documents * (2 * won_share + margin * (1 - margin))
    return float(scipy.special.ndtr((lost - won - n_documents * margin) / math.sqrt(variance)))


def bernstein_half_width(sd: float, n: int, alpha: float) -> float:
    """Compute how far the true mean of differences can lie above the observed mean.

    The upper bound of the true mean is valid with the probability 1 - `alpha`, for any distribution
    of differences in [-1, 1], even if large differences are rare.

    Args:
        sd: Standard deviation of the observed differences.
        n: Number of independent differences, 2 or more.
        alpha: Largest probability that the true mean is above the bound.

    Returns:
        The upper bound minus the observed mean; above 0.

    References:
        A. Maurer, M. Pontil, Empirical Bernstein bounds, COLT 2009 (theorem 4).

    Examples:
        >>> round(bernstein_half_width(0.1, 2000, 0.025), 4)
        0.0168
    """
    log = math.log(2 / alpha)
    return sd * math.sqrt(2 * log / n) + 14 * log / (3 * (n - 1))


def effective_number(weights: Array, clusters: IntArray | None) -> float:
    """Return the effective number of clusters (Kish).

    The result is the number of equally weighted clusters whose mean has the same variance as the
    mean of the given, unequally weighted clusters.
    """
    _, shares = cluster_means(weights, weights, clusters)
    return float(shares.sum() ** 2 / (shares @ shares))


def drop_sd(baseline: Array, ablated: Array, weights: Array | None = None) -> Estimate:
    """Estimate the standard deviation of the documents' drops (baseline minus ablated).

    Args:
        baseline: `[documents]`, the intact model's outcomes; NaN if the model gave no finite score.
        ablated: `[documents]`, the ablated model's outcomes on the same documents.
        weights: `[documents]`, summing to 1; None for equal weights.

    Returns:
        The standard deviation of baseline minus ablated, without an interval.

    Examples:
        >>> drop_sd(np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.0, 1.0, 0.0, 1.0])).value
        0.5
    """
    intact, shares = _weighted_arrays(baseline, weights)
    drops = intact - _weighted_arrays(ablated, None)[0]
    if reason := undefined_mean_reason(drops):
        return Estimate(None, reason=reason)
    variance = _error_variance(drops, shares)
    if variance is None:
        return Estimate(None, reason="one document has no spread")
    return Estimate(math.sqrt(variance * len(drops)))


def mean_interval(
    values: Array, weights: Array | None = None, extra: tuple[float, ...] = ()
) -> tuple[float | None, float | None]:
    """Return the 95 % confidence interval of a weighted mean over documents.

    By default, the interval is a t interval. If `extra` is given, artificial documents with the
    values `extra` are added, and the interval is a Wald interval (normal approximation).

    Args:
        values: `[documents]`, finite value of each document.
        weights: `[documents]`, summing to 1; None for equal weights.
        extra: Values of the artificial documents, which have the mean weight of the real documents.

    Returns:
        The lower and the upper bound. Both are None if `extra` is empty and one document has almost
        all weight.
    """
    array, shares = _weighted_arrays(values, weights)
    if extra:
        n = len(array)
        array = np.concatenate([array, extra])
        shares = np.concatenate([shares, np.full(len(extra), 1 / n)]) / (1 + len(extra) / n)
        variance: float | None = float(shares**2 @ (array - float(array @ shares)) ** 2)
        quantile = scipy.special.ndtri((1 + LEVEL) / 2)
    else:
        variance = _error_variance(array, shares)
        quantile = scipy.special.stdtrit(1 / float(shares @ shares) - 1, (1 + LEVEL) / 2)
    if variance is None:
        return None, None
    mean, half_width = float(array @ shares), float(quantile) * math.sqrt(variance)
    return mean - half_width, mean + half_width


def chance_accuracy(choices: IntArray | Array, weights: Array | None = None) -> float:
    """Return the expected accuracy of answers that are chosen at random.

    Args:
        choices: `[documents]`, number of answer options of each document; 0 if there are no
            options.
        weights: `[documents]`, summing to 1; None for equal weights.

    Returns:
        The weighted mean of 1 / choices, where a document without options counts as 0. The result
        is NaN if there are no documents.

    Examples:
        >>> chance_accuracy(np.array([4, 4, 5, 0]))
        0.175
    """
    counts, shares = _weighted_arrays(choices, weights)
    if not len(counts):
        return math.nan
    return _weighted_mean(safe_divide(1.0, counts, 0.0), shares)


def accuracy_relevance(baseline: float | None, ablated: float | None, chance: float) -> Estimate:
    """Compute which share of the accuracy above chance is lost.

    The formula is 1 - max(ablated - chance, 0) / max(baseline - chance, 0). The value is 1 if the
    accuracy falls to chance, 0 if the accuracy does not change, and negative if the accuracy
    increases.

    Args:
        baseline: Accuracy of the intact model.
        ablated: Accuracy of the ablated model on the same documents.
        chance: Expected accuracy of a random predictor on these documents.

    Returns:
        The relevance, without an interval. The value is None with a reason if an input is missing,
        or if the baseline accuracy is not above chance.

    References:
        arXiv 2605.14075.

    Examples:
        >>> accuracy_relevance(0.75, 0.5, chance=0.25).value
        0.5
        >>> accuracy_relevance(0.25, 0.2, chance=0.25).reason
        'the baseline accuracy 0.2500 is not above chance 0.2500'
    """
    intact, changed = (math.nan if level is None else level for level in (baseline, ablated))
    for name, level in (("baseline", intact), ("ablated", changed), ("chance", chance)):
        if not math.isfinite(level):
            return Estimate(None, reason=f"the {name} accuracy is undefined")
    if intact - chance <= _TOLERANCE:
        reason = f"the baseline accuracy {intact:.4f} is not above chance {chance:.4f}"
        return Estimate(None, reason=reason)
    return Estimate(1 - max(changed - chance, 0.0) / (intact - chance))


def _weighted_arrays(values: ArrayLike, weights: Array | None) -> tuple[Array, Array]:
    """Convert values and weights to arrays; weights of None become equal weights.

    Raises ValueError if a weight is negative, or if the weights do not sum to 1.
    """
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    if weights is None:
        return array, np.full(n, 1 / max(n, 1))
    shares = np.asarray(weights, dtype=np.float64)
    if n and not ((shares >= 0).all() and abs(shares.sum() - 1) < _TOLERANCE * n):
        raise ValueError(f"weights must be 0 or more and sum to 1, not {shares.sum()}")
    return array, shares


def _has_equal_weights(shares: Array) -> bool:
    """Return whether all documents have the same weight."""
    return bool(np.allclose(shares * len(shares), 1, rtol=0, atol=_TOLERANCE))


def _weighted_mean(values: Array, shares: Array) -> float:
    """Return the weighted mean of the values."""
    return float(values.mean() if _has_equal_weights(shares) else values @ shares)


def undefined_mean_reason(values: Array, missing: str = "finite score") -> str | None:
    """Explain why the mean of the documents' values is undefined.

    The text counts the values that are not finite; `missing` is the word for such values. The
    function returns None if the mean is defined.
    """
    if not len(values):
        return "no documents"
    n_missing = int((~np.isfinite(values)).sum())
    have = "has" if n_missing == 1 else "have"
    return f"{n_missing} of {len(values)} documents {have} no {missing}" if n_missing else None


def _is_binary(values: Array) -> bool:
    """Return whether all values are 0 or 1."""
    return bool(((values == 0) | (values == 1)).all())


def _error_variance(values: Array, weights: Array) -> float | None:
    """Estimate the variance of the documents' weighted mean.

    The function returns None if one document has almost all weight (`MAX_CONCENTRATION`).
    """
    concentration = float(weights @ weights)
    if concentration > MAX_CONCENTRATION:
        return None
    return float(weights**2 @ (values - float(values @ weights)) ** 2) / (1 - concentration)


ALPHA = 0.05
TEST_POWER = 0.8
REPORTED_DROP = 0.05
"""The accuracy drop (as a fraction) for which reports state the required number of documents."""


@dataclass(frozen=True)
class OutcomeVariance:
    """Variance over documents of the change in outcome, used to compute sample sizes.

    For 0/1 outcomes, power is computed by the normal approximation of McNemar's test. The exact
    McNemar test needs slightly more documents. For other outcomes, the variance is assumed to be
    equal for drops of any size.

    Attributes:
        variance: For 0/1 outcomes, the share of documents with a changed outcome; else the variance
            of the paired difference.
        binary: Whether outcomes are 0 or 1.

    References:
        O. S. Miettinen, Biometrics 24 (1968) 339-352. R. J. Connor, Biometrics 43 (1987) 207-211.

    Examples:
        Half of the documents are lost, and a fifth of the documents is won (S.-C. Chow, J. Shao, H.
        Wang, Sample Size Calculations in Clinical Research, example 6.4.3).

        >>> OutcomeVariance(0.7, binary=True).count_documents(0.3)
        59
    """

    variance: float
    binary: bool

    def count_documents(self, change: float, n_tests: int = 1) -> int:
        """Compute how many documents a test needs to detect a mean change of a given size.

        Args:
            change: Size of the drop or increase to detect, above 0.
            n_tests: Number of simultaneous tests, each at the level `ALPHA` / `n_tests`.

        Returns:
            The smallest sufficient number of documents.
        """
        return math.ceil(self._scaled_documents(change, n_tests) / change**2)

    def count_equivalence_documents(self, margin: float, n_tests: int = 1) -> int:
        """Compute how many documents a test needs to show that two equal models are equivalent.

        Two models are significantly equivalent if the interval of the difference lies inside
        ±margin. With the returned number of documents, equal models pass this test with the
        probability `TEST_POWER` (normal approximation). For 0/1 outcomes, z² / (2 · margin)
        documents are added for Tango's score test.

        Args:
            margin: Largest acceptable difference, above 0.
            n_tests: Number of simultaneous intervals, each at the level 1 - `ALPHA` / `n_tests`.

        Returns:
            The smallest sufficient number of documents.

        References:
            S.-C. Chow, J. Shao, H. Wang, Sample Size Calculations in Clinical Research (2008),
            section 3.1.3.

        Examples:
            For a 95 % interval and a power of 80 %, the formula is (1.960 + 1.282)² · 0.07 / 0.01²
            + 1.960² / (2 · 0.01).

            >>> OutcomeVariance(0.07, binary=True).count_equivalence_documents(0.01)
            7548
        """
        levels = [1 - ALPHA / (2 * n_tests), (1 + TEST_POWER) / 2]
        level_z, power_z = map(float, scipy.special.ndtri(levels))
        correction = level_z**2 / (2 * margin) if self.binary else 0
        return math.ceil((level_z + power_z) ** 2 * self.variance / margin**2 + correction)

    def detectable_change(self, n_documents: int, n_tests: int = 1) -> float | None:
        """Return the smallest change that a test on `n_documents` documents can detect.

        Args:
            n_documents: Number of documents, one or more.
            n_tests: Number of simultaneous tests, each at the level `ALPHA` / `n_tests`.

        Returns:
            The smallest detectable change; None if even the largest change cannot be detected.
        """
        if not self.binary:
            return math.sqrt(self._scaled_documents(0, n_tests) / n_documents)

        def excess(change: float) -> float:
            return n_documents * change**2 - self._scaled_documents(change, n_tests)

        if excess(1) < 0:
            return None
        # Search above 0, because at 0 nothing changes and nothing is revealed.
        return float(scipy.optimize.brentq(excess, 1e-9, 1, xtol=1e-12))

    def _scaled_documents(self, change: float, n_tests: int) -> float:
        """Return n · change², where n is the number of documents that a test of the change needs.

        If outcomes are not 0 or 1, n · change² does not depend on the change.
        """
        level_z, power_z = map(float, scipy.special.ndtri([1 - ALPHA / (2 * n_tests), TEST_POWER]))
        if not self.binary:
            return (level_z + power_z) ** 2 * self.variance
        share = max(self.variance, change)
        return float((level_z * math.sqrt(share) + power_z * math.sqrt(share - change**2)) ** 2)


def documents_needed(
    variances: Sequence[OutcomeVariance],
    n_tests: int,
    n_benchmarks: int = 1,
    change: float = REPORTED_DROP,
) -> int:
    """Compute how many documents suffice to detect a change in half of the removals.

    Args:
        variances: Variance of the outcome changes for each removal; at least one.
        n_tests: Number of removals that are tested together.
        n_benchmarks: Number of benchmarks of equal size over which the change is averaged.
        change: Mean change that the test should detect.

    Returns:
        The number of documents per benchmark, rounded to two significant digits.

    Examples:
        >>> documents_needed([OutcomeVariance(0.2, binary=True)], n_tests=30)
        1300
    """
    counts = [variance.count_documents(change, n_tests) for variance in variances]
    n_documents = math.ceil(median(counts) / n_benchmarks)
    return round(n_documents, 2 - len(str(n_documents)))


UNRELATED_VARIANCE = OutcomeVariance(0.5, binary=True)
"""Variance for two unrelated models that each answer half of the documents right.

This variance is assumed before anything is measured. It is larger than the variance of a removal.
"""


def expected_best(values: Sequence[float], draws: int) -> float:
    """Compute the expected maximum of `draws` values, drawn without replacement.

    For values 0 and 1, the expected maximum is the unbiased estimator of pass@k. This is the
    probability that at least one of `draws` sampled answers is right.

    Args:
        values: Value of each sampled answer.
        draws: Number of values that are drawn, at most all.

    Returns:
        The expected maximum.

    References:
        M. Chen et al., Evaluating Large Language Models Trained on Code (2021), equation 1.

    Examples:
        Two of four answers are right. One of the six pairs has no right answer.

        >>> expected_best([0, 1, 0, 1], 2)
        0.8333333333333334
    """
    # The n-th smallest value is the maximum if all other draws are among the n smaller values.
    sums = (comb(n, draws - 1) * value for n, value in enumerate(sorted(values)))
    return sum(sums) / comb(len(values), draws)


def majority_value(answers: Sequence[Hashable], values: Sequence[float]) -> float:
    """Return the value of the most frequent answer.

    Args:
        answers: The sampled answers.
        values: Value of each answer.

    Returns:
        The value of the most frequent answer. If several answers are equally frequent, the function
        returns the mean of their values.

    Examples:
        >>> majority_value(["7", "8", "7"], [1, 0, 1])
        1.0
        >>> majority_value(["7", "8"], [1, 0])
        0.5
    """
    by_answer = defaultdict[Hashable, list[float]](list)
    for answer, value in zip(answers, values, strict=True):
        by_answer[answer].append(value)
    most = max(map(len, by_answer.values()))
    tied = [sum(group) / most for group in by_answer.values() if len(group) == most]
    return sum(tied) / len(tied)
