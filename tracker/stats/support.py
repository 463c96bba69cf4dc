"""Combine estimates, and decide whether statements about layers are supported or open.

A 95 % interval is wrong in one of twenty cases, so of thirty layers without any effect one or two
have an interval above 0. Statements that name some of many layers need simultaneous intervals: with
probability 95 % or more, all of them are true.

Ratios, differences and means are computed from estimates with intervals. They need no documents, so
they also combine other people's results. The method of variance estimates recovery (MOVER) takes
the two halves of each interval as the uncertainty in either direction.

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

from tracker.core.estimates import Estimate
from tracker.stats.accuracy import ALPHA, LEVEL
from tracker.stats.arrays import Array


def recovered(lost: Array, left: Array, drawn_lost: Array, drawn_left: Array) -> Estimate:
    """Compute the share of a summed loss that is recovered: 1 − sum(left) / sum(lost).

    The interval is the percentile interval of the same ratio over resamples of the documents, with
    both sums over the same documents. It assumes independent documents and takes the layers as
    fixed. The ratio is undefined unless the summed loss is above 0 in at least 97.5 % of the
    resamples.

    Args:
        lost: `[layers]`, mean drop of each layer when it is removed.
        left: `[layers]`, mean drop of each layer when it is replaced.
        drawn_lost: `[resamples, layers]`, `lost` of resampled documents.
        drawn_left: `[resamples, layers]`, `left` of the same documents.

    Returns:
        The share, 1 = all of it, with its 95 % interval; None with a reason if undefined.

    References:
        B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Examples:
        >>> some = np.full((100, 2), 0.1)
        >>> round(recovered(some[0], some[0] / 4, some, some / 4).value, 3)
        0.75
    """
    over, under = drawn_left.sum(axis=1), drawn_lost.sum(axis=1)
    if not np.isfinite([*lost, *left]).all():
        return Estimate(None, reason="a drop is not a finite number")
    if lost.sum() <= 0 or np.mean(under > 0) < (1 + LEVEL) / 2:
        return Estimate(None, reason="removals cost nothing here that these documents could show")
    low, high = np.quantile(
        1 - over[under > 0] / under[under > 0], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    )
    return Estimate(float(1 - left.sum() / lost.sum()), float(low), float(high))


def ratio(over: Estimate, under: Estimate) -> Estimate:
    """Divide one figure by another that is surely positive.

    The two are taken as independent. Figures of the same documents rise and fall together, which
    makes the true interval of their ratio narrower: this one is then too wide, never too narrow.

    Args:
        over: The numerator, with its interval.
        under: The denominator, with its interval.

    Returns:
        The ratio and its interval; no interval where one of the two has none, or where the
        denominator's reaches 0. None where the denominator is not positive.

    Examples:
        >>> found = ratio(Estimate(0.1, 0.05, 0.15), Estimate(0.5, 0.4, 0.6))
        >>> found.value, round(found.low, 3), round(found.high, 3)
        (0.2, 0.098, 0.319)
    """
    a, b = over.value, under.value
    if a is None or b is None:
        return Estimate(None, reason=over.reason or under.reason)
    if b <= 0:
        return Estimate(None, reason="a share of nothing")
    above, below = over.between, under.between
    if above is None or below is None or below[0] <= 0 or below[1] >= 2 * b:
        return Estimate(a / b)

    def end(of_a: float, of_b: float, sign: int) -> float:
        spread = (a * b) ** 2 - of_a * of_b * (2 * a - of_a) * (2 * b - of_b)
        return (a * b + sign * math.sqrt(max(spread, 0.0))) / (of_b * (2 * b - of_b))

    return Estimate(a / b, end(above[0], below[1], -1), end(above[1], below[0], 1))


def difference(one: Estimate, other: Estimate) -> Estimate:
    """Subtract one estimate from another that was measured independently.

    Args:
        one: Estimate with its interval.
        other: Estimate to subtract, with its interval.

    Returns:
        one - other and its interval (None where one of the two has none). Of two models on the
        same documents it is too wide rather than too narrow, because the documents are shared.

    Examples:
        >>> found = difference(Estimate(0.3, 0.2, 0.4), Estimate(0.1, 0.0, 0.2))
        >>> round(found.value, 3), round(found.low, 3), round(found.high, 3)
        (0.2, 0.059, 0.341)
    """
    if one.value is None or other.value is None:
        return Estimate(None, reason=one.reason or other.reason)
    value = one.value - other.value
    if one.between is None or other.between is None:
        return Estimate(value)
    (low, high), (other_low, other_high) = one.between, other.between
    return Estimate(
        value,
        value - math.hypot(one.value - low, other_high - other.value),
        value + math.hypot(high - one.value, other.value - other_low),
    )


def mean(figures: Sequence[Estimate], independent: bool = True) -> Estimate:
    """Average figures, each with its interval.

    The interval covers the values that other documents of the same benchmarks (or layers) would
    give; it does not cover other benchmarks.

    Args:
        figures: Estimates to average; those without a value are left out.
        independent: Whether they rest on different documents. Otherwise their errors are added up,
            which is the worst case of dependence.

    Returns:
        The plain mean, and its interval if every estimate has one; None without an estimate.

    Examples:
        >>> four = [Estimate(0.2, 0.1, 0.3)] * 4
        >>> found, shared = mean(four), mean(four, independent=False)
        >>> round(found.low, 3), round(found.high, 3), round(shared.low, 3)
        (0.15, 0.25, 0.1)
    """
    there = [(f.value, f.between) for f in figures if f.value is not None]
    if not there:
        return Estimate(None, reason=next((f.reason for f in figures if f.reason), "no figures"))
    value = math.fsum(v for v, _ in there) / len(there)
    known = [(v, between) for v, between in there if between]
    if len(known) < len(there):
        return Estimate(value)
    together = math.hypot if independent else lambda *parts: math.fsum(parts)
    below = together(*(v - low for v, (low, _) in known)) / len(there)
    above = together(*(high - v for v, (_, high) in known)) / len(there)
    return Estimate(value, value - below, value + above)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values by Holm's method, which controls the family-wise error rate.

    Calling all tests below α significant is wrong anywhere with at most the probability α, for any
    dependence of the tests.

    Args:
        p_values: One for each test; None for a test that could not be made, which does not count.

    Returns:
        The adjusted p-values, at most 1, in the same order; None stays None.

    References:
        S. Holm, Scandinavian Journal of Statistics 6 (1979) 65-70.

    Examples:
        >>> holm([0.01, 0.04, None, 0.03])
        [0.03, 0.06, None, 0.06]
    """  # fmt: skip
    made = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, place) in enumerate(made):
        least = max(least, min(1.0, p * (len(made) - rank)))
        adjusted[place] = least
    return adjusted


