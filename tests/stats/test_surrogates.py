from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tests.stats.drawn import Array
from tracker.stats.rank_agreement import SMOOTHNESS, smoothness_likelihood, surrogate_series


def smooth(layers: int) -> Array:
    return np.cumsum(np.random.default_rng(3).normal(size=layers))


def lag_one(series: Array) -> Array:
    centred = series - series.mean(axis=-1, keepdims=True)
    products = (centred[..., 1:] * centred[..., :-1]).sum(axis=-1)
    return np.asarray(products / (centred**2).sum(axis=-1))


@pytest.mark.parametrize(
    "values", [smooth(30), np.exp(smooth(12)), np.round(smooth(20)), smooth(3)]
)
def test_each_draw_holds_the_values_in_another_order(values: Array) -> None:
    drawn = surrogate_series(values, 50, seed=0)
    assert drawn.shape == (50, len(values))
    assert (np.sort(drawn, axis=1) == np.sort(values)).all()
    if len(values) > 3:
        assert len(np.unique(drawn, axis=0)) > 40
    assert (drawn == surrogate_series(values, 50, seed=0)).all()
    assert (drawn != surrogate_series(values, 50, seed=1)).any()


def test_draws_are_as_smooth_as_the_series() -> None:
    values = smooth(200)
    assert lag_one(values) > 0.9
    # Its own smoothness, less what ten values a correlation length blur.
    assert lag_one(surrogate_series(values, 300, seed=0)).mean() == pytest.approx(0.9, abs=0.06)
    white = np.random.default_rng(0).normal(size=200)
    assert lag_one(surrogate_series(white, 300, seed=0)).mean() == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize("layers", [3, 4, 12, 30])
def test_the_likelihood_of_an_autocorrelation_against_whole_matrices(layers: int) -> None:
    scores = stats.norm.ppf(stats.rankdata(smooth(layers)) / (layers + 1))
    ones = np.ones((layers, 1))
    lag = np.abs(np.subtract.outer(np.arange(layers), np.arange(layers)))
    # A basis of what no mean changes: the density of the scores there, its scale integrated out.
    contrasts = np.linalg.svd(ones.T)[2][1:]
    log = []
    for rho in SMOOTHNESS:
        covariance = contrasts @ (rho**lag if rho else np.eye(layers)) @ contrasts.T
        seen = contrasts @ scores
        square = seen @ np.linalg.solve(covariance, seen)
        log.append(-(np.linalg.slogdet(covariance)[1] + (layers - 1) * np.log(square)) / 2)
    expected = np.exp(np.array(log) - max(log))
    assert smoothness_likelihood(scores) == pytest.approx(expected / expected.sum(), rel=1e-9)
