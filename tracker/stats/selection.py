"""The best of many that chance alone makes: what a winner picked by its own score has to beat."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tracker.stats.arrays import Array

FLIPS = 1_999
_CHUNK = 64
"""Flips that are multiplied at once."""


class BestByChance(NamedTuple):
    """The largest mean of many that signs drawn at random give.

    Attributes:
        middle: Its median.
        high: What it exceeds in one of twenty draws.
        p_value: The share of draws, the values themselves counted as one, in which it is as large
            as the largest mean that was found.
    """

    middle: float
    high: float
    p_value: float


def best_by_chance(gains: Array, weights: Array | None = None, seed: int = 0) -> BestByChance:
    """Say how large the best of many mean gains would be if none of them gained or lost anything.

    The signs of all of a document's gains are turned at random together, so that candidates that
    change the same documents stay as alike as they are. It assumes that, if nothing is gained, a
    document is as likely to gain x as to lose it, and that documents are independent. Candidates
    that change many documents, as harmful ones do, make the best by chance larger: it is what all
    would give if each changed as many documents as it does, for nothing.

    Args:
        gains: `[documents, candidates]`, how much better each makes each document; finite.
        weights: `[documents]`, summing to 1; None for equal weights.
        seed: Of the signs.

    Returns:
        The best by chance, in the gains' unit.

    References:
        P. H. Westfall, S. S. Young, Resampling-Based Multiple Testing (1993), section 2.5 (the
        largest of many under signs that are equally likely).

    Examples:
        Two candidates that change the same 100 documents, one for the better and one for the worse.

        >>> found = best_by_chance(np.tile([[1.0, -1.0]], (100, 1)))
        >>> 0.05 < found.middle < 0.1, found.p_value
        (True, 0.0005)
    """
    share = np.full(len(gains), 1 / len(gains)) if weights is None else weights
    scaled = gains * share[:, None]
    draw = np.random.default_rng(seed)
    best = np.empty(FLIPS)
    for first in range(0, FLIPS, _CHUNK):
        count = min(_CHUNK, FLIPS - first)
        signs = draw.integers(0, 2, (count, len(gains))) * 2.0 - 1.0
        best[first : first + count] = (signs @ scaled).max(axis=1)
    found = scaled.sum(axis=0).max()
    reached = int((best >= found - 1e-12).sum()) + 1
    middle, high = np.quantile(best, [0.5, 0.95])
    return BestByChance(float(middle), float(high), reached / (FLIPS + 1))
