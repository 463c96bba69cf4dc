"""Worker processes of this machine: what comes out is what one process gives."""

from __future__ import annotations

import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from tests.runner.elsewhere import Heard, descendants, run, shards, wait_for
from tracker.core.config import cell_request
from tracker.core.errors import ModelError, RequestError
from tracker.executors import pool, processes
from tracker.executors.child import Child, answered
from tracker.executors.pool import LostError, grouped
from tracker.executors.processes import ProcessesExecutor
from tracker.ledger.blocks import BLOCK
from tracker.measuring.job import Options

WORKER = "tracker.executors.child"
LAYERS = list(range(8))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("options", [(), ("--workers", "2")])
def test_a_failure_stays_in_its_cell(one_cell_fails, options):
    one_cell_fails(*options)


def test_two_give_what_one_process_gives(as_one_process):
    found, heard = as_one_process(workers=2)
    # Two cells of one model: each worker has loaded it once.
    assert 1 <= found.outcome.models_loaded <= 2
    assert heard.expected == 2 * (BLOCK + 4) * 3 * 5
    assert heard.lines.count("2 workers, 1 thread each") == 1
    assert heard.lines.count("loading tiny-llama") == 1
    assert not list(descendants(WORKER))


def test_what_a_killed_worker_did_is_done_again(worker_is_killed):
    said = worker_is_killed(WORKER, workers=2)
    assert said.startswith("worker 1 died; what it did is done again (killed, as the system does")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_who_started_it(long, start, tmp_path, how):
    results = tmp_path / "results"
    long.write_text(long.read_text().replace("limit: {value: 165}", "limit: {value: 320}"))
    process = start("run", long, "--results", results, "--track", "none", "--workers", "2")
    wait_for(lambda: shards(results))
    workers = psutil.Process(process.pid).children()
    assert len(workers) == 2
    process.send_signal(how)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGKILL: -9}[how], output
    psutil.wait_procs(workers, timeout=30)
    assert not any(worker.is_running() for worker in workers)


def test_a_users_script_is_not_run_again(long, tmp_path):
    """`multiprocessing` would, in each worker, where no `if __name__` stands before it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import tracker\nprint('begins')\n"
        f"done = tracker.run({str(long)!r}, limit=4, results={str(tmp_path / 'results')!r}, "
        "track='none', workers=1)\nprint('failed', done.outcome.failed)\n"
    )
    said = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert said.stdout.split("\n")[:2] == ["begins", "failed {}"], said.stderr


class TestOneThatCannotStart:
    def test_says_why(self, monkeypatch, long, tmp_path):
        monkeypatch.setattr(
            "tracker.executors.child._PROGRAM", "raise SystemExit('no such device')"
        )
        heard = Heard()
        found = run(long, tmp_path / "results", heard, workers=2)
        (why,) = found.outcome.failed.values()
        assert why == "no worker is left: exit code 1: no such device"
        assert "worker 1 cannot start: exit code 1: no such device" in heard.lines

    def test_is_told_of_an_error_of_its_own(self):
        child = Child("worker 1", {}, "too few arguments")
        child.start()
        try:
            assert answered([child], 60) == [child]
            with pytest.raises(Exception, match="TypeError") as caught:
                child.answer()
            assert not isinstance(caught.value, LostError)
        finally:
            child.kill()


LOST = """
from tracker.executors import child, worker
def lost(*asked):
    raise RuntimeError("CUDA error: unspecified launch failure\\nCompile with TORCH_USE_CUDA_DSA")
