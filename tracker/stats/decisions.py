"""What a model decides on documents with options: which one it takes, and by how much.

An option's score is its log-likelihood, or whatever the metric makes of it; scores are
[documents, options], with NaN where a document has fewer options than others.
"""

from __future__ import annotations

import numpy as np

from tracker.stats.arrays import Array


def choices(scores: Array) -> Array:
    """Say which option each document's model takes: the first of the best, as lm-eval does.

    Args:
        scores: The options' scores.

    Returns:
        The option's number for every document; NaN where it has none.
    """
    lowest = np.where(np.isnan(scores), -np.inf, scores)
    taken = lowest.argmax(axis=1).astype(np.float64) if scores.shape[1] else np.full(len(scores), 0)
    return np.where(np.isnan(scores).all(axis=1), np.nan, taken)


def margins(scores: Array, gold: Array) -> Array:
    """Say by how much the gold option beats the best of the others; negative where it does not.

    Args:
        scores: The options' scores.
        gold: The number of every document's gold option; NaN where there is none.

    Returns:
        The margin of every document; NaN without a gold option, or without another.
    """
    found = np.full(len(scores), np.nan)
    (known,) = np.nonzero(~np.isnan(gold))
    right = gold[known].astype(int)
    others = np.where(np.isnan(scores), -np.inf, scores)[known]
    others[np.arange(len(known)), right] = -np.inf
    best = others.max(axis=1, initial=-np.inf)
    mine = scores[known, right]
    found[known] = np.where(np.isneginf(best), np.nan, mine - np.where(best > -np.inf, best, 0))
    return found


def shares(taken: Array, options: int) -> Array:
    """Say how often each option is taken.

    Args:
        taken: The number of every document's option; NaN where it has none.
        options: How many options there are at most.

    Returns:
        The share of each option among the documents that have one; NaN where none has.
    """
    known = taken[~np.isnan(taken)].astype(int)
    counts = np.bincount(known, minlength=options).astype(np.float64)
    return counts / len(known) if len(known) else np.full(options, np.nan)
