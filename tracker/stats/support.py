"""Combine estimates with intervals, and test statements about layers.

On average, one of twenty 95 % intervals does not contain the true value. Statements about selected
layers, such as the layer with the largest drop, therefore need simultaneous intervals. The
probability that all simultaneous intervals contain their true values is at least 95 %.

The interval of a ratio, a difference or a mean of estimates is computed from the intervals of these
estimates, by the method of variance estimates recovery (MOVER).

A. Donner, G. Y. Zou, Statistical Methods in Medical Research 21 (2012) 347-359.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np
import scipy  # imports its slow submodules on first use
from numpy.typing import NDArray

from tracker.schema.estimates import Estimate
from tracker.stats.accuracy import ALPHA, LEVEL
from tracker.stats.arrays import Array


def recovered_share(
    losses: Array, remainders: Array, loss_resamples: Array, remainder_resamples: Array
) -> Estimate:
    """Compute how much accuracy loss is avoided if layers are replaced instead of removed.

    A layer can be removed, or replaced by a fitted function. The avoided fraction of the loss is 1
    − Σ `remainders` / Σ `losses`, with sums over layers. The fraction's interval is a percentile
    interval over resamples of the documents. The fraction is undefined if the sum of the losses is
    positive in less than 97.5 % of the resamples.

    Args:
        losses: `[layers]`, mean drop if the layer is removed.
        remainders: `[layers]`, mean drop if the layer is replaced by a fitted function.
        loss_resamples: `[resamples, layers]`, mean drops of removed layers, on each bootstrap
            resample of the documents.
        remainder_resamples: `[resamples, layers]`, mean drops of replaced layers, on the same
            resamples.

    Returns:
        The avoided fraction with its 95 % interval; None with a reason if the fraction is
        undefined.

    References:
        B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Examples:
        >>> drops = np.full((100, 2), 0.1)
        >>> round(recovered_share(drops[0], drops[0] / 4, drops, drops / 4).value, 3)
        0.75
    """
    if not np.isfinite([*losses, *remainders]).all():
        return Estimate(None, reason="the accuracy drop of a layer is not a finite number")
    loss_sums, remainder_sums = loss_resamples.sum(axis=1), remainder_resamples.sum(axis=1)
    is_positive = loss_sums > 0
    if losses.sum() <= 0 or is_positive.mean() < (1 + LEVEL) / 2:
        return Estimate(None, reason="the sum of the drops is not significantly above 0")
    shares = 1 - remainder_sums[is_positive] / loss_sums[is_positive]
    low, high = np.quantile(shares, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(1 - remainders.sum() / losses.sum()), float(low), float(high))


def divide(numerator: Estimate, denominator: Estimate) -> Estimate:
    """Compute the ratio of two estimates, and the interval of the ratio.

    The interval assumes that the two estimates are independent. For estimates from the same
    documents, the interval is usually too wide.

    Args:
        numerator: The numerator, with its interval.
        denominator: The denominator, with its interval.

    Returns:
        The ratio and its interval. The ratio has no interval if one of the two estimates has no
        interval, or if the denominator's interval reaches 0. The value is None if the denominator
        is not positive.

    Examples:
        >>> share = divide(Estimate(0.1, 0.05, 0.15), Estimate(0.5, 0.4, 0.6))
        >>> share.value, round(share.low, 3), round(share.high, 3)
        (0.2, 0.098, 0.319)
    """
    a, b = numerator.value, denominator.value
    if a is None or b is None:
        return Estimate(None, reason=numerator.reason or denominator.reason)
    if b <= 0:
        return Estimate(None, reason="the denominator is not above 0")
    a_bounds, b_bounds = numerator.bounds, denominator.bounds
    if a_bounds is None or b_bounds is None or b_bounds[0] <= 0 or b_bounds[1] >= 2 * b:
        return Estimate(a / b)

    def bound(a_end: float, b_end: float, sign: int) -> float:
        spread = (a * b) ** 2 - a_end * b_end * (2 * a - a_end) * (2 * b - b_end)
        return (a * b + sign * math.sqrt(max(spread, 0.0))) / (b_end * (2 * b - b_end))

    low, high = bound(a_bounds[0], b_bounds[1], -1), bound(a_bounds[1], b_bounds[0], 1)
    return Estimate(a / b, low, high)


def subtract(minuend: Estimate, subtrahend: Estimate) -> Estimate:
    """Compute the difference of two estimates, and the interval of the difference.

    The interval assumes that the two estimates are independent. For estimates from the same
    documents, the interval is usually too wide.

    Args:
        minuend: Estimate from which `subtrahend` is subtracted, with its interval.
        subtrahend: Estimate to subtract, with its interval.

    Returns:
        The difference and its interval. The difference has no interval if one of the two estimates
        has no interval.

    Examples:
        >>> difference = subtract(Estimate(0.3, 0.2, 0.4), Estimate(0.1, 0.0, 0.2))
        >>> round(difference.value, 3), round(difference.low, 3), round(difference.high, 3)
        (0.2, 0.059, 0.341)
    """
    a, b = minuend.value, subtrahend.value
    if a is None or b is None:
        return Estimate(None, reason=minuend.reason or subtrahend.reason)
    if minuend.bounds is None or subtrahend.bounds is None:
        return Estimate(a - b)
    (a_low, a_high), (b_low, b_high) = minuend.bounds, subtrahend.bounds
    lower_half, upper_half = math.hypot(a - a_low, b_high - b), math.hypot(a_high - a, b - b_low)
    return Estimate(a - b, a - b - lower_half, a - b + upper_half)


def average(estimates: Sequence[Estimate], independent: bool = True) -> Estimate:
    """Compute the mean of several estimates, and the interval of the mean.

    The interval holds for the mean of exactly these estimates, not for further benchmarks.

    Args:
        estimates: Estimates to average; estimates without a value are ignored.
        independent: Whether the estimates are measured on different documents. If False, the half
            widths of the intervals are averaged, as for completely dependent estimates.

    Returns:
        The unweighted mean, with an interval if every estimate has an interval. The value is None
        if no estimate has a value.

    Examples:
        >>> four = [Estimate(0.2, 0.1, 0.3)] * 4
        >>> mean, dependent = average(four), average(four, independent=False)
        >>> round(mean.low, 3), round(mean.high, 3), round(dependent.low, 3)
        (0.15, 0.25, 0.1)
    """
    values = [(figure.value, figure.bounds) for figure in estimates if figure.value is not None]
    if not values:
        return Estimate(None, reason=next((f.reason for f in estimates if f.reason), "no figures"))
    mean = math.fsum(value for value, _ in values) / len(values)
    intervals = [(value, *bounds) for value, bounds in values if bounds]
    if len(intervals) < len(values):
        return Estimate(mean)
    combine = math.hypot if independent else lambda *parts: math.fsum(parts)
    lower_half = combine(*(value - low for value, low, _ in intervals)) / len(values)
    upper_half = combine(*(high - value for value, _, high in intervals)) / len(values)
    return Estimate(mean, mean - lower_half, mean + upper_half)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values by Holm's method for the family-wise error rate.

    If a test is called significant when its adjusted p-value is below α, the probability of any
    false positive is at most α. The tests do not have to be independent.

    Args:
        p_values: p-value of each test. None for a test that could not be computed; the adjustment
            ignores such tests.

    Returns:
        The adjusted p-values, at most 1, in the order of the tests; None remains None.

    References:
        S. Holm, Scandinavian Journal of Statistics 6 (1979) 65-70.

    Examples:
        >>> holm([0.01, 0.04, None, 0.03])
        [0.03, 0.06, None, 0.06]
    """  # fmt: skip
    sorted_p = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(sorted_p):
        largest = max(largest, min(1.0, p * (len(sorted_p) - rank)))
        adjusted[index] = largest
    return adjusted


