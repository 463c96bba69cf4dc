"""Estimate how much a layer's relevance varies between benchmarks.

The relevance of a layer is its accuracy drop or the value of a proxy. Relevance is converted to
z-scores within each benchmark, so that benchmarks with different metrics are comparable. The
result, called the variation, is the variance of a layer's z-score over benchmarks, averaged over
layers. The variation is 0 if each layer has equal z-scores on all benchmarks. The variation is 1 if
the relevance on different benchmarks is uncorrelated.

An accuracy drop is measured on a sample of documents. Because of sampling noise, the measured drops
of a layer differ between benchmarks even if the true drops are equal. The variance of the noise is
therefore subtracted from the variance over benchmarks. The interval of the variation is computed by
a jackknife over documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy import stats

from tracker.schema.estimates import Estimate
from tracker.stats.accuracy import LEVEL
from tracker.stats.arrays import Array, IntArray, Strata
from tracker.stats.rank_agreement import rounded_values
from tracker.stats.resampling import jackknife_error

BenchmarkSample = tuple[Array, Array, Strata | None]
"""Values, weights and strata of one benchmark: the arguments of `estimate_profile`."""
SIGN_BLOCK = 3
"""Number of neighbouring layers whose signs change together in the permutation test."""
SIGN_DRAWS = 2**14
"""Maximum number of sign combinations; if there are more, this number is drawn at random."""
LEFT_OUT_GROUPS = 100
"""Maximum number of groups of documents in the jackknife over the documents of a benchmark."""


def estimate_profile(
    values: Array, weights: Array, strata: Strata | None = None
) -> tuple[Array, Array]:
    """Estimate the mean value of each layer, and the variance of each mean.

    The profile is the array of the layers' mean values, minus their average over layers.

    Args:
        values: `[documents, layers]`, the value of each document for each layer, e.g. the drop.
        weights: `[documents]`, 0 or more; the weight of each document in the means.
        strata: `[documents]`, stratum of each document, e.g. its task. None = a single stratum.

    Returns:
        The centred profile `[layers]` and the variance of each of its values `[layers]`. The
        variance is computed by linearisation (W. G. Cochran, Sampling Techniques (1977), sections
        5.6 and 6.4). The variances are NaN for a single document.

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
    """Return the reliability of a profile: the fraction of its variance that is not sampling noise.

    The fraction can be negative, because the variance of the noise is only an estimate.

    Args:
        profile: `[layers]`, the centred mean values of the layers, from `estimate_profile`.
        noise: `[layers]`, the sampling variance of each mean value, from `estimate_profile`.

    Returns:
        1 - (mean noise) / (mean squared profile); NaN for a constant profile.
    """
    spread = float((profile**2).mean())
    return float(1 - noise.mean() / spread) if spread > 0 else float("nan")


def benchmark_variance(profiles: Array, noise: Array | None = None) -> Array:
    """Compute the variance over benchmarks of each layer's z-score.

    Args:
        profiles: `[benchmarks, layers]`, the value of each layer; two benchmarks or more, and no
            constant row.
        noise: `[benchmarks, layers]`, the sampling variance of each value; None = no noise. The
            noise is subtracted, so a returned variance can be negative.

    Returns:
        `[layers]`, the variance over benchmarks, with the divisor (number of benchmarks - 1).

    Raises:
        ValueError: There are fewer than two benchmarks, or a benchmark has more noise than variance
            over layers.

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
        raise ValueError(
            "on one benchmark, the differences between the layers are not larger than the noise"
        )
    z, scaled_noise = centred / np.sqrt(spread), noise / spread
    n_benchmarks = len(z)
    covariances = (z.sum(axis=0) ** 2 - (z**2).sum(axis=0)) / (n_benchmarks * (n_benchmarks - 1))
    return np.asarray((z**2 - scaled_noise).mean(axis=0) - covariances, dtype=np.float64)


def variance_difference(
    first_samples: Sequence[BenchmarkSample], second_samples: Sequence[BenchmarkSample]
) -> Estimate:
    """Estimate how much more one measure varies over benchmarks than another measure.

    The variation of a measure of relevance is the mean of `benchmark_variance` over layers. The
    interval is a normal interval, with a standard error from the jackknife over documents.

    Args:
        first_samples: For each benchmark, the values of one measure for its documents; two
            benchmarks or more.
        second_samples: For each benchmark, the values of the other measure for the same documents.

    Returns:
        The first measure's variation minus the second measure's variation, with an interval. There
        is no interval if the difference is undefined in one step of the jackknife.

    Raises:
        ValueError: There are fewer than two benchmarks, or a benchmark has more noise than variance
            over layers.
    """
    samples = list(zip(first_samples, second_samples, strict=True))
    profiles = [[estimate_profile(*sample) for sample in pair] for pair in samples]

    def difference(profiles: Sequence[Sequence[tuple[Array, Array]]]) -> float:
        first, second = (_mean_variance(side) for side in zip(*profiles, strict=True))
        return first - second

    def leave_out(index: int, kept_documents: IntArray) -> float:
        """Return the difference when the benchmark `index` has only `kept_documents`."""
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
    """Return the mean of `benchmark_variance` over layers, with the noise subtracted."""
    profiles, noise = (np.array(arrays) for arrays in zip(*estimates, strict=True))
    return float(benchmark_variance(profiles, noise).mean())


@dataclass(frozen=True)
class VarianceComparison:
    """Result of `compare_variances`: how much two measures vary over benchmarks.

    Attributes:
        larger: Number of layers for which the first measure varies more over benchmarks than the
            second measure.
        n: Number of layers.
        p_value: p-value of the two-sided Wilcoxon signed-rank test, which assumes independent
            layers.
        block_p: p-value of a permutation test that flips the signs of whole blocks of neighbouring
            layers.
    """

    larger: int
    n: int
    p_value: float
    block_p: float


def compare_variances(first_variances: Array, second_variances: Array) -> VarianceComparison:
    """Test whether two measures vary differently over benchmarks, with one p-value per test.

    The first p-value is from Wilcoxon's signed-rank test, which assumes independent layers. In
    fact, neighbouring layers have similar values. The second p-value is therefore from a
    permutation test that reverses the signs of `SIGN_BLOCK` neighbouring layers together.

    Args:
        first_variances: `[layers]`, variance of each layer over benchmarks by the first measure.
        second_variances: `[layers]`, variance of each layer over benchmarks by the second measure.

    Returns:
        The number of layers whose first variance is larger than the second variance, and the two
        p-values. The p-values are 1 if all differences are 0.

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
