"""Numbers and sentences as people read them."""

from __future__ import annotations

import re

import pytest

from tracker.core import formats
from tracker.report import wording
from tracker.report.tables import layer_table

from .conftest import build_cell


def test_numbers_in_front_of_people() -> None:
    assert formats.points(-0.0001) == "0.0"
    assert formats.points(-0.0316) == "−3.2"
    assert formats.p_value(0.000034) == "3e−5"
    assert formats.p_value(0.0) == "0.000"
    assert formats.p_value(0.0123) == "0.012"
    figures = [1083.4, 999.6, 999.4, 12.34, -0.01234]
    assert list(map(formats.three_digits, figures)) == ["1,083", "1,000", "999", "12.3", "−0.0123"]


def test_power_is_said_under_every_table_of_runs() -> None:
    """By another road: sqrt(2 z-values) of the normal test, from the shares that change."""
    cell = build_cell(n=160)
    says = wording.power_sentence(cell, cell.runs)
    assert says in layer_table(cell).notes
    shares = sorted(0.12 * 159 / 160 + run.drop.value**2 for run in cell.runs)
    middle = (shares[14] + shares[15]) / 2
    found = re.fullmatch(
        r"The smallest accuracy drop that 160 documents reveal, with 80 % power \(two-sided 5 %, "
        r"paired, 30 runs together\): (.+) pp under the median removal, (.+) pp under the one that "
        r"changes most\.",
        says,
    )
    for change, share in zip(found.groups(), (middle, shares[-1]), strict=True):
        assert float(change) == pytest.approx(
            100 * (3.144 + 0.842) * (share / 160) ** 0.5, rel=0.05
        )
    one = wording.power_sentence(cell, cell.runs[:1])
    assert "median" not in one
    assert "together" not in one
    loss = cell.model_copy(update={"higher_is_better": False, "metric": "bits_per_byte"})
    assert wording.power_sentence(loss, cell.runs).endswith("under the one that changes most.")
