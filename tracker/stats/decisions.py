"""Compute decisions between options, their margins, and the effect of rounding on them.

An option's score is its log-likelihood, possibly divided by its length. Scores are
[documents, options], with NaN where a document has fewer options than others. `phi` and
`cluster_order` compare the documents that ablations lose.

Another way of computing the same model may reverse a judgement. In half precision a log-likelihood
is rounded many times, each time by a share of itself. The result depends on the batch size, on the
other texts of the batch, and on the device. Some documents are therefore computed twice, in two
ways that are equal but for rounding. The observed movement of the differences between options
estimates the standard deviation of rounding.

Assumptions: the movement is normal with mean 0 and independent between documents. It is
proportional to the size of the subtracted scores, with one proportion for all documents of a run.
A judgement depends only on the gold option and the best of the others.
"""

from __future__ import annotations

import math

import numpy as np
import scipy  # imports its slow submodules on first use

from tracker.stats.arrays import Array


def phi(both: Array, lost: Array, documents: int) -> Array:
    """Correlate the documents that pairs of ablations lose: 1 = the same ones, 0 = chance.

    This is Pearson's correlation of two binary columns (Yule 1912): independent losses give 0,
    for any number of lost documents.

    Args:
        both: Number of documents that both of a pair lose [ablations, ablations].
        lost: Number of documents that each ablation loses.
        documents: Number of documents that could be lost: those that the baseline has right.

    Returns:
        The coefficients, symmetric; NaN if one of the two loses none, or all.
    """
    lost = np.asarray(lost, dtype=np.float64)
    spread = np.sqrt(lost * (documents - lost))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (documents * both - np.outer(lost, lost)) / np.outer(spread, spread)
    return np.where(np.outer(spread, spread) > 0, found, np.nan)


def cluster_order(agreement: Array) -> list[int]:
    """Order ablations so that similar ones are neighbours.

    Average linkage (UPGMA, Sokal and Michener 1958) over 1 minus the agreement, leaves ordered so
    that neighbours are as alike as can be (Bar-Joseph 2001).

    Args:
        agreement: Coefficients of at most 1 [ablations, ablations], without NaN.

    Returns:
        Indexes of the ablations.
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
    """Return the option that each document's model chooses: the first of the best, as in lm-eval.

    Args:
        scores: The options' scores.

    Returns:
        Number of the option for each document; NaN without options.
    """
    lowest = np.where(np.isnan(scores), -np.inf, scores)
    taken = lowest.argmax(axis=1).astype(np.float64) if scores.shape[1] else np.full(len(scores), 0)
    return np.where(np.isnan(scores).all(axis=1), np.nan, taken)


def margins(scores: Array, gold: Array) -> Array:
    """Return the gold option's score minus the best other option's score.

    Args:
        scores: The options' scores.
        gold: Number of each document's gold option; NaN if it has none.

    Returns:
        The margin of each document; NaN without a gold option, or without another option.
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
    """Return the share of documents that choose each option.

    Args:
        taken: Number of each document's option; NaN if it has none.
        options: Largest number of options.

    Returns:
        The share of each option among the documents that have one; NaN where none has.
    """
    known = taken[~np.isnan(taken)].astype(int)
    counts = np.bincount(known, minlength=options).astype(np.float64)
    return counts / len(known) if len(known) else np.full(options, np.nan)


WITHIN = 2.0
"""Margins below this many standard deviations of the rounding count as within rounding."""


def least_chance() -> float:
    """Return the probability that rounding reverses a judgement with a margin of `WITHIN`."""
    return float(scipy.special.ndtr(-WITHIN))


def movement(scores: Array, again: Array) -> float | None:
    """Estimate how far rounding moves the difference of two options, relative to their size.

    Args:
        scores: Scores of the options.
        again: Scores of the same options, computed in another way.

    Returns:
        The root mean square, over all pairs of options of all documents, of the movement of their
        difference divided by the root of the sum of their squares. None if no document has two
        options, or nothing has moved, because then the effect of rounding is unknown.

    Examples:
        Of -3 and -4 the first moves by 0.1, the second does not: 0.1 / 5.

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
    """Return the probability that another way of computing changes each document's judgement.

    Args:
        scores: The options' scores.
        gold: Number of each document's gold option; NaN if it has none.
        moved: Relative movement of differences, from `movement`.

    Returns:
        The probability that a normal movement exceeds the document's margin, at most 0.5; NaN
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
        chances: Probabilities from `turning`.

    Returns:
        Number of margins below `WITHIN` standard deviations of the rounding.

    Examples:
        >>> within(np.array([0.5, 0.159, 0.02, 0.0]))
        2
    """
    return int((chances > least_chance()).sum())


def shift(chances: Array, weights: Array) -> float:
    """Return how far another way of computing moves an accuracy, in 95 of 100 cases.

    Args:
        chances: Probabilities from `turning`, for each document.
        weights: `[documents]`, summing to 1.

    Returns:
        1.96 standard deviations of the weighted mean, if each document's judgement changes with its
        own probability.

    Examples:
        Two of 16 documents are undecided, and 14 are certain.

        >>> round(shift(np.array([0.5, 0.5] + [0.0] * 14), np.full(16, 1 / 16)), 3)
        0.087
    """
    both_sides = float(scipy.special.ndtri(0.975))
    return both_sides * math.sqrt(float(weights**2 @ (chances * (1 - chances))))
