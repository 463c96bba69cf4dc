"""The runs of sublayers, spans and layers beneath, in a real MLflow store."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tracker.core.identities import Half
from tracker.core.records import CellRecord, RunRecord
from tracker.report.page.html import render_page
from tracker.tracking.figures import curve_name, is_curve, logged_layers
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.backend import MlflowBackend
from tracker.tracking.mlflow.runs import mlflow_run
from tracker.tracking.runs import cell_run, intact_run, layer_run
from tracker.tracking.wandb.runs import wandb_run

from .conftest import CellMaker, layer_record
from .test_mlflow import PROJECT, Store, local


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


def beneath(cell: CellRecord) -> CellRecord:
    """Layer 1 where 2 is gone removes the same layers as two layers from layer 1 on."""
    runs = (run("layer", 1, 1, "layers:1,2"), run("mlp", 3, 1, "layer:2+mlp:3"))
    changes = {"runs": runs, "removed": (2,), "removed_accuracy": 0.25}
    return cell.model_copy(update=changes)


def publish(results: Path, cell: CellRecord) -> tuple[int, int, int]:
    backend = MlflowBackend(PROJECT, results)
    done = backend.publish(cell, [], {})
    backend.close()
    return done.created, done.updated, done.unchanged


def runs_by_name(results: Path) -> dict[str, object]:
    store = Store(local(results))
    experiment = store.client.get_experiment_by_name(PROJECT).experiment_id
    return {run.info.run_name: run for run in store.client.search_runs([experiment])}


def test_names_params_and_curves_tell_the_kinds_apart(results: Path, make_cell: CellMaker) -> None:
    cell = several_kinds(make_cell(layers=(0, 1)))
    assert publish(results, cell) == (7, 0, 0)
    assert publish(results, cell) == (0, 0, 7)
    runs = runs_by_name(results)
    ends = " · arc_easy · SmolLM2-135M-Instruct"
    for name, component, layer, span in (
        ("layer 01", "layer", "1", "1"),
        ("layers 01–04", "layer", "1", "4"),
        ("attention 01", "attention", "1", "1"),
        ("mlp 01–04", "mlp", "1", "4"),
    ):
        params = runs[name + ends].data.params
        assert (params["component"], params["layer"], params["span"]) == (component, layer, span)
        assert params["removed"] == "none"
    store = Store(local(results))
    drop = cell.runs[1].accuracy_drop
    assert [step for step, _ in store.curve(cell, "accuracy_drop")] == [0, 1]
    for name in ("span4/accuracy_drop", "attention/accuracy_drop", "mlp/span4/accuracy_drop"):
        assert store.curve(cell, name) == [(1, drop)]
    assert "attention/cosine_score" not in store.cell(cell).data.metrics
    assert logged_layers(cell).columns[:5] == (
        *("layer", "component", "span", "intervention", "ablation"),
    )
    last = logged_layers(cell).rows[-1]
    assert last[:5] == (1, "mlp", 4, "remove", "mlp:1,2,3,4")


def test_a_layer_that_is_replaced_has_a_run_and_a_curve_of_its_own(
    results: Path, make_cell: CellMaker
) -> None:
    cell = make_cell(layers=(0, 1))
    mean = run("layer", 1, 1, "mean:1").model_copy(update={"intervention": "mean"})
    cell = cell.model_copy(update={"runs": (*cell.runs, mean)})
    assert publish(results, cell) == (5, 0, 0)
    shown = runs_by_name(results)["mean 01 · arc_easy · SmolLM2-135M-Instruct"]
    assert shown.data.params["intervention"] == "mean"
    assert "replaced by its mean update" in shown.data.tags["mlflow.note.content"]
    store = Store(local(results))
    assert store.curve(cell, "mean/accuracy_drop") == [(1, mean.accuracy_drop)]
    assert [step for step, _ in store.curve(cell, "accuracy_drop")] == [0, 1]
    assert is_curve("mean/accuracy_drop")
    assert not is_curve("meen/accuracy_drop")
    config = wandb_run(layer_run(cell, mean)).config
    assert (config["layer"], config["component"], config["intervention"]) == (1, "layer", "mean")
    page = render_page([cell], {})
    assert "each layer was replaced by its mean update in turn" in page


def test_a_curve_that_changes_is_updated_at_its_layer(results: Path, make_cell: CellMaker) -> None:
    cell = several_kinds(make_cell(layers=(0, 1)))
    publish(results, cell)
    changed = cell.runs[-2].model_copy(update={"accuracy_drop": 0.5})
    grown = cell.model_copy(update={"runs": (*cell.runs[:-2], changed, cell.runs[-1])})
    assert publish(results, grown) == (0, 2, 5)
    history = Store(local(results)).curve(cell, "attention/accuracy_drop")
    assert history[-1] == (1, 0.5)


def test_what_lies_beneath_makes_other_runs(results: Path, make_cell: CellMaker) -> None:
    """Was: one ablation had one run a cell, whatever it stood for."""
    intact = make_cell(layers=(0,))
    span = run("layer", 1, 2, "layers:1,2")
    intact = intact.model_copy(update={"runs": (*intact.runs, span)})
    without = beneath(make_cell())
    assert run_key(intact, "layers:1,2") != run_key(without, "layers:1,2")
    assert publish(results, intact) == (4, 0, 0)
    assert publish(results, without) == (4, 0, 0)
    assert publish(results, intact) == (0, 0, 4)
    runs = runs_by_name(results)
    ends = " · arc_easy · SmolLM2-135M-Instruct"
    assert {"layers 01–02" + ends, "layer 01 without 2" + ends, "mlp 03 without 2" + ends} <= set(
        runs
    )
    # Was: the cells of a search had as many runs called intact, with the intact model's figures.
    assert runs["intact" + ends].data.metrics["accuracy"] == 0.5
    first = runs["without 2" + ends].data
    assert first.metrics == {"n": 160, "accuracy": 0.25, "accuracy_drop": 0.25}
    assert first.params["removed"] == "2"
    assert "its drop, as theirs, is from the intact model" in first.tags["mlflow.note.content"]
    assert wandb_run(intact_run(without)).name == "without 2" + ends
    assert wandb_run(intact_run(without)).summary == first.metrics
    parent = runs["SmolLM2-135M-Instruct · arc_easy · 0-shot · without layer 2"]
    assert parent.data.params["removed"] == "2"
    assert parent.data.metrics["removed_accuracy"] == 0.25
    nested = runs["mlp 03 without 2" + ends]
    assert nested.data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_another_metric_makes_other_runs_beside_those_of_the_benchmarks_own(
    results: Path, make_cell: CellMaker
) -> None:
    """Was: accuracy and normalised accuracy of one cell overwrote each other's runs."""
    cell = make_cell(layers=(0, 1))
    other = cell.model_copy(update={"metric": "acc_norm"})
    assert publish(results, cell) == (4, 0, 0)
    assert publish(results, other) == (4, 0, 0)
    for each in (cell, other):
        assert publish(results, each) == (0, 0, 4)
    runs = runs_by_name(results)
    assert len(runs) == 8
    for each, ends in ((cell, "arc_easy"), (other, "arc_easy · acc_norm")):
        nested = runs[f"layer 01 · {ends} · SmolLM2-135M-Instruct"]
        parent = runs[each.title]
        assert nested.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert {r.data.tags["tracker.metric"] for r in (nested, parent)} == {each.metric}


