"""Every place that a results folder was published to is kept in step, until it is forgotten."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils as mlflow_cache

from tests.conftest import cli
from tests.helpers.mlflow_store import Store
from tests.helpers.wandb_runs import counts, runs
from tests.helpers.wandb_runs import shown as shown_by_wandb
from tracker import api
from tracker.ledger.store import Ledger
from tracker.runner import RunOutcome
from tracker.tracking.figures import flat_metrics
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.database import create_database, follow_folder
from tracker.tracking.wandb.writing import run_id

from .conftest import cell_record, local
from .mlflow_server import PASSWORD, USER, Gate, free_port

Ran = Callable[..., RunOutcome]


@pytest.fixture
def ran(tiny_llama, experiment, results) -> Ran:
    """Measure two layers on some documents for a project, and publish them."""
    model = tiny_llama(layers=2)

    def run(project: str, documents: int, *track: str) -> RunOutcome:
        file = experiment(model, limit=documents, layer=[0, 1], benchmark="copa")
        file.write_text(f"project: {project}\n{file.read_text()}")
        return api.run(file, results=results, track=track).outcome

    return run


def synced(results: Path, *more: str) -> Result:
    return cli("sync", "--results", results, *more)


def shown(results: Path, project: str, uri: str = "") -> int:
    """Return the documents of a cell in a project, after checking all that the project shows."""
    uri = uri or local(results)
    if MlflowClient(uri).get_experiment_by_name(project) is None:
        return 0
    (cell,) = api.ls(results)
    store = Store(uri, project)
    assert len(store.runs) == 2 + len(cell.runs)
    (shown,) = (run for run in store.runs if run.data.tags["tracker.kind"] == "cell")
    documents = int(shown.data.metrics["n"])
    if documents == cell.n:
        store.shows(cell)
    return documents


# Was: only the project of the last run was completed, and the one that was left was stale for ever.
def test_a_project_that_was_left_is_kept_by_runs_and_by_sync(ran, results):
    assert ran("lab", 3, "mlflow").exit_code == 0
    done = ran("other", 6, "mlflow")
    assert done.exit_code == 0
    assert [shown(results, name) for name in ("lab", "other")] == [6, 6]
    assert list(done.locations) == ["mlflow:other", "mlflow:lab"]

    ran("third", 9)
    assert [shown(results, name) for name in ("lab", "other")] == [6, 6]
    only = synced(results, "--to", "mlflow:other")
    assert "mlflow:other: 1 measurement; 0 new runs, 4 changed, 0 as before" in only.output
    assert "lab" not in only.output
    assert [shown(results, name) for name in ("lab", "other")] == [6, 9]
    every = synced(results)
    assert every.exit_code == 0
    assert "mlflow:lab: 1 measurement; 0 new runs, 4 changed, 0 as before" in every.output
    assert "mlflow:other: 1 measurement; 0 new runs, 0 changed, 4 as before" in every.output
    assert [shown(results, name) for name in ("lab", "other", "third")] == [9, 9, 0]


def test_a_place_that_is_away_fails_alone_until_it_is_back_or_forgotten(
    ran, results, server, monkeypatch
):
    with Gate(server) as gate:
        there = f"mlflow:{gate.address}/left"
        assert ran("lab", 3, there, "mlflow").exit_code == 0
        gate.status = 401
        done = ran("lab", 6, "mlflow")
        assert done.exit_code == 1
        ((_, why),) = done.unpublished.items()
        assert f"{there}, where it was published before" in why
        assert f"MLFLOW_TRACKING_URI={gate.address} tracker sync --to mlflow:left --res" in why
        failed = synced(results)
        assert failed.exit_code == 1
        assert "mlflow:lab: 1 measurement; 0 new runs, 0 changed, 4 as before" in failed.output
        assert (shown(results, "lab"), shown(results, "left", server)) == (6, 3)

        gate.status = None
        # A login is for the server that the environment names, and for no other.
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", PASSWORD)
        asked = gate.seen
        failed = synced(results)
        assert (failed.exit_code, gate.seen) == (1, asked)
        assert "would get the login" in failed.output
        assert f"MLFLOW_TRACKING_URI={gate.address} tracker sync --to mlf" in failed.output
        monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
        assert synced(results).exit_code == 0
        assert shown(results, "left", server) == 6

        gate.status = 500
        (place,) = results.glob("places/*left*.json")
        assert f"delete {place}" in synced(results).output
        place.unlink()
        assert synced(results).exit_code == 0
    assert api.check(results)[0].damaged == {}


def test_what_a_place_did_not_get_is_owed_to_it(ran, results, server, monkeypatch):
    """The server of the environment is away at the first run; no login is written anywhere."""
    address = server.replace("://", f"://{USER}:{PASSWORD}@")
    with monkeypatch.context() as away:
        away.setenv("MLFLOW_TRACKING_URI", f"http://{USER}:{PASSWORD}@127.0.0.1:{free_port()}")
        assert ran("owed", 3, "mlflow").exit_code == 1
    (place,) = results.glob("places/*.json")
    assert f"delete {place}" in synced(results).output
    place.write_text(place.read_text().replace("127.0.0.1", "localhost"))
    assert "places" in str(api.check(results)[0].damaged)
    shutil.rmtree(place.parent)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert ran("owed", 6, "mlflow").exit_code == 0
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    ran("owed", 9)
    assert synced(results).exit_code == 0
    assert shown(results, "owed", server) == 9
    assert shown(results, "owed") == 0, "nobody asked for a file"
    for path in results.rglob("*.json"):
        assert PASSWORD not in path.read_text()


def test_wandb_is_kept_by_whoever_is_logged_in(ran, results, lent, monkeypatch):
    assert ran("layers", 3, "wandb").exit_code == 0
    done = ran("layers", 6, "mlflow", "wandb")
    assert list(done.locations) == ["mlflow:layers", "wandb:layers"]
    done = ran("other", 9, "mlflow")
    assert done.exit_code == 0, done.unpublished
    first, *others = done.locations
    assert first == "mlflow:other"
    assert sorted(others) == ["mlflow:layers", "wandb:team/layers"]  # by their receipts' names
    assert [shown(results, name) for name in ("layers", "other")] == [9, 9]
    (cell,) = api.ls(results)
    assert len(shown_by_wandb(lent, cell)) == 4

    # Another person, whose W&B is another one: what can be done is done, the rest is said.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    ran("other", 12)
    theirs = synced(results)
    assert theirs.exit_code == 1
    assert f"WANDB_BASE_URL={lent.url} tracker sync --to wandb:team/layers" in theirs.output
    assert [shown(results, name) for name in ("layers", "other")] == [12, 12]
    # Offline runs go wherever they are sent.
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert synced(results).exit_code == 0


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
    there = shown_by_wandb(double, cell)
    assert len(there[run_key(cell, "cell")].history) == 3
    # What was sent stays, and what has grown since is sent beside it.
    publish(cell_record(layers=(0, 1), n=480), WANDB_MODE="offline")
    assert set(folders) < set(publish.results.glob("wandb/offline-run-*"))
