"""Test ranks, ties and chance by every permutation, every way of breaking ties, and simulation."""

from __future__ import annotations

import math
from itertools import pairwise, permutations, product

import numpy as np
import pytest
from scipy import stats

from tests.stats.drawn import Array, ar1
from tracker.stats import rank_agreement as module
from tracker.stats.rank_agreement import (
    AUTOCORRELATIONS,
    compare_ranks,
    differing_rank_share,
    mean_spearman_p,
    midranks,
    min_ranks,
    smoothness_likelihood,
    surrogate_series,
    top_overlap,
)


@pytest.mark.parametrize("beyond", [0, 1, 2.5])
@pytest.mark.parametrize("drop", [[3, 1, 4, 2, 5, 6], [1, 1, 4, 2, 2, 2], [1, 1, 1, 1, 1, 2]])
def test_chance_and_p_are_those_of_all_permutations(drop: list[float], beyond: float) -> None:
    """Two benchmarks whose layers are relabelled alike; ties in one of them."""
    x = np.array([[1.0, 2, 3, 4, 5, 6], [2, 1, 3, 3, 5, 6]])
    y = np.array([drop, [6.0, 5, 4, 3, 2, 1]])
    x_ranks, y_ranks = (stats.rankdata(table, axis=1) for table in (x, y))
    shares = [
        float((np.abs(x_ranks - y_ranks[:, order]) > beyond).mean())
        for order in map(list, permutations(range(6)))
    ]
    result = compare_ranks(x, y, beyond)
    assert result.share == shares[0]
    assert result.chance == pytest.approx(np.mean(shares), abs=1e-12)
    p_value = np.mean(np.array(shares) <= result.share + 1e-12)
    assert result.shuffled_p == pytest.approx(p_value, abs=0.025)


def test_the_papers_chance_levels() -> None:
    """Thirty layers: 96.7 % of ranks apart, and by more than a quarter of them 56.2 %."""
    layers, shuffled = np.arange(30.0)[None], np.random.default_rng(0).permutation(30)[None] * 1.0
    assert compare_ranks(layers, shuffled, 0).chance == pytest.approx(29 / 30)
    expected = sum(abs(i - j) > 7.5 for i in range(30) for j in range(30)) / 900
    assert expected == pytest.approx(0.562, abs=5e-4)
    assert compare_ranks(layers, shuffled, 7.5).chance == pytest.approx(expected)


def test_smooth_series_are_not_called_alike_too_often(monkeypatch) -> None:
    """Unrelated AR(1) series of 30 layers: free shuffles are fooled, smooth relabellings less."""
    monkeypatch.setattr(module, "RELABELLINGS", 299)
    rng, p_values = np.random.default_rng(1), []
    for seed in range(200):
        x, y = ar1(rng, 0.9, 2, 30)[:, None]
        result = compare_ranks(x, y, 7.5, seed)
        p_values.append((result.shuffled_p, result.smooth_p, mean_spearman_p(x, y, seed)))
    shuffled, smooth, spearman = np.mean(np.array(p_values) < 0.1, axis=0)
    assert shuffled > 0.15
    assert smooth < 0.12
    assert spearman < 0.15


def test_ties_share_ranks_and_places() -> None:
    assert midranks(np.array([[1.0, 1.0 + 1e-15, 0.0]])).tolist() == [[2.5, 2.5, 1.0]]
    assert min_ranks([2.0, 5.0, 2.0 + 1e-15, 1.0]) == [2, 1, 2, 4]
    assert min_ranks([2.0, 5.0, 2.0 + 1e-15, 1.0], lowest_first=True) == [2, 4, 2, 1]


