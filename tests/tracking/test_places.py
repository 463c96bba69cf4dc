"""Every place that a results folder was published to is kept in step, until it is forgotten."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from mlflow import MlflowClient
from mlflow.tracking._tracking_service import utils as mlflow_cache

from tests.conftest import cli
from tests.helpers.mlflow_store import MlflowStoreReader
from tests.helpers.wandb_runs import assert_shown as shown_by_wandb
from tests.helpers.wandb_runs import change_counts, project_runs_by_key
from tracker import api
from tracker.ledger.store import Ledger
from tracker.runner import RunOutcome
from tracker.tracking.figures import run_metrics
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.database import create_database, update_addresses
from tracker.tracking.wandb.writing import run_id

from .conftest import cell_record, sqlite_uri
from .mlflow_server import PASSWORD, USER, Gate, free_port

RunAndPublish = Callable[..., RunOutcome]


@pytest.fixture
def run_study(tiny_llama, experiment, results) -> RunAndPublish:
    """Measure two layers on some documents for a project, and publish them."""
    model = tiny_llama(layers=2)

    def run(project: str, documents: int, *track: str) -> RunOutcome:
        file = experiment(model, limit=documents, layer=[0, 1], benchmark="copa")
        file.write_text(f"project: {project}\n{file.read_text()}")
        return api.run(file, results=results, track=track).outcome

    return run


def run_sync(results: Path, *options: str) -> Result:
    return cli("sync", "--results", results, *options)


def check_project(results: Path, project: str, uri: str = "") -> int:
    """Return the documents of a cell in a project, after checking all that the project shows."""
    uri = uri or sqlite_uri(results)
    if MlflowClient(uri).get_experiment_by_name(project) is None:
        return 0
    (cell,) = api.ls(results)
    store = MlflowStoreReader(uri, project)
    assert len(store.runs) == 2 + len(cell.runs)
    (shown_run,) = (run for run in store.runs if run.data.tags["tracker.kind"] == "cell")
    documents = int(shown_run.data.metrics["n"])
    if documents == cell.n:
        store.assert_shows(cell)
    return documents


# Was: only the project of the last run was completed, and the one that was left was stale for ever.
def test_earlier_projects_are_updated(run_study, results):
    assert run_study("lab", 3, "mlflow").exit_code == 0
    outcome = run_study("other", 6, "mlflow")
    assert outcome.exit_code == 0
    assert [check_project(results, name) for name in ("lab", "other")] == [6, 6]
    assert list(outcome.locations) == ["mlflow:other", "mlflow:lab"]

    run_study("third", 9)
    assert [check_project(results, name) for name in ("lab", "other")] == [6, 6]
    single_sync = run_sync(results, "--to", "mlflow:other")
    assert "mlflow:other: 1 measurement; 0 new runs, 4 updated, 0 unchanged" in single_sync.output
    assert "lab" not in single_sync.output
    assert [check_project(results, name) for name in ("lab", "other")] == [6, 9]
    full_sync = run_sync(results)
    assert full_sync.exit_code == 0
    assert "mlflow:lab: 1 measurement; 0 new runs, 4 updated, 0 unchanged" in full_sync.output
    assert "mlflow:other: 1 measurement; 0 new runs, 0 updated, 4 unchanged" in full_sync.output
    assert [check_project(results, name) for name in ("lab", "other", "third")] == [9, 9, 0]


def test_an_unreachable_backend_fails_alone(run_study, results, server, monkeypatch):
    with Gate(server) as gate:
        remote_target = f"mlflow:{gate.address}/left"
        assert run_study("lab", 3, remote_target, "mlflow").exit_code == 0
        gate.status = 401
        outcome = run_study("lab", 6, "mlflow")
        assert outcome.exit_code == 1
        ((_, reason),) = outcome.unpublished.items()
        assert f"{remote_target} contains earlier results and could not be updated" in reason
        assert f"MLFLOW_TRACKING_URI={gate.address} tracker sync --to mlflow:left --res" in reason
        sync_result = run_sync(results)
        assert sync_result.exit_code == 1
        assert "mlflow:lab: 1 measurement; 0 new runs, 0 updated, 4 unchanged" in sync_result.output
        assert (check_project(results, "lab"), check_project(results, "left", server)) == (6, 3)

        gate.status = None
        # A login is for the server that the environment names, and for no other.
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", PASSWORD)
        n_requests = gate.n_requests
        sync_result = run_sync(results)
        assert (sync_result.exit_code, gate.n_requests) == (1, n_requests)
        assert "sends a login only to the server to which it belongs" in sync_result.output
        assert f"MLFLOW_TRACKING_URI={gate.address} tracker sync --to mlf" in sync_result.output
        monkeypatch.delenv("MLFLOW_TRACKING_TOKEN")
        assert run_sync(results).exit_code == 0
        assert check_project(results, "left", server) == 6

        gate.status = 500
        (address_path,) = results.glob("places/*left*.json")
        assert f"delete {address_path}" in run_sync(results).output
        address_path.unlink()
        assert run_sync(results).exit_code == 0
    assert api.check(results)[0].damaged == {}


def test_missed_uploads_are_sent_later(run_study, results, server, monkeypatch):
    """The server of the environment is away at the first run; no login is written anywhere."""
    address = server.replace("://", f"://{USER}:{PASSWORD}@")
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://{USER}:{PASSWORD}@127.0.0.1:{free_port()}")
        assert run_study("owed", 3, "mlflow").exit_code == 1
    (address_path,) = results.glob("places/*.json")
    assert f"delete {address_path}" in run_sync(results).output
    address_path.write_text(address_path.read_text().replace("127.0.0.1", "localhost"))
    assert "places" in str(api.check(results)[0].damaged)
    shutil.rmtree(address_path.parent)

    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    assert run_study("owed", 6, "mlflow").exit_code == 0
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    run_study("owed", 9)
    assert run_sync(results).exit_code == 0
    assert check_project(results, "owed", server) == 9
    assert check_project(results, "owed") == 0, "nobody asked for a file"
    for path in results.rglob("*.json"):
        assert PASSWORD not in path.read_text()


def test_another_wandb_login_gets_no_uploads(run_study, results, lent, monkeypatch):
    assert run_study("layers", 3, "wandb").exit_code == 0
    outcome = run_study("layers", 6, "mlflow", "wandb")
    assert list(outcome.locations) == ["mlflow:layers", "wandb:layers"]
    outcome = run_study("other", 9, "mlflow")
    assert outcome.exit_code == 0, outcome.unpublished
    first_target, *other_targets = outcome.locations
    assert first_target == "mlflow:other"
    assert sorted(other_targets) == [
        "mlflow:layers",
        "wandb:team/layers",
    ]  # by their receipts' names
    assert [check_project(results, name) for name in ("layers", "other")] == [9, 9]
    (cell,) = api.ls(results)
    assert len(shown_by_wandb(lent, cell)) == 4

    # Another person, whose W&B is another one: what can be done is done, the rest is said.
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run_study("other", 12)
    sync_result = run_sync(results)
    assert sync_result.exit_code == 1
    assert f"WANDB_BASE_URL={lent.url} tracker sync --to wandb:team/layers" in sync_result.output
    assert [check_project(results, name) for name in ("layers", "other")] == [12, 12]
    # Offline runs go wherever they are sent.
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run_sync(results).exit_code == 0


# Was: files went on to where the folder had been, and a copy wrote into its original's.
def test_moved_and_copied_folders_use_their_own_file(tiny_llama, experiment, results, tmp_path):
    model = tiny_llama(layers=2)
    settings = {"layer": [0, 1], "benchmark": "copa"}
    study = experiment(model, limit=3, **settings)
    assert api.run(study, results=results).outcome.exit_code == 0
    moved_folder, copied_folder = tmp_path / "moved", tmp_path / "copied"
    results.rename(moved_folder)
    mlflow_cache._artifact_repos_cache.clear()  # another process
    assert [cell.n for cell in api.ls(moved_folder)] == [3]
    outcome = api.run(study, results=moved_folder).outcome
    command = f"mlflow ui --backend-store-uri sqlite:///{moved_folder}/mlflow.db --port 5000"
    assert list(outcome.locations.values()) == [command]
    grown = api.run(experiment(model, limit=6, **settings), results=moved_folder)
    assert (grown.outcome.exit_code, grown.report) == (0, moved_folder / "report.html")
    assert not api.sync(results=moved_folder).failed
    assert not results.exists(), "nothing is written where it was"
    check_ledger(moved_folder)

    shutil.copytree(moved_folder, copied_folder)
    files = {path: path.read_bytes() for path in moved_folder.rglob("mlartifacts/**/*.*")}
    mlflow_cache._artifact_repos_cache.clear()  # another process
    api.run(experiment(model, limit=9, **settings), results=copied_folder)
    check_ledger(copied_folder)
    assert {path: path.read_bytes() for path in moved_folder.rglob("mlartifacts/**/*.*")} == files


# Was: artifacts that a server keeps elsewhere were sought beside the database from then on.
def test_foreign_mlflow_folders_stay_unchanged(results, tmp_path):
    theirs = tmp_path / "data" / "mlartifacts"
    for folder in (theirs, results / "mlartifacts"):
        folder.mkdir(parents=True)
    create_database(results / "mlflow.db")
    client = MlflowClient(sqlite_uri(results))
    experiment_id = client.create_experiment("theirs", artifact_location=f"{theirs.as_uri()}/7")
    update_addresses(results / "mlflow.db")
    assert client.get_experiment(experiment_id).artifact_location == f"{theirs.as_uri()}/7"
    (theirs.parent / "mlflow.db").touch()  # now it is what a copy's original looks like
    update_addresses(results / "mlflow.db")
    own_uri = (results / "mlartifacts").as_uri()
    own_experiment = MlflowClient(sqlite_uri(results)).get_experiment(experiment_id)
    assert own_experiment.artifact_location == f"{own_uri}/7"


def check_ledger(results: Path) -> None:
    """MLflow shows what the ledger says, and the files that it leads to are the ledger's."""
    (cell,) = api.ls(results)
    store = MlflowStoreReader(sqlite_uri(results), "tracker")
    assert len(store.runs) == 2 + len(cell.runs)
    store.assert_shows(cell)
    (stored_cell,) = Ledger(results).cells()
    for shard in stored_cell.shards():
        assert store.bytes_of(store.cell(cell), shard.name, results) == shard.read_bytes()


