"""Paired outcomes against sums that are written out document by document."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tracker.analysis.paired import PairedOutcomes
from tracker.stats.accuracy import accuracy_drop

DICE = np.random.default_rng(0)
WEIGHTS = np.array([0.1, 0.2, 0.3, 0.4])


def test_right_and_wrong_are_tested_as_such_of_a_loss_too() -> None:
    before, after = np.array([0.0] * 8), np.array([[1.0]] * 6 + [[0.0]] * 2)
    even = np.full(8, 1 / 8)
    paired = PairedOutcomes(before, after, even, higher_is_better=False)
    assert paired.drop(0).p_value == 2 / 2**6
    assert paired.drop(0) == accuracy_drop(after[:, 0], before, even)
    assert paired.drop_sd(0).value == pytest.approx(np.std(paired.drops, ddof=1))


def test_a_document_without_an_outcome_has_no_drop_and_leaves_no_estimate() -> None:
    before = np.array([1.0, math.nan, 1.0, 0.0])
    after = np.array([[1.0, 0.0], [0.0, 0.0], [math.nan, 0.0], [0.0, 0.0]])
    paired = PairedOutcomes(before, after, WEIGHTS)
    assert np.isnan(paired.drops).tolist() == [[0, 0], [1, 1], [1, 0], [0, 0]]
    assert paired.drop(0).value is None
    assert paired.drop(0).reason == "2 of 4 documents have no finite score"
    assert paired.drop(1).reason == "1 of 4 documents has no finite score"
