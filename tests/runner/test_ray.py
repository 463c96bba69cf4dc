"""A real Ray cluster of two nodes on this machine: what comes out is what one process gives."""

from __future__ import annotations

import re
import socket
import tempfile
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.runs import kill_program, type_command, write_arc
from tracker.ledger.store import Ledger
from tracker.measuring.executors.base import open_executor
from tracker.measuring.job import Options, Reporting
from tracker.measuring.progress import Silent

RAY = ("--track", "none", "--executor", "ray")


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
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    nodes.add_node(**node)
    settings.setenv("RAY_ADDRESS", nodes.address)
    yield nodes
    nodes.shutdown()
    settings.undo()


@pytest.fixture
def here(tmp_path, monkeypatch, one_thread):
    """Work in a folder that the cluster was not started in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _make_workers(options, gpus=1):
    from tracker.measuring.executors import ray

    return list(ray._make_actors(options, gpus))


def test_without_a_cluster_a_local_one_lives_as_long_as_the_run(here, monkeypatch):
    import ray

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    executor = open_executor(options := Options(executor="ray", device="cpu"))
    (worker,) = _make_workers(options)
    assert worker.name == f"worker 1 on {socket.gethostname()}"
    assert ray.get(ray.remote(lambda: Path.cwd()).remote()) == here
    executor.measure([], Reporting(Ledger(here / "results"), Silent(), print, print))
    assert not ray.is_initialized()


@pytest.mark.parametrize("named", [True, False])
def test_a_cluster_that_is_gone_is_said_at_once(
    here, apart, tiny_llama, experiment, monkeypatch, named
):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    address_file = apart / "ray" / "ray_current_cluster"
    if named:
        monkeypatch.setenv("RAY_ADDRESS", address)
    else:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        address_file.parent.mkdir(exist_ok=True)
        address_file.write_text(address)
    file = experiment(tiny_llama(), data=str(write_arc(here / "data")))
    code, output = type_command("run", file, "--results", here / "results", *RAY)
    address_file.unlink(missing_ok=True)
    assert code == 2, output
    assert f"nobody answers at {address}" in output
    assert "ray stop" in output


@pytest.mark.usefixtures("cluster", "here")
def test_two_nodes_give_what_one_process_gives_also_where_a_worker_is_killed(as_one_process):
    _, heard = as_one_process(partial(kill_program, "ray::RemoteWorker.measure"), executor="ray")
    (death,) = [line for line in heard.lines if "died" in line]
    assert re.fullmatch(r"worker [12] on \S+ died; its unfinished work is done again \(.+\)", death)


def test_a_worker_gets_as_many_gpus_of_a_node_as_its_model_needs(monkeypatch):
    """GPUs that are not here: what is asked of Ray."""

    def node(number: int, gpus: int) -> dict[str, object]:
        resources = {"CPU": 16.0, "GPU": float(gpus)}
        host = f"host{number}"
        return {
            "NodeID": f"{number:056x}",
            "Alive": True,
            "NodeManagerHostname": host,
            "Resources": resources,
        }

    monkeypatch.setattr("ray.nodes", lambda: [node(1, 4), node(2, 0), node(3, 3)])
    single_workers, double_workers = (_make_workers(Options(), gpus) for gpus in (1, 2))
    assert [worker.name for worker in double_workers] == [
        f"worker {n} on host{m}" for n, m in ((1, 1), (2, 1), (3, 3))
    ]
    assert [worker._placement["num_gpus"] for worker in double_workers] == [2, 2, 2]
    assert {worker._options.device for worker in double_workers} == {"spread"}
    assert len(single_workers) == 7
    assert {worker._options.device for worker in single_workers} == {"auto"}
    assert not _make_workers(Options(), 5)
    cpu_workers = _make_workers(Options(device="cpu"))
    assert [worker._placement["num_cpus"] for worker in cpu_workers] == [16] * 3
