"""Test the runs of sublayers, spans, removed layers and parts of a benchmark."""

from __future__ import annotations

from tests.report.conftest import build_cell
from tracker.analysis.claims import claims, shown_runs
from tracker.core.estimates import Estimate
from tracker.report.wording import answer
from tracker.team.reports import board_text
from tracker.tracking.figures import curve_name, is_curve
from tracker.tracking.mlflow.runs import mlflow_run
from tracker.tracking.runs import AVERAGE, MANY, cell_run, layer_note, layer_run, one_by_one
from tracker.tracking.wandb.writing import labels_of

from .conftest import cell_record, of_kind


def test_whole_layers_stay_runs_of_their_own_beside_very_many_spans():
    """Was: they were counted with the spans, and were left behind where they had been published."""
    cell = cell_record()
    spans = [of_kind("layer", n % 20, 2 + n // 20, f"layers:{n}") for n in range(MANY + 1)]
    whole = cell.model_copy(update={"runs": (*cell.runs, *spans)})
    assert one_by_one(whole, "auto") == [*cell.runs]
    assert one_by_one(whole, "all") == [*whole.runs]
    few = cell.model_copy(update={"runs": (*cell.runs, *spans[1:])})
    assert one_by_one(few, "auto") == [*few.runs]


def test_complete_means_all_runs_and_all_documents():
    """Was: a cell that lacked documents, but no run, was published as complete."""
    whole = cell_record()
    documents = "64 of 160 documents are measured so far"
    growing = cell_record(n=64).model_copy(update={"unfinished": documents})
    both = cell_record(layers=(0, 1)).model_copy(update={"unfinished": documents})
    for cell, lacks in (
        (whole, []),
        (growing, [documents]),
        (cell_record(layers=(0, 1)), ["layer 2", "layer 3"]),
        (both, [documents, "layer 2", "layer 3"]),
    ):
        assert cell.is_complete == (not lacks)
        outcomes = cell_run(cell).outcomes
        assert ("complete" in outcomes.aliases) == (not lacks)
        assert ("incomplete" in outcomes.aliases) == bool(lacks)
        assert outcomes.metadata["missing"] == lacks
        tags = mlflow_run(cell_run(cell)).tags
        assert tags.get("tracker.missing", "") == ", ".join(lacks)


def test_curves_are_told_from_other_metrics():
    for kind in (("layer", 1, 4), ("attention", 1, 1), ("mlp", 1, 4), ("layer", 1, 1)):
        assert is_curve(curve_name(of_kind(*kind, "").change, "accuracy_drop"))
    assert is_curve("mean/accuracy_drop")
    others = ("meen/accuracy_drop", "n", "baseline_accuracy", "metric/accuracy")
    assert not any(map(is_curve, (*others, "baseline_metric/accuracy")))


# Was: names grew with the removed layers, beyond what W&B takes.
def test_names_that_are_too_long_are_cut_and_stay_apart():
    cell = cell_record(layers=(0,))
    model = cell.model.model_copy(update={"name": "a-model-with-a-long-name-" * 3})
    benchmark = cell.benchmark.model_copy(update={"name": "größe_" * 20})
    labels = []
    for many in (16, 60):
        changes = {"model": model, "benchmark": benchmark, "removed": tuple(range(2, 2 + many))}
        one = cell.model_copy(update=changes)
        for run in (cell_run(one), layer_run(one, one.runs[0])):
            labels.append(labels_of(one, run.name, run.kind))
    assert {len(each[name]) for each in labels for name in ("name", "group")} <= {*range(129)}
    assert len({each["group"] for each in labels}) == 2
    assert len({each["name"] for each in labels}) == 4  # each named by what it lacks


def test_a_note_says_what_the_page_says_where_other_drops_are_undefined():
    """Was: among the runs with an interval alone."""
    quiet, *others = build_cell().runs
    quiet = quiet.model_copy(update={"drop": Estimate(0.07, 0.02, 0.12, 0.004)})
    undefined = [run.model_copy(update={"drop": Estimate(None)}) for run in others]
    cell = build_cell().model_copy(update={"runs": (quiet, *undefined)})
    assert shown_runs(cell, cell.runs)[quiet.change] == "open"
    assert layer_note(cell, quiet).endswith(
        f"be chance among 30 runs of this benchmark alone; {AVERAGE}."
    )


def test_the_note_of_a_leaderboard_has_the_answer_over_its_benchmarks():
    """Was: empty."""
    cells = [build_cell(), build_cell("piqa")]
    assert answer(claims(cells)) in board_text(cells)