Verdict = Literal["costs", "helps", "open"]
"""Supported statement about a removal: accuracy is lost, accuracy is gained, or neither."""


def together(
    figures: Sequence[Estimate], documents: Sequence[int], family: int | None = None
) -> list[Estimate]:
    """Widen 95 % intervals so that they hold for all figures at once.

    By Bonferroni's inequality, each of m figures gets the level 1 - 0.05 / m, for any dependence. A
    normal interval (Wald's, adjusted) has the same middle at every level, and a half width
    proportional to the normal quantile; a t interval uses the t quantile. A figure with a p-value
    is taken as normal, as are accuracy drops of 0/1 outcomes. Any other figure, including a
    baseline, is taken as t, which is wider.

    Args:
        figures: Estimates with 95 % intervals; those without one do not count.
        documents: Number of documents of each estimate.
        family: Number of simultaneous statements; None = the number of estimates with an interval.

    Returns:
        The same estimates with wider intervals; unchanged if they have none.

    References:
        O. J. Dunn, Journal of the American Statistical Association 56 (1961) 52-64.

    Examples:
        >>> one, other = together([Estimate(0.1, 0.0, 0.2, 0.04), Estimate(0.3, 0.2, 0.4, 0.01)],
        ...                       [100, 100])
        >>> round(one.low, 4), round(one.high, 4)
        (-0.0144, 0.2144)
    """  # fmt: skip
    if family is None:
        family = sum(figure.low is not None and figure.high is not None for figure in figures)

    @cache
    def factor(freedom: float) -> float:
        levels = [1 - (1 - LEVEL) / (2 * family), (1 + LEVEL) / 2]
        wide, narrow = scipy.special.stdtrit(freedom, levels)
        return float(wide / narrow)

    def widened(figure: Estimate, count: int) -> Estimate:
        if family == 1 or figure.low is None or figure.high is None:
            return figure
        # Student's distribution converges to the normal one.
        times = factor(max(count - 1, 1) if figure.p_value is None else math.inf)
        middle, half = (figure.low + figure.high) / 2, times * (figure.high - figure.low) / 2
        return replace(figure, low=middle - half, high=middle + half)

    return [widened(figure, count) for figure, count in zip(figures, documents, strict=True)]


