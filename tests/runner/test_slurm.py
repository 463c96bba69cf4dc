"""SLURM jobs through submitit's local executor: real processes, one a cell, really interrupted."""

from __future__ import annotations

import pickle
import signal
import sys
import threading
from pathlib import Path

import psutil
import pytest

from tests.conftest import golden
from tests.helpers.runs import arc, descendants, kill, run, shards, typed
from tracker.core.answers import statement
from tracker.core.experiment_input import load_experiment
from tracker.ledger.blocks import BLOCK
from tracker.measuring.job import Options

job = pytest.importorskip("tracker.executors.slurm", exc_type=ImportError)
LOCAL = {"executor": "slurm", "slurm": {"cluster": "local", "timeout_min": 10}}
"""Of so few minutes submitit takes each signal for a time limit, not for a preemption."""
JOB = "submitit.core._submit"


@pytest.fixture(autouse=True)
def quick(monkeypatch, one_thread):
    """Look often at the jobs, and do not wait for the files of a slow network."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr("tracker.executors.slurm.POLL", 0.1)
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 0)


@pytest.fixture
def cli(tmp_path):
    def run(file: Path, *arguments: str) -> tuple[int, str]:
        asked = ("--results", tmp_path / "results", "--track", "none", "--executor", "slurm")
        return typed("run", file, *asked, *arguments)

    return run


def test_a_job_array_gives_what_one_process_gives_also_where_a_job_is_timed_out(
    as_one_process, tmp_path
):
    """Of questions: the job that is queued again continues from its shards."""
    kept: dict[Path, bytes] = {}

    def interrupt() -> None:
        kept.update({path: path.read_bytes() for path in shards(tmp_path / "elsewhere")})
        (good,) = (each for each in descendants(JOB) if benchmark_of(each) == "arc_easy")
        # What SLURM sends before a time limit.
        good.send_signal(signal.SIGUSR2)

    asked = {
        "benchmarks": ["arc_easy", "piqa"],
        "documents": 400,
        "until": "drop within 4 pp at 80 %",
    }
    found, heard = as_one_process(interrupt, **asked, **LOCAL)
    (cell,) = found.cells
    assert 64 < cell.answer.looked < 400
    assert statement(cell.answer) in heard.lines[-1]
    assert found.outcome.models_loaded == 1
    assert heard.expected == -(-cell.answer.looked // BLOCK)
    assert found.report.is_file()
    there = shards(tmp_path / "elsewhere")
    assert 0 < len(kept) < len(there)
    assert all(path.read_bytes() == content for path, content in kept.items())
    logs = (tmp_path / "elsewhere").glob("slurm/*/*_log.out")
    assert sum("Requeued" in log.read_text() for log in logs) == 1


def benchmark_of(job: psutil.Process) -> str:
    """Return the benchmark that a job measures."""
    from submitit.core.utils import DelayedSubmission

    folder = job.cmdline()[-1].replace("%j", number := job.environ()["SUBMITIT_LOCAL_JOB_ID"])
    asked = DelayedSubmission.load(Path(folder, f"{number}_submitted.pkl"))
    return str(asked.function.requests[0].benchmark)


def test_a_job_that_dies_fails_its_cell_and_names_its_log(tiny_llama, experiment, tmp_path):
    jobs = tmp_path / "jobs"
    file = experiment(tiny_llama(), data=str(arc(tmp_path / "data")))
    killer = threading.Thread(target=kill, args=[JOB])
    killer.start()
    found = run(file, jobs, **LOCAL)
    killer.join()
    (why,) = found.outcome.failed.values()
    assert "_log.err" in why
    assert found.outcome.exit_code == 1


def test_a_job_that_never_measures_anything_is_not_started_for_ever(
    tiny_llama, experiment, tmp_path, monkeypatch
):
    def stopped(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(job, "measure_cell", stopped)
    file = experiment(tiny_llama(), data=str(arc(tmp_path / "data")))
    (request,) = load_experiment(file).file.cells()
    asked = job.CellJob([request], tmp_path / "results", Options())
    for _ in range(job.STARTS):
        with pytest.raises(SystemExit):
            asked()
        asked = pickle.loads(pickle.dumps(asked))
    assert "--slurm timeout_min=240" in str(asked().error)


@pytest.mark.parametrize(("settings", "words"), golden("slurm"))
def test_wrong_parameters_are_refused(
    cli, tiny_llama, experiment, tmp_path, monkeypatch, settings, words
):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # no srun here
    file = experiment(tiny_llama(), data=str(arc(tmp_path / "data")))
    code, said = cli(file, *(word for setting in settings.split() for word in ("--slurm", setting)))
    assert code == 2, said
    assert words in said
    assert not (tmp_path / "results").exists()
