"""Whether a layer's relevance depends on the task: its variance from benchmark to benchmark.

Relevance is standardised over the layers of each benchmark first (z-scores, population standard
deviation), so that benchmarks of any level and unit can stand side by side. The variance of a layer
over benchmarks, averaged over layers, is then exactly 1 minus the mean Pearson correlation of two
benchmarks' layers: where layers matter alike everywhere it is 0, where they have nothing in common
it is 1.

An accuracy drop is measured on a sample of documents, and its noise differs from benchmark to
benchmark even if the layer does not. A proxy that is an average over thousands of tokens has hardly
any. So the variance of the drop is larger by its noise alone, and says something of the layers only
once that is taken off. What is then left is no longer symmetric about its expectation, layer by
layer, so that a test of signs or ranks does not hold its level; the mean over layers has an
interval from the documents instead.
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
"""Neighbouring layers whose differences change their signs together in the check of the test."""
MOST_BLOCKS = 14
"""Up to so many blocks all signs are tried; beyond, `DRAWS` of them at random."""
DRAWS = 9999
GROUPS = 100
"""Documents of a benchmark are left out one at a time, or in so many groups if there are more."""
_EPS = 1e-9


def sampling_noise(
    values: Array, weights: Array, strata: Strata | None = None
) -> tuple[Array, Array]:
    """Measure a profile over layers on documents, and how far other documents would move it.

    The profile is centred on its mean over layers: what moves all layers together is not in it.

    Args:
        values: `[documents, layers]`, each document's figure, e.g. its drop.
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
        # A stratum of one document has no mean of its own to be measured from.
        there = mine - mine.mean(axis=0) if len(mine) > 1 else mine
        variance += (there**2).sum(axis=0) * (len(mine) / max(len(mine) - 1, 1))
    return profile, variance


def reliability(profile: Array, noise: Array) -> float:
    """Say which share of a profile's spread over layers is no noise; at most 1, below 0 for none.

    Args:
        profile: `[layers]`, centred.
        noise: `[layers]`, the variance of each figure.

    Returns:
        1 - mean noise / mean square; NaN for a constant profile.
    """
    spread = float((profile**2).mean())
    return float(1 - noise.mean() / spread) if spread > 0 else float("nan")


def variance_across(profiles: Array, noise: Array | None = None) -> Array:
    """Say how much each layer's z-score varies over benchmarks.

    Args:
        profiles: `[benchmarks, layers]`, two benchmarks or more, none constant.
        noise: `[benchmarks, layers]`, the variance of each figure, which is taken off; None for
            none. The noise of two benchmarks is independent, so only squares hold any: it is taken
            off the squares, and off the spread by which they are divided. An estimate is unbiased
            up to that division, and may be negative.

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
    """Say how much more one measure varies over benchmarks than another, without noise in either.

    The figure is the mean over layers of `variance_across` with the noise taken off, of one less
    that of the other. Its interval is the jackknife over the documents of each benchmark, of which
    both measures leave out the same, and the normal distribution. The bootstrap is too narrow here:
    its world has the noise of the documents in the layers themselves, and divides by it.

    Args:
        ones: Of each benchmark, two or more, one measure of its documents.
        others: The other measure of the same documents.

    Returns:
        The difference, without an interval where some document cannot be left out.

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
    """Two variances of the same layers, compared.

    Attributes:
        larger: In how many layers the first is the larger one.
        n: Layers.
        p_value: Of Wilcoxon's signed-rank test, two-sided: layers are taken as independent.
        block_p: The same statistic against signs that change together in blocks of layers.
    """

    larger: int
    n: int
    p_value: float
    block_p: float


def compared(one: Array, other: Array) -> Paired:
    """Compare two variances layer by layer (F. Wilcoxon, Biometrics Bulletin 1 (1945) 80-83).

    Wilcoxon's test takes the layers' differences as independent and, where nothing differs, as
    symmetric about 0. Neighbouring layers resemble each other, which makes its p-value too small.
    The check keeps the symmetry and drops the independence within blocks of `BLOCK` neighbours: all
    differences of a block change their signs together, every choice of signs is tried, and the
    p-value is the share of them whose statistic is as far from the middle.

    Args:
        one: `[layers]`.
        other: `[layers]`.

    Returns:
        What was found; p-values of 1 where all differences are 0.

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
    # What each block adds to the sum of signed ranks.
    adds = np.add.reduceat(np.sign(difference) * ranks, np.arange(0, n, BLOCK))
    if blocks <= MOST_BLOCKS:
        signs = np.array(list(itertools.product((-1, 1), repeat=blocks)))
        extra = 0
    else:
        signs, extra = np.random.default_rng(0).choice((-1, 1), size=(DRAWS, blocks)), 1
    sums = np.abs(signs @ adds)
    as_far = int((sums >= abs(adds.sum()) - _EPS).sum())
    return Paired(larger, n, p_value, (as_far + extra) / (len(signs) + extra))
