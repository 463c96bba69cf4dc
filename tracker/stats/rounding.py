"""What rounding decides: judgements that another way of computing the same model may turn round.

In half precision a log-likelihood is rounded over and over, each time to a share of itself, and
where it ends depends on the size of a batch, on what stands beside a text in it, on the device. So
some documents are computed twice, in two ways that are equal but for rounding, and how far the
differences between options move is taken for the standard deviation by which rounding moves them.

It is assumed that this movement is normal with mean 0, in proportion to the size of what is
subtracted, in one proportion for all documents of a run, independent from document to document, and
that a judgement hangs on the gold option and the best of the others alone.

Scores are [documents, options]: log-likelihoods, or whatever the metric makes of them, with NaN
where a document has fewer options than others.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

from tracker.stats.arrays import Array
from tracker.stats.decisions import margins

WITHIN = 2.0
"""A judgement is within rounding where its margin is less than so many standard deviations."""
LEAST_CHANCE = float(stats.norm.sf(WITHIN))
"""The chance that rounding turns a judgement round whose margin is just `WITHIN`."""
_BOTH_SIDES = float(stats.norm.ppf(0.975))


def movement(scores: Array, again: Array) -> float | None:
    """Say how far rounding moves the difference between two options, as a share of their size.

    Args:
        scores: The options' scores,
        again: and the same computed in another way.

    Returns:
        The root mean square, over all pairs of options of all documents, of how far their
        difference moves, divided by the root of the sum of their squares. None where no document
        has two options, or nothing has moved at all: that shows no rounding, and it is there.

    Examples:
        Of -3 and -4 one moves by 0.1 and the other does not: 0.1 / 5.

        >>> round(movement(np.array([[-3.0, -4.0]]), np.array([[-3.1, -4.0]])), 4)
        0.02
    """
    count = scores.shape[1]
    one, other = np.triu_indices(count, 1)
    moved = (scores - again)[:, one] - (scores - again)[:, other]
    size = np.hypot(scores[:, one], scores[:, other])
    known = np.isfinite(moved) & (size > 0)
    if not known.any():
        return None
    return float(np.sqrt(np.mean((moved[known] / size[known]) ** 2))) or None


def turning(scores: Array, gold: Array, moved: float) -> Array:
    """Say how likely another way of computing judges each document otherwise.

    Args:
        scores: The options' scores.
        gold: The number of every document's gold option; NaN where there is none.
        moved: The `movement` of the differences.

    Returns:
        The chance that a normal movement is larger than the document's margin, at most a half; NaN
        without a margin.

    Examples:
        The gold option leads by 1, and rounding moves the difference of -3 and -4 by 0.2 · 5 = 1.

        >>> turning(np.array([[-3.0, -4.0]]), np.array([0.0]), 0.2).round(3).tolist()
        [0.159]
    """
    margin = margins(scores, gold)
    found = np.full(len(scores), math.nan)
    (known,) = np.nonzero(np.isfinite(margin))
    mine = scores[known, gold[known].astype(int)]
    size = np.hypot(mine, mine - margin[known])
    with np.errstate(divide="ignore", invalid="ignore"):
        found[known] = stats.norm.sf(np.abs(margin[known]) / (moved * size))
    return found


def within(chances: Array) -> int:
    """Count the documents whose judgement is within rounding.

    Args:
        chances: What `turning` says of each.

    Returns:
        How many margins are below `WITHIN` standard deviations of what rounding moves.

    Examples:
        >>> within(np.array([0.5, 0.159, 0.02, 0.0]))
        2
    """
    return int((chances > LEAST_CHANCE).sum())


def shift(chances: Array, weights: Array) -> float:
    """Say how far another way of computing moves a share of right answers, in 95 of 100 cases.

    Args:
        chances: What `turning` says of each document.
        weights: `[documents]`, summing to 1.

    Returns:
        1.96 standard deviations of the weighted mean, each document being judged otherwise with its
        own chance.

    Examples:
        Two of 16 documents hang in the balance, and 14 do not.

        >>> round(shift(np.array([0.5, 0.5] + [0.0] * 14), np.full(16, 1 / 16)), 3)
        0.087
    """
    return _BOTH_SIDES * math.sqrt(float(weights**2 @ (chances * (1 - chances))))
