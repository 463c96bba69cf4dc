"""Orders beside chance: by every permutation, every way of breaking ties, and simulation."""

from __future__ import annotations

import math
from itertools import pairwise, permutations, product

import numpy as np
import pytest
from scipy import stats

from tests.stats.drawn import ar1
from tracker.stats import rank_agreement as module
from tracker.stats.rank_agreement import (
    disagreement,
    mean_spearman_p,
    midranks,
    overlap,
    places,
    ranks_apart,
)


@pytest.mark.parametrize("beyond", [0, 1, 2.5])
@pytest.mark.parametrize("drop", [[3, 1, 4, 2, 5, 6], [1, 1, 4, 2, 2, 2], [1, 1, 1, 1, 1, 2]])
def test_chance_and_p_are_those_of_all_permutations(drop: list[float], beyond: float) -> None:
    """Two benchmarks whose layers are relabelled alike; ties in one of them."""
    x = np.array([[1.0, 2, 3, 4, 5, 6], [2, 1, 3, 3, 5, 6]])
    y = np.array([drop, [6.0, 5, 4, 3, 2, 1]])
    a, b = (stats.rankdata(each, axis=1) for each in (x, y))
    every = [
        float((np.abs(a - b[:, order]) > beyond).mean())
        for order in map(list, permutations(range(6)))
    ]
    found = disagreement(x, y, beyond)
    assert found.share == every[0]
    assert found.chance == pytest.approx(np.mean(every), abs=1e-12)
    as_few = np.mean(np.array(every) <= found.share + 1e-12)
    assert found.shuffled_p == pytest.approx(as_few, abs=0.025)


def test_the_papers_chance_levels() -> None:
    """Thirty layers: 96.7 % of ranks apart, and by more than a quarter of them 56.2 %."""
    layers, other = np.arange(30.0)[None], np.random.default_rng(0).permutation(30)[None] * 1.0
    assert disagreement(layers, other, 0).chance == pytest.approx(29 / 30)
    far = sum(abs(i - j) > 7.5 for i in range(30) for j in range(30)) / 900
    assert far == pytest.approx(0.562, abs=5e-4)
    assert disagreement(layers, other, 7.5).chance == pytest.approx(far)


def test_smooth_series_are_not_called_alike_too_often(monkeypatch) -> None:
    """Unrelated AR(1) series of 30 layers: free shuffles are fooled, smooth relabellings less."""
    monkeypatch.setattr(module, "DRAWS", 299)
    generator, p_values = np.random.default_rng(1), []
    for seed in range(200):
        x, y = ar1(generator, 0.9, 2, 30)[:, None]
        found = disagreement(x, y, 7.5, seed)
        p_values.append((found.shuffled_p, found.smooth_p, mean_spearman_p(x, y, seed)))
    shuffled, smooth, spearman = np.mean(np.array(p_values) < 0.1, axis=0)
    assert shuffled > 0.15
    assert smooth < 0.12
    assert spearman < 0.15


def test_ties_share_ranks_and_places() -> None:
    assert midranks(np.array([[1.0, 1.0 + 1e-15, 0.0]])).tolist() == [[2.5, 2.5, 1.0]]
    assert places([2.0, 5.0, 2.0 + 1e-15, 1.0]) == [2, 1, 2, 4]
    assert places([2.0, 5.0, 2.0 + 1e-15, 1.0], lowest_first=True) == [2, 4, 2, 1]


def _all_tops(figures: np.ndarray, k: int) -> list[set[int]]:
    """Compute the top k under every order of all layers, with ties in each possible order."""
    orders = [
        order
        for order in permutations(range(len(figures)))
        if all(figures[a] >= figures[b] for a, b in pairwise(order))
    ]
    return [set(order[:k]) for order in orders]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_ties_are_broken_in_every_way(k: int) -> None:
    dice = np.random.default_rng(k)
    one, other = dice.integers(0, 3, size=(2, 40, 5)).astype(float)
    for a, b, found in zip(one, other, overlap(one, other, k), strict=True):
        pairs = list(product(_all_tops(a, k), _all_tops(b, k)))
        assert found == pytest.approx(np.mean([len(x & y) / k for x, y in pairs]))


def test_overlap_of_what_is_tied_is_chance_and_of_what_is_undefined_nothing() -> None:
    tied, clear = np.zeros((1, 10)), np.arange(10.0)[None]
    assert overlap(tied, clear, 4).tolist() == [pytest.approx(0.4)]
    assert overlap(clear, clear, 4).tolist() == [1.0]
    # Means that differ by rounding alone are tied.
    assert overlap(1e-15 * clear, clear, 4)[0] == pytest.approx(0.4)
    holed = clear.copy()
    holed[0, 3] = np.nan
    assert np.isnan(overlap(holed, clear, 4)).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_ranks_of_what_is_not_finite_are_undefined(value: float) -> None:
    """Was: a layer without a figure agreed with every rank."""
    known, lacking = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, value, 2.0]])
    for tables in ((known, lacking), (lacking, known)):
        assert np.isnan(ranks_apart(*tables)).all()
