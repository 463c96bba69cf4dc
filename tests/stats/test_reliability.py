"""Agreement of samples: against plain sampling, and drawn documents."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from tracker.core.estimates import Estimate
from tracker.stats.rank_agreement import row_coefficients
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


def test_documents_of_a_stratum_are_drawn_alike() -> None:
    strata = ["a", "b", "a", "b", "b", "b"]
    first = np.array([sorted(order[:3]) for order in stratified_orders(strata, 4000, seed=2)])
    times = np.bincount(first.ravel(), minlength=6) / 4000
    assert times == pytest.approx(np.full(6, 0.5), abs=0.03)
    # Nor does a small stratum always come first, or last.
    begins = np.mean([order[0] in (0, 2) for order in stratified_orders(strata, 4000, seed=2)])
    assert 0.2 < begins < 0.4


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


def test_drawn_documents_agree_as_predicted() -> None:
    """Where the assumptions hold, the formula is right: correlation of means of 10 and of 80."""
    dice = np.random.default_rng(0)
    layers = dice.normal(0, 0.5, size=(400, 1, 300))
    noise = dice.normal(0, 2, size=(400, 2, 300))

    def agreement(n: int) -> float:
        means = layers + noise / n**0.5
        return float(row_coefficients(means[:, 0], means[:, 1], "pearson").mean())

    assert spearman_brown(agreement(10), 8) == pytest.approx(agreement(80), abs=0.02)
    assert documents_for(agreement(80), 10, agreement(10)) == pytest.approx(80, rel=0.1)


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


def test_leaving_out_a_tenth_of_a_mean_gives_its_standard_error() -> None:
    values = np.random.default_rng(0).lognormal(3, 0.1, size=4000)
    found = positive_estimate(lambda chosen: float(values[chosen].mean()), ["a"] * 4000, seed=0)
    assert found.value == pytest.approx(values.mean())
    half = stats.t.ppf(0.975, 9) * values.std(ddof=1) / 4000**0.5
    assert found.high - found.value == pytest.approx(half, rel=0.4)
    assert found.value / found.low == pytest.approx(found.high / found.value)


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


def test_the_interval_holds_how_many_documents_other_documents_would_ask_for() -> None:
    """Outcomes that are lost or won, some documents by many layers at once; the truth from pairs of
    fresh samples."""
    dice, layers, documents = np.random.default_rng(0), 20, 120
    lost, won = np.abs(dice.normal(0.05, 0.1, layers)), dice.uniform(0.01, 0.08, layers)

    def draw(n: int) -> np.ndarray:
        right = dice.random((n, 1)) < 0.6
        luck = (dice.random((n, layers)) + dice.random((n, 1))) / 2
        return np.where(right, luck < lost, -1.0 * (luck < won))

    def agreement(one: np.ndarray, other: np.ndarray) -> float:
        return float(np.nanmean(row_coefficients(one, other, "spearman")))

    fresh = np.array([draw(60).mean(axis=0) for _ in range(2000)])
    truth = documents_for(0.9, 60, agreement(fresh[:1000], fresh[1000:]))
    inside = []
    for _ in range(12):
        values = draw(documents)

        def needed(chosen: np.ndarray, values: np.ndarray = values) -> float:
            n = len(chosen) // 2
            one, other = disjoint_means(
                values[chosen], np.ones(len(chosen)), np.zeros(len(chosen)), [n], 40, 0
            )
            return documents_for(0.9, n, agreement(one[:, 0], other[:, 0]))

        found = positive_estimate(needed, ["a"] * documents, seed=0)
        inside.append(found.low is None or found.low < truth < found.high)
    assert sum(inside) >= 10


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