worker.open_model = lost
child.serve()
"""


def test_a_worker_whose_device_is_lost_ends(monkeypatch):
    """Nothing can be computed in its process any more; another process, or device, may."""
    monkeypatch.setattr("tracker.executors.child._PROGRAM", LOST)
    child = Child("worker 1", {}, Options(), ".", {})
    child.start()
    try:
        assert child.answer() is None
        child.ask("open", ["a request"])
        with pytest.raises(LostError) as caught:
            child.answer()
        assert str(caught.value) == "exit code 1: CUDA error: unspecified launch failure"
    finally:
        child.kill()


def test_a_device_that_is_not_there_is_said_at_the_start():
    if torch.cuda.is_available():
        pytest.skip("it is there")
    child = Child("worker 1", {"CUDA_VISIBLE_DEVICES": "0,1"}, Options(device="spread"), ".", {})
    child.start()
    with pytest.raises(ModelError, match="accelerators 0,1 only 0 are there"):
        child.answer()
    child.kill()


class TestDevices:
    """Of accelerators there are none here: what a worker is told, and who says how many."""

    @pytest.fixture
    def eight(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(f"GPU-{n}" for n in range(2, 10)))
        monkeypatch.setattr(processes, "_least_free", lambda: 79 * 2**30)
        return lambda **said: ProcessesExecutor(Options(device="all", **said))

    @pytest.mark.parametrize(
        ("weights", "said", "sees"),
        [
            (16, {}, [f"GPU-{n}" for n in range(2, 10)]),
            (16, {"workers": 2}, ["GPU-2", "GPU-3"]),
            (16, {"devices_per_worker": 4}, ["GPU-2,GPU-3,GPU-4,GPU-5", "GPU-6,GPU-7,GPU-8,GPU-9"]),
            # Three are needed, two workers have three each, and none is to be idle.
            (141, {}, ["GPU-2,GPU-3,GPU-4,GPU-5", "GPU-6,GPU-7,GPU-8,GPU-9"]),
            (141, {"devices_per_worker": 3}, ["GPU-2,GPU-3,GPU-4", "GPU-5,GPU-6,GPU-7"]),
            (141, {"weights": 2**33, "workers": 1}, ["GPU-2"]),
        ],
    )
    def test_each_worker_sees_its_own(self, eight, monkeypatch, weights, said, sees):
        monkeypatch.setattr(pool, "largest", lambda jobs, options: weights * 2**30)
        places = eight(**said)._places([])
        assert [place.sees for place in places] == sees
        assert {place.device for place in places} == {"spread" if "," in sees[0] else "cuda"}

    def test_of_weights_it_is_known_what_they_take(self, tiny_llama):
        folder = tiny_llama()
        file = (folder / "model.safetensors").stat().st_size
        request = cell_request(model=str(folder), benchmark="b", layers=(0,))
        size = pool.largest([SimpleNamespace(requests=(request,))], Options())
        assert 0 <= file - size < 10_000  # the file's header

    def test_more_than_there_are(self, eight):
        with pytest.raises(RequestError, match=r"9 workers of 1 accelerators each: .* has 8"):
            eight(workers=9)
        with pytest.raises(RequestError, match=r"1 workers of 9 accelerators each: .* has 8"):
            eight(devices_per_worker=9)
        assert grouped(["0", "1", "2"], 2) == [range(2)]

    def test_without_any(self):
        if torch.cuda.is_available():
            pytest.skip("there are some")
        assert len(ProcessesExecutor(Options(device="all"))._places([])) == 1
        with pytest.raises(RequestError, match="no accelerators to choose from"):
            ProcessesExecutor(Options(device="all", devices_per_worker=2))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"workers": 0}, "workers is 0; write a whole number from 1 on"),
        ({"workers": 2, "device": "spread"}, "--device all --devices-per-worker 2"),
        ({"workers": 2, "executor": "ray"}, "Ray has a worker at every GPU"),
        ({"device": "all", "executor": "slurm"}, "--slurm gpus_per_node=2 --device spread"),
        ({"devices_per_worker": 2, "executor": "slurm"}, "gpus_per_node=2 --device spread"),
    ],
)
def test_what_does_not_go_together_is_refused(said, why):
    with pytest.raises(RequestError, match=why):
        Options(**said)
