"""How much of a loss is won back when something stands in for what was taken out."""

from __future__ import annotations

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
