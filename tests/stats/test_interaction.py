"""Interactions: against every sign, drawn documents, and drops that are known."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from tracker.stats.effects import additivity, interactions, sign_flip_p


def test_the_exact_test_is_that_of_all_signs() -> None:
    dice = np.random.default_rng(0)
    for _ in range(40):
        values = dice.integers(-2, 3, size=dice.integers(1, 10))
        sums = [np.dot(signs, values) for signs in product((-1, 1), repeat=len(values))]
        expected = np.mean(np.abs(sums) >= abs(values.sum()))
        assert sign_flip_p(values.astype(float)) == pytest.approx(expected)

    # Of ones it is that of McNemar.
    ones = np.array([1.0] * 9 + [-1.0] * 2 + [0.0] * 30)
    assert sign_flip_p(ones) == pytest.approx(stats.binomtest(9, 11).pvalue)


def test_drawn_signs_are_near_all_signs() -> None:
    values = np.random.default_rng(1).normal(0.5, 1, size=(11, 3))
    values[0, 2] = np.nan
    one, other, undefined = interactions(values)
    for found, column in ((one, values[:, 0]), (other, values[:, 1])):
        sums = [np.dot(signs, column) for signs in product((-1, 1), repeat=11)]
        expected = np.mean(np.abs(sums) >= abs(column.sum()) - 1e-9)
        assert found.p_value == pytest.approx(expected, abs=0.01)
        assert found.value == pytest.approx(column.mean())
        low, high = stats.t.interval(0.95, 10, column.mean(), stats.sem(column))
        assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert undefined.value is None
    assert undefined.reason == "1 of 11 documents have no finite score"


def test_whole_numbers_get_one_document_of_each_sign() -> None:
    values = np.array([[2.0], [1.0], [0.0], [0.0], [-1.0]])
    (found,) = interactions(values)
    padded = np.array([2, 1, 0, 0, -1, 1, -1])
    half = stats.norm.ppf(0.975) * padded.std() / 7**0.5
    assert found.value == pytest.approx(0.4)
    assert [found.low, found.high] == pytest.approx([padded.mean() - half, padded.mean() + half])
    (nothing,) = interactions(np.zeros((20, 1)))
    assert nothing.low < 0 < nothing.high
    assert nothing.p_value == 1

    values, weights = np.array([[1.0], [0.0], [-1.0]]), np.array([0.5, 0.25, 0.25])
    assert interactions(values, weights)[0].value == pytest.approx(0.25)
    assert interactions(np.empty((0, 1)))[0].reason == "no documents"


def _drawn(dice: np.random.Generator, rates: tuple[float, ...], size: tuple[int, int]):
    """Interactions of documents from outcomes: intact, without one, the other, both."""
    baseline, first, second, both = rates
    hard = dice.random(size)  # equal for all four, so that outcomes are paired

    def right(rate: float) -> np.ndarray:
        return (0.5 * hard + 0.5 * dice.random(size) < _cut(rate)).astype(float)

    return right(first) + right(second) - right(baseline) - right(both)


def _cut(rate: float) -> float:
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
    baseline, first, second, both = rates
    truth = first + second - baseline - both
    drawn = _drawn(np.random.default_rng(0), rates, (documents, 2000))
    assert drawn.mean() == pytest.approx(truth, abs=0.01)
    found = interactions(drawn)
    assert np.mean([each.low <= truth <= each.high for each in found]) > 0.93
    significant = np.mean([each.p_value <= 0.05 for each in found])
    if abs(truth) < 1e-9:
        assert significant < 0.06
    elif documents == 128:
        assert significant > 0.95


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
    some, same = np.arange(4.0), np.full(4, 0.1)
    for found in additivity(some, same, (some[None], same[None])):
        assert found.reason == "the sums or the joint drops are all the same"
