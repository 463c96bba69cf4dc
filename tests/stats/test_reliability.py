"""Agreement of samples: against plain sampling, and drawn documents."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from tracker.core.estimates import Estimate
from tracker.stats.reliability import (
    differ,
    disjoint_means,
    documents_for,
    documents_needed,
    positive_estimate,
    spearman_brown,
    stratified_orders,
)


def test_one_stratum_is_shuffled_freely() -> None:
    drawn = [tuple(order) for order in stratified_orders(["a"] * 3, 6000, seed=0)]
    counts = [drawn.count(each) for each in permutations(range(3))]
    assert sum(counts) == 6000
    assert stats.chisquare(counts).pvalue > 0.001


def test_every_stretch_holds_each_stratum_by_its_share() -> None:
    strata = np.array(["big"] * 40 + ["small"] * 10)[np.random.default_rng(0).permutation(50)]
    for order in stratified_orders(strata, 200, seed=1):
        assert sorted(order) == list(range(50))
        for start, stop in ((0, 10), (10, 20), (3, 28), (0, 25), (25, 50)):
            small = (strata[order[start:stop]] == "small").sum()
            assert abs(small - (stop - start) / 5) < 2
    assert len({tuple(order) for order in stratified_orders(strata, 20, seed=1)}) == 20


def test_samples_are_those_of_the_orders_and_share_nothing() -> None:
    dice = np.random.default_rng(3)
    values, weights = dice.normal(size=(11, 4)), dice.uniform(size=11)
    weights[2], values[2] = 0, np.nan
    strata = dice.integers(0, 2, size=11)
    sizes = [1, 2, 5, 7, 11]
    first, second = disjoint_means(values, weights, strata, sizes, 30, seed=5)
    for draw, order in enumerate(stratified_orders(strata, 30, seed=5)):
        for place, n in enumerate(sizes):
            for found, docs in ((first, order[:n]), (second, order[n : 2 * n])):
                known = docs[weights[docs] > 0]
                if len(docs) < n or not len(known):
                    assert np.isnan(found[draw, place]).all()
                    continue
                mean = np.average(values[known], axis=0, weights=weights[known])
                assert found[draw, place] == pytest.approx(mean)


def test_the_textbook() -> None:
    """A. Anastasi, S. Urbina, Psychological Testing (7th ed.), chapter 4: doubling 0.70, and 25
    to 100 items."""
    assert spearman_brown(0.70, 2) == pytest.approx(0.82, abs=0.005)
    assert documents_for(spearman_brown(0.70, 4), 25, 0.70) == pytest.approx(100)


def test_a_curve_is_read_where_it_stays_above() -> None:
    sizes = [1, 10, 100, 1000]
    # It falls below again, so the first time does not count.
    n, extrapolated = documents_needed(sizes, [0.9, 0.5, 0.7, 0.9], 0.8)
    assert (n, extrapolated) == (pytest.approx(10**2.5), False)
    assert documents_needed(sizes, [0.9, 0.9, 0.9, 0.95], 0.8) == (1.0, False)
    assert documents_needed(sizes, [np.nan, 0.85, 0.9, 0.95], 0.8) == (10.0, False)
    n, extrapolated = documents_needed(sizes, [0.1, 0.2, 0.3, 0.6], 0.9)
    assert (n, extrapolated) == (pytest.approx(6000), True)
    # Nothing follows from halves that agree not at all, or in all.
    for reliability in (-0.2, 0.0, 1.0, np.nan):
        assert np.isnan(documents_for(0.9, 10, reliability))
    assert np.isnan(documents_needed(sizes, [0.1, 0.2, 0.3, -0.1], 0.9)[0])
    assert np.isnan(documents_needed([5], [np.nan], 0.9)[0])


def test_leaving_out_covers_the_mean_of_other_documents() -> None:
    dice, inside = np.random.default_rng(0), 0
    for _ in range(400):
        values = dice.gamma(2, size=60)
        found = positive_estimate(lambda chosen, v=values: float(v[chosen].mean()), ["a"] * 60, 0)
        inside += found.low < 2 < found.high
    assert inside / 400 == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("whole", [np.nan, 3.0])
def test_what_is_not_defined_has_no_interval(whole: float) -> None:
    why = "it is not defined for all documents, or without some of them"
    found = positive_estimate(lambda kept: whole if len(kept) == 20 else np.nan, ["a"] * 20, 0)
    assert found == Estimate(None, reason=why)


def test_layers_that_do_not_differ_are_rarely_said_to() -> None:
    """Also where some layers change many documents and others few, in both directions alike."""
    share, called = np.linspace(0.02, 0.5, 16), 0
    for seed in range(100):
        luck = np.random.default_rng(seed).random((60, 16))
        called += (
            differ(np.where(luck < share / 2, 1.0, -1.0 * (luck < share)), np.ones(60), 0) < 0.05
        )
    assert called <= 11  # of 5 expected, with probability 99 %
    luck = np.random.default_rng(0).random((60, 16))
    assert differ((luck < np.linspace(0, 0.5, 16)) * 1.0, np.ones(60), 0) < 0.001
    assert differ(np.ones((60, 16)), np.ones(60), 0) == 1