def _top_sets(figures: np.ndarray, k: int) -> list[set[int]]:
    """Compute the top k under every order of all layers, with ties in each possible order."""
    orders = [
        order
        for order in permutations(range(len(figures)))
        if all(figures[a] >= figures[b] for a, b in pairwise(order))
    ]
    return [set(order[:k]) for order in orders]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_ties_are_broken_in_every_way(k: int) -> None:
    rng = np.random.default_rng(k)
    x_rows, y_rows = rng.integers(0, 3, size=(2, 40, 5)).astype(float)
    for a, b, overlap in zip(x_rows, y_rows, top_overlap(x_rows, y_rows, k), strict=True):
        pairs = list(product(_top_sets(a, k), _top_sets(b, k)))
        assert overlap == pytest.approx(np.mean([len(x & y) / k for x, y in pairs]))


def test_overlap_of_what_is_tied_is_chance_and_of_what_is_undefined_nothing() -> None:
    tied, ascending = np.zeros((1, 10)), np.arange(10.0)[None]
    assert top_overlap(tied, ascending, 4).tolist() == [pytest.approx(0.4)]
    assert top_overlap(ascending, ascending, 4).tolist() == [1.0]
    # Means that differ by rounding alone are tied.
    assert top_overlap(1e-15 * ascending, ascending, 4)[0] == pytest.approx(0.4)
    missing = ascending.copy()
    missing[0, 3] = np.nan
    assert np.isnan(top_overlap(missing, ascending, 4)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_ranks_of_what_is_not_finite_are_undefined(value: float) -> None:
    """Was: a layer without a figure agreed with every rank."""
    finite, undefined = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, value, 2.0]])
    for tables in ((finite, undefined), (undefined, finite)):
        assert np.isnan(differing_rank_share(*tables)).all()


def smooth_series(layers: int) -> Array:
    return np.cumsum(np.random.default_rng(3).normal(size=layers))


def autocorrelation(series: Array) -> Array:
    centred = series - series.mean(axis=-1, keepdims=True)
    products = (centred[..., 1:] * centred[..., :-1]).sum(axis=-1)
    return np.asarray(products / (centred**2).sum(axis=-1))


@pytest.mark.parametrize(
    "values",
    [smooth_series(30), np.exp(smooth_series(12)), np.round(smooth_series(20)), smooth_series(3)],
)
def test_each_draw_holds_the_values_in_another_order(values: Array) -> None:
    surrogates = surrogate_series(values, 50, seed=0)
    assert surrogates.shape == (50, len(values))
    assert (np.sort(surrogates, axis=1) == np.sort(values)).all()
    if len(values) > 3:
        assert len(np.unique(surrogates, axis=0)) > 40
    assert (surrogates == surrogate_series(values, 50, seed=0)).all()
    assert (surrogates != surrogate_series(values, 50, seed=1)).any()


def test_draws_are_as_smooth_as_the_series() -> None:
    values = smooth_series(200)
    assert autocorrelation(values) > 0.9
    # Its own smoothness, less what ten values a correlation length blur.
    assert autocorrelation(surrogate_series(values, 300, seed=0)).mean() == pytest.approx(
        0.9, abs=0.06
    )
    white = np.random.default_rng(0).normal(size=200)
    assert autocorrelation(surrogate_series(white, 300, seed=0)).mean() == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("layers", [3, 4, 12, 30])
def test_the_likelihood_of_an_autocorrelation_against_whole_matrices(layers: int) -> None:
    scores = stats.norm.ppf(stats.rankdata(smooth_series(layers)) / (layers + 1))
    ones = np.ones((layers, 1))
    lags = np.abs(np.subtract.outer(np.arange(layers), np.arange(layers)))
    # A basis of what no mean changes: the density of the scores there, its scale integrated out.
    contrasts = np.linalg.svd(ones.T)[2][1:]
    log_likelihoods = []
    for rho in AUTOCORRELATIONS:
        covariance = contrasts @ (rho**lags if rho else np.eye(layers)) @ contrasts.T
        projected = contrasts @ scores
        square = projected @ np.linalg.solve(covariance, projected)
        log_likelihoods.append(
            -(np.linalg.slogdet(covariance)[1] + (layers - 1) * np.log(square)) / 2
        )
    expected = np.exp(np.array(log_likelihoods) - max(log_likelihoods))
    assert smoothness_likelihood(scores) == pytest.approx(expected / expected.sum(), rel=1e-9)
