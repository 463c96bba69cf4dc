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

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import stats

from tracker.core.estimates import Estimate
from tracker.stats.accuracy import LEVEL
from tracker.stats.arrays import Array, IntArray, Strata
from tracker.stats.rank_agreement import rounded_values
from tracker.stats.resampling import jackknife_error

BenchmarkSample = tuple[Array, Array, Strata | None]
"""Values, weights and strata of one benchmark: the arguments of `estimate_profile`."""
SIGN_BLOCK = 3
"""Number of neighbouring layers whose signs change together in the check of the test."""
SIGN_DRAWS = 2**14
"""If there are more choices of signs than this, this number of random choices is drawn."""
LEFT_OUT_GROUPS = 100
"""Documents of a benchmark are left out one at a time, or in this many groups if there are more."""


def estimate_profile(
    values: Array, weights: Array, strata: Strata | None = None
) -> tuple[Array, Array]:
    """Estimate the mean of each layer (the profile), and the variance of each of these means.

    The profile is centred on its mean over layers, so common changes of all layers are excluded.

    Args:
        values: `[documents, layers]`, value of each document, e.g. its drop.
        weights: `[documents]`, 0 or more; the profile is the weighted mean.
        strata: `[documents]`, e.g. each document's task, each of a fixed size; None for one.

    Returns:
        The centred profile and the variance of each of its figures `[layers]`, of the weighted mean
        as a ratio (linearised; W. G. Cochran, Sampling Techniques (1977), sections 5.6 and 6.4).
        NaN in the variance for a single document.

    Examples:
        >>> profile, variance = estimate_profile(np.array([[1.0, 0.0], [0.0, 0.0]]), np.ones(2))
        >>> profile.tolist(), variance.tolist()
        ([0.25, -0.25], [0.0625, 0.0625])
    """
    shares = weights / weights.sum()
    centred = values - values.mean(axis=1, keepdims=True)
    profile = shares @ centred
    if len(values) == 1:
        return profile, np.full(values.shape[1], np.nan)
    influences = shares[:, None] * (centred - profile)
    labels = np.zeros(len(values)) if strata is None else np.asarray(strata)
    variance = np.zeros(values.shape[1])
    for label in np.unique(labels):
        stratum = influences[labels == label]
        n = len(stratum)
        # The only document of a stratum keeps its deviation from the mean of all.
        variance += n * stratum.var(axis=0, ddof=1) if n > 1 else stratum[0] ** 2
    return profile, variance


def profile_reliability(profile: Array, noise: Array) -> float:
    """Return the share of a profile's variation over layers that is not noise.

    It is below 0 if the noise exceeds the spread.

    Args:
        profile: `[layers]`, centred.
        noise: `[layers]`, the variance of each figure.

    Returns:
        1 - mean noise / mean square; NaN for a constant profile.
    """
    spread = float((profile**2).mean())
    return float(1 - noise.mean() / spread) if spread > 0 else float("nan")


