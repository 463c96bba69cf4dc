"""A real MLflow server that stops, refuses, is slow or full: an upload is lost, never a result."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.conftest import cli
from tests.helpers.mlflow_store import MlflowStoreReader, publish_cell
from tracker import api
from tracker.ledger.store import Ledger
from tracker.schema.errors import TrackingError
from tracker.schema.records import CellRecord
from tracker.tracking.figures import CURVES
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.backend import MlflowBackend

from .conftest import cell_record, sqlite_uri
from .mlflow_server import PASSWORD, USER, Gate, MlflowServer

MIDDLE_REQUEST = 14  # a request in the middle of publishing a cell of four layers


@pytest.fixture
def mortal(serving) -> Iterator[MlflowServer]:
    """Start the server, which a test may stop: it runs when the next one begins."""
    yield serving
    if serving.process is None:
        serving.start()


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "outcomes.parquet"
    path.write_bytes(bytes(range(256)) * 40)
    return path


def check_complete(uri: str, project: str, cell: CellRecord, file: Path, folder: Path) -> None:
    """Every run is there once, with every figure once."""
    store = MlflowStoreReader(uri, project)
    assert len(store.runs) == 2 + len(cell.runs)
    assert all(run.info.status == "FINISHED" for run in store.runs)
    for name in CURVES:
        expected = [(row.change.layer, row.figure(name)) for row in cell.runs]
        assert store.curve(cell, name) == [point for point in expected if point[1] is not None]
    store.assert_shows(cell)
    assert store.bytes_of(store.cell(cell), file.name, folder) == file.read_bytes()
    assert len(store.cell(cell).inputs.dataset_inputs) == 1


@pytest.mark.parametrize(
    ("status", "first"), [(401, 1), (429, MIDDLE_REQUEST), (500, 1), (507, MIDDLE_REQUEST)]
)
def test_a_server_that_refuses(server, results, file, status, first):
    cell, project = cell_record(), f"refuses-{status}-{first}"
    with Gate(server) as gate:
        gate.actions_by_number[first] = lambda: setattr(gate, "status", status)
        backend = MlflowBackend(project, results, gate.address)
        with pytest.raises(TrackingError, match=f"error code {status}|{status} error") as caught:
            backend.publish(cell, [file], {})
        n_retries = 2 if status in (429, 500) else 0
        assert gate.n_requests == first + n_retries
        message = str(caught.value)
        assert len(message) < 900, "the whole error page is not a message"
        assert f"tracker sync --to mlflow:{project} --results {results}" in message
        assert ("MLFLOW_TRACKING_USERNAME" in message) == (status == 401)

        gate.status = None
        published = backend.publish(cell, [file], {})
        assert published.unchanged < 6
    check_complete(server, project, cell, file, results)
    assert MlflowBackend(project, results, server).publish(cell, [file], {}).unchanged == 6


def test_a_slow_server_times_out(server, results, file, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with Gate(server) as gate:
        gate.actions_by_number[MIDDLE_REQUEST] = lambda: setattr(gate, "delay", 5.0)
        backend = MlflowBackend("slow", results, gate.address)
        with pytest.raises(TrackingError, match=r"(?i)timed out"):
            backend.publish(cell_record(), [file], {})
        assert gate.n_requests == MIDDLE_REQUEST + 2
        gate.delay = 0.0
        backend.publish(cell_record(), [file], {})
    check_complete(server, "slow", cell_record(), file, results)


@contextmanager
def no_file_grows_beyond(size: int, processes: list[psutil.Process]) -> Iterator[None]:
    """Simulate a full disk with the kernel's limit of file sizes."""
    old_limits = [process.rlimit(psutil.RLIMIT_FSIZE) for process in processes]
    for process, (_, hard_limit) in zip(processes, old_limits, strict=True):
        process.rlimit(psutil.RLIMIT_FSIZE, (size, hard_limit))
    try:
        yield
    finally:
        for process, limits in zip(processes, old_limits, strict=True):
            process.rlimit(psutil.RLIMIT_FSIZE, limits)


