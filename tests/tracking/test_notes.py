"""What the note of a run says of its layer."""

from __future__ import annotations

from tests.report.conftest import build_cell
from tracker.analysis.claims import answer, claims, shown_runs
from tracker.core.estimates import Estimate
from tracker.team.reports import board_text
from tracker.tracking.runs import AVERAGE, layer_note


def test_a_note_says_what_the_page_says_where_other_drops_are_undefined() -> None:
    """Was: among the runs with an interval alone."""
    quiet, *others = build_cell().runs
    quiet = quiet.model_copy(update={"drop": Estimate(0.07, 0.02, 0.12, 0.004)})
    undefined = [run.model_copy(update={"drop": Estimate(None)}) for run in others]
    cell = build_cell().model_copy(update={"runs": (quiet, *undefined)})
    assert shown_runs(cell, cell.runs)[quiet.change] == "open"
    assert layer_note(cell, quiet).endswith(
        f"be chance among 30 runs of this benchmark alone; {AVERAGE}."
    )


def test_the_note_of_a_leaderboard_has_the_answer_over_its_benchmarks() -> None:
    """Was: empty."""
    cells = [build_cell(), build_cell("piqa")]
    assert answer(claims(cells)) in board_text(cells)
