"""What a model decides on documents with options: which one it takes, and by how much.

An option's score is its log-likelihood, or whatever the metric makes of it; scores are
[documents, options], with NaN where a document has fewer options than others.

And whether ablations break the same documents, and which ones belong together.
"""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
from scipy.spatial.distance import squareform

from tracker.stats.arrays import Array
from tracker.stats.multiple import holm
from tracker.stats.power import ALPHA


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


def clustered(agreement: Array, alike: float) -> tuple[list[int], list[list[int]]]:
    """Order ablations so that those that agree stand together, and group them.

    Average linkage (UPGMA, Sokal and Michener 1958) over 1 minus the agreement, leaves ordered so
    that neighbours are as alike as can be (Bar-Joseph 2001).

    Args:
        agreement: Coefficients of at most 1 [ablations, ablations], without NaN.
        alike: Ablations are one group where their mean agreement is at least this.

    Returns:
        The ablations' numbers in order, and the groups of two or more, in the same order.
    """
    count = len(agreement)
    if count < 2:
        return list(range(count)), []
    distance = np.clip(1 - (agreement + agreement.T) / 2, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    order = [int(leaf) for leaf in leaves_list(tree)]
    # Rounding must not part what is exactly alike.
    label = fcluster(tree, 1 - alike + 1e-9, "distance")
    groups = (list(group) for _, group in itertools.groupby(order, label.__getitem__))
    return order, [group for group in groups if len(group) > 1]


def more_than_chance(both: Array, lost: Array, documents: int) -> NDArray[np.bool_]:
    """Say which ablations lose the same documents more often than by chance.

    Fisher's exact test of each pair, one-sided, adjusted by Holm's method over all pairs: where the
    ablations lose their documents independently, a pair is named with probability 5 % at most.

    Args:
        both: How many documents each two ablations both lose [ablations, ablations].
        lost: How many each loses.
        documents: How many could be lost.

    Returns:
        Whether it is shown, symmetric [ablations, ablations]; False on the diagonal.
    """
    one, other = np.triu_indices(len(lost), 1)
    p_values = stats.hypergeom.sf(both[one, other] - 1, documents, lost[one], lost[other])
    adjusted = holm(p_values.tolist())
    shown = np.zeros(both.shape, dtype=bool)
    shown[one, other] = [p is not None and p <= ALPHA for p in adjusted]
    return shown | shown.T


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
