"""Compute bootstrap and jackknife intervals over documents.

Every layer and every proxy uses the same resampled documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from tracker.stats.accuracy import LEVEL
from tracker.stats.arrays import Array, Numbers, Strata, divided

RESAMPLES = 2000
"""Default number of resamples for an interval."""
SEED = 0
"""Seed of all draws, so that two figures of the same documents stay paired."""
_CHUNK = 1_000_000
"""Number of draws in memory at once."""


def document_counts(
    documents: int, resamples: int, seed: int, strata: Strata | None = None
) -> Iterator[Array]:
    """Yield how often each document is drawn in resamples, a few resamples at a time.

    The same arguments give the same documents, so two quantities that are resampled separately
    are still paired.

    Args:
        documents: Number of documents, at least one.
        resamples: Number of resamples, each of as many documents.
        seed: Seed of the generator.
        strata: `[documents]`, e.g. each document's task: every stratum keeps its size. Strata of
            one document are merged, since each alone would never vary.

    Yields:
        `[resamples of a chunk, documents]`; every row sums to `documents`.
    """
    labels = np.zeros(documents) if strata is None else np.asarray(strata)
    _, stratum, sizes = np.unique(_collapsed(labels), return_inverse=True, return_counts=True)
    order = np.argsort(stratum, kind="stable")
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    limits = np.repeat(sizes, sizes)
    generator = np.random.default_rng(seed)
    step = max(1, _CHUNK // documents)
    for first in range(0, resamples, step):
        rows = min(step, resamples - first)
        drawn = order[starts + generator.integers(0, limits, size=(rows, documents))]
        drawn += np.arange(rows)[:, None] * documents
        counts = np.bincount(drawn.ravel(), minlength=rows * documents)
        yield counts.reshape(rows, documents).astype(np.float64)


def _collapsed(labels: NDArray[np.generic]) -> Numbers:
    """Assign numbers to strata: those of one document are merged, one alone joins the smallest."""
    _, stratum, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    alone = sizes[stratum] == 1
    if alone.sum() == 1 and len(sizes) > 1:
        alone |= stratum == np.argmin(np.where(sizes == 1, len(labels) + 1, sizes))
    return np.where(alone, len(sizes), stratum)


def resampled_means(
    values: Array,
    resamples: int,
    seed: int,
    strata: Strata | None = None,
    weights: Array | None = None,
) -> Array:
    """Bootstrap the weighted means of columns that were measured on the same documents.

    All columns see the same resampled documents, so differences between columns stay paired; so do
    two calls with the same number of documents, seed and strata. A proxy is resampled per document
    with its tokens as weights: `values` = sums / tokens, `weights` = tokens.

    Args:
        values: `[documents, k]`, e.g. each document's accuracy drop for k layers.
        resamples: Number of resamples.
        seed: Seed of the generator.
        strata: `[documents]`, e.g. each document's task: resample within it, so that every resample
            has each task at its size; as in `document_counts`.
        weights: `[documents]`, 0 or more, of any sum; None for equal weights. A document of weight
            0 is ignored, even if its values are NaN.

    Returns:
        `[resamples, k]`: sum(count · weight · value) / sum(count · weight). NaN in a column with a
        NaN, in a resample whose weights are all 0, and everywhere without documents.

    References:
        B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 8. W. G.
        Cochran, Sampling Techniques (1977), 5A.12 (collapsed strata).

    Examples:
        >>> means = resampled_means(np.array([[0.0, 1.0], [1.0, 0.0]]), resamples=200, seed=0)
        >>> means.shape, sorted({float(mean) for mean in means[:, 0]})
        ((200, 2), [0.0, 0.5, 1.0])
        >>> bool((means.sum(axis=1) == 1).all())
        True
    """
    documents, columns = values.shape
    weighed = np.ones(documents) if weights is None else np.asarray(weights, dtype=np.float64)
    if not documents:
        return np.full((resamples, columns), np.nan)
    weighted = np.where(weighed[:, None] > 0, values * weighed[:, None], 0.0)
    drawn = document_counts(documents, resamples, seed, strata)
    return np.concatenate([divided(n @ weighted, (n @ weighed)[:, None]) for n in drawn])


def bias_corrected_interval(
    value: float, resampled: Array, lowest: float = -math.inf, highest: float = math.inf
) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % percentile interval, moved so that its median is the value itself.

    Resampling documents adds the measurement noise a second time. A rank correlation that noise
    pulls towards 0 is pulled once more in every resample, so the plain percentile interval lies too
    near 0 and may not even hold the value. Moving it by the median bias undoes the second pull.

    The interval covers the mean value of other samples of the same size. The first pull remains, so
    it is no interval for the value without measurement noise.

    Efron's bias-corrected (BC) interval mends the median as well, but it reads its ends from the
    far tail of the resamples and collapses there: for Spearman's coefficient of 30 simulated layers
    on 500 documents it held the expected coefficient in 40-90 % of the cases, this one in 85-99 %.

    Args:
        value: Figure of the documents themselves.
        resampled: `[resamples]`, the figure from each resample; NaN where it is undefined.
        lowest: The lowest value that the figure can have, to which the interval is clipped.
        highest: The highest.

    Returns:
        Both ends; None when fewer than half of the resamples are defined.

    Examples:
        >>> low, high = bias_corrected_interval(0.9, np.linspace(0.6, 0.8, 201))
        >>> round(low, 3), round(high, 3)
        (0.805, 0.995)
    """
    defined = resampled[np.isfinite(resampled)]
    if not np.isfinite(value) or not len(defined) or 2 * len(defined) < len(resampled):
        return None, None
    low, median, high = np.quantile(defined, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
    return max(float(value + low - median), lowest), min(float(value + high - median), highest)


def jackknife_error(
    figure: Callable[[Numbers], float], strata: Strata, groups: int, seed: int = SEED
) -> float:
    """Estimate a figure's standard error by leaving out each group of documents in turn.

    Groups are random, and each stratum is spread over them as evenly as possible.

    Args:
        figure: Function of the indexes of the remaining documents, ascending.
        strata: `[documents]`, e.g. each document's task; two documents or more.
        groups: Number of groups; with fewer documents, each is a group.
        seed: Seed of the groups.

    Returns:
        The standard error; NaN if the figure is undefined without some group.

    References:
        M. H. Quenouille, Biometrika 43 (1956) 353-360. J. Shao, D. Tu, The Jackknife and Bootstrap
        (1995), section 2.2.

    Examples:
        For a mean it equals the usual standard error.

        >>> values = np.array([1.0, 2.0, 3.0, 4.0])
        >>> error = jackknife_error(lambda kept: float(values[kept].mean()), ["task"] * 4, 10)
        >>> round(error, 6), round(float(values.std(ddof=1)) / 2, 6)
        (0.645497, 0.645497)
    """
    documents = np.arange(len(strata))
    groups = min(groups, len(documents))
    drawn = np.random.default_rng(seed).permutation(documents)
    dealt = np.empty_like(documents)
    dealt[np.lexsort((drawn, np.asarray(strata)))] = documents % groups
    without = [figure(documents[dealt != group]) for group in range(groups)]
    return math.sqrt(float(np.var(without)) * (groups - 1))
