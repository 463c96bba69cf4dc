"""Test interactions and growth against every sign, drawn documents and known effects."""

from __future__ import annotations

import itertools
import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from tracker.schema.estimates import Estimate
from tracker.stats import effects as module
from tracker.stats.effects import (
    additivity,
    growth_difference_p,
    growths,
    interactions,
    min_growth_documents,
    sign_flip_p,
)
from tracker.stats.support import holm


def test_the_exact_test_is_that_of_all_signs() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        values = rng.integers(-2, 3, size=rng.integers(1, 10))
        sums = [np.dot(signs, values) for signs in product((-1, 1), repeat=len(values))]
        expected = np.mean(np.abs(sums) >= abs(values.sum()))
        assert sign_flip_p(values.astype(float)) == pytest.approx(expected)

    # Of ones it is that of McNemar.
    ones = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 30)
    assert sign_flip_p(ones) == pytest.approx(stats.binomtest(9, 11).pvalue)


def test_drawn_signs_are_near_all_signs() -> None:
    values = np.random.default_rng(1).normal(0.5, 1, size=(11, 3))
    values[0, 2] = np.nan
    first_estimate, second_estimate, undefined = interactions(values)
    for estimate, column in ((first_estimate, values[:, 0]), (second_estimate, values[:, 1])):
        sums = [np.dot(signs, column) for signs in product((-1, 1), repeat=11)]
        expected = np.mean(np.abs(sums) >= abs(column.sum()) - 1e-9)
        assert estimate.p_value == pytest.approx(expected, abs=0.01)
        assert estimate.value == pytest.approx(column.mean())
        low, high = stats.t.interval(0.95, 10, column.mean(), stats.sem(column))
        assert estimate.bounds == pytest.approx((low, high))
    assert undefined.value is None
    assert undefined.reason == "1 of 11 documents has no finite score"


def test_whole_numbers_get_one_document_of_each_sign() -> None:
    values = np.array([[2.0], [1.0], [0.0], [0.0], [-1.0]])
    (estimate,) = interactions(values)
    padded = np.array([2, 1, 0, 0, -1, 1, -1])
    half_width = stats.norm.ppf(0.975) * padded.std() / 7**0.5
    assert estimate.value == pytest.approx(0.4)
    assert [estimate.low, estimate.high] == pytest.approx(
        [padded.mean() - half_width, padded.mean() + half_width]
    )
    (zero,) = interactions(np.zeros((20, 1)))
    assert zero.low < 0 < zero.high
    assert zero.p_value == 1

    values, weights = np.array([[1.0], [0.0], [-1.0]]), np.array([0.5, 0.25, 0.25])
    assert interactions(values, weights)[0].value == pytest.approx(0.25)
    assert interactions(np.empty((0, 1)))[0].reason == "no documents"


def _draw_interactions(rng: np.random.Generator, rates: tuple[float, ...], size: tuple[int, int]):
    """Interactions of documents from outcomes: intact, without one, the other, both."""
    baseline, first, second, joint = rates
    difficulty = rng.random(size)  # equal for all four, so that outcomes are paired

    def right(rate: float) -> np.ndarray:
        return (0.5 * difficulty + 0.5 * rng.random(size) < _threshold(rate)).astype(float)

    return right(first) + right(second) - right(baseline) - right(joint)


def _threshold(rate: float) -> float:
    """Where half the sum of two uniform numbers lies below with a probability."""
    return (rate / 2) ** 0.5 if rate <= 0.5 else 1 - ((1 - rate) / 2) ** 0.5


RATES = [
    (0.6, 0.5, 0.55, 0.45),  # adds up
    (0.9, 0.88, 0.5, 0.48),  # adds up, and is not symmetric
    (0.95, 0.94, 0.93, 0.92),  # next to no change, near 1
    (0.9, 0.88, 0.9, 0.3),  # redundant
    (0.8, 0.35, 0.4, 0.3),  # at the floor
    (0.05, 0.05, 0.04, 0.04),  # near 0
]


@pytest.mark.parametrize("documents", [12, 128])
@pytest.mark.parametrize("rates", RATES)
def test_intervals_hold_the_truth(rates: tuple[float, ...], documents: int) -> None:
    """Additive effects are rarely significant, even if the values are not symmetric."""
    baseline, first, second, joint = rates
    truth = first + second - baseline - joint
    values = _draw_interactions(np.random.default_rng(0), rates, (documents, 2000))
    assert values.mean() == pytest.approx(truth, abs=0.01)
    estimates = interactions(values)
    assert np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]) > 0.93
    significant_share = np.mean([estimate.p_value <= 0.05 for estimate in estimates])
    if abs(truth) < 1e-9:
        assert significant_share < 0.06
    elif documents == 128:
        assert significant_share > 0.95


def test_drops_that_add_up_are_predicted_by_their_sums() -> None:
    sums = np.array([0.1, 0.4, 0.2, 0.3])
    rank, share = additivity(sums, sums, (sums[None], sums[None]))
    assert (rank.value, share.value) == (pytest.approx(1), pytest.approx(1))
    joint = np.array([0.2, 0.3, 0.1, 0.4])
    rank, share = additivity(sums, joint, (sums[None], joint[None]))
    assert rank.value == pytest.approx(stats.spearmanr(sums, joint).statistic)
    # Not the square of a correlation: a sum that is always too large predicts badly.
    assert share.value == pytest.approx(1 - 0.04 / 0.05)
    assert additivity(sums, joint - 1, (sums[None], joint[None]))[1].value < -10


