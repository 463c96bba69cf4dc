"""Tables keep layers apart and never show a number that is not one."""

from __future__ import annotations

import pytest

from tracker.core.formats import three_digits
from tracker.core.tables import EntryText
from tracker.report import tables

from .conftest import as_read, build_cell, with_layer


def test_layers_with_different_documents_show_them() -> None:
    table = as_read(tables.layer_table(with_layer(build_cell(), 3, n=80)))
    column = table.labels.index("documents")
    assert [row[column].text for row in table.rows[2:5]] == ["160", "80", "160"]


def test_nan_is_a_dash_with_a_reason() -> None:
    table = as_read(tables.layer_table(with_layer(build_cell(), 0, cosine_score=float("nan"))))
    column = table.labels.index("cosine score (1 − cos)")
    assert table.rows[0][column] == EntryText("–", "not a finite number (nan)")
    assert (
        "cosine score (1 − cos): undefined for layer 0: not a finite number (nan)." in table.notes
    )


def test_an_overview_without_numbers_says_why() -> None:
    cell = build_cell(
        baseline_accuracy=None,
        runs=(),
        correlations=(),
        reasons={"baseline_accuracy": "no document was scored"},
    )
    table = as_read(tables.overview_table([cell]))
    assert [value.text for value in table.rows[0][3:]] == ["–", "25.0", "–", "–", "–"]
    assert table.notes == (
        f"{cell.title}: Spearman is undefined: not computed.",
        f"{cell.title}: the baseline accuracy is undefined: no document was scored.",
    )


@pytest.mark.parametrize(
    ("value", "written"),
    [(1083.4, "1,083"), (999.6, "1,000"), (999.4, "999"), (12.34, "12.3"), (-0.01234, "−0.0123")],
)
def test_thousands_are_written_out(value: float, written: str) -> None:
    assert three_digits(value) == written