# Was: `wandb sync` left tables and outcomes out without a word, and `tracker sync` missed nothing.
@pytest.mark.parametrize("how", ["sent and completed", "written anew and sent"])
def test_offline_runs(double, publish, how):
    del publish.client.environment["WANDB_DATA_DIR"]  # by default it lies in the folder
    cell = cell_record(layers=(0,))
    assert change_counts(publish(cell, WANDB_MODE="offline")) == (3, 0, 0)
    moved_folder = publish.results.with_name("moved")
    publish.results.rename(moved_folder)
    publish.results = moved_folder
    if how == "written anew and sent":
        assert change_counts(publish(cell, WANDB_MODE="offline")) == (3, 0, 0)
    folders = sorted(moved_folder.glob("wandb/offline-run-*"))
    assert len(folders) == 3
    publish.client.cli("sync", *map(str, folders))
    assert len(project_runs_by_key(double)) == 3
    if how == "sent and completed":
        assert change_counts(publish(cell)) == (0, 1, 2)
    assert change_counts(publish(cell)) == (0, 0, 3)
    artifact_counts: Counter[str] = Counter()
    for (kind, _), collection in double.projects["team", "layers"].artifacts.items():
        artifact_counts[kind] += sum(bool(version.files) for version in collection.versions)
    assert artifact_counts == {"run_table": 3, "outcomes": 1}