Verdict = Literal["costs", "helps", "open"]
"""Result for a removal: a significant loss of accuracy, a significant gain, or neither."""


def widen(
    estimates: Sequence[Estimate], counts: Sequence[float], family: int | None = None
) -> list[Estimate]:
    """Widen 95 % intervals to simultaneous 95 % intervals of all estimates.

    Each interval of m estimates is widened to the level 1 - 0.05 / m (Bonferroni's inequality). The
    midpoint stays, and the half width is multiplied by a ratio of quantiles: the quantile for the
    new level, divided by the quantile for 95 %. The quantiles are those of the normal distribution
    for an estimate with a p-value, and of the t distribution for other estimates.

    Args:
        estimates: Estimates with 95 % intervals; estimates without an interval are returned
            unchanged.
        counts: Number of independent documents or clusters of each estimate.
        family: Number m of estimates for which the intervals are simultaneous; None = the number of
            estimates with an interval.

    Returns:
        The same estimates with wider intervals.

    References:
        O. J. Dunn, Journal of the American Statistical Association 56 (1961) 52-64.

    Examples:
        >>> drops = [Estimate(0.1, 0.0, 0.2, 0.04), Estimate(0.3, 0.2, 0.4, 0.01)]
        >>> wide, _ = widen(drops, [100, 100])
        >>> round(wide.low, 4), round(wide.high, 4)
        (-0.0144, 0.2144)
    """  # fmt: skip
    if family is None:
        family = sum(None not in (estimate.low, estimate.high) for estimate in estimates)

    @cache
    def widening_factor(df: float) -> float:
        levels = [1 - (1 - LEVEL) / (2 * family), (1 + LEVEL) / 2]
        wide, narrow = scipy.special.stdtrit(df, levels)
        return float(wide / narrow)

    def widen_one(estimate: Estimate, count: float) -> Estimate:
        low, high = estimate.low, estimate.high
        if family == 1 or low is None or high is None:
            return estimate
        # Student's distribution converges to the normal one.
        factor = widening_factor(max(count - 1, 1) if estimate.p_value is None else math.inf)
        centre, half_width = (low + high) / 2, factor * (high - low) / 2
        return replace(estimate, low=centre - half_width, high=centre + half_width)

    return [widen_one(*pair) for pair in zip(estimates, counts, strict=True)]


