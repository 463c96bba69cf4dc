"""What the runs of sublayers, spans, layers beneath and parts of a benchmark should be."""

from __future__ import annotations

import hashlib

from tracker.core.identities import Half
from tracker.core.records import CellRecord, RunRecord
from tracker.report.page.html import render_page
from tracker.tracking.figures import curve_name, is_curve
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.runs import mlflow_run
from tracker.tracking.runs import cell_run, layer_run
from tracker.tracking.wandb.runs import group_of, run_id

from .conftest import CellMaker, layer_record


def run(component: str, layer: int, span: int, ablation: str) -> RunRecord:
    changes = {"component": component, "layer": layer, "span": span, "ablation": ablation}
    return layer_record(layer, 160).model_copy(update={**changes, "cosine_score": None})


def several_kinds(cell: CellRecord) -> CellRecord:
    runs = (
        *cell.runs,
        run("layer", 1, 4, "layers:1,2,3,4"),
        run("attention", 1, 1, "attention:1"),
        run("mlp", 1, 4, "mlp:1,2,3,4"),
    )
    return cell.model_copy(update={"runs": runs})


def test_a_layer_that_is_replaced_is_said_to_be(make_cell: CellMaker) -> None:
    cell = make_cell(layers=(0, 1))
    mean = run("layer", 1, 1, "mean:1").model_copy(update={"intervention": "mean"})
    assert "replaced by its mean update" in layer_run(cell, mean).note
    page = render_page([cell.model_copy(update={"runs": (*cell.runs, mean)})], {})
    assert "each layer was replaced by its mean update in turn" in page


def test_drawn_documents_are_said_and_make_another_artifact(make_cell: CellMaker) -> None:
    cell = make_cell(layers=(0, 1))
    drawn = cell.model_copy(update={"sample_seed": 1234})
    ours, theirs = (cell_run(each) for each in (cell, drawn))
    assert "160 documents drawn at random (seed 1234)" in theirs.note
    assert ours.outcomes.name != theirs.outcomes.name
    assert theirs.outcomes.metadata["sample_seed"] == 1234
    assert mlflow_run(cell_run(drawn)).params["sample_seed"] == "1234"
    layers = [layer_run(each, each.runs[0]) for each in (cell, drawn)]
    assert len({run_id(run.key) for run in (ours, theirs, *layers)}) == 4


def test_what_was_published_before_metrics_were_told_apart_is_found_again(
    make_cell: CellMaker,
) -> None:
    cell = make_cell()
    assert run_key(cell, "layer:3") == f"{cell.key}/layer:3"
    without = cell.model_copy(update={"removed": (3, 17)})
    assert run_key(without, "cell") == f"{cell.key}/without-3-17/cell"
    found = [cell_run(each) for each in (cell, without)]
    found += [cell_run(each.model_copy(update={"metric": "acc_norm"})) for each in (cell, without)]
    assert run_id(found[0].key) == hashlib.sha256(f"{cell.key}/cell".encode()).hexdigest()[:16]
    assert found[0].outcomes.name.endswith(f"-intact-{cell.key}")
    assert len({run_id(run.key) for run in found}) == 4
    assert len({group_of(run.cell) for run in found}) == 4
    for name in ("key", "name"):
        assert len({getattr(run, name) for run in found}) == 4
    assert len({run.outcomes.name for run in found}) == 4


def test_complete_means_all_runs_and_all_documents(make_cell: CellMaker) -> None:
    """Was: a cell that lacked documents, but no run, was published as complete."""
    whole = make_cell()
    documents = "64 of 160 documents are measured so far"
    growing = make_cell(n=64).model_copy(update={"reasons": {"n": documents}})
    both = make_cell(layers=(0, 1)).model_copy(update={"reasons": {"n": documents}})
    for cell, lacks in (
        (whole, []),
        (growing, [documents]),
        (make_cell(layers=(0, 1)), ["layer 2", "layer 3"]),
        (both, [documents, "layer 2", "layer 3"]),
    ):
        assert cell.is_complete == (not lacks)
        outcomes = cell_run(cell).outcomes
        assert ("complete" in outcomes.aliases) == (not lacks)
        assert ("incomplete" in outcomes.aliases) == bool(lacks)
        assert outcomes.metadata["missing"] == lacks
        tags = mlflow_run(cell_run(cell)).tags
        assert tags.get("tracker.missing", "") == ", ".join(lacks)
        page = render_page([cell], {})
        assert ("Nothing of what is shown: every run" in page) == (not lacks)
        assert (f"0-shot: {documents}." in page) == (documents in lacks)


def test_curves_are_told_from_other_metrics(make_cell: CellMaker) -> None:
    for record in several_kinds(make_cell()).runs:
        assert is_curve(curve_name(record, "accuracy_drop"))
    assert is_curve("mean/accuracy_drop")
    for name in (
        "meen/accuracy_drop",
        "n",
        "baseline_accuracy",
        "metric/accuracy",
        "baseline_metric/accuracy",
    ):
        assert not is_curve(name)


def test_two_halves_of_a_benchmark_are_told_apart(make_cell: CellMaker) -> None:
    """They have one fingerprint, that of the whole split."""
    whole = make_cell(layers=(0,))
    made = [(mlflow_run(cell_run(whole)), layer_run(whole, whole.runs[0]))]
    for part in ("calibration", "test"):
        (task,) = whole.benchmark.tasks
        half = Half(part=part, seed=1234, of=2 * task.documents)
        changes = {"tasks": (task.model_copy(update={"half": half}),), "settings": {"part": part}}
        cell = whole.model_copy(update={"benchmark": whole.benchmark.model_copy(update=changes)})
        made.append((mlflow_run(cell_run(cell)), layer_run(cell, cell.runs[0])))
        theirs, ours = made[-1]
        assert f"arc_easy ({part} half)" in theirs.of.name
        assert f"arc_easy ({part} half)" in ours.name
        assert theirs.params["part"] == ours.config["part"] == part
        assert "half" not in made[0][1].name
    assert len({theirs.data[0]["digest"] for theirs, _ in made}) == 3
    assert "part" not in made[0][0].params
