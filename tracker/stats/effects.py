"""Estimate interactions of layers, growth factors, and the largest of many gains.

The interaction of two layers is drop(both) − drop(first) − drop(second), from the same documents.
If the interaction is above 0, removing both layers costs more than the sum of the single removals,
for example because the layers are redundant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy import stats

from tracker.schema.estimates import Estimate
from tracker.stats.accuracy import LEVEL, mean_interval, undefined_mean_reason
from tracker.stats.arrays import Array, Mask, Strata, safe_divide
from tracker.stats.rank_agreement import rounded_values, row_coefficients
from tracker.stats.resampling import (
    RESAMPLES,
    bias_corrected_interval,
    random_signs,
    resampled_means,
)

SIGN_FLIPS = 19_999


def interactions(values: Array, weights: Array | None = None, seed: int = 0) -> list[Estimate]:
    """Estimate the mean interaction of each pair of layers, and test whether it is 0.

    The null hypothesis of the two-sided sign-flip test is that the distribution of the interactions
    is symmetric about 0. The p-value is the fraction of sign combinations for which the sum is at
    least as far from 0 as the observed sum. The test ignores `weights`.

    For 0/1 outcomes, all values are whole numbers in {−2, …, 2}. The p-value is then exact, and the
    interval is Bonett and Price's adjusted Wald interval (2012). For other outcomes, the p-value is
    computed from random signs, and the interval is the t interval.

    Args:
        values: `[documents, pairs]`, drop(both) − drop(first) − drop(second) of every document; NaN
            if a score is not finite.
        weights: `[documents]`, summing to 1; None for equal weights.
        seed: Seed of the random signs.

    Returns:
        One estimate for each pair, with interval and p-value. The value is None with a reason if
        there are no documents, or if a value is NaN.

    References:
        R. A. Fisher, The Design of Experiments (1935), section 21 (signs that are equally likely).
        D. G. Bonett, R. M. Price, Journal of Educational and Behavioral Statistics 37 (2012)
        479-488. B. Phipson, G. K. Smyth, Statistical Applications in Genetics and Molecular Biology
        9 (2010) 39 (p-values from draws).

    Examples:
        Removing both layers makes five of ten answers wrong. Removing a single layer changes no
        answer.

        >>> (estimate,) = interactions(np.array([[1.0]] * 5 + [[0.0]] * 5))
        >>> estimate.value, round(estimate.p_value, 4)
        (0.5, 0.0625)
    """
    is_whole: Mask = np.all(np.isin(values, (-2, -1, 0, 1, 2)), axis=0)
    is_random = np.isfinite(values).all(axis=0) & ~is_whole
    random_p = np.full(len(is_whole), np.nan)
    if is_random.any():
        random_p[is_random] = _random_sign_p_values(values[:, is_random], seed)
    estimates = []
    for column, is_exact, p in zip(values.T, is_whole, random_p, strict=True):
        if reason := undefined_mean_reason(column):
            estimates.append(Estimate(None, reason=reason))
            continue
        value = float(column.mean()) if weights is None else float(column @ weights)
        interval = mean_interval(column, weights, (1.0, -1.0) if is_exact else ())
        p_value = sign_flip_p(column) if is_exact else float(p)
        estimates.append(Estimate(value, *interval, p_value))
    return estimates


def sign_flip_p(values: Array) -> float:
    """Test whether values are symmetric about 0; return the exact p-value (sign-flip test).

    Args:
        values: `[documents]`, whole numbers in {−2, …, 2}.

    Returns:
        The two-sided p-value.

    Examples:
        >>> round(sign_flip_p(np.array([2.0, 1.0, 0.0])), 4)
        0.5
    """
    signed_sums, chances = [], []
    for size in (1, 2):
        count = int((np.abs(values) == size).sum())
        n_positive = np.arange(count + 1)
        signed_sums.append(size * (2 * n_positive - count))
        chances.append(stats.binom.pmf(n_positive, count, 0.5))
    is_far = np.abs(np.add.outer(*signed_sums)) >= abs(values.sum()) - 1e-9
    return min(1.0, float(np.multiply.outer(*chances)[is_far].sum()))


def _random_sign_p_values(values: Array, seed: int) -> Array:
    """Test for each pair of layers whether the interaction is 0; return the p-values.

    The array `values` is `[documents, pairs]`. The sign-flip tests of all pairs use the same random
    signs.
    """
    # Equal sums may differ by rounding.
    thresholds = np.abs(values.sum(axis=0)) - 1e-9 * np.abs(values).sum(axis=0)
    n_beyond = np.ones(values.shape[1])
    for signs in random_signs(values.shape, SIGN_FLIPS, seed):
        n_beyond += (np.abs(signs @ values) >= thresholds).sum(axis=0)
    return np.asarray(n_beyond / (SIGN_FLIPS + 1))


def additivity(
    single_sums: Sequence[float] | Array,
    joint_drops: Sequence[float] | Array,
    resamples: tuple[Array, Array],
) -> tuple[Estimate, Estimate]:
    """Estimate how well drops of single layers predict drops of layer pairs.

    The joint drop of a pair (both layers removed) is predicted as the sum of the two single drops.
    The quality of the predictions is R² = 1 − Σ (joint − sum)² / Σ (joint − mean)², without fitting
    a line. Spearman's coefficient and R² are too large, because sums and joint drops are measured
    on the same documents and have correlated noise.

    Args:
        single_sums: `[pairs]`, drop(first) + drop(second) for each pair of layers.
        joint_drops: `[pairs]`, the drop if both layers of a pair are removed.
        resamples: Sums and joint drops for resampled documents, each `[resamples, pairs]`.

    Returns:
        Spearman's coefficient and R², each with the 95 % interval of `bias_corrected_interval`. A
        value is None with a reason for fewer than three pairs, a NaN, or values that are equal for
        all pairs.

    Examples:
        >>> sums, joint = np.array([0.1, 0.2, 0.3]), np.array([0.1, 0.2, 0.4])
        >>> rank, share = additivity(sums, joint, (sums[None], joint[None]))
        >>> round(rank.value, 3), round(share.value, 3)
        (1.0, 0.786)
    """
    sums, joint = (np.asarray(values, dtype=np.float64) for values in (single_sums, joint_drops))
    if (n_pairs := len(sums)) < 3:
        reason = f"at least three pairs of layers are needed, not {n_pairs}"
        return Estimate(None, reason=reason), Estimate(None, reason=reason)

    def estimate(measure: Callable[[Array, Array], Array]) -> Estimate:
        (value,) = measure(sums[None], joint[None]).tolist()
        if not math.isfinite(value):
            reason = "all pairs of layers have equal joint drops, or equal sums of single drops"
            return Estimate(None, reason=reason)
        return Estimate(value, *bias_corrected_interval(value, measure(*resamples), max_value=1))

    return estimate(partial(row_coefficients, coefficient="spearman")), estimate(_explained_share)


def _explained_share(sums: Array, joint: Array) -> Array:
    """Return R² of predicting joint drops by sums of single drops, for each row.

    Both arguments are arrays `[rows, pairs]`, and the result is an array `[rows]`.
    """
    residuals = ((joint - sums) ** 2).sum(axis=1)
    variation = ((joint - joint.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    varies = np.ptp(rounded_values(joint), axis=1) > 0
    return 1 - safe_divide(residuals, np.where(varies, variation, 0))


def growths(
    start_values: Array, end_values: Array, strata: Strata | None = None, seed: int = 0
) -> list[Estimate]:
    """Estimate the mean growth factor (end / start value) of each column, as a geometric mean.

    The interval is a bootstrap interval of the mean log ratio (Hesterberg's expanded percentiles).
    The bootstrap resamples documents within each stratum. The p-value is from Wilcoxon's signed
    rank test of the log ratios. The null hypothesis is that the growth factor is 1.

    Args:
        start_values: `[documents, k]`, the positive start values.
        end_values: `[documents, k]`, the positive end values of the same documents.
        strata: `[documents]`, e.g. each document's task.
        seed: Seed of the resamples.

    Returns:
        For each column, the growth factor with its 95 % interval and p-value; 1 means no growth.
        The value is None with a reason for fewer than two documents, or if an input is not positive
        and finite.

    References:
        F. Wilcoxon, Biometrics Bulletin 1 (1945) 80-83. T. C. Hesterberg, The American
        Statistician 69 (2015) 371-386 (the expanded percentile interval).

    Examples:
        >>> (estimate,) = growths(np.ones((3, 1)), np.array([[2.0], [4.0], [8.0]]))
        >>> round(estimate.value, 9), estimate.p_value
        (4.0, 0.25)
    """
    n, n_columns = start_values.shape
    if n < 2:
        reason = f"a growth factor (end / start value) needs at least two documents, not {n}"
        return [Estimate(None, reason=reason)] * n_columns
    with np.errstate(all="ignore"):
        logs = np.log(end_values / start_values)
    is_usable = np.isfinite(logs) & (start_values > 0)
    logs = np.where(is_usable, logs, 0)
    means = resampled_means(logs, RESAMPLES, seed, strata)
    z = np.sqrt(n / (n - 1)) * stats.t.ppf((1 + LEVEL) / 2, n - 1)
    lows, highs = np.exp(np.quantile(means, stats.norm.cdf([-z, z]), axis=0)).tolist()
    estimates = []
    counts = (~is_usable).sum(axis=0)
    for column, low, high, n_unusable in zip(logs.T, lows, highs, counts, strict=True):
        if n_unusable:
            reason = (
                f"start or end values are not positive and finite in {n_unusable} of {n} documents"
            )
            estimates.append(Estimate(None, reason=reason))
            continue
        is_unchanged = np.allclose(column, 0, rtol=0, atol=1e-12)
        p_value = 1.0 if is_unchanged else float(stats.wilcoxon(column).pvalue)
        estimates.append(Estimate(float(np.exp(column.mean())), low, high, p_value))
    return estimates


def min_growth_documents(n_tests: int, level: float) -> int:
    """Compute how many documents Wilcoxon's test needs for any significant result.

    For n documents, no p-value is below 2^(1 - n). Holm's method multiplies the smallest p-value by
    the number of tests.

    Args:
        n_tests: Number of columns that are tested together.
        level: Level of significance for the adjusted p-value.

    Returns:
        The smallest number of documents, 2 or more.

    Examples:
        >>> min_growth_documents(1, 0.05), min_growth_documents(29, 0.05)
        (6, 11)
    """
    return next(n for n in itertools.count(2) if n_tests * 2.0 ** (1 - n) < level)


def growth_difference_p(groups: Sequence[Array]) -> float | None:
    """Test whether growth factors differ between groups of documents; return the p-value.

    The test is Kruskal and Wallis's rank test, which assumes independent documents.

    Args:
        groups: The growth factors (end / start value) of the documents of each group.

    Returns:
        The p-value; None for fewer than two groups, for a group of fewer than five documents, for a
        factor that is not finite, or if all factors are equal.

    References:
        W. H. Kruskal, W. A. Wallis, Journal of the American Statistical Association 47 (1952)
        583-621.

    Examples:
        >>> low, high = np.arange(1.0, 6), np.arange(6.0, 11)
        >>> round(growth_difference_p([low, high]), 4)
        0.009
    """
    if len(groups) < 2 or min(map(len, groups)) < 5:
        return None
    all_ratios = np.concatenate(list(groups))
    if not np.isfinite(all_ratios).all() or np.ptp(all_ratios) == 0:
        return None
    return float(stats.kruskal(*groups).pvalue)


GAIN_FLIPS = 1_999


class BestByChance(NamedTuple):
    """Distribution of the largest mean gain under the null hypothesis of no effects.

    Attributes:
        middle: Median of the largest mean gain under the null hypothesis.
        high: 95 % quantile of the largest mean gain under the null hypothesis.
        p_value: Probability of at least the observed largest mean gain under the null hypothesis.
    """

    middle: float
    high: float
    p_value: float


def best_by_chance(gains: Array, weights: Array | None = None, seed: int = 0) -> BestByChance:
    """Estimate how large the largest of several mean gains is by chance alone.

    The null hypothesis is that no candidate has an effect: documents are independent, and gains are
    symmetric about 0. Each random draw therefore reverses the signs of all gains of randomly chosen
    documents.

    Args:
        gains: `[documents, candidates]`, the finite gain that each candidate has on each document.
        weights: `[documents]`, summing to 1; None for equal weights.
        seed: Seed of the random signs.

    Returns:
        Median and 95 % quantile of the largest mean gain by chance, and the p-value of the observed
        largest mean gain.

    References:
        P. H. Westfall, S. S. Young, Resampling-Based Multiple Testing (1993), section 2.5.

    Examples:
        Two candidates change the same 100 documents. One candidate improves all of them, and the
        other candidate makes all of them worse.

        >>> best = best_by_chance(np.tile([[1.0, -1.0]], (100, 1)))
        >>> 0.05 < best.middle < 0.1, best.p_value
        (True, 0.0005)
    """
    shares = np.full(len(gains), 1 / len(gains)) if weights is None else weights
    scaled = gains * shares[:, None]
    chunks = random_signs(scaled.shape, GAIN_FLIPS, seed)
    best_means = np.concatenate([(signs @ scaled).max(axis=1) for signs in chunks])
    observed_best = scaled.sum(axis=0).max()
    n_reached = int((best_means >= observed_best - 1e-12).sum()) + 1
    median, high = np.quantile(best_means, [0.5, 0.95])
    return BestByChance(float(median), float(high), n_reached / (GAIN_FLIPS + 1))
