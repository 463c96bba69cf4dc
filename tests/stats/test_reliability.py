"""Agreement of samples: against plain sampling, and drawn documents."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from tracker.schema.estimates import Estimate
from tracker.stats.reliability import (
    LayerMeasure,
    disjoint_means,
    documents_to_reach,
    extrapolate_documents,
    layer_difference_p,
    positive_estimate,
    prediction_by_budget,
    spearman_brown,
    stratified_orders,
)


def test_one_stratum_is_shuffled_freely() -> None:
    orders = [tuple(order) for order in stratified_orders(["a"] * 3, 6000, seed=0)]
    counts = [orders.count(permutation) for permutation in permutations(range(3))]
    assert sum(counts) == 6000
    assert stats.chisquare(counts).pvalue > 0.001


def test_every_stretch_holds_each_stratum_by_its_share() -> None:
    strata = np.array(["big"] * 40 + ["small"] * 10)[np.random.default_rng(0).permutation(50)]
    for order in stratified_orders(strata, 200, seed=1):
        assert sorted(order) == list(range(50))
        for start, stop in ((0, 10), (10, 20), (3, 28), (0, 25), (25, 50)):
            n_small = (strata[order[start:stop]] == "small").sum()
            assert abs(n_small - (stop - start) / 5) < 2
    assert len({tuple(order) for order in stratified_orders(strata, 20, seed=1)}) == 20


def test_samples_are_those_of_the_orders_and_share_nothing() -> None:
    rng = np.random.default_rng(3)
    values, weights = rng.normal(size=(11, 4)), rng.uniform(size=11)
    weights[2], values[2] = 0, np.nan
    strata = rng.integers(0, 2, size=11)
    sizes = [1, 2, 5, 7, 11]
    first_means, second_means = disjoint_means(values, weights, strata, sizes, 30, seed=5)
    for draw, order in enumerate(stratified_orders(strata, 30, seed=5)):
        for index, n in enumerate(sizes):
            for means, documents in ((first_means, order[:n]), (second_means, order[n : 2 * n])):
                weighted_documents = documents[weights[documents] > 0]
                if len(documents) < n or not len(weighted_documents):
                    assert np.isnan(means[draw, index]).all()
                    continue
                mean = np.average(
                    values[weighted_documents], axis=0, weights=weights[weighted_documents]
                )
                assert means[draw, index] == pytest.approx(mean)


def test_the_textbook() -> None:
    """A. Anastasi, S. Urbina, Psychological Testing (7th ed.), chapter 4: doubling 0.70, and 25
    to 100 items."""
    assert spearman_brown(0.70, 2) == pytest.approx(0.82, abs=0.005)
    assert extrapolate_documents(spearman_brown(0.70, 4), 25, 0.70) == pytest.approx(100)


def test_a_curve_is_read_where_it_stays_above() -> None:
    sizes = [1, 10, 100, 1000]
    # It falls below again, so the first time does not count.
    n, extrapolated = documents_to_reach(sizes, [0.9, 0.5, 0.7, 0.9], 0.8)
    assert (n, extrapolated) == (pytest.approx(10**2.5), False)
    assert documents_to_reach(sizes, [0.9, 0.9, 0.9, 0.95], 0.8) == (1.0, False)
    assert documents_to_reach(sizes, [np.nan, 0.85, 0.9, 0.95], 0.8) == (10.0, False)
    n, extrapolated = documents_to_reach(sizes, [0.1, 0.2, 0.3, 0.6], 0.9)
    assert (n, extrapolated) == (pytest.approx(6000), True)
    # Nothing follows from halves that agree not at all, or in all.
    for reliability in (-0.2, 0.0, 1.0, np.nan):
        assert np.isnan(extrapolate_documents(0.9, 10, reliability))
    assert np.isnan(documents_to_reach(sizes, [0.1, 0.2, 0.3, -0.1], 0.9)[0])
    assert np.isnan(documents_to_reach([5], [np.nan], 0.9)[0])


def test_leaving_out_covers_the_mean_of_other_documents() -> None:
    rng, n_covered = np.random.default_rng(0), 0
    for _ in range(400):
        values = rng.gamma(2, size=60)
        estimate = positive_estimate(
            lambda indexes, v=values: float(v[indexes].mean()), ["a"] * 60, 0
        )
        n_covered += estimate.low < 2 < estimate.high
    assert n_covered / 400 == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("whole", [np.nan, 3.0])
def test_what_is_not_defined_has_no_interval(whole: float) -> None:
    reason = "the statistic is undefined for all documents or without a tenth of them"
    estimate = positive_estimate(
        lambda documents: whole if len(documents) == 20 else np.nan, ["a"] * 20, 0
    )
    assert estimate == Estimate(None, reason=reason)


def test_layers_that_do_not_differ_are_rarely_said_to() -> None:
    """Also where some layers change many documents and others few, in both directions alike."""
    shares, n_significant = np.linspace(0.02, 0.5, 16), 0
    for seed in range(100):
        luck = np.random.default_rng(seed).random((60, 16))
        n_significant += (
            layer_difference_p(
                np.where(luck < shares / 2, 1.0, -1.0 * (luck < shares)), np.ones(60), 0
            )
            < 0.05
        )
    assert n_significant <= 11  # of 5 expected, with probability 99 %
    luck = np.random.default_rng(0).random((60, 16))
    assert layer_difference_p((luck < np.linspace(0, 0.5, 16)) * 1.0, np.ones(60), 0) < 0.001
    assert layer_difference_p(np.ones((60, 16)), np.ones(60), 0) == 1


TRUTH = np.linspace(0, 1, 12)


def _noisy_measure(n_documents: int, noise: float, price: float, seed: int) -> LayerMeasure:
    rng = np.random.default_rng(seed)
    values = TRUTH + noise * rng.standard_normal((n_documents, 12))
    return LayerMeasure(values, np.ones(n_documents), price)


def test_the_figures_are_those_of_plain_halves() -> None:
    truth, measure = _noisy_measure(8, 1.0, 1, 3), _noisy_measure(8, 1.0, 2, 4)
    weights = np.array([1.0, 0, 2, 3, 1, 1, 2, 1])
    measure = LayerMeasure(measure.values, weights, 2)
    # A document that weighs nothing may hold no number.
    measure.values[1] = np.nan
    (prediction,) = prediction_by_budget({"one": measure}, truth, [7])["one"]
    rng, coefficients = np.random.default_rng(0), []
    for _ in range(100):
        order = rng.permutation(8)
        documents = [i for i in order[:3] if weights[i]]
        mean = np.average(measure.values[documents], axis=0, weights=weights[documents])
        coefficients.append(stats.spearmanr(mean, truth.values[order[4:]].mean(axis=0)).statistic)
    assert prediction == pytest.approx(np.mean(coefficients))
    expected = np.average(np.nan_to_num(measure.values), axis=0, weights=weights)
    assert measure.means() == pytest.approx(expected)


def test_the_truth_never_rests_on_what_a_measure_sees() -> None:
    """Documents that only repeat themselves predict nothing of others."""
    rng, predictions = np.random.default_rng(6), []
    for _ in range(20):
        truth = LayerMeasure(rng.standard_normal((60, 12)), np.ones(60), 1)
        predictions += prediction_by_budget({"itself": truth}, truth, [30])["itself"]
    # Of one sample, its halves lie on either side of its mean.
    assert abs(np.mean(predictions)) < 0.15