def test_what_cannot_be_predicted_has_a_reason() -> None:
    ascending, constant = np.arange(4.0), np.full(4, 0.1)
    for estimate in additivity(ascending, constant, (ascending[None], constant[None])):
        assert (
            estimate.reason
            == "all pairs of layers have equal joint drops, or equal sums of single drops"
        )


def estimate_growth(start_values, end_values, strata=None) -> Estimate:
    """Return the growth of a single column."""
    (estimate,) = growths(start_values[:, None], end_values[:, None], strata)
    return estimate


def test_darwins_plants() -> None:
    # Fisher (1935), chapter 3: heights of 15 pairs of maize, crossed against self-fertilised, in
    # eighths of an inch. Signed ranks of the log ratios by hand: two negative pairs.
    crossed = np.array([188, 96, 168, 176, 153, 172, 177, 163, 146, 173, 186, 168, 177, 184, 96.0])
    selfed = np.array([139, 163, 160, 160, 147, 149, 149, 122, 132, 144, 130, 144, 102, 124, 144.0])
    estimate = estimate_growth(selfed, crossed)
    assert estimate.value == pytest.approx(stats.gmean(crossed) / stats.gmean(selfed))
    logs = np.log(crossed / selfed)
    ranks = stats.rankdata(abs(logs))
    smaller_sum = min(ranks[logs < 0].sum(), ranks[logs > 0].sum())
    n_as_far = sum(
        min(total, 120 - total) <= smaller_sum
        for signs in itertools.product((0, 1), repeat=15)
        for total in [np.dot(signs, range(1, 16))]
    )
    assert estimate.p_value == pytest.approx(n_as_far / 2**15)


@pytest.mark.parametrize(
    ("n", "covers", "skewed"),
    [
        *((5, 0.92, False), (12, 0.95, False), (24, 0.95, False), (100, 0.95, False)),
        # Log ratios as skewed as an exponential distribution: too narrow for few documents.
        *((24, 0.92, True), (150, 0.95, True)),
    ],
)
def test_how_often_the_interval_covers(n: int, covers: float, skewed: bool, monkeypatch) -> None:
    monkeypatch.setattr(module, "RESAMPLES", 500)
    rng, n_covered = np.random.default_rng(n), 0
    for _ in range(300):
        logs = rng.exponential(0.3, n) - 0.3 if skewed else rng.normal(0, 0.3, n)
        estimate = estimate_growth(np.ones(n), np.exp(logs))
        n_covered += estimate.low <= 1 <= estimate.high
    # Four standard deviations to either side.
    assert n_covered / 300 == pytest.approx(covers, abs=4 * (covers * (1 - covers) / 300) ** 0.5)


def test_without_any_growth() -> None:
    estimate = estimate_growth(np.array([1.0, 3, 0.1]), np.array([1.0, 3, 0.1 + 1e-15]))
    assert (estimate.value, estimate.p_value) == (pytest.approx(1), 1)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_undefined_growth_has_a_reason(bad: float) -> None:
    usable, unusable = np.array([1.0, 2, 3]), np.array([1.0, bad, 3])
    for pair in ((usable, unusable), (unusable, usable)):
        estimate = estimate_growth(*pair)
        assert (estimate.value, estimate.low, estimate.p_value) == (None, None, None)
        reason = "start or end values are not positive and finite in 1 of 3 documents"
        assert estimate.reason == reason
    assert (
        estimate_growth(usable[:1], usable[:1]).reason
        == "a growth factor (end / start value) needs at least two documents, not 1"
    )
    assert (
        estimate_growth(usable[:0], usable[:0]).reason
        == "a growth factor (end / start value) needs at least two documents, not 0"
    )


def test_kruskal_and_walliss_own_example() -> None:
    # Bottles from three machines (Kruskal & Wallis 1952, table 1.1): H = 5.66 without the
    # correction, p = 0.059; the third has too few bottles for the approximation, so it is doubled.
    machine_a, machine_b = [340, 345, 330, 342, 338.0], [339, 333, 344.0]
    machine_c = [347, 343, 349, 355.0]
    assert growth_difference_p([np.array(x) for x in (machine_a, machine_b, machine_c)]) is None
    groups = [np.array(2 * x) for x in (machine_a, machine_b, machine_c)]
    assert growth_difference_p(groups) == pytest.approx(stats.kruskal(*groups).pvalue)
    ranks = stats.rankdata(np.concatenate(groups))
    means = [ranks[:10].mean(), ranks[10:16].mean(), ranks[16:].mean()]
    spread = sum(size * (mean - 12.5) ** 2 for size, mean in zip((10, 6, 8), means, strict=True))
    # Twelve pairs of ties take 12 (2³ − 2) / (24³ − 24) of the variance.
    statistic = 12 / (24 * 25) * spread / (1 - 12 * 6 / (24**3 - 24))
    assert growth_difference_p(groups) == pytest.approx(stats.chi2.sf(statistic, 2))


@pytest.mark.parametrize("tests", [1, 3, 29])
def test_with_one_document_fewer_nothing_can_be_shown(tests: int) -> None:
    min_documents = min_growth_documents(tests, 0.05)
    for documents, is_shown in ((min_documents - 1, False), (min_documents, True)):
        ratios = np.exp(np.random.default_rng(0).random((documents, tests)) + 1)
        estimates = growths(np.ones_like(ratios), ratios)
        adjusted = holm([estimate.p_value for estimate in estimates])
        assert [p < 0.05 for p in adjusted] == [is_shown] * tests
