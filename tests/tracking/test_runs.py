"""Test the runs of sublayers, spans, removed layers and parts of a benchmark."""

from __future__ import annotations

from tests.report.conftest import build_cell
from tracker.analysis.claims import run_verdicts
from tracker.schema.estimates import Estimate
from tracker.tracking.figures import curve_name, is_curve
from tracker.tracking.mlflow.runs import mlflow_run
from tracker.tracking.runs import (
    AVERAGE_NOTE,
    MAX_OWN_RUNS,
    describe_cell,
    describe_run,
    individual_runs,
    layer_note,
)
from tracker.tracking.wandb.writing import run_labels

from .conftest import cell_record, run_of_kind


def test_layers_stay_separate_runs_beside_many_spans():
    """Was: they were counted with the spans, and were left behind where they had been published."""
    cell = cell_record()
    numbers = range(MAX_OWN_RUNS + 1)
    spans = [run_of_kind("layer", n % 20, 2 + n // 20, f"layers:{n}") for n in numbers]
    many_cell = cell.model_copy(update={"runs": (*cell.runs, *spans)})
    assert individual_runs(many_cell, "auto") == [*cell.runs]
    assert individual_runs(many_cell, "all") == [*many_cell.runs]
    few_cell = cell.model_copy(update={"runs": (*cell.runs, *spans[1:])})
    assert individual_runs(few_cell, "auto") == [*few_cell.runs]


def test_complete_means_all_runs_and_all_documents():
    """Was: a cell that lacked documents, but no run, was published as complete."""
    complete_cell = cell_record()
    documents = "64 of 160 documents are measured so far"
    growing_cell = cell_record(n=64).model_copy(update={"unfinished": documents})
    short_cell = cell_record(layers=(0, 1)).model_copy(update={"unfinished": documents})
    for cell, lacks in (
        (complete_cell, []),
        (growing_cell, [documents]),
        (cell_record(layers=(0, 1)), ["layer 2", "layer 3"]),
        (short_cell, [documents, "layer 2", "layer 3"]),
    ):
        assert cell.is_complete == (not lacks)
        outcomes = describe_cell(cell).outcomes
        assert ("complete" in outcomes.aliases) == (not lacks)
        assert ("incomplete" in outcomes.aliases) == bool(lacks)
        assert outcomes.metadata["missing"] == lacks
        tags = mlflow_run(describe_cell(cell)).tags
        assert tags.get("tracker.missing", "") == ", ".join(lacks)


def test_curves_are_recognised():
    for kind in (("layer", 1, 4), ("attention", 1, 1), ("mlp", 1, 4), ("layer", 1, 1)):
        assert is_curve(curve_name(run_of_kind(*kind, "").change, "accuracy_drop"))
    assert is_curve("mean/accuracy_drop")
    others = ("meen/accuracy_drop", "n", "baseline_accuracy", "metric/accuracy")
    assert not any(map(is_curve, (*others, "baseline_metric/accuracy")))


# Was: names grew with the removed layers, beyond what W&B takes.
def test_long_names_are_cut_and_stay_distinct():
    cell = cell_record(layers=(0,))
    model = cell.model.model_copy(update={"name": "a-model-with-a-long-name-" * 3})
    benchmark = cell.benchmark.model_copy(update={"name": "größe_" * 20})
    labels = []
    for n_removed in (16, 60):
        removed = tuple(range(2, 2 + n_removed))
        changes = {"model": model, "benchmark": benchmark, "removed": removed}
        long_cell = cell.model_copy(update=changes)
        for run in (describe_cell(long_cell), describe_run(long_cell, long_cell.runs[0])):
            labels.append(run_labels(long_cell, run.name, run.kind))
    names, groups = ({label[key] for label in labels} for key in ("name", "group"))
    assert max(map(len, names | groups)) <= 128
    assert len(groups) == 2
    assert len(names) == 4  # each named by what it lacks


def test_notes_agree_with_the_page():
    """Was: among the runs with an interval alone."""
    small_run, *other_runs = build_cell().runs
    small_run = small_run.model_copy(update={"drop": Estimate(0.07, 0.02, 0.12, 0.004)})
    undefined_runs = [run.model_copy(update={"drop": Estimate(None)}) for run in other_runs]
    cell = build_cell().model_copy(update={"runs": (small_run, *undefined_runs)})
    assert run_verdicts(cell, cell.runs)[small_run.change] == "open"
    note = layer_note(cell, small_run)
    assert note.endswith(f"when corrected for 30 runs of this benchmark; {AVERAGE_NOTE}.")
