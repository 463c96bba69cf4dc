"""Variance over benchmarks: what noise adds to it, and what is left when that is taken off."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from tracker.stats.task_dependence import (
    SIGN_DRAWS,
    benchmark_variance,
    compare_variances,
    estimate_profile,
    profile_reliability,
    variance_difference,
)


def test_its_mean_is_one_minus_the_mean_correlation() -> None:
    profiles = np.random.default_rng(0).standard_normal((5, 12)) * np.arange(1, 6)[:, None]
    pairs = [np.corrcoef(a, b)[0, 1] for a, b in itertools.combinations(profiles, 2)]
    assert benchmark_variance(profiles).mean() == pytest.approx(1 - np.mean(pairs))
    z = stats.zscore(profiles, axis=1)
    assert benchmark_variance(profiles) == pytest.approx(z.var(axis=0, ddof=1))


def test_noise_is_what_other_documents_change() -> None:
    """Against the spread of means over drawn documents, weighted and in strata."""
    rng = np.random.default_rng(5)
    population = rng.random((4000, 6)) * np.arange(1, 7)
    weights = rng.integers(1, 9, 4000).astype(float)
    levels = np.where(np.arange(4000) % 2, 10.0, 0.0)[:, None] * np.arange(6)
    unstratified, stratified = [], []
    for _ in range(400):
        indexes = rng.integers(0, 4000, 60)
        unstratified.append(estimate_profile(population[indexes], weights[indexes]))
        halves = [rng.choice(np.arange(start, 4000, 2), 30) for start in (0, 1)]
        values = (population + levels)[np.concatenate(halves)]
        stratified.append(estimate_profile(values, np.ones(60), ["even"] * 30 + ["odd"] * 30))
    for estimates, rel in ((unstratified, 0.2), (stratified, 0.25)):
        profiles, noise = np.array(estimates).swapaxes(0, 1)
        assert noise.mean(axis=0) == pytest.approx(profiles.var(axis=0), rel=rel)


def test_one_document_has_no_noise_to_see() -> None:
    assert np.isnan(estimate_profile(np.ones((1, 3)), np.ones(1))[1]).all()
    # Of one document a stratum, how far it is from all others stands for it.
    values = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    variance = estimate_profile(values, np.ones(3), ["a", "b", "c"])[1]
    assert variance == pytest.approx(estimate_profile(values, np.ones(3))[1] * 2 / 3)


def test_how_much_of_a_profile_is_no_noise() -> None:
    assert profile_reliability(np.array([1.0, -1.0]), np.array([0.25, 0.25])) == 0.75
    assert profile_reliability(np.array([1.0, -1.0]), np.array([2.0, 2.0])) == -1
    assert np.isnan(profile_reliability(np.zeros(2), np.ones(2)))


def test_nothing_but_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="are not larger than the noise"):
        benchmark_variance(np.array([[1.0, -1.0], [1.0, -1.0]]), np.ones((2, 2)))
    with pytest.raises(ValueError, match="at least two"):
        benchmark_variance(np.array([[1.0, -1.0]]))


def test_signed_ranks_of_the_textbook() -> None:
    """Siegel, Nonparametric Statistics (1956), p. 79: eight twins, T = 4."""
    nursery, home = [82, 69, 73, 43, 58, 56, 76, 65], [63, 42, 74, 37, 51, 43, 80, 62]
    comparison = compare_variances(np.array(nursery, float), np.array(home, float))
    assert comparison.p_value == pytest.approx(stats.wilcoxon(nursery, home).pvalue)
    assert comparison.p_value == pytest.approx(0.055, abs=0.001)
    assert (comparison.larger, comparison.n) == (6, 8)


def test_blocks_against_every_choice_of_signs() -> None:
    difference = np.random.default_rng(6).standard_normal(11) + 0.4
    ranks = stats.rankdata(np.abs(difference)) * np.sign(difference)
    sums = [
        abs(sum(sign * ranks[i] for i, sign in enumerate(np.repeat(signs, 3)[:11])))
        for signs in itertools.product((1, -1), repeat=4)
    ]
    comparison = compare_variances(difference, np.zeros(11))
    assert comparison.block_p == np.mean([value >= sums[0] - 1e-9 for value in sums])


def test_many_layers_draw_their_signs_and_equal_ones_say_nothing() -> None:
    comparison = compare_variances(np.ones(90), np.zeros(90))
    assert comparison.block_p == pytest.approx(2 / (SIGN_DRAWS + 1))
    equal = compare_variances(np.ones(9), np.ones(9))
    assert (equal.p_value, equal.block_p, equal.larger) == (1, 1, 0)


@pytest.mark.parametrize("n_layers", [1, 3])
def test_one_block_of_layers_shows_nothing(n_layers: int) -> None:
    comparison = compare_variances(np.arange(1.0, n_layers + 1), np.zeros(n_layers))
    assert (comparison.block_p, comparison.larger) == (1, n_layers)


def _draw_samples(truth: np.ndarray, n_documents: int, rng: np.random.Generator) -> list:
    losses = (rng.random((n_documents, len(row))) < row for row in truth)
    return [(values * 1.0, np.ones(n_documents), None) for values in losses]


def _exact_samples(truth: np.ndarray, n_documents: int) -> list:
    return [(np.tile(row, (n_documents, 1)), np.ones(n_documents), None) for row in truth]


@pytest.mark.parametrize("share", [0, 0.7])
def test_no_more_variance_than_another_measure_is_seldom_called_more_or_less(share: float) -> None:
    """Right-skewed drops, alike in all benchmarks or not, that vary exactly as the other does."""
    rng = np.random.default_rng(11)
    counts = np.zeros(2)
    for _ in range(20):
        common = rng.exponential(0.08, 20)
        specific = rng.exponential(0.08, (4, 20))
        truth = np.minimum((1 - share) * common + share * specific, 1)
        estimate = variance_difference(_draw_samples(truth, 80, rng), _exact_samples(truth, 80))
        counts += [estimate.low > 0, estimate.high < 0]
    assert (counts <= 2).all()


def test_more_and_less_variance_are_found() -> None:
    rng = np.random.default_rng(12)
    truth = rng.exponential(0.1, (4, 20)).clip(max=1)
    constant = np.tile(truth[0], (4, 1))
    larger = variance_difference(_draw_samples(truth, 100, rng), _exact_samples(constant, 100))
    smaller = variance_difference(_draw_samples(constant, 100, rng), _exact_samples(truth, 100))
    assert larger.low > 0
    assert smaller.high < 0


def test_two_documents_have_a_difference_without_an_interval() -> None:
    values = np.array([[1.0, 0.2, 0.0], [0.9, 0.3, 0.0]])
    samples = [(values, np.ones(2), None), (values[:, ::-1], np.ones(2), None)]
    estimate = variance_difference(samples, samples)
    assert (estimate.value, estimate.low) == (0, None)
