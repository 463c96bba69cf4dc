"""A real Ray cluster of two nodes on this machine: what comes out is what one process gives."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from tests.runner.elsewhere import Heard, arc, descendants, run, same, shards, wait_for
from tracker.cli.commands import main
from tracker.core.distribution import install_extra
from tracker.ledger.blocks import BLOCK


@pytest.fixture(scope="module", autouse=True)
def apart():
    """Keep what Ray writes in a folder of its own: a cluster of another run is not found there.

    The path is short, since Ray puts Unix sockets into it.
    """
    with tempfile.TemporaryDirectory(prefix="ray") as folder, pytest.MonkeyPatch.context() as set_:
        set_.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


@pytest.fixture(scope="module")
def cluster():
    """Start two nodes of one core each, on loopback, and end them by their ids."""
    from ray.cluster_utils import Cluster

    settings = pytest.MonkeyPatch()
    node = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}
    found = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    found.add_node(**node)
    settings.setenv("RAY_ADDRESS", found.address)
    yield found
    found.shutdown()
    settings.undo()


@pytest.fixture
def here(tmp_path, monkeypatch, one_thread):
    """Work in a folder that the cluster was not started in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_without_a_cluster_a_local_one_does_and_a_failure_stays_in_its_cell(
    here, tiny_llama, experiment, monkeypatch
):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    data = arc(here / "data", 12)
    broken = data / "allenai/ai2_arc/ARC-Easy/test.jsonl"
    broken.write_text(broken.read_text().replace("that 3", "word " * 400))
    file = experiment(tiny_llama(), benchmark=["arc_easy", "arc_challenge"], data=str(data))
    arguments = ["run", file, "--results", here / "results", "--track", "none"]
    found = CliRunner().invoke(main, [*map(str, arguments), "--executor", "ray"])
    assert found.exit_code == 1, found.output
    assert "continuation" in found.output
    assert "to run just what failed, give the same command again" in found.output
    assert "arc_challenge · 0-shot" in found.output


@pytest.mark.parametrize("named", [True, False])
def test_a_cluster_that_is_gone_is_said_at_once(
    here, apart, tiny_llama, experiment, monkeypatch, named
):
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = f"127.0.0.1:{server.getsockname()[1]}"
    left = apart / "ray" / "ray_current_cluster"
    if named:
        monkeypatch.setenv("RAY_ADDRESS", gone)
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        left.parent.mkdir(exist_ok=True)
        left.write_text(gone)
    file = experiment(tiny_llama(), data=str(arc(here / "data")))
    arguments = ["run", str(file), "--results", str(here / "results"), "--track", "none"]
    found = CliRunner().invoke(main, [*arguments, "--executor", "ray"])
    left.unlink(missing_ok=True)
    assert found.exit_code == 2, found.output
    assert f"nobody answers at {gone}" in found.output
    assert "ray stop" in found.output


def test_two_nodes_answer_a_question_as_one_process_does(cluster, here, tiny_llama, experiment):
    data = str(arc(here / "data", 4 * BLOCK + 8))
    file = experiment(tiny_llama(seed=3), data=data, limit=None, until="drop within 5 pp at 80 %")
    (alone,) = run(file, here / "local").cells
    assert alone.is_stopped
    (cell,) = run(file, here / "ray", executor="ray").cells
    assert (cell.answer, cell.runs) == (alone.answer, alone.runs)


def test_two_nodes_give_what_one_process_gives(cluster, here, tiny_llama, experiment):
    arc(here / "data", BLOCK + 8)
    name = tiny_llama().name
    file = experiment(
        f"./{name}",
        benchmark=["arc_easy", "arc_challenge"],
        data="./data",
        limit=None,
        sample=BLOCK + 4,
    )
    run(file, here / "local")
    heard = Heard()
    found = run(file, here / "ray", heard, executor="ray")
    assert not found.outcome.failed
    same(here / "local", here / "ray")
    # Two cells of one model: each worker has loaded it once.
    assert 1 <= found.outcome.models_loaded <= 2
    assert heard.counted == heard.expected == 2 * (BLOCK + 4) * 3 * 5
    assert heard.finished

    again = run(file, here / "ray", executor="ray")
    assert again.outcome.models_loaded == 0
    assert again.cells == found.cells


def test_what_a_killed_worker_did_is_done_again(cluster, here, tiny_llama, experiment):
    model = tiny_llama(layers=8)
    file = experiment(model, layer=list(range(8)), limit=4 * BLOCK + 5)
    run(file, here / "local")
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: shards(here / "ray"))
        wait_for(lambda: list(descendants("ray::Worker.measure")))
        victim: psutil.Process = next(descendants("ray::Worker.measure"))
        victim.send_signal(signal.SIGKILL)
        killed.append(victim.pid)

    heard = Heard()
    killer = threading.Thread(target=kill)
    killer.start()
    found = run(file, here / "ray", heard, executor="ray")
    killer.join()
    assert killed
    assert not found.outcome.failed
    assert any(line.startswith("a worker died; what it did is done again") for line in heard.lines)
    assert heard.counted == heard.expected
    same(here / "local", here / "ray")


def test_without_the_extra(here, tiny_llama, experiment, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "tracker.executors.ray", raising=False)
    file = experiment(tiny_llama(), data=str(arc(here / "data")))
    arguments = ["run", str(file), "--results", str(here / "results"), "--executor", "ray"]
    found = CliRunner().invoke(main, arguments)
    assert found.exit_code == 2, found.output
    assert install_extra("ray") in found.output
    assert not (here / "results").exists()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
