"""Intervals of ratios, differences and means of figures that have intervals of their own.

They need the figures and their intervals alone, so results of other people can be combined without
their documents. The method of variance estimates recovery (MOVER) takes each interval's two halves
as the figure's uncertainty in either direction.

A. Donner, G. Y. Zou, Statistical Methods in Medical Research 21 (2012) 347-359.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tracker.core.estimates import Estimate
from tracker.stats.accuracy import LEVEL
from tracker.stats.arrays import Array


def recovered(lost: Array, left: Array, drawn_lost: Array, drawn_left: Array) -> Estimate:
    """Compute the share of a summed loss that is won back: 1 − sum(left) / sum(lost).

    The interval is the percentile interval of the same ratio over resamples of the documents, both
    sums over the same documents; it assumes that documents are independent and takes the layers as
    they are. A ratio is worth nothing where its denominator may be 0: it is undefined unless the
    summed loss is above 0 in at least 97.5 % of the resamples.

    Args:
        lost: `[layers]`, the mean drop of each with nothing in its place.
        left: `[layers]`, the mean drop of each with the stand-in.
        drawn_lost: `[resamples, layers]`, the same of resampled documents.
        drawn_left: `[resamples, layers]`, of the same documents.

    Returns:
        The share, 1 = all of it, with its 95 % interval; or why it is undefined.

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
    """Subtract one figure from another that was measured independently.

    Args:
        one: A figure with its interval.
        other: What is subtracted, with its interval.

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

    The interval says what other documents would give for the same benchmarks (or layers); it says
    nothing about other benchmarks.

    Args:
        figures: What is averaged; those without a value are left out.
        independent: Whether they rest on different documents. Otherwise their errors are added up,
            as if all went the same way, which is the widest that they can be together.

    Returns:
        The plain mean, and its interval where every figure has one; None without a figure.

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
