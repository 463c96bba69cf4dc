"""A cell that an answer has stopped, on the page, in tables, in leaderboards and in trackers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.ablations import with_figures
from tests.helpers.answers import answer, run
from tracker.analysis.ranks.layers import layer_board
from tracker.analysis.ranks.proxies import agreements
from tracker.core.records import CellRecord
from tracker.report.page.sections import model_sections
from tracker.team.collect import merged
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.runs import mlflow_run
from tracker.tracking.runs import layer_run

from .conftest import build_cell

WHY = "stopped at the answer to 'top 2': 64 to 96 of 2000 documents were looked at, run by run"


def stopped(**changes: Any) -> CellRecord:
    """A cell whose layers 0 and 1 were looked at longer than the others."""
    cell = build_cell(n=64)
    longer = [
        one.model_copy(update={"n": 96}) if one.change.layer < 2 else one for one in cell.runs
    ]
    runs = [with_figures(one, mcnemar_p=None) for one in longer]
    answers = (run(one.change.layer, "+" if one.change.layer < 2 else "", n=one.n) for one in runs)
    found = answer("top 2", *answers, looked=96, measured=96)
    return build_cell(
        **{"n": 64, "runs": tuple(runs), "answer": found, "unfinished": WHY} | changes
    )


@pytest.fixture(scope="module")
def cell() -> CellRecord:
    return stopped()


def test_its_layers_are_not_ranked_beside_others(cell):
    whole = build_cell("piqa")
    board = layer_board([cell, whole])
    assert [one.benchmark.name for one in board.cells] == ["piqa"]
    assert board.left_out == {"arc_easy · 0-shot · stopped at an answer": WHY}
    assert agreements([cell, whole]) == agreements([whole])
    assert not layer_board([cell]).layers
    (section,) = model_sections([cell], {})
    assert "headline" not in section.charts


def test_an_answer_stands_beside_the_whole_cell_and_another_answer(cell):
    whole = build_cell(n=2000)
    assert merged([cell, whole]) == [cell, whole]
    other = stopped(answer=cell.answer.model_copy(update={"question": "sign"}))
    assert merged([cell, other]) == [cell, other]
    assert merged([cell, cell]) == [cell]


def test_a_run_is_updated_when_its_part_of_the_answer_changes(cell):
    """Its figures are the same, its tags are not."""
    runs = [one.model_copy(update={"chosen": not one.chosen}) for one in cell.answer.runs]
    other = stopped(answer=cell.answer.model_copy(update={"runs": tuple(runs)}))
    for digest in (
        lambda c: mlflow_run(layer_run(c, c.runs[3]), "p").digest,
        lambda c: layer_run(c, c.runs[3]).digest(),
    ):
        assert digest(cell) == digest(cell)
        assert digest(cell) != digest(other)
    assert run_key(cell, "cell") == run_key(build_cell(), "cell"), "continued, it is the same run"
