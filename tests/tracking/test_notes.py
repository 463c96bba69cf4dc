"""What the note of a run says of its layer."""

from __future__ import annotations

from tests.report.conftest import build_cell
from tracker.analysis.claims import answer, claims, shown_runs
from tracker.analysis.ranks.parts import cell_answer
from tracker.team.reports import board_text
from tracker.tracking.runs import AVERAGE, described, layer_note


def test_a_note_says_what_may_be_chance_among_all_runs_of_its_cell() -> None:
    """Was: what one interval for itself says."""
    cell = build_cell()
    loud, quiet, rises = (
        cell.runs[layer].model_copy(
            update={
                "accuracy_drop": drop,
                "accuracy_drop_low": drop - 0.05,
                "accuracy_drop_high": drop + 0.05,
                "mcnemar_p": p,
            }
        )
        for layer, (drop, p) in enumerate([(0.2, 1e-9), (0.06, 0.02), (-0.02, 0.6)])
    )
    cell = cell.model_copy(update={"runs": (loud, quiet, rises, *cell.runs[3:])})
    assert layer_note(cell, loud).endswith("it falls by 20.0 pp (95 % interval 15.0 to 25.0).")
    chance = (
        f", which may be chance among {len(cell.runs)} runs of this benchmark alone; {AVERAGE}."
    )
    assert layer_note(cell, quiet).endswith(
        f"it falls by 6.0 pp (95 % interval 1.0 to 11.0){chance}"
    )
    assert layer_note(cell, rises).endswith(
        f"it rises by 2.0 pp (95 % interval −3.0 to 7.0){chance}"
    )


def test_a_note_says_what_the_page_says_where_other_drops_are_undefined() -> None:
    """Was: among the runs with an interval alone."""
    figures = ("accuracy_drop", "accuracy_drop_low", "accuracy_drop_high", "mcnemar_p")
    quiet, *others = build_cell().runs
    quiet = quiet.model_copy(update=dict(zip(figures, (0.07, 0.02, 0.12, 0.004), strict=True)))
    undefined = [run.model_copy(update=dict.fromkeys(figures)) for run in others]
    cell = build_cell().model_copy(update={"runs": (quiet, *undefined)})
    assert shown_runs(cell, cell.runs)[quiet.change] == "open"
    assert layer_note(cell, quiet).endswith(
        f"be chance among 30 runs of this benchmark alone; {AVERAGE}."
    )


def test_the_note_and_the_name_of_a_cells_run_begin_with_what_it_is_read_for() -> None:
    """Was: its note lacked the answer, and lists cut names to the model's, which is all alike."""
    cell = build_cell()
    whole = described(cell, (), {}, answer=cell_answer(cell))[-1]
    assert whole.note.endswith(
        f"{answer(claims([cell]))} This rests on this benchmark alone; {AVERAGE}."
    )
    assert whole.name == "arc_easy · 0-shot · SmolLM2-135M-Instruct"


def test_the_note_of_a_leaderboard_has_the_answer_over_its_benchmarks() -> None:
    """Was: empty."""
    cells = [build_cell(), build_cell("piqa")]
    assert answer(claims(cells)) in board_text(cells)
