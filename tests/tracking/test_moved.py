"""A results folder that is moved or copied goes on: its MLflow file and its offline W&B runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils as mlflow_cache

from tests.helpers.mlflow_store import Store
from tests.helpers.wandb_runs import counts, runs, shown
from tracker import api
from tracker.ledger.store import Ledger
from tracker.tracking.figures import flat_metrics
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.database import create_database, follow_folder
from tracker.tracking.wandb.writing import run_id

from .conftest import cell_record, local


# Was: files went on to where the folder had been, and a copy wrote into its original's.
def test_a_folder_with_its_mlflow_file(tiny_llama, experiment, results, tmp_path):
    model = tiny_llama(layers=2)
    asked = {"layer": [0, 1], "benchmark": "copa"}
    study = experiment(model, limit=3, **asked)
    assert api.run(study, results=results).outcome.exit_code == 0
    moved, copied = tmp_path / "moved", tmp_path / "copied"
    results.rename(moved)
    mlflow_cache._artifact_repos_cache.clear()  # another process
    assert [cell.n for cell in api.ls(moved)] == [3]
    again = api.run(study, results=moved).outcome
    assert list(again.locations.values()) == [
        f"mlflow ui --backend-store-uri sqlite:///{moved}/mlflow.db --port 5000"
    ]
    grown = api.run(experiment(model, limit=6, **asked), results=moved)
    assert (grown.outcome.exit_code, grown.report) == (0, moved / "report.html")
    assert not api.sync(results=moved).failed
    assert not results.exists(), "nothing is written where it was"
    whole(moved)

    shutil.copytree(moved, copied)
    files = {path: path.read_bytes() for path in moved.rglob("mlartifacts/**/*.*")}
    mlflow_cache._artifact_repos_cache.clear()  # another process
    api.run(experiment(model, limit=9, **asked), results=copied)
    whole(copied)
    assert {path: path.read_bytes() for path in moved.rglob("mlartifacts/**/*.*")} == files


# Was: artifacts that a server keeps elsewhere were sought beside the database from then on.
def test_a_folder_of_somebody_elses_is_left_alone(results, tmp_path):
    theirs = tmp_path / "data" / "mlartifacts"
    for folder in (theirs, results / "mlartifacts"):
        folder.mkdir(parents=True)
    create_database(results / "mlflow.db")
    client = MlflowClient(local(results))
    kept = client.create_experiment("theirs", artifact_location=f"{theirs.as_uri()}/7")
    follow_folder(results / "mlflow.db")
    assert client.get_experiment(kept).artifact_location == f"{theirs.as_uri()}/7"
    (theirs.parent / "mlflow.db").touch()  # now it is what a copy's original looks like
    follow_folder(results / "mlflow.db")
    here = (results / "mlartifacts").as_uri()
    assert MlflowClient(local(results)).get_experiment(kept).artifact_location == f"{here}/7"


def whole(results: Path) -> None:
    """MLflow shows what the ledger says, and the files that it leads to are the ledger's."""
    (cell,) = api.ls(results)
    store = Store(local(results), "tracker")
    assert len(store.runs) == 2 + len(cell.runs)
    store.shows(cell)
    (kept,) = Ledger(results).cells()
    for shard in kept.shards():
        assert store.bytes_of(store.cell(cell), shard.name, results) == shard.read_bytes()


# Was: `wandb sync` left tables and outcomes out without a word, and `tracker sync` missed nothing.
@pytest.mark.parametrize("how", ["sent and completed", "written anew and sent"])
def test_offline_runs(double, publish, how):
    del publish.client.environment["WANDB_DATA_DIR"]  # by default it lies in the folder
    cell = cell_record(layers=(0, 1))
    assert counts(publish(cell, WANDB_MODE="offline")) == (4, 0, 0)
    moved = publish.results.with_name("moved")
    publish.results.rename(moved)
    publish.results = moved
    if how == "written anew and sent":
        assert counts(publish(cell, WANDB_MODE="offline")) == (4, 0, 0)
    folders = sorted(moved.glob("wandb/offline-run-*"))
    assert len(folders) == 4
    publish.client.cli("sync", *map(str, folders))
    assert len(runs(double)) == 4
    if how == "sent and completed":
        assert counts(publish(cell)) == (0, 1, 3)
    assert counts(publish(cell)) == (0, 0, 4)
    kinds: dict[str, int] = {}
    for (kind, _), collection in double.projects["team", "layers"].artifacts.items():
        kinds[kind] = kinds.get(kind, 0) + len([one for one in collection.versions if one.files])
    assert kinds == {"run_table": 3, "outcomes": 1}


def test_offline_runs_wait_and_are_not_written_twice(double, publish):
    cell = cell_record(layers=(0,))
    said = publish(cell, WANDB_MODE="offline")
    assert said["location"] == f"wandb sync {publish.results / 'wandb'}/offline-run-*"
    assert (counts(said), counts(publish(cell, WANDB_MODE="offline"))) == ((3, 0, 0), (0, 0, 3))
    assert not double.requests
    name = run_id(run_key(cell, "layer:0"))
    (file,) = publish.results.glob(f"wandb/offline-run-*-{name}/*.wandb")
    said = publish.client.cli("leet", "inspect", "--json", "--summary", str(file))
    assert flat_metrics(cell.runs[0]).items() <= json.loads(said)["summary"].items()


BEHIND = """
import time
clock = time.time
time.time = lambda: clock() - 3600
"""


# Was: what was measured first was sent last, and shown, where the clock had been set back.
def test_offline_runs_that_grew_are_sent_as_they_are_now(double, publish, tmp_path, monkeypatch):
    publish(cell_record(layers=(0, 1)), WANDB_MODE="offline")
    cell = cell_record(layers=(0, 1), n=320)
    with monkeypatch.context() as behind:
        (tmp_path / "behind").mkdir()
        (tmp_path / "behind" / "sitecustomize.py").write_text(BEHIND)
        behind.syspath_prepend(tmp_path / "behind")  # the SDK's process has the path of this one
        publish.close()
        assert counts(publish(cell, WANDB_MODE="offline")) == (0, 4, 0)
    folders = sorted(publish.results.glob("wandb/offline-run-*"))
    publish.client.cli("sync", *map(str, folders))
    there = shown(double, cell)
    assert len(there[run_key(cell, "cell")].history) == 3
    # What was sent stays, and what has grown since is sent beside it.
    publish(cell_record(layers=(0, 1), n=480), WANDB_MODE="offline")
    assert set(folders) < set(publish.results.glob("wandb/offline-run-*"))
