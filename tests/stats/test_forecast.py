"""Forecasts of what a race takes, against races over the population itself."""

from __future__ import annotations

import numpy as np
import pytest

from tracker.core.questions import question
from tracker.stats.stopping import Race, forecast

COSTS = [0.5, 0.3, 0.12, 0.05, 0.02]


def lost(documents: int) -> np.ndarray:
    """Documents that five layers lose, each its share, and win: some of those that are wrong."""
    dice = np.random.default_rng(3)
    draw, wrong = dice.random((documents, len(COSTS))), dice.random((documents, 1)) < 0.1
    return np.where(wrong, -1.0 * (draw > 0.7), draw < COSTS)


def raced(text: str, values: np.ndarray) -> tuple[int, np.ndarray]:
    race, at = Race(question(text), *values.shape), 0
    while at < len(values) and not race.standing.answered:
        race.look(values[at : at + 32])
        at += 32
    return min(at, len(values)), race.bounds.seen


@pytest.mark.parametrize("text", ["top 2", "drop within 8 pp"])
def test_from_all_documents_it_is_what_random_orders_take(text: str) -> None:
    values = lost(800)
    found = forecast(question(text), values, 800)
    dice = np.random.default_rng(0)
    orders = [raced(text, dice.permutation(values)) for _ in range(24)]
    looked, seen = (np.array(each) for each in zip(*orders, strict=True))
    assert 32 < np.median(looked) < 800
    assert np.median(found.looked) == pytest.approx(np.median(looked), rel=0.2)
    assert found.seen.mean(axis=0) == pytest.approx(seen.mean(axis=0), rel=0.25)
    assert found.answered.all()


def test_an_exact_tie_is_left_open_by_all_documents() -> None:
    tie = np.zeros((40, 2))
    found = forecast(question("top 1"), tie, 100, draws=3)
    assert found.looked.tolist() == [100] * 3
    assert found.seen.tolist() == [[100, 100]] * 3
    assert not found.answered.any()
