"""A cell that an answer has stopped, on the page, in tables, in leaderboards and in trackers."""

from __future__ import annotations

import html
from typing import Any

import pytest

from tests.helpers.answers import answer, run
from tracker.analysis.ranks.layers import layer_board
from tracker.analysis.ranks.proxies import agreements
from tracker.cli.printing import print_cell
from tracker.core.records import CellRecord
from tracker.report.frames import layer_frame
from tracker.report.page.html import render_page
from tracker.report.page.sections import model_sections
from tracker.team.collect import merged
from tracker.tracking.figures import answer_figures
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.runs import mlflow_run
from tracker.tracking.runs import cell_run, intact_run, layer_run
from tracker.tracking.wandb.writing import labels_of

from .conftest import build_cell

WHY = "stopped at the answer to 'top 2': 64 to 96 of 2000 documents were looked at, run by run"


def stopped(**changes: Any) -> CellRecord:
    """A cell whose layers 0 and 1 were looked at longer than the others."""
    cell = build_cell(n=64)
    longer = [
        one.model_copy(update={"n": 96}) if one.change.layer < 2 else one for one in cell.runs
    ]
    runs = [one.model_copy(update={"mcnemar_p": None}) for one in longer]
    answers = (run(one.change.layer, "+" if one.change.layer < 2 else "", n=one.n) for one in runs)
    found = answer("top 2", *answers, looked=96, measured=96)
    return build_cell(
        **{"n": 64, "runs": tuple(runs), "answer": found, "reasons": {"n": WHY}} | changes
    )


@pytest.fixture(scope="module")
def cell() -> CellRecord:
    return stopped()


def test_it_is_stopped_and_never_complete(cell: CellRecord) -> None:
    assert cell.is_stopped
    assert not cell.is_complete
    assert cell.documents == "64 to 96 documents drawn at random (seed 1234), stopped at an answer"
    assert cell.title.endswith("0-shot · drawn at random (seed 1234), stopped at an answer")
    assert cell.view == "intact", "with more documents it is the same view"
    # Neither while it is not answered yet, nor once all is measured.
    running = stopped(answer=cell.answer.model_copy(update={"over": False}))
    assert (running.is_raced, running.is_stopped) == (True, False)
    assert running.documents == "64 to 96 documents drawn at random (seed 1234)"
    assert stopped(reasons={}).is_complete


def test_the_page_says_the_answer_and_what_figures_rest_on(cell: CellRecord) -> None:
    text = html.unescape(render_page([cell], {}))
    assert (
        "top 2: the largest drops are those of layers 0 and 1 (95 % confidence; 96 of 2,000 "
        "documents, 40 % of the layer passes)." in text
    )
    assert "arc_easy · 0-shot · stopped at an answer" in text
    assert "with its confidence sequence at 95 %" in text
    assert "measured so far" not in text
    assert "Incomplete" not in text


def test_the_terminal_and_the_frame_say_it(cell: CellRecord, capsys) -> None:
    print_cell(cell)
    said = capsys.readouterr().out
    assert "confidence sequence at 95 %" in said
    assert "Power" not in said
    assert said.rstrip().endswith(
        "(95 % confidence; 96 of 2,000 documents, 40 % of the layer passes)"
    )
    frame = layer_frame([cell, build_cell("piqa")])
    assert frame.groupby("benchmark")["interval"].first().to_dict() == {
        "arc_easy": "confidence sequence at 95 %",
        "piqa": "95 % interval",
    }
    assert frame["until"].dropna().unique().tolist() == ["top 2"]


def test_its_layers_are_not_ranked_beside_others(cell: CellRecord) -> None:
    whole = build_cell("piqa")
    board = layer_board([cell, whole])
    assert [one.benchmark.name for one in board.cells] == ["piqa"]
    assert board.left_out == {"arc_easy · 0-shot · stopped at an answer": WHY}
    assert agreements([cell, whole]) == agreements([whole])
    assert not layer_board([cell]).layers
    (section,) = model_sections([cell], {})
    assert "headline" not in section.charts


def test_an_answer_stands_beside_the_whole_cell_and_another_answer(cell: CellRecord) -> None:
    whole = build_cell(n=2000)
    assert merged([cell, whole]) == [cell, whole]
    other = stopped(answer=cell.answer.model_copy(update={"question": "sign"}))
    assert merged([cell, other]) == [cell, other]
    assert merged([cell, cell]) == [cell]


def test_trackers_mark_it(cell: CellRecord) -> None:
    of_cell = mlflow_run(cell_run(cell))
    marks = {
        "tracker.until": "top 2",
        "tracker.answered": "true",
        "tracker.stopped": "true",
        "tracker.looked": "96 of 2000",
        "tracker.interval": "confidence sequence at 95 %",
        "tracker.missing": WHY,
    }
    assert marks.items() <= of_cell.tags.items()
    assert "largest drops are those of layers 0 and 1" in of_cell.tags["tracker.answer"]
    assert of_cell.tags["tracker.answer"] in of_cell.tags["mlflow.note.content"]
    assert of_cell.points["answer/documents", 0] == 96
    assert of_cell.points["answer/layer_passes", 0] == 40
    group = cell.answer.model_copy(update={"measured": 128})
    assert answer_figures(group)["answer/documents"] == 128, "what it took"
    one, other = (mlflow_run(layer_run(cell, cell.runs[place]), "parent") for place in (0, 5))
    assert (one.tags["tracker.chosen"], other.tags["tracker.chosen"]) == ("true", "false")
    assert "on 96 documents drawn at random (seed 1234), stopped" in one.tags["mlflow.note.content"]
    assert "(confidence sequence at 95 % " in one.tags["mlflow.note.content"]
    assert mlflow_run(intact_run(cell), "parent").tags["tracker.stopped"] == "true"

    found = cell_run(cell)
    labels = labels_of(cell, found.name, found.kind)
    assert labels["tags"] == ("SmolLM2-135M-Instruct", "arc_easy", "stopped")
    assert found.config["tracker"]["until"] == "top 2"
    assert found.config["tracker"]["stopped"] == "true"
    assert found.figures["answer/documents_of"] == 2000
    assert found.outcomes.aliases == ("stopped",)
    assert layer_run(cell, cell.runs[0]).config["tracker"]["chosen"] == "true"


def test_a_run_is_updated_when_its_part_of_the_answer_changes(cell: CellRecord) -> None:
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