def test_drawn_documents_make_other_runs(results: Path, make_cell: CellMaker) -> None:
    cell = make_cell(layers=(0, 1))
    drawn = cell.model_copy(update={"sample_seed": 1234})
    for each in (cell, drawn):
        assert publish(results, each) == (4, 0, 0)
    for each in (cell, drawn):
        assert publish(results, each) == (0, 0, 4)
    runs = runs_by_name(results)
    assert len(runs) == 8
    for each, ends in ((cell, "arc_easy"), (drawn, "arc_easy · sample 1234")):
        nested = runs[f"layer 01 · {ends} · SmolLM2-135M-Instruct"]
        parent = runs[each.title]
        assert nested.data.tags["mlflow.parentRunId"] == parent.info.run_id
        seed = None if each is cell else "1234"
        assert {r.data.params.get("sample_seed") for r in (nested, parent)} == {seed}
    note = runs[drawn.title].data.tags["mlflow.note.content"]
    assert "160 documents drawn at random (seed 1234)" in note
    ours, theirs = (wandb_run(cell_run(each)) for each in (cell, drawn))
    assert ours.group != theirs.group
    assert ours.outcomes.name != theirs.outcomes.name
    assert theirs.outcomes.metadata["sample_seed"] == 1234
    assert {ours.config["tracker"]["sample_seed"], theirs.config["tracker"]["sample_seed"]} == {
        None,
        1234,
    }
    layers = [wandb_run(layer_run(each, each.runs[0])) for each in (cell, drawn)]
    assert len({run.id() for run in (ours, theirs, *layers)}) == 4


def test_what_was_published_before_metrics_were_told_apart_is_found_again(
    make_cell: CellMaker,
) -> None:
    cell = make_cell()
    assert run_key(cell, "layer:3") == f"{cell.key}/layer:3"
    without = cell.model_copy(update={"removed": (3, 17)})
    assert run_key(without, "cell") == f"{cell.key}/without-3-17/cell"
    found = [wandb_run(cell_run(each)) for each in (cell, without)]
    found += [
        wandb_run(cell_run(each.model_copy(update={"metric": "acc_norm"})))
        for each in (cell, without)
    ]
    assert found[0].id() == hashlib.sha256(f"{cell.key}/cell".encode()).hexdigest()[:16]
    assert found[0].outcomes.name.endswith(f"-intact-{cell.key}")
    assert len({run.id() for run in found}) == 4
    for name in ("group", "key", "name"):
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
        outcomes = wandb_run(cell_run(cell)).outcomes
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
    for name in ("n", "baseline_accuracy", "metric/accuracy", "baseline_metric/accuracy"):
        assert not is_curve(name)


def test_two_halves_of_a_benchmark_are_told_apart(make_cell: CellMaker) -> None:
    """They have one fingerprint, that of the whole split."""
    whole = make_cell(layers=(0,))
    made = [(mlflow_run(cell_run(whole)), wandb_run(layer_run(whole, whole.runs[0])))]
    for part in ("calibration", "test"):
        (task,) = whole.benchmark.tasks
        half = Half(part=part, seed=1234, of=2 * task.documents)
        changes = {"tasks": (task.model_copy(update={"half": half}),), "settings": {"part": part}}
        cell = whole.model_copy(update={"benchmark": whole.benchmark.model_copy(update=changes)})
        made.append((mlflow_run(cell_run(cell)), wandb_run(layer_run(cell, cell.runs[0]))))
        theirs, ours = made[-1]
        assert f"arc_easy ({part} half)" in theirs.name
        assert f"arc_easy ({part} half)" in ours.name
        assert theirs.params["part"] == ours.config["part"] == part
        assert "half" not in made[0][1].name
    assert len({theirs.data[0]["digest"] for theirs, _ in made}) == 3
    assert "part" not in made[0][0].params
