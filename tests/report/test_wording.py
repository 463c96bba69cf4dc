"""Numbers and sentences as people read them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tracker.core import formats
from tracker.report import wording
from tracker.report.export import export, figures, frames
from tracker.report.page.html import render_page
from tracker.report.tables import layer_table, provenance_table

from .conftest import as_read, build_cell


def test_numbers_in_front_of_people() -> None:
    assert formats.points(-0.0001) == "0.0"
    assert formats.points(-0.0316) == "−3.2"
    assert formats.p_value(0.000034) == "3e−5"
    assert formats.p_value(0.0) == "0.000"
    assert formats.p_value(0.0123) == "0.012"
    figures = [1083.4, 999.6, 999.4, 12.34, -0.01234]
    assert list(map(formats.three_digits, figures)) == ["1,083", "1,000", "999", "12.3", "−0.0123"]


def test_drawn_documents_are_named_wherever_cells_are(tmp_path: Path) -> None:
    """Two cells that differ in nothing else; the figures of one are not those of the other."""
    first = build_cell()
    drawn = first.model_copy(update={"sample_seed": 1234, "view": "intact-sample-160-seed-1234"})
    says = "drawn at random (seed 1234)"
    facts = [
        {row[0].text: row[1].text for row in as_read(provenance_table(c)).rows}
        for c in (first, drawn)
    ]
    assert [f["documents measured"] for f in facts] == ["160", f"160 {says}"]
    assert first.place != drawn.place
    page = render_page([first, drawn], {})
    for section in (1, 2):
        assert page.count(f'id="model-1-cell-{section}"') == 1
    for frame in frames([first, drawn]).values():
        if "sample_seed" in frame:
            assert set(frame.sample_seed.dropna()) == {1234}
            assert frame.sample_seed.isna().sum() == len(frame) / 2
    for form in ("md", "tex"):
        (file,) = export([first, drawn], form, tmp_path / f"report.{form}")
        assert says in file.read_text()
    assert len(figures([first, drawn])) == len(figures([first])) * 2 - 1, "one heat map a model"


def test_power_is_said_under_every_table_of_runs() -> None:
    """By another road: sqrt(2 z-values) of the normal test, from the shares that change."""
    cell = build_cell(n=160)
    says = wording.power_sentence(cell, cell.runs)
    assert says in layer_table(cell).notes
    shares = sorted(0.12 * 159 / 160 + run.accuracy_drop**2 for run in cell.runs)
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