def verdicts(drops: Sequence[Estimate]) -> list[Verdict]:
    """Decide for each removal whether it costs accuracy, helps, or is open.

    Args:
        drops: Drop of each removal, with simultaneous intervals (`together`, or a confidence
            sequence). A p-value, if there is one, must agree after Holm's adjustment, because it is
            exact for few documents.

    Returns:
        One verdict for each removal. The probability that any layer without an effect gets another
        verdict than open is at most 5 %.

    Examples:
        >>> verdicts([Estimate(0.3, 0.1, 0.5), Estimate(0.1, -0.1, 0.3), Estimate(None)])
        ['costs', 'open', 'open']
    """
    adjusted = holm([drop.p_value for drop in drops])

    def verdict(drop: Estimate, p_value: float | None) -> Verdict:
        if drop.low is None or drop.high is None or (p_value is not None and p_value > ALPHA):
            return "open"
        return "costs" if drop.low > 0 else "helps" if drop.high < 0 else "open"

    return [verdict(drop, p_value) for drop, p_value in zip(drops, adjusted, strict=True)]


def pairs(count: int) -> int:
    """Return the number of pairs among some figures: the family of `ranks`."""
    return max(count * (count - 1) // 2, 1)


def ranks(figures: Sequence[Estimate]) -> list[tuple[int, int]]:
    """Compute the best and the worst possible rank of each figure, 1 for the largest.

    Two figures are distinguished if the interval of their difference excludes 0. The interval is
    that of independent figures (Donner and Zou 2012). Figures of the same documents rise together,
    so it is too wide rather than too narrow. A figure ranks behind all larger ones and before all
    smaller ones; undistinguished ones may be on either side.

    Args:
        figures: Estimates with intervals simultaneous for all pairs (`together`, of the family
            `pairs`). One without an interval may have any rank.

    Returns:
        The best and the worst rank of each; all hold simultaneously if the intervals do.

    References:
        M. Mogstad, J. Romano, A. Shaikh, D. Wilhelm, Review of Economic Studies 91 (2024) 476-518.

    Examples:
        >>> ranks([Estimate(0.5, 0.4, 0.6), Estimate(0.2, 0.1, 0.3), Estimate(0.1, 0.0, 0.2)])
        [(1, 1), (2, 3), (2, 3)]
    """
    known = [
        (one.value, one.low, one.high) if None not in (one.low, one.high) else (math.nan,) * 3
        for one in figures
    ]
    value, low, high = np.array(known, dtype=np.float64).reshape(-1, 3).T
    # Comparisons with NaN are False.
    return between(value[:, None] - value > np.hypot((value - low)[:, None], high - value))


def between(larger: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Compute the best and the worst possible rank of items, 1 for the largest.

    Args:
        larger: `[items, items]`, whether the first is surely larger than the second.

    Returns:
        The best and the worst rank of each.

    Examples:
        >>> between(np.array([[False, True, True], [False] * 3, [False] * 3]))
        [(1, 1), (2, 3), (2, 3)]
    """
    best, worst = 1 + larger.sum(axis=0), len(larger) - larger.sum(axis=1)
    return [(int(first), int(last)) for first, last in zip(best, worst, strict=True)]
