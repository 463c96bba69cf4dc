"""Pruned models in real MLflow stores, and in W&B: offline and at the double."""

from __future__ import annotations

import json
import os
from contextlib import closing
from dataclasses import replace

import mlflow
import pytest
import torch
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

import tracker
from tests.conftest import save_llama
from tests.helpers.serving import serving_in_process
from tracker.benchmarks import reference_process
from tracker.export import proof
from tracker.export.checkpoint import publish
from tracker.export.facts import Accuracy, ExportedModel
from tracker.schema.estimates import Estimate
from tracker.tracking import open_backend
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.runs import KIND_TAG

from .conftest import cell_record


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> ExportedModel:
    """Build a tiny model without two of its layers, and made-up accuracies."""
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch, serving_in_process():
        answer = reference_process.main
        patch.setattr(proof, "_run_reference", lambda question: answer(question) | {"ours": []})
        saved = tracker.export(str(save_llama(folder / "tiny")), [1, 2], folder / "lighter")
    levels = Estimate(0.5, 0.4, 0.6), Estimate(0.25, 0.1, 0.4)
    accuracy = Accuracy("arc_easy", 0, "acc", "24 documents", 24, *levels)
    return replace(saved, accuracy=(accuracy,))


@pytest.mark.usefixtures("one_thread")
def test_mlflow_logs_the_model(exported, results, monkeypatch):
    uri = f"sqlite:///{results / 'mlflow.db'}"
    cell = cell_record()
    published = publish(exported, [cell], ["mlflow:pruned"], "tracker", results, register="lighter")
    assert not published.unpublished
    assert published.exit_code == 0
    client = MlflowClient(tracking_uri=uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == "pruned"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("tiny-2-of-4-layers", "FINISHED")
    assert run.data.tags[KIND_TAG] == "pruned model"
    assert run.data.tags["tracker.made_of"] == run_key(cell, "cell")
    assert "## What was removed" in run.data.tags["mlflow.note.content"]
    assert run.data.metrics["pruned/arc_easy/acc"] == 0.25
    assert run.data.metrics["base/parameters"] == exported.before.parameters
    assert run.data.params["removed"] == "[1, 2]"
    (version,) = client.search_model_versions("name = 'lighter'")
    assert version.run_id == run.info.run_id
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        try:
            load = mlflow.transformers.load_model
            components = load("models:/lighter/1", return_type="components")
        finally:
            mlflow.set_tracking_uri(None)
    ids = torch.tensor([[3, 5, 8, 13]])
    saved_model = AutoModelForCausalLM.from_pretrained(exported.folder)
    with torch.no_grad():
        assert torch.equal(components["model"](ids).logits, saved_model(ids).logits)
    assert components["tokenizer"].chat_template


def test_an_unreachable_server_fails_only_the_upload(exported, results):
    published = publish(exported, [], ["mlflow:http://127.0.0.1:9/pruned"], "tracker", results)
    assert published.exit_code == 1
    assert "MLflow at http://127.0.0.1:9 did not accept" in published.unpublished.popitem()[1]
    assert (exported.folder / "model.safetensors").is_file()


def test_wandb_links_the_model_to_outcomes(exported, lent, tmp_path):
    cell, outcomes = cell_record(), tmp_path / "outcomes.parquet"
    outcomes.write_bytes(b"outcomes")
    with closing(open_backend("wandb", "team/layers", tmp_path / "results")) as backend:
        backend.publish(cell, [outcomes], {})
    published = publish(exported, [cell], ["wandb:team/layers"], "tracker", tmp_path / "results")
    assert not published.unpublished
    project = lent.projects["team", "layers"]
    (run,) = [run for run in project.runs.values() if run.job_type == "model"]
    assert run.used_artifacts == [f"outcomes-SmolLM2-135M-Instruct-arc_easy-intact-{cell.key}:v0"]
    assert run.values["tracker"]["kept"] == [0, 3]
    assert run.summary["pruned/parameters"] == exported.after.parameters
    (version,) = project.artifacts["model", "tiny-2-of-4-layers"].versions
    assert version.aliases == ["latest"], "which one is best, nobody has shown"
    weights = (exported.folder / "model.safetensors").read_bytes()
    assert version.files["model.safetensors"] == weights
    assert version.metadata["base"]["name"] == "tiny"


def test_offline_models_wait_for_wandb_sync(exported, results, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in [name for name in os.environ if name.startswith("WANDB_BASE")]:
        monkeypatch.delenv(name)
    published = publish(exported, [], ["wandb:layers"], "tracker", results)
    assert published.locations == {"wandb": f"wandb sync {results / 'wandb'}/offline-run-*"}
    contents = [path.read_bytes() for path in (results / "wandb").rglob("*") if path.is_file()]
    weights = (exported.folder / "model.safetensors").read_bytes()
    assert weights in contents, "the artifact's files wait beside the run"
    assert json.loads((exported.folder / "tracker.json").read_text())["kept"] == [0, 3]