def decide_verdicts(drops: Sequence[Estimate], alpha: float = ALPHA) -> list[Verdict]:
    """Decide for each removal whether the accuracy is significantly lower, higher, or neither.

    Args:
        drops: Accuracy drop of each removal, with simultaneous intervals from `widen` or a
            confidence sequence. A drop is significant if its interval excludes 0. If the drop has a
            p-value, the p-value must also be significant after Holm's adjustment.
        alpha: Largest acceptable probability of any wrong verdict; also the error probability of
            the intervals.

    Returns:
        One verdict for each removal: `costs` for a significant loss of accuracy, `helps` for a
        significant gain, or `open`.

    Examples:
        >>> decide_verdicts([Estimate(0.3, 0.1, 0.5), Estimate(0.1, -0.1, 0.3), Estimate(None)])
        ['costs', 'open', 'open']
    """
    words: dict[int, Verdict] = {1: "costs", -1: "helps", 0: "open"}
    adjusted = holm([drop.p_value for drop in drops])
    return [
        words[drop.side() if p_value is None or p_value <= alpha else 0]
        for drop, p_value in zip(drops, adjusted, strict=True)
    ]


def count_pairs(n_figures: int) -> int:
    """Return the number of pairs of `n_figures` values; 1 for a single value."""
    return max(n_figures * (n_figures - 1) // 2, 1)


def possible_ranks(estimates: Sequence[Estimate]) -> list[tuple[int, int]]:
    """Compute the best and the worst rank that each estimate could have, given the intervals.

    The largest estimate has rank 1.

    Two estimates differ significantly if the interval of their difference excludes 0. The interval
    of the difference assumes independent estimates (Donner and Zou 2012). The best possible rank of
    an estimate is 1 plus the number of significantly larger estimates. The worst possible rank is
    the number of estimates minus the number of significantly smaller estimates.

    Args:
        estimates: Estimates with intervals that are simultaneous for all pairs of estimates. Such
            intervals are returned by `widen` if `family` is the number of pairs. An estimate
            without an interval can have any rank.

    Returns:
        A list of pairs (best rank, worst rank), one pair for each estimate.

    References:
        M. Mogstad, J. Romano, A. Shaikh, D. Wilhelm, Review of Economic Studies 91 (2024) 476-518.

    Examples:
        >>> drops = [Estimate(0.5, 0.4, 0.6), Estimate(0.2, 0.1, 0.3), Estimate(0.1, 0.0, 0.2)]
        >>> possible_ranks(drops)
        [(1, 1), (2, 3), (2, 3)]
    """
    rows = [(estimate.value, *(estimate.bounds or (math.nan,) * 2)) for estimate in estimates]
    value, low, high = np.array(rows, dtype=np.float64).reshape(-1, 3).T
    # Comparisons with NaN are False.
    distances = np.hypot((value - low)[:, None], high - value)
    return ranks_by_comparison(value[:, None] - value > distances)


def ranks_by_comparison(is_larger: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Compute each item's best and worst possible rank from comparisons of all pairs.

    The largest item has rank 1.

    Args:
        is_larger: `[items, items]`, whether the item of the row is significantly larger than the
            item of the column.

    Returns:
        A list of pairs (best rank, worst rank), one pair for each item.

    Examples:
        >>> ranks_by_comparison(np.array([[False, True, True], [False] * 3, [False] * 3]))
        [(1, 1), (2, 3), (2, 3)]
    """
    best, worst = 1 + is_larger.sum(axis=0), len(is_larger) - is_larger.sum(axis=1)
    return list(zip(best.tolist(), worst.tolist(), strict=True))
