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
from tests.helpers.runs import (
    descendants,
    kill_program,
    list_shards,
    run_experiment,
    type_command,
    write_arc,
)
from tracker.ledger.blocks import BLOCK_SIZE
from tracker.measuring.job import Options
from tracker.schema.answers import statement
from tracker.schema.experiment_input import load_experiment

job = pytest.importorskip("tracker.measuring.executors.slurm", exc_type=ImportError)
LOCAL = {"executor": "slurm", "slurm": {"cluster": "local", "timeout_min": 10}}
"""Of so few minutes submitit takes each signal for a time limit, not for a preemption."""
JOB = "submitit.core._submit"


@pytest.fixture(autouse=True)
def quick(monkeypatch, one_thread):
    """Look often at the jobs, and do not wait for the files of a slow network."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr("tracker.measuring.executors.slurm.POLL_SECONDS", 0.1)
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 0)


@pytest.fixture
def cli(tmp_path):
    def run(file: Path, *arguments: str) -> tuple[int, str]:
        options = ("--results", tmp_path / "results", "--track", "none", "--executor", "slurm")
        return type_command("run", file, *options, *arguments)

    return run


def test_a_job_array_gives_what_one_process_gives_also_where_a_job_is_timed_out(
    as_one_process, tmp_path
):
    """Of questions: the job that is queued again continues from its shards."""
    contents: dict[Path, bytes] = {}

    def interrupt() -> None:
        contents.update({path: path.read_bytes() for path in list_shards(tmp_path / "elsewhere")})
        (target,) = (process for process in descendants(JOB) if benchmark_of(process) == "arc_easy")
        # What SLURM sends before a time limit.
        target.send_signal(signal.SIGUSR2)

    options = {
        "benchmarks": ["arc_easy", "piqa"],
        "documents": 400,
        "until": "drop within 8 pp at 80 %",
    }
    results, heard = as_one_process(interrupt, **options, **LOCAL)
    (cell,) = results.cells
    assert 64 < cell.answer.looked < 400
    assert statement(cell.answer) in heard.lines[-1]
    assert results.outcome.models_loaded == 1
    assert heard.n_expected == -(-cell.answer.looked // BLOCK_SIZE)
    assert results.report.is_file()
    paths = list_shards(tmp_path / "elsewhere")
    assert 0 < len(contents) < len(paths)
    assert all(path.read_bytes() == content for path, content in contents.items())
    logs = (tmp_path / "elsewhere").glob("slurm/*/*_log.out")
    assert sum("Requeued" in log.read_text() for log in logs) == 1


def benchmark_of(job: psutil.Process) -> str:
    """Return the benchmark that a job measures."""
    from submitit.core.utils import DelayedSubmission

    folder = job.cmdline()[-1].replace("%j", number := job.environ()["SUBMITIT_LOCAL_JOB_ID"])
    submission = DelayedSubmission.load(Path(folder, f"{number}_submitted.pkl"))
    return str(submission.function.requests[0].benchmark)


def test_a_job_that_dies_fails_its_cell_and_names_its_log(tiny_llama, experiment, tmp_path):
    jobs = tmp_path / "jobs"
    file = experiment(tiny_llama(), data=str(write_arc(tmp_path / "data")))
    killer = threading.Thread(target=kill_program, args=[JOB])
    killer.start()
    results = run_experiment(file, jobs, **LOCAL)
    killer.join()
    (reason,) = results.outcome.failed.values()
    assert "_log.err" in reason
    assert results.outcome.exit_code == 1


def test_a_job_that_never_measures_anything_is_not_started_for_ever(
    tiny_llama, experiment, tmp_path, monkeypatch
):
    def stop(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(job, "measure_cell", stop)
    file = experiment(tiny_llama(), data=str(write_arc(tmp_path / "data")))
    (request,) = load_experiment(file).file.cells()
    cell_job = job.CellJob([request], tmp_path / "results", Options())
    for _ in range(job.MAX_STARTS):
        with pytest.raises(SystemExit):
            cell_job()
        cell_job = pickle.loads(pickle.dumps(cell_job))
    assert "--slurm timeout_min=240" in str(cell_job().error)


@pytest.mark.parametrize(("settings", "words"), golden("slurm"))
def test_wrong_parameters_are_refused(
    cli, tiny_llama, experiment, tmp_path, monkeypatch, settings, words
):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # no srun here
    file = experiment(tiny_llama(), data=str(write_arc(tmp_path / "data")))
    options = (word for setting in settings.split() for word in ("--slurm", setting))
    code, output = cli(file, *options)
    assert code == 2, output
    assert words in output
    assert not (tmp_path / "results").exists()