def test_offline_runs_wait_and_are_not_written_twice(double, publish):
    cell = cell_record(layers=(0,))
    published = publish(cell, WANDB_MODE="offline")
    assert published["location"] == f"wandb sync {publish.results / 'wandb'}/offline-run-*"
    assert change_counts(published) == (3, 0, 0)
    assert change_counts(publish(cell, WANDB_MODE="offline")) == (0, 0, 3)
    assert not double.requests
    name = run_id(run_key(cell, "layer:0"))
    (file,) = publish.results.glob(f"wandb/offline-run-*-{name}/*.wandb")
    published = publish.client.cli("leet", "inspect", "--json", "--summary", str(file))
    assert run_metrics(cell.runs[0]).items() <= json.loads(published)["summary"].items()


SLOW_CLOCK = """
import time
clock = time.time
time.time = lambda: clock() - 3600
"""


# Was: what was measured first was sent last, and shown, where the clock had been set back.
def test_grown_offline_runs_are_sent(double, publish, tmp_path, monkeypatch):
    publish(cell_record(layers=(0,)), WANDB_MODE="offline")
    cell = cell_record(layers=(0,), n=320)
    with monkeypatch.context() as patch:
        (tmp_path / "behind").mkdir()
        (tmp_path / "behind" / "sitecustomize.py").write_text(SLOW_CLOCK)
        patch.syspath_prepend(tmp_path / "behind")  # the SDK's process has the path of this one
        publish.close()
        assert change_counts(publish(cell, WANDB_MODE="offline")) == (0, 3, 0)
    folders = sorted(publish.results.glob("wandb/offline-run-*"))
    publish.client.cli("sync", *map(str, folders))
    shown_runs = shown_by_wandb(double, cell)
    assert len(shown_runs[run_key(cell, "cell")].history) == 2
    # What was sent stays, and what has grown since is sent beside it.
    publish(cell_record(layers=(0,), n=480), WANDB_MODE="offline")
    assert set(folders) < set(publish.results.glob("wandb/offline-run-*"))
