"""Estimate how much a layer's relevance varies between benchmarks.

Relevance is first standardised over the layers of each benchmark (z-scores, population standard
deviation), so that benchmarks of any level and unit are comparable. The variance of a layer over
benchmarks, averaged over layers, is then exactly 1 minus the mean Pearson correlation of two
benchmarks' layers. It is 0 if layers matter equally everywhere, and 1 if benchmarks are unrelated.

An accuracy drop is measured on a sample of documents, so its noise differs between benchmarks even
if the layer does not. A proxy that averages over thousands of tokens has hardly any noise. The
variance of the drop is therefore inflated, and is informative only after the noise is subtracted.
The result is not symmetric about its expectation for a single layer, so a test of signs or ranks is
invalid. The mean over layers has an interval from the documents instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from tracker.core.estimates import Estimate
from tracker.stats.accuracy import LEVEL
from tracker.stats.arrays import Array, Numbers, Strata
from tracker.stats.rank_agreement import rounded
from tracker.stats.resampling import jackknife_error

Sample = tuple[Array, Array, Strata | None]
"""Values, weights and strata of one benchmark, as `sampling_noise` takes them."""
_Both = tuple[Sample, Sample]
BLOCK = 3
"""Number of neighbouring layers whose signs change together in the check of the test."""
MOST_BLOCKS = 14
"""Largest number of blocks for which all signs are tried; beyond it, `DRAWS` random ones."""
DRAWS = 9999
GROUPS = 100
"""Documents of a benchmark are left out one at a time, or in this many groups if there are more."""
_EPS = 1e-9


def sampling_noise(
    values: Array, weights: Array, strata: Strata | None = None
) -> tuple[Array, Array]:
    """Estimate a profile over layers, and its variance over samples of documents.

    The profile is centred on its mean over layers, so common changes of all layers are excluded.

    Args:
        values: `[documents, layers]`, value of each document, e.g. its drop.
        weights: `[documents]`, 0 or more; the profile is the weighted mean.
        strata: `[documents]`, e.g. each document's task, where each keeps its size; None for one.

    Returns:
        The centred profile and the variance of each of its figures `[layers]`, of the weighted mean
        as a ratio (linearised; W. G. Cochran, Sampling Techniques (1977), sections 5.6 and 6.4).
        NaN in the variance for a single document.

    Examples:
        >>> profile, variance = sampling_noise(np.array([[1.0, 0.0], [0.0, 0.0]]), np.ones(2))
        >>> profile.tolist(), variance.tolist()
        ([0.25, -0.25], [0.0625, 0.0625])
    """
    shares = weights / weights.sum()
    centred = values - values.mean(axis=1, keepdims=True)
    profile = shares @ centred
    off = shares[:, None] * (centred - profile)
    labels = np.zeros(len(values)) if strata is None else np.asarray(strata)
    variance = np.zeros(values.shape[1])
    for label in np.unique(labels):
        mine = off[labels == label]
        if len(values) == 1:
            return profile, np.full(values.shape[1], np.nan)
        # The only document of a stratum keeps its deviation from the mean of all.
        there = mine - mine.mean(axis=0) if len(mine) > 1 else mine
        variance += (there**2).sum(axis=0) * (len(mine) / max(len(mine) - 1, 1))
    return profile, variance


def reliability(profile: Array, noise: Array) -> float:
    """Return the share of a profile's spread over layers that is not noise; below 0 if none is.

    Args:
        profile: `[layers]`, centred.
        noise: `[layers]`, the variance of each figure.

    Returns:
        1 - mean noise / mean square; NaN for a constant profile.
    """
    spread = float((profile**2).mean())
    return float(1 - noise.mean() / spread) if spread > 0 else float("nan")


def variance_across(profiles: Array, noise: Array | None = None) -> Array:
    """Compute the variance of each layer's z-score over benchmarks.

    Args:
        profiles: `[benchmarks, layers]`, two benchmarks or more, none constant.
        noise: `[benchmarks, layers]`, variance of each value, which is subtracted; None = no noise.
            The noise of two benchmarks is independent, so it affects only squares. It is subtracted
            from the squares, and from the spread that divides them. An estimate is unbiased up to
            that division, and may be negative.

    Returns:
        `[layers]`, with the divisor benchmarks - 1.

    Raises:
        ValueError: Fewer than two benchmarks, or the spread of one is all noise.

    Examples:
        >>> variance_across(np.array([[1.0, -1.0], [1.0, -1.0]])).tolist()
        [0.0, 0.0]
        >>> variance_across(np.array([[1.0, -1.0], [-2.0, 2.0]])).tolist()
        [2.0, 2.0]
    """
    if len(profiles) < 2:
        raise ValueError("the variance over benchmarks needs at least two")
    centred = profiles - profiles.mean(axis=1, keepdims=True)
    noise = np.zeros_like(centred) if noise is None else noise
    spread = (centred**2 - noise).mean(axis=1, keepdims=True)
    if (spread <= 0).any():
        raise ValueError("the spread over layers of a benchmark is no larger than its noise")
    z, off = centred / np.sqrt(spread), noise / spread
    count = len(z)
    between = (z.sum(axis=0) ** 2 - (z**2).sum(axis=0)) / (count * (count - 1))
    return np.asarray((z**2 - off).mean(axis=0) - between, dtype=np.float64)


def clean_difference(ones: Sequence[Sample], others: Sequence[Sample]) -> Estimate:
    """Estimate how much more one measure varies over benchmarks than another, without noise.

    The figure is the mean over layers of the noise-free `variance_across` of `ones`, minus that of
    `others`. Its interval is the jackknife over the documents of each benchmark with the normal
    distribution; both measures leave out the same documents. The bootstrap is too narrow here,
    because its population includes the noise of the documents.

    Args:
        ones: One measure of the documents of each benchmark, two benchmarks or more.
        others: Other measure of the same documents.

    Returns:
        The difference, without an interval if some document cannot be left out.

    Raises:
        ValueError: Fewer than two benchmarks, or the spread of one is all noise.
    """
    pairs = [[sampling_noise(*sample) for sample in side] for side in (ones, others)]
    value = _mean_variance(pairs[0]) - _mean_variance(pairs[1])
    squares = 0.0
    for place, samples in enumerate(zip(ones, others, strict=True)):

        def without(kept: Numbers, place: int = place, samples: _Both = samples) -> float:
            means = []
            for side, (values, weights, strata) in zip(pairs, samples, strict=True):
                labels = None if strata is None else np.asarray(strata)[kept]
                fewer = sampling_noise(values[kept], weights[kept], labels)
                try:
                    means.append(_mean_variance([*side[:place], fewer, *side[place + 1 :]]))
                except ValueError:
                    return float("nan")
            return means[0] - means[1]

        values, _, strata = samples[0]
        labels = np.zeros(len(values)) if strata is None else strata
        squares += jackknife_error(without, labels, GROUPS) ** 2
    if not np.isfinite(squares):
        return Estimate(value)
    off = float(stats.norm.ppf((1 + LEVEL) / 2) * np.sqrt(squares))
    return Estimate(value, value - off, value + off)


def _mean_variance(pairs: Sequence[tuple[Array, Array]]) -> float:
    profiles, noise = (np.array(each) for each in zip(*pairs, strict=True))
    return float(variance_across(profiles, noise).mean())


@dataclass(frozen=True)
class Paired:
    """Comparison of two variances of the same layers.

    Attributes:
        larger: Number of layers in which the first is larger.
        n: Number of layers.
        p_value: p-value of Wilcoxon's signed-rank test, two-sided: layers are taken as independent.
        block_p: p-value of the same statistic with signs that change together in blocks of layers.
    """

    larger: int
    n: int
    p_value: float
    block_p: float


def compared(one: Array, other: Array) -> Paired:
    """Compare two variances layer by layer (F. Wilcoxon, Biometrics Bulletin 1 (1945) 80-83).

    Wilcoxon's test assumes that the layers' differences are independent and, without an effect,
    symmetric about 0. Neighbouring layers resemble each other, so its p-value is too small. The
    check keeps the symmetry but drops independence within blocks of `BLOCK` neighbours: all
    differences of a block change their signs together. All choices of signs are tried, and the
    p-value is the share whose statistic is as far from the middle.

    Args:
        one: `[layers]`.
        other: `[layers]`.

    Returns:
        The comparison; p-values are 1 if all differences are 0.

    Examples:
        >>> found = compared(np.arange(1.0, 10.0), np.zeros(9))
        >>> found.larger, round(found.p_value, 4), found.block_p
        (9, 0.0039, 0.25)
    """
    difference = rounded(one - other)
    n = len(difference)
    blocks = -(-n // BLOCK)
    larger = int((difference > 0).sum())
    if not difference.any():
        return Paired(larger, n, 1.0, 1.0)
    p_value = float(stats.wilcoxon(difference).pvalue)
    kept = difference != 0
    ranks = np.zeros(n)
    ranks[kept] = stats.rankdata(np.abs(difference[kept]))
    # Contribution of each block to the sum of signed ranks.
    adds = np.add.reduceat(np.sign(difference) * ranks, np.arange(0, n, BLOCK))
    if blocks <= MOST_BLOCKS:
        signs = np.array(list(itertools.product((-1, 1), repeat=blocks)))
        extra = 0
    else:
        signs, extra = np.random.default_rng(0).choice((-1, 1), size=(DRAWS, blocks)), 1
    sums = np.abs(signs @ adds)
    as_far = int((sums >= abs(adds.sum()) - _EPS).sum())
    return Paired(larger, n, p_value, (as_far + extra) / (len(signs) + extra))