def test_a_server_whose_disk_is_full(serving, results, file):
    cell = cell_record()
    backend = MlflowBackend("full", results, serving.address)
    with (
        no_file_grows_beyond(1024, serving.processes),
        pytest.raises(TrackingError, match="did not accept the runs"),
    ):
        backend.publish(cell, [file], {})
    backend.publish(cell, [file], {})
    check_complete(serving.address, "full", cell, file, results)


def test_a_results_folder_whose_disk_is_full(results, file):
    size = (results / "mlflow.db").stat().st_size
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    with (
        no_file_grows_beyond(size // 8, [psutil.Process(os.getpid())]),
        pytest.raises(TrackingError, match="did not accept the runs"),
    ):
        publish_cell(results, cell_record(layers=range(30)), file)
    publish_cell(results, cell_record(layers=range(30)), file)
    check_complete(sqlite_uri(results), "layers", cell_record(layers=range(30)), file, results)


@pytest.fixture
def guarded_server(template, tmp_path) -> Iterator[MlflowServer]:
    folder = tmp_path / "guarded"
    folder.mkdir()
    with MlflowServer(folder, template, auth=True) as server:
        yield server


def test_a_server_with_logins(guarded_server, results, file, monkeypatch):
    cell = cell_record(layers=(0,))
    backend = MlflowBackend("guarded", results, guarded_server.address)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASS"):
        backend.publish(cell, [file], {})
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a wrong one")
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_USERNAME") as caught:
        backend.publish(cell, [file], {})
    assert "a wrong one" not in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    assert backend.publish(cell, [file], {}).created == 3
    check_complete(guarded_server.address, "guarded", cell, file, results)

    experiment = MlflowStoreReader(guarded_server.address, "guarded").experiment.experiment_id
    address = guarded_server.address.replace("://", f"://{USER}:{PASSWORD}@") + "/"
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    published = MlflowBackend("guarded", results, address).publish(cell, [file], {})
    assert published.unchanged == 3
    assert published.location == f"{guarded_server.address}/#/experiments/{experiment}/runs"


def test_sync_completes_if_the_server_dies(mortal, tiny_llama, experiment, tmp_path, monkeypatch):
    """The server is killed between the figures and the files of a cell."""
    benchmarks = ["copa", "winogrande"]
    study = experiment(tiny_llama(layers=2), limit=6, layer=[0, 1], benchmark=benchmarks)
    results, project = tmp_path / "results", "dies"
    with Gate(mortal.address) as gate:
        gate.actions_by_path["/mlflow-artifacts/"] = mortal.stop
        monkeypatch.setenv("MLFLOW_TRACKING_URI", gate.address)
        result = cli("run", study, "--results", results, "--track", f"mlflow:{project}")
        output = result.output.replace("\n", " ")
        assert result.exit_code == 1, output
        assert "Traceback" not in output
        assert f"tracker sync --to mlflow:{project} --results {results}" in output
        cells = api.ls(results)
        assert [cell.n for cell in cells] == [6, 6], "the measurement goes on"

        mortal.start()
        # What is owed is known without being named again, and whatever the environment says.
        monkeypatch.delenv("MLFLOW_TRACKING_URI")
        assert not api.sync(results=results).failed
    store = MlflowStoreReader(mortal.address, project)
    assert len(store.runs) == 2 * (2 + 2)
    assert not (results / "mlflow.db").exists()
    for cell in cells:
        store.assert_shows(cell)
    for stored_cell in Ledger(results).cells():
        record = next(cell for cell in cells if cell.key == stored_cell.identity.key)
        run_id = store.by_key[run_key(record, "cell")]
        for shard in stored_cell.shards():
            assert store.bytes_of(run_id, shard.name, tmp_path) == shard.read_bytes()


def test_a_server_without_logged_models(server, results, file):
    """As one of MLflow 2, which knows no such path."""
    cell = cell_record(layers=(0,))
    with Gate(server) as gate:
        gate.unknown_path = "/logged-models"
        backend = MlflowBackend("no-models", results, gate.address)
        assert backend.publish(cell, [file], {}).created == 3
        assert backend.publish(cell, [file], {}).unchanged == 3
    store = MlflowStoreReader(server, "no-models")
    store.assert_shows(cell)
    assert not store.client.search_logged_models([store.experiment.experiment_id])
