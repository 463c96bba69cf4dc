"""Compute bootstrap and jackknife intervals over documents.

All layers and proxies use the same resamples of the documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from tracker.stats.accuracy import LEVEL
from tracker.stats.arrays import Array, IntArray, Strata, chunk_sizes, safe_divide

RESAMPLES = 2000
"""Default number of resamples for an interval."""
SEED = 0
"""Seed of all random draws. Statistics of the same documents use the same resamples."""
_CHUNK = 1_000_000
"""Number of draws in memory at once."""


def document_counts(
    n_documents: int, n_resamples: int, seed: int, strata: Strata | None = None
) -> Iterator[Array]:
    """Draw bootstrap resamples; yield how often each resample contains each document.

    Args:
        n_documents: Number of documents, at least one.
        n_resamples: Number of resamples, each of `n_documents` documents.
        seed: Seed of the generator.
        strata: `[documents]`, e.g. each document's task. The number of documents of a stratum is
            the same in all resamples. Strata with only one document are merged.

    Yields:
        `[resamples, documents]`, one array per chunk of resamples; every row sums to `n_documents`.
    """
    labels = np.zeros(n_documents) if strata is None else np.asarray(strata)
    _, stratum, sizes = np.unique(_merge_strata(labels), return_inverse=True, return_counts=True)
    order = np.argsort(stratum, kind="stable")
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    limits = np.repeat(sizes, sizes)
    rng = np.random.default_rng(seed)
    for n_rows in chunk_sizes(n_resamples, max(1, _CHUNK // n_documents)):
        indexes = order[starts + rng.integers(0, limits, size=(n_rows, n_documents))]
        indexes += np.arange(n_rows)[:, None] * n_documents
        counts = np.bincount(indexes.ravel(), minlength=n_rows * n_documents)
        yield counts.reshape(n_rows, n_documents).astype(np.float64)


def _merge_strata(labels: NDArray[np.generic]) -> IntArray:
    """Merge the strata that have only one document; return the stratum number of each document.

    If only one stratum has a single document, the smallest other stratum is merged with it.
    """
    _, stratum, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    is_single = sizes[stratum] == 1
    if is_single.sum() == 1 and len(sizes) > 1:
        is_single |= stratum == np.argmin(np.where(sizes == 1, len(labels) + 1, sizes))
    return np.where(is_single, len(sizes), stratum)


def random_signs(shape: tuple[int, ...], n_draws: int, seed: int) -> Iterator[Array]:
    """Yield random signs for a sign-flip test: one sign for each draw and document.

    Args:
        shape: Shape of the values whose signs are flipped; the first axis is the documents.
        n_draws: Total number of draws over all chunks.
        seed: Seed of the generator.

    Yields:
        `[draws, documents]`, one array per chunk of draws; all values are 1 or −1.
    """
    rng = np.random.default_rng(seed)
    for n_rows in chunk_sizes(n_draws, max(1, _CHUNK // max(shape))):
        yield np.asarray(2.0 * rng.integers(0, 2, (n_rows, shape[0])) - 1)


def resampled_means(
    values: Array,
    n_resamples: int,
    seed: int,
    strata: Strata | None = None,
    weights: Array | None = None,
) -> Array:
    """Return bootstrap resamples of the weighted mean of each column.

    All columns, and all calls with equal seed, strata and number of documents, use the same
    resamples. For the mean of a proxy over tokens, `values` must contain each document's mean over
    tokens, and `weights` the numbers of tokens.

    Args:
        values: `[documents, k]`, e.g. each document's accuracy drop for k layers.
        n_resamples: Number of resamples.
        seed: Seed of the generator.
        strata: `[documents]`, e.g. each document's task. Documents are resampled within each
            stratum.
        weights: `[documents]`, 0 or more; None for equal weights. A document of weight 0 is
            ignored.

    Returns:
        `[resamples, k]`, the means sum(count · weight · value) / sum(count · weight). A mean is NaN
        if its column contains a NaN or if all weights of the resample are 0.

    References:
        B. Efron, R. J. Tibshirani, An Introduction to the Bootstrap (1993), chapters 6 and 8. W. G.
        Cochran, Sampling Techniques (1977), 5A.12 (collapsed strata).

    Examples:
        >>> means = resampled_means(np.array([[0.0, 1.0], [1.0, 0.0]]), n_resamples=200, seed=0)
        >>> means.shape, sorted({float(mean) for mean in means[:, 0]})
        ((200, 2), [0.0, 0.5, 1.0])
        >>> bool((means.sum(axis=1) == 1).all())
        True
    """
    n_documents, n_columns = values.shape
    if not n_documents:
        return np.full((n_resamples, n_columns), np.nan)
    weights = np.ones(n_documents) if weights is None else np.asarray(weights, dtype=np.float64)
    weighted = np.where(weights[:, None] > 0, values * weights[:, None], 0.0)
    chunks = document_counts(n_documents, n_resamples, seed, strata)
    means = [safe_divide(counts @ weighted, (counts @ weights)[:, None]) for counts in chunks]
    return np.concatenate(means)


def bias_corrected_interval(
    value: float, resamples: Array, min_value: float = -math.inf, max_value: float = math.inf
) -> tuple[float, float] | tuple[None, None]:
    """Return the 95 % bootstrap interval: percentiles, shifted so that `value` is the median.

    Measurement noise weakens a rank correlation, and resampling weakens the correlation further.
    The shift corrects only the effect of resampling. The interval is therefore for the expected
    statistic of a sample of this size, still weakened by measurement noise.

    In simulations of Spearman's coefficient for 30 layers and 500 documents, this interval
    contained the expected coefficient in 85-99 % of the cases. Efron's bias-corrected (BC) interval
    contained the expected coefficient in 40-90 % of the cases.

    Args:
        value: The statistic, computed from the original documents.
        resamples: `[resamples]`, the statistic of each resample; NaN if undefined.
        min_value: Lowest possible value of the statistic.
        max_value: Highest possible value of the statistic.

    Returns:
        The lower and the upper bound; both are None if fewer than half of the resamples are
        defined.

    Examples:
        >>> low, high = bias_corrected_interval(0.9, np.linspace(0.6, 0.8, 201))
        >>> round(low, 3), round(high, 3)
        (0.805, 0.995)
    """
    defined = resamples[np.isfinite(resamples)]
    if not np.isfinite(value) or not len(defined) or 2 * len(defined) < len(resamples):
        return None, None
    low, median, high = np.quantile(defined, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2])
    return max(float(value + low - median), min_value), min(float(value + high - median), max_value)


def jackknife_error(
    figure: Callable[[IntArray], float], strata: Strata, n_groups: int, seed: int = SEED
) -> float:
    """Estimate the standard error of a statistic by the grouped jackknife.

    Documents are assigned to groups at random. Each group has about the same number of documents of
    each stratum.

    Args:
        figure: Function that computes the statistic from the indexes of the remaining documents.
        strata: `[documents]`, e.g. each document's task; two documents or more.
        n_groups: Number of groups; at most one group per document is used.
        seed: Seed of the random groups.

    Returns:
        The standard error; NaN if the statistic is undefined after leaving out some group.

    References:
        M. H. Quenouille, Biometrika 43 (1956) 353-360. J. Shao, D. Tu, The Jackknife and Bootstrap
        (1995), section 2.2.

    Examples:
        The jackknife error of a mean equals the usual standard error of the mean.

        >>> values = np.array([1.0, 2.0, 3.0, 4.0])
        >>> error = jackknife_error(lambda kept: float(values[kept].mean()), ["task"] * 4, 10)
        >>> round(error, 6), round(float(values.std(ddof=1)) / 2, 6)
        (0.645497, 0.645497)
    """
    documents = np.arange(len(strata))
    n_groups = min(n_groups, len(documents))
    permutation = np.random.default_rng(seed).permutation(documents)
    group_numbers = np.empty_like(documents)
    group_numbers[np.lexsort((permutation, np.asarray(strata)))] = documents % n_groups
    figures = [figure(documents[group_numbers != group]) for group in range(n_groups)]
    return math.sqrt(float(np.var(figures)) * (n_groups - 1))
