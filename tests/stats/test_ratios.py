"""Ratios of sums against sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tracker.stats.accuracy import SCALES, document_ratios, ratio_of_sums, weights_by_task

SUMS = np.array([-30.0, -2.0, 0.0, -9.0])
UNITS = np.array([10.0, 4.0, 0.0, 6.0])


@pytest.mark.parametrize("how", list(SCALES))
def test_the_weighted_mean_of_documents_is_the_ratio_of_sums(how: str) -> None:
    weights = weights_by_task(["a"] * 4, True, UNITS)
    mean = weights @ document_ratios(how, SUMS, UNITS)
    assert mean == pytest.approx(ratio_of_sums(how, list(zip(SUMS, UNITS, strict=True))))


def test_worked_examples() -> None:
    """41 nats in 20 bytes are 41 / 20 / ln 2 = 2.96 bits per byte."""
    pairs = list(zip(SUMS, UNITS, strict=True))
    assert ratio_of_sums("ratio", pairs) == -2.05
    assert ratio_of_sums("bits_per_byte", pairs) == pytest.approx(2.9575, abs=1e-4)
    assert document_ratios("ratio", SUMS, UNITS).tolist() == [-3, -0.5, 0, -1.5]
    assert document_ratios("ratio", np.array([-0.5]), np.array([1])).tolist() == [-0.5]


def test_without_units() -> None:
    assert math.isnan(ratio_of_sums("ratio", [(0, 0)]))
    found = document_ratios(
        "ratio", np.array([1.0, math.nan, math.nan]), np.array([0, 2, math.nan])
    )
    assert np.isnan(found).all()
