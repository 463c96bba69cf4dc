"""SLURM jobs through submitit's local executor: real processes, one a cell, really interrupted."""

from __future__ import annotations

import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.conftest import golden
from tests.runner.elsewhere import arc, descendants, run, same, shards, typed, wait_for
from tracker.core.asked import load_experiment
from tracker.core.distribution import install_extra
from tracker.measuring.job import Options

job = pytest.importorskip("tracker.executors.slurm", exc_type=ImportError)
LOCAL = {"executor": "slurm", "slurm": {"cluster": "local"}}
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


def test_a_job_array_gives_what_one_process_gives(as_one_process):
    found, heard = as_one_process(**LOCAL)
    assert found.outcome.models_loaded == 2
    assert heard.expected == 4
    assert found.report.is_file()


@pytest.fixture
def meanwhile():
    """Do something to a run while it is under way, as soon as it has written something."""

    @contextmanager
    def meanwhile(jobs: Path, do: Callable[[], None]) -> Iterator[None]:
        thread = threading.Thread(target=lambda: (wait_for(lambda: shards(jobs)), do()))
        thread.start()
        yield
        thread.join()

    return meanwhile


def test_a_job_that_is_timed_out_continues_from_its_shards(long, tmp_path, meanwhile):
    run(long, tmp_path / "local")
    jobs = tmp_path / "jobs"
    kept: dict[Path, bytes] = {}

    def interrupt() -> None:
        kept.update({path: path.read_bytes() for path in shards(jobs)})
        # What SLURM sends before a time limit.
        next(descendants(JOB)).send_signal(signal.SIGUSR2)

    with meanwhile(jobs, interrupt):
        found = run(long, jobs, **LOCAL)
    assert not found.outcome.failed
    assert kept
    assert len(kept) < len(shards(jobs))
    assert all(path.read_bytes() == content for path, content in kept.items())
    (log,) = jobs.glob("slurm/*/*_log.out")
    assert "Requeued" in log.read_text()
    same(tmp_path / "local", jobs)


def test_a_job_that_dies_fails_its_cell_and_names_its_log(long, tmp_path, meanwhile):
    jobs = tmp_path / "jobs"
    with meanwhile(jobs, lambda: next(descendants(JOB)).send_signal(signal.SIGKILL)):
        found = run(long, jobs, **LOCAL)
    (why,) = found.outcome.failed.values()
    assert "_log.err" in why
    assert found.outcome.exit_code == 1


def test_a_job_that_never_measures_anything_is_not_started_for_ever(
    tiny_llama, experiment, tmp_path, monkeypatch
):
    def stopped(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(job, "open_model", lambda *_: None)
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


def test_parameters_need_the_executor(tiny_llama, experiment, tmp_path):
    file = experiment(tiny_llama(), data=str(arc(tmp_path / "data")))
    code, said = typed("run", file, "--results", tmp_path / "results", "--slurm", "time=60")
    assert code == 2, said
    assert "add --executor slurm" in said


@pytest.mark.parametrize(("executor", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_without_the_extra(tiny_llama, experiment, tmp_path, monkeypatch, executor, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"tracker.executors.{executor}", raising=False)
    file = experiment(tiny_llama(), data=str(arc(tmp_path / "data")))
    code, said = typed("run", file, "--results", tmp_path / "results", "--executor", executor)
    assert code == 2, said
    assert install_extra(executor) in said
    assert not (tmp_path / "results").exists()