def benchmark_variance(profiles: Array, noise: Array | None = None) -> Array:
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
        >>> benchmark_variance(np.array([[1.0, -1.0], [1.0, -1.0]])).tolist()
        [0.0, 0.0]
        >>> benchmark_variance(np.array([[1.0, -1.0], [-2.0, 2.0]])).tolist()
        [2.0, 2.0]
    """
    if len(profiles) < 2:
        raise ValueError("the variance over benchmarks needs at least two benchmarks")
    centred = profiles - profiles.mean(axis=1, keepdims=True)
    noise = np.zeros_like(centred) if noise is None else noise
    spread = (centred**2 - noise).mean(axis=1, keepdims=True)
    if (spread <= 0).any():
        raise ValueError("the spread over layers of a benchmark is no larger than its noise")
    z, scaled_noise = centred / np.sqrt(spread), noise / spread
    n_benchmarks = len(z)
    covariances = (z.sum(axis=0) ** 2 - (z**2).sum(axis=0)) / (n_benchmarks * (n_benchmarks - 1))
    return np.asarray((z**2 - scaled_noise).mean(axis=0) - covariances, dtype=np.float64)


def variance_difference(
    first_samples: Sequence[BenchmarkSample], second_samples: Sequence[BenchmarkSample]
) -> Estimate:
    """Estimate how much more one measure varies over benchmarks than another, without noise.

    The figure is the mean over layers of the noise-free `benchmark_variance` of `first_samples`,
    minus that of `second_samples`. Its interval is the jackknife over the documents of each
    benchmark with the normal distribution; both measures leave out the same documents. The
    bootstrap is too narrow here, because its population includes the noise of the documents.

    Args:
        first_samples: One measure of the documents of each benchmark, two benchmarks or more.
        second_samples: Other measure of the same documents.

    Returns:
        The difference, without an interval if some document cannot be left out.

    Raises:
        ValueError: Fewer than two benchmarks, or the spread of one is all noise.
    """
    samples = list(zip(first_samples, second_samples, strict=True))
    profiles = [[estimate_profile(*sample) for sample in pair] for pair in samples]

    def difference(profiles: Sequence[Sequence[tuple[Array, Array]]]) -> float:
        first, second = (_mean_variance(side) for side in zip(*profiles, strict=True))
        return first - second

    def leave_out(index: int, kept_documents: IntArray) -> float:
        """Return the difference if only some documents of one benchmark are kept."""
        pair = []
        for values, weights, strata in samples[index]:
            labels = None if strata is None else np.asarray(strata)[kept_documents]
            pair.append(estimate_profile(values[kept_documents], weights[kept_documents], labels))
        try:
            return difference([*profiles[:index], pair, *profiles[index + 1 :]])
        except ValueError:
            return float("nan")

    value, variance = difference(profiles), 0.0
    for index, (values, _, strata) in enumerate(first_samples):
        labels = np.zeros(len(values)) if strata is None else strata
        variance += jackknife_error(partial(leave_out, index), labels, LEFT_OUT_GROUPS) ** 2
    if not np.isfinite(variance):
        return Estimate(value)
    half_width = float(stats.norm.ppf((1 + LEVEL) / 2) * np.sqrt(variance))
    return Estimate(value, value - half_width, value + half_width)


def _mean_variance(estimates: Sequence[tuple[Array, Array]]) -> float:
    """Average the noise-free variance (over benchmarks) over all layers."""
    profiles, noise = (np.array(arrays) for arrays in zip(*estimates, strict=True))
    return float(benchmark_variance(profiles, noise).mean())


@dataclass(frozen=True)
class VarianceComparison:
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


def compare_variances(first_variances: Array, second_variances: Array) -> VarianceComparison:
    """Compare two variances layer by layer with Wilcoxon's test.

    Wilcoxon's test assumes that the layers' differences are independent and, without an effect,
    symmetric about 0. Neighbouring layers resemble each other, so its p-value is too small. The
    check keeps the symmetry but drops independence within blocks of `SIGN_BLOCK` neighbours: all
    differences of a block change their signs together. All choices of signs are tried, or
    `SIGN_DRAWS` random ones, and the p-value is the share whose statistic is as far from 0.

    Args:
        first_variances: `[layers]`.
        second_variances: `[layers]`.

    Returns:
        The comparison; p-values are 1 if all differences are 0, and the p-value of blocks is 1 if
        there is a single block.

    References:
        F. Wilcoxon, Biometrics Bulletin 1 (1945) 80-83.

    Examples:
        >>> comparison = compare_variances(np.arange(1.0, 10.0), np.zeros(9))
        >>> comparison.larger, round(comparison.p_value, 4), comparison.block_p
        (9, 0.0039, 0.25)
    """
    differences = rounded_values(first_variances - second_variances)
    n_layers, n_larger = len(differences), int((differences > 0).sum())
    if not differences.any():
        return VarianceComparison(n_larger, n_layers, 1.0, 1.0)
    p_value = float(stats.wilcoxon(differences).pvalue)
    is_nonzero = differences != 0
    ranks = np.zeros(n_layers)
    ranks[is_nonzero] = stats.rankdata(np.abs(differences[is_nonzero]))
    # Contribution of each block to the sum of signed ranks.
    block_sums = np.add.reduceat(np.sign(differences) * ranks, np.arange(0, n_layers, SIGN_BLOCK))
    if len(block_sums) == 1:
        return VarianceComparison(n_larger, n_layers, p_value, 1.0)
    test = stats.permutation_test(
        (block_sums,), np.sum, permutation_type="samples", n_resamples=SIGN_DRAWS, rng=0
    )
    return VarianceComparison(n_larger, n_layers, p_value, float(test.pvalue))
