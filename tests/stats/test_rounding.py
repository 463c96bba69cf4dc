"""Test the effect of rounding on simulated scores, where it is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tracker.stats.decisions import choices, least_chance, movement, shift, turning, within

NONE = math.nan
DOCUMENTS, OPTIONS = 4000, 4
MOVED = 0.01
"""By what share of itself each option moves, from what it is to what is computed."""


def computed(exact: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return exact * (1 + MOVED * draw.normal(size=exact.shape))


@pytest.fixture(scope="module")
def two_ways() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores computed in two ways, and gold options: some documents have fewer options."""
    draw = np.random.default_rng(7)
    exact = -draw.gamma(4, 3, size=(DOCUMENTS, 1)) + draw.normal(0, 1.5, size=(DOCUMENTS, OPTIONS))
    exact[: DOCUMENTS // 4, -1] = NONE
    gold = draw.integers(0, OPTIONS - 1, DOCUMENTS).astype(float)
    return computed(exact, draw), computed(exact, draw), gold


def test_the_movement_is_found_from_a_few_documents(two_ways) -> None:
    """Both ways move, so that their difference moves by the root of two as much."""
    one, other, _ = two_ways
    assert movement(one, other) == pytest.approx(math.sqrt(2) * MOVED, rel=0.03)
    few = [movement(one[i : i + 8], other[i : i + 8]) for i in range(0, DOCUMENTS, 8)]
    assert np.quantile(few, 0.05) > 0.6 * math.sqrt(2) * MOVED


def test_as_many_judgements_turn_round_as_are_expected_and_nearly_all_are_counted(two_ways) -> None:
    one, other, gold = two_ways
    chances = turning(one, gold, movement(one, other))
    turned = (choices(one) == gold) != (choices(other) == gold)
    assert turned.sum() > 40, "there is something to count"
    assert chances.sum() == pytest.approx(turned.sum(), rel=0.2)
    assert (chances[turned] > least_chance()).mean() > 0.95
    assert turned.sum() < within(chances) < 6 * turned.sum()


def test_accuracies_computed_in_two_ways_are_as_far_apart_as_is_said(two_ways) -> None:
    one, other, gold = two_ways
    size = 100
    chances = turning(one, gold, movement(one, other)).reshape(-1, size)
    apart = ((choices(one) == gold).astype(float) - (choices(other) == gold)).reshape(-1, size)
    said = [shift(some, np.full(size, 1 / size)) for some in chances]
    held = np.abs(apart.mean(axis=1)) <= said
    assert len(held) == 40
    assert held.sum() >= 36


@pytest.mark.parametrize(
    ("scores", "again"),
    [
        ([[-1.0, NONE], [-2.0, NONE]], [[-1.5, NONE], [-2.5, NONE]]),
        ([[-1.0, -2.0]], [[-1.0, -2.0]]),
        ([[0.0, 0.0]], [[0.0, 0.0]]),
        (np.empty((0, 4)), np.empty((0, 4))),
    ],
    ids=["one option each", "nothing has moved", "nothing to move", "no document"],
)
def test_no_movement_is_not_a_movement_of_zero(scores, again) -> None:
    assert movement(np.array(scores), np.array(again)) is None


def test_what_has_no_margin_has_no_chance() -> None:
    scores = np.array([[-1.0, -2.0], [-1.0, NONE], [-3.0, -3.0]])
    found = turning(scores, np.array([NONE, 0, 1]), 0.1)
    assert np.isnan(found).tolist() == [True, True, False]
    assert found[2] == 0.5, "a tie is decided by rounding alone"
    assert within(found) == 1
