"""What a model decides on documents with options: which one it takes, and by how much.

An option's score is its log-likelihood, or whatever the metric makes of it; scores are
[documents, options], with NaN where a document has fewer options than others.

And how far ablations agree in the documents that they lose.

What rounding decides are judgements that another way of computing the same model may turn round.
In half precision a log-likelihood is rounded over and over, each time to a share of itself, and
where it ends depends on the size of a batch, on what stands beside a text in it, on the device. So
some documents are computed twice, in two ways that are equal but for rounding, and how far the
differences between options move is taken for the standard deviation by which rounding moves them.

It is assumed that this movement is normal with mean 0, in proportion to the size of what is
subtracted, in one proportion for all documents of a run, independent from document to document, and
that a judgement hangs on the gold option and the best of the others alone.
"""

from __future__ import annotations

import math

import numpy as np
import scipy  # what takes long to import comes when it is used

from tracker.stats.arrays import Array


def phi(both: Array, lost: Array, documents: int) -> Array:
    """Correlate which documents each two ablations lose: 1 = the same ones, 0 = as by chance.

    Pearson's correlation of two yes-or-no columns (Yule 1912): however many documents each loses,
    losing them independently gives 0.

    Args:
        both: How many documents each two ablations both lose [ablations, ablations].
        lost: How many each loses.
        documents: How many could be lost: those that the baseline has right.

    Returns:
        The coefficients, symmetric; NaN where one of the two loses none, or all.
    """
    lost = np.asarray(lost, dtype=np.float64)
    spread = np.sqrt(lost * (documents - lost))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (documents * both - np.outer(lost, lost)) / np.outer(spread, spread)
    return np.where(np.outer(spread, spread) > 0, found, np.nan)


def cluster_order(agreement: Array) -> list[int]:
    """Order ablations so that those that agree stand together.

    Average linkage (UPGMA, Sokal and Michener 1958) over 1 minus the agreement, leaves ordered so
    that neighbours are as alike as can be (Bar-Joseph 2001).

    Args:
        agreement: Coefficients of at most 1 [ablations, ablations], without NaN.

    Returns:
        The ablations' numbers.
    """
    count = len(agreement)
    if count < 2:
        return list(range(count))
    distance = np.clip(1 - (agreement + agreement.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    condensed = scipy.spatial.distance.squareform(distance, checks=False)
    hierarchy = scipy.cluster.hierarchy
    tree = hierarchy.linkage(condensed, "average", optimal_ordering=True)
    return [int(leaf) for leaf in hierarchy.leaves_list(tree)]


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


WITHIN = 2.0
"""A judgement is within rounding where its margin is less than so many standard deviations."""


def least_chance() -> float:
    """The chance that rounding turns a judgement round whose margin is just `WITHIN`."""
    return float(scipy.special.ndtr(-WITHIN))


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
        found[known] = scipy.special.ndtr(-np.abs(margin[known]) / (moved * size))
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
    return int((chances > least_chance()).sum())


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
    both_sides = float(scipy.special.ndtri(0.975))
    return both_sides * math.sqrt(float(weights**2 @ (chances * (1 - chances))))
