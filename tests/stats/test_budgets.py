"""Test the prediction of each measure for its cost, on disjoint documents."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tracker.stats.reliability import LayerMeasure, at_equal_cost

TRUTH = np.linspace(0, 1, 12)


def _noisy(documents: int, noise: float, price: float, seed: int) -> LayerMeasure:
    generator = np.random.default_rng(seed)
    values = TRUTH + noise * generator.standard_normal((documents, 12))
    return LayerMeasure(values, np.ones(documents), price)


def test_the_figures_are_those_of_plain_halves() -> None:
    truth, measure = _noisy(8, 1.0, 1, 3), _noisy(8, 1.0, 2, 4)
    weights = np.array([1.0, 0, 2, 3, 1, 1, 2, 1])
    measure = LayerMeasure(measure.values, weights, 2)
    # A document that weighs nothing may hold no number.
    measure.values[1] = np.nan
    (found,) = at_equal_cost({"one": measure}, truth, [7])["one"]
    generator, naive = np.random.default_rng(0), []
    for _ in range(100):
        order = generator.permutation(8)
        some = [i for i in order[:3] if weights[i]]
        mean = np.average(measure.values[some], axis=0, weights=weights[some])
        naive.append(stats.spearmanr(mean, truth.values[order[4:]].mean(axis=0)).statistic)
    assert found == pytest.approx(np.mean(naive))
    assert measure.means() == pytest.approx(
        np.average(np.nan_to_num(measure.values), axis=0, weights=weights)
    )


def test_the_truth_never_rests_on_what_a_measure_sees() -> None:
    """Documents that only repeat themselves predict nothing of others."""
    generator, found = np.random.default_rng(6), []
    for _ in range(20):
        truth = LayerMeasure(generator.standard_normal((60, 12)), np.ones(60), 1)
        found += at_equal_cost({"itself": truth}, truth, [30])["itself"]
    # Of one sample, its halves lie on either side of its mean.
    assert abs(np.mean(found)) < 0.15
