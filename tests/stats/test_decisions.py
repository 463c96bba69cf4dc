"""Choices, margins and shares against lm-eval's argmax and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tracker.stats.decisions import choices, margins, shares

NONE = math.nan
DRAW = np.random.default_rng(5)


def drawn(documents: int = 300, options: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, of documents that have one to five options, and their gold ones."""
    scores = np.round(DRAW.normal(size=(documents, options)), 1)
    counts = DRAW.integers(1, options + 1, documents)
    scores[np.arange(options) >= counts[:, None]] = NONE
    gold = (DRAW.random(documents) * counts).astype(int).astype(float)
    gold[::7] = NONE
    return scores, gold


def test_a_worked_example() -> None:
    scores = np.array([[-3.0, -1.0, -2.0], [-1.0, -1.0, NONE], [-4.0, -2.5, -9.0]])
    assert choices(scores).tolist() == [1, 0, 1]
    assert margins(scores, np.array([1, 1, 0])).tolist() == [1.0, 0.0, -1.5]
    assert shares(choices(scores), 3).tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert shares(np.array([2, NONE, 0, 2, 2]), 4).tolist() == [0.25, 0, 0.75, 0]


def test_the_first_of_the_best_is_taken_as_lm_eval_does() -> None:
    scores, _ = drawn()
    for row, taken in zip(scores, choices(scores), strict=True):
        assert taken == np.argmax(row[~np.isnan(row)])


def test_margins_are_those_of_a_plain_loop() -> None:
    scores, gold = drawn()
    for row, right, margin in zip(scores, gold, margins(scores, gold), strict=True):
        known = [score for score in row if score == score]
        if right != right or len(known) == 1:
            assert math.isnan(margin)
            continue
        mine = known.pop(int(right))
        assert margin == pytest.approx(mine - max(known))
        # It is positive exactly where the gold option is the only best one.
        assert (margin > 0) == (mine > max(known))
