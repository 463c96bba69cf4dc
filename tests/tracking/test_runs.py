"""What the runs of sublayers, spans, layers beneath and parts of a benchmark should be."""

from __future__ import annotations

import hashlib

from tracker.core.identities import Half
from tracker.tracking.figures import curve_name, is_curve
from tracker.tracking.mlflow.runs import mlflow_run
from tracker.tracking.runs import MANY, cell_run, layer_run, one_by_one
from tracker.tracking.wandb.writing import group_of, labels_of, run_id

from .conftest import cell_record, of_kind


def test_whole_layers_stay_runs_of_their_own_beside_very_many_spans() -> None:
    """Was: they were counted with the spans, and were left behind where they had been published."""
    cell = cell_record()
    spans = [of_kind("layer", n % 20, 2 + n // 20, f"layers:{n}") for n in range(MANY + 1)]
    whole = cell.model_copy(update={"runs": (*cell.runs, *spans)})
    assert one_by_one(whole, "auto") == [*cell.runs]
    assert one_by_one(whole, "all") == [*whole.runs]
    few = cell.model_copy(update={"runs": (*cell.runs, *spans[1:])})
    assert one_by_one(few, "auto") == [*few.runs]


def test_complete_means_all_runs_and_all_documents() -> None:
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


def test_other_questions_have_runs_and_artifacts_of_their_own() -> None:
    """The halves of a benchmark have one fingerprint, that of the whole split."""
    cell = cell_record()
    (task,) = cell.benchmark.tasks
    halves = {}
    for part in ("calibration", "test"):
        half = Half(part=part, seed=1234, of=2 * task.documents)
        changes = {"tasks": (task.model_copy(update={"half": half}),), "settings": {"part": part}}
        benchmark = cell.benchmark.model_copy(update=changes)
        halves[part] = cell_record(key=part).model_copy(update={"benchmark": benchmark})
    drawn = cell.model_copy(update={"sample_seed": 1234, "view": "intact-sample-160-seed-1234"})
    without = cell.model_copy(update={"removed": (3, 17), "view": "without-3-17"})
    other = [
        record.model_copy(update={"metric": "acc_norm", "view": f"{record.view}--acc_norm"})
        for record in (cell, without)
    ]
    cells = [cell, drawn, without, *other, *halves.values()]
    found = [cell_run(one) for one in cells]
    assert len({run.outcomes.name for run in found}) == len(cells)
    assert len({group_of(one) for one in cells}) == len(cells)
    keys = [
        run.key for run in (*found, layer_run(cell, cell.runs[0]), layer_run(drawn, drawn.runs[0]))
    ]
    assert len({run_id(key) for key in keys}) == len(cells) + 2
    assert [found[0].key, found[2].key] == [f"{cell.key}/cell", f"{cell.key}/without-3-17/cell"]
    assert run_id(keys[0]) == hashlib.sha256(f"{cell.key}/cell".encode()).hexdigest()[:16]

    assert len({mlflow_run(run).data[0]["digest"] for run in (found[0], *found[-2:])}) == 3
    assert "part" not in mlflow_run(found[0]).params


def test_curves_are_told_from_other_metrics() -> None:
    for kind in (("layer", 1, 4), ("attention", 1, 1), ("mlp", 1, 4), ("layer", 1, 1)):
        assert is_curve(curve_name(of_kind(*kind, "").change, "accuracy_drop"))
    assert is_curve("mean/accuracy_drop")
    others = ("meen/accuracy_drop", "n", "baseline_accuracy", "metric/accuracy")
    assert not any(map(is_curve, (*others, "baseline_metric/accuracy")))


# Was: names grew with the removed layers, beyond what W&B takes.
def test_names_that_are_too_long_are_cut_and_stay_apart() -> None:
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
