"""Whether a statement about layers is supported by what was measured, or open.

One interval of 95 % is wrong in one of twenty cases, so of thirty layers that cost nothing one or
two have an interval that lies above 0. What names some of many layers therefore needs intervals
that hold for all of them at once: with probability 95 % or more, everything that is named is there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np
import scipy  # what takes long to import comes when it is used
from numpy.typing import NDArray

from tracker.core.estimates import Estimate
from tracker.stats.accuracy import LEVEL
from tracker.stats.power import ALPHA


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values by Holm's method: called significant below α, one in all is wrong with at
    most the probability α.

    It assumes nothing of how the tests depend on each other.

    Args:
        p_values: One a test; None for a test that could not be made, which does not count.

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
"""What is shown of a removal: accuracy is lost without the layer, won, or neither is shown."""


def together(
    figures: Sequence[Estimate], documents: Sequence[int], family: int | None = None
) -> list[Estimate]:
    """Widen 95 % intervals so that they hold for all figures at once.

    By Bonferroni's inequality: of m figures each gets the level 1 - 0.05 / m, whatever the figures
    have to do with each other. An interval of the normal distribution (Wald's, adjusted) has the
    same middle at every level and a half width in proportion to the normal quantile; one of the t
    distribution, in proportion to its quantile. A figure with a p-value is taken to have the first
    kind, as accuracy drops of right and wrong answers do; another one, a baseline too, the second,
    which is the wider one.

    Args:
        figures: Each with its 95 % interval; those without one do not count.
        documents: How many documents each rests on.
        family: How many statements are made of them; None for one a figure with an interval.

    Returns:
        The same figures with wider intervals; as it was where there is none.

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
        # Student's distribution is the normal one in the end.
        times = factor(max(count - 1, 1) if figure.p_value is None else math.inf)
        middle, half = (figure.low + figure.high) / 2, times * (figure.high - figure.low) / 2
        return replace(figure, low=middle - half, high=middle + half)

    return [widened(figure, count) for figure, count in zip(figures, documents, strict=True)]


def verdicts(drops: Sequence[Estimate]) -> list[Verdict]:
    """Say of each removal what is shown.

    Args:
        drops: What each costs, with intervals that hold for all at once (`together`, or a
            confidence sequence). Where one has a p-value, that must agree, adjusted by Holm's
            method: with few documents it is exact where the interval is an approximation.

    Returns:
        One each. Of layers that neither cost nor help anything, one or more are called otherwise
        with probability 5 % at most.

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
    """Say how many comparisons of two there are among some figures: the family of `ranks`."""
    return max(count * (count - 1) // 2, 1)


def ranks(figures: Sequence[Estimate]) -> list[tuple[int, int]]:
    """Say between which ranks each figure lies, 1 for the largest.

    Two figures are told apart where the interval of their difference does not hold 0. It is taken
    as that of independent figures (Donner and Zou 2012); figures of the same documents rise
    together, so that it is too wide rather than too narrow. As many as are larger come before a
    figure, as many as are smaller come behind it, and all others may be on either side.

    Args:
        figures: With intervals that hold for all pairs at once (`together`, of the family `pairs`);
            without one, a figure may be anywhere.

    Returns:
        The best and the worst rank of each: all of them hold at once where the intervals do.

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
    # No comparison with NaN holds.
    return between(value[:, None] - value > np.hypot((value - low)[:, None], high - value))


def between(larger: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Say between which ranks some things lie, 1 for the largest.

    Args:
        larger: `[things, things]`, whether the one is surely larger than the other.

    Returns:
        The best and the worst rank of each.

    Examples:
        >>> between(np.array([[False, True, True], [False] * 3, [False] * 3]))
        [(1, 1), (2, 3), (2, 3)]
    """
    best, worst = 1 + larger.sum(axis=0), len(larger) - larger.sum(axis=1)
    return [(int(first), int(last)) for first, last in zip(best, worst, strict=True)]
