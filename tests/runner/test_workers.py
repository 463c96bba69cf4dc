"""Worker processes of this machine: what comes out is what one process gives."""

from __future__ import annotations

import re
import sys
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.helpers.runs import (
    RecordingProgress,
    descendants,
    kill_program,
    run_experiment,
    type_command,
    write_arc,
)
from tracker.ledger.blocks import BLOCK_SIZE
from tracker.measuring.executors import pool as allotted
from tracker.measuring.executors import processes
from tracker.measuring.executors.processes import ProcessesExecutor, WorkerProcess
from tracker.measuring.job import Options
from tracker.models import devices
from tracker.schema.config import cell_request
from tracker.schema.distribution import extra_command
from tracker.schema.errors import ModelError
from tracker.schema.remote import RemoteError

WORKER = "serve(False)"

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_failure_stays_in_its_cell(tiny_llama, experiment, tmp_path):
    """Of ARC's two tasks, one of which has an answer that no model can read."""
    data = write_arc(tmp_path / "data", 12)
    path = data / "allenai/ai2_arc/ARC-Easy/test.jsonl"
    path.write_text(path.read_text().replace("that 3", "word " * 400))
    file = experiment(tiny_llama(), benchmark=["arc_easy", "arc_challenge"], data=str(data))
    code, output = type_command("run", file, "--results", tmp_path / "results", "--track", "none")
    assert code == 1, output
    assert "continuation" in output
    assert "type the same command again to repeat the failed ones" in output
    assert "arc_challenge · 0-shot" in output


def test_two_give_what_one_process_gives_also_where_one_is_killed(as_one_process):
    results, heard = as_one_process(partial(kill_program, WORKER), workers=2)
    # Three cells of one model: each worker has loaded it once, and who came for the killed one.
    assert 1 <= results.outcome.models_loaded <= 3
    # Three options, or a trace and its prompt; the intact model, four layers, four heads.
    assert heard.n_expected == (BLOCK_SIZE + 4) * (3 + 2) * 9
    assert heard.lines.count("2 workers, 1 thread each") == 1
    assert heard.lines.count("loading tiny-llama") == 1
    (death,) = [line for line in heard.lines if "died" in line]
    assert re.match(
        r"worker [12] died; its unfinished work is done again \(the worker was killed, probably",
        death,
    )
    assert not list(descendants(WORKER))


def test_one_that_cannot_start_says_why(monkeypatch, long, tmp_path):
    monkeypatch.setattr(processes, "_WORKER_TARGET", "tests.helpers.runs:NoDevice")
    heard = RecordingProgress()
    results = run_experiment(long, tmp_path / "results", heard, workers=1)
    (reason,) = results.outcome.failed.values()
    assert reason == "no worker is left: exit code 1: no such device"
    assert "worker 1 cannot start: exit code 1: no such device" in heard.lines


def test_a_worker_says_what_keeps_it_from_its_work(tmp_path):
    variables = {"CUDA_VISIBLE_DEVICES": "98,99"}

    def make_worker(device: str) -> WorkerProcess:
        options = Options(device=device)
        return WorkerProcess("worker 1", tmp_path / "out", variables, options, ".", {}, 1)

    error = "accelerators 98,99; only 0 are available"
    with closing(make_worker("spread")) as worker, pytest.raises(ModelError, match=error):
        worker.ready()
    with closing(make_worker("cpu")) as worker:
        worker.ready()
        with pytest.raises(RemoteError, match="AttributeError: 'str' object"):
            worker.open(["a request"])
        worker.ready()


class TestDevices:
    """Of accelerators there are none here: what a worker is told, and who says how many."""

    @pytest.fixture
    def eight(self, monkeypatch):
        gpus = [torch.device("cuda", n) for n in range(8)]
        monkeypatch.setattr(devices, "accelerators", lambda: gpus)
        monkeypatch.setattr(processes, "default_device", lambda: gpus[0])
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(f"GPU-{n}" for n in range(2, 10)))
        monkeypatch.setattr(processes, "_least_free_memory", lambda: 79 * 2**30)
        return lambda **options: ProcessesExecutor(Options(device="all", **options))

    @pytest.mark.parametrize(
        ("weights", "settings", "sees"),
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
    def test_each_worker_sees_its_own(self, eight, monkeypatch, weights, settings, sees):
        monkeypatch.setattr(allotted, "largest_weights", lambda jobs, options: weights * 2**30)
        executor = eight(**settings)
        groups = executor._worker_groups([])
        workers = [executor._make_worker(1, group, 1, 1, Path("out")) for group in groups]
        assert [worker._added["CUDA_VISIBLE_DEVICES"] for worker in workers] == sees
        options = {worker._object[1][0].device for worker in workers}
        assert options == {"spread" if "," in sees[0] else "cuda"}

    def test_of_weights_it_is_known_what_they_take(self, tiny_llama):
        folder = tiny_llama()
        file = (folder / "model.safetensors").stat().st_size
        request = cell_request(model=str(folder), benchmark="b", layers=(0,))
        size = allotted.largest_weights([SimpleNamespace(requests=(request,))], Options())
        assert 0 <= file - size < 10_000  # the file's header


@pytest.mark.parametrize(("executor", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_without_the_extra(tiny_llama, experiment, tmp_path, monkeypatch, executor, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"tracker.measuring.executors.{executor}", raising=False)
    file = experiment(tiny_llama(), data=str(write_arc(tmp_path / "data")))
    results = tmp_path / "results"
    code, output = type_command("run", file, "--results", results, "--executor", executor)
    assert code == 2, output
    assert extra_command(executor) in output
    assert not (tmp_path / "results").exists()
