"""Compute the options that a model chooses, their margins, and the effects of rounding.

An option's score is its log-likelihood, possibly divided by its length. The scores are arrays
[documents, options]. If a document has fewer options than others, the rest of its row is NaN. A
document is lost by an ablation if the intact model answers it right and the ablated model answers
it wrong.

Rounding errors can change whether an answer is judged right or wrong. In half precision, a
log-likelihood depends on the batch and on the device. The scores of some documents are therefore
computed twice, by two methods that differ only in rounding. The standard deviation of rounding
errors is estimated from the differences between the two scores of an option.

The module assumes that rounding errors are normally distributed with mean 0, and that they are
independent between documents. The standard deviation of a rounding error is assumed to be
proportional to the score. Whether an answer is right is assumed to depend only on the gold option
and on the best other option.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import scipy  # imports its slow submodules on first use

from tracker.stats.arrays import Array, safe_divide


def phi(joint_losses: Array, losses: Array, n_documents: int) -> Array:
    """Compute the phi coefficient of each pair of ablations.

    An ablation loses a document if the intact model answers the document right, and the ablated
    model answers it wrong. The coefficient of two ablations is 1 if both lose the same documents,
    and 0 if the overlap of the lost documents is as large as expected by chance. The phi
    coefficient is Pearson's correlation of two binary variables (Yule 1912).

    Args:
        joint_losses: `[ablations, ablations]`, number of documents that both ablations lose.
        losses: Number of documents that each ablation loses.
        n_documents: Number of documents that the intact model answers right.

    Returns:
        `[ablations, ablations]`, the coefficients. A coefficient is NaN if one of the ablations
        loses no document or all documents.
    """
    losses = np.asarray(losses, dtype=np.float64)
    deviations = np.sqrt(losses * (n_documents - losses))
    covariances = n_documents * joint_losses - np.outer(losses, losses)
    return safe_divide(covariances, np.outer(deviations, deviations))


def cluster_order(agreement: Array) -> list[int]:
    """Return an order of the ablations that puts similar ablations side by side.

    The function clusters the ablations by average linkage (UPGMA, Sokal and Michener 1958) and
    orders the leaves by the method of Bar-Joseph (2001).

    Args:
        agreement: `[ablations, ablations]`, the similarity of each pair of ablations, at most 1.
            NaN is not allowed.

    Returns:
        The indexes of the ablations in the new order.
    """
    n_ablations = len(agreement)
    if n_ablations < 2:
        return list(range(n_ablations))
    distance = np.clip(1 - (agreement + agreement.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    condensed = scipy.spatial.distance.squareform(distance, checks=False)
    hierarchy = scipy.cluster.hierarchy
    tree = hierarchy.linkage(condensed, "average", optimal_ordering=True)
    return [int(leaf) for leaf in hierarchy.leaves_list(tree)]


def choose_options(scores: Array) -> Array:
    """Return the option with the highest score for each document.

    If several options have the highest score, the first of them is returned.

    Args:
        scores: `[documents, options]`, the scores of the options.

    Returns:
        `[documents]`, the number of the chosen option; NaN for a document without options.
    """
    # A last column of −∞ is the maximum of a document without options.
    padded = np.column_stack([np.nan_to_num(scores, nan=-np.inf), np.full(len(scores), -np.inf)])
    return np.where(np.isnan(scores).all(axis=1), np.nan, padded.argmax(axis=1))


def margins(scores: Array, gold: Array) -> Array:
    """Return the gold option's score minus the best other score, for each document.

    Args:
        scores: `[documents, options]`, the scores of the options.
        gold: `[documents]`, the number of the gold option; NaN for a document without a gold
            option.

    Returns:
        `[documents]`, the margins; NaN for a document without a gold option or without another
        option.
    """
    gold_margins = np.full(len(scores), np.nan)
    (rows,) = np.nonzero(~np.isnan(gold))
    gold_options = gold[rows].astype(int)
    other_scores = np.where(np.isnan(scores), -np.inf, scores)[rows]
    other_scores[np.arange(len(rows)), gold_options] = -np.inf
    best_scores = other_scores.max(axis=1, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        differences = scores[rows, gold_options] - best_scores
    gold_margins[rows] = np.where(np.isneginf(best_scores), np.nan, differences)
    return gold_margins


def gold_probabilities(scores: Array, gold: Array) -> Array:
    """Compute the probability of each document's gold option.

    The probability is the softmax of the scores of the document's options: exp(score of the gold
    option) / Σ exp(score).

    Args:
        scores: `[documents, options]`, the scores of the options.
        gold: `[documents]`, the number of the gold option; NaN for a document without a gold
            option.

    Returns:
        `[documents]`, the probabilities. A probability is NaN if the document has no gold option or
        fewer than two options, or if infinite scores make the softmax undefined.

    Examples:
        >>> scores = np.log([[0.3, 0.1], [0.2, np.nan]])
        >>> gold_probabilities(scores, np.zeros(2)).round(4).tolist()
        [0.75, nan]
    """
    probabilities = np.full(len(scores), np.nan)
    (rows,) = np.nonzero(~np.isnan(gold) & ((~np.isnan(scores)).sum(axis=1) > 1))
    if not rows.size:
        return probabilities
    with np.errstate(invalid="ignore"):
        logprobs = scipy.special.log_softmax(np.where(np.isnan(scores), -np.inf, scores)[rows], 1)
    probabilities[rows] = np.exp(logprobs[np.arange(len(rows)), gold[rows].astype(int)])
    return probabilities


def option_shares(choices: Array, n_options: int) -> Array:
    """Compute the fraction of documents for which the model chooses each option.

    Args:
        choices: `[documents]`, the number of the chosen option; NaN for a document without a
            choice.
        n_options: The largest number of options of a document.

    Returns:
        `[options]`, the fractions, which sum to 1. Documents without a choice are ignored. The
        fractions are NaN if no document has a choice.
    """
    valid = choices[~np.isnan(choices)].astype(int)
    counts = np.bincount(valid, minlength=n_options).astype(np.float64)
    return safe_divide(counts, np.array([len(valid)], dtype=np.float64))


ROUNDING_SDS = 2.0
"""Number of standard deviations of rounding errors below which a margin is a tie."""


MIN_FLIP_CHANCE = NormalDist().cdf(-ROUNDING_SDS)
"""Probability that rounding reverses a judgement whose margin is `ROUNDING_SDS`."""


def relative_rounding_error(scores: Array, repeats: Array) -> float | None:
    """Estimate the relative rounding error of score differences from repeated scores.

    Args:
        scores: `[documents, options]`, the scores of the options.
        repeats: `[documents, options]`, the same scores computed by a method that rounds
            differently.

    Returns:
        The root mean square of the relative changes of score differences, over all pairs of
        options. For the scores a and b of a pair, the relative change is the change of a - b,
        divided by √(a² + b²). The function returns None if no document has two options, or if no
        score difference has changed.

    Examples:
        The first of the scores -3 and -4 changes by 0.1, so the relative change is 0.1 / 5.

        >>> round(relative_rounding_error(np.array([[-3.0, -4.0]]), np.array([[-3.1, -4.0]])), 4)
        0.02
    """
    i, j = np.triu_indices(scores.shape[1], 1)
    changes = (scores - repeats)[:, i] - (scores - repeats)[:, j]
    sizes = np.hypot(scores[:, i], scores[:, j])
    usable = np.isfinite(changes) & (sizes > 0)
    if not usable.any():
        return None
    return float(np.sqrt(np.mean((changes[usable] / sizes[usable]) ** 2))) or None


def flip_probabilities(scores: Array, gold: Array, movement: float) -> Array:
    """Return the probability that rounding makes a right answer wrong or a wrong answer right.

    Args:
        scores: `[documents, options]`, the scores of the options.
        gold: `[documents]`, the number of the gold option; NaN for a document without a gold
            option.
        movement: Relative size of rounding errors, as returned by `relative_rounding_error`.

    Returns:
        `[documents]`, the probabilities, at most 0.5; NaN if the document's margin is undefined or
        infinite (see `margins`).

    Examples:
        The gold option leads by 1, and rounding moves the difference of -3 and -4 by 0.2 · 5 = 1.

        >>> flip_probabilities(np.array([[-3.0, -4.0]]), np.array([0.0]), 0.2).round(3).tolist()
        [0.159]
    """
    gold_margins = margins(scores, gold)
    chances = np.full(len(scores), math.nan)
    (rows,) = np.nonzero(np.isfinite(gold_margins))
    gold_scores = scores[rows, gold[rows].astype(int)]
    sizes = np.hypot(gold_scores, gold_scores - gold_margins[rows])
    with np.errstate(divide="ignore", invalid="ignore"):
        chances[rows] = scipy.special.ndtr(-np.abs(gold_margins[rows]) / (movement * sizes))
    return chances


def count_undecided(chances: Array) -> int:
    """Count the documents whose outcome (right or wrong) could be reversed by rounding.

    Args:
        chances: `[documents]`, the probabilities from `flip_probabilities`.

    Returns:
        The number of documents with a margin below `ROUNDING_SDS` standard deviations of rounding.

    Examples:
        >>> count_undecided(np.array([0.5, 0.159, 0.02, 0.0]))
        2
    """
    return int((chances > MIN_FLIP_CHANCE).sum())


def rounding_shift(chances: Array, weights: Array) -> float:
    """Return the half width of a 95 % interval for the effect of rounding on an accuracy.

    Args:
        chances: `[documents]`, the probabilities from `flip_probabilities`.
        weights: `[documents]`, summing to 1.

    Returns:
        1.96 times the standard deviation of the accuracy's change by rounding.

    Examples:
        Two of 16 documents change their outcome with a probability of 0.5 each. The other 14
        documents never change.

        >>> round(rounding_shift(np.array([0.5, 0.5] + [0.0] * 14), np.full(16, 1 / 16)), 3)
        0.087
    """
    z = float(scipy.special.ndtri(0.975))
    return z * math.sqrt(float(weights**2 @ (chances * (1 - chances))))
