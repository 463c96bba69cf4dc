"""Shared fixtures of the runner's tests."""

from __future__ import annotations

import os

# Read when Ray is imported: no statistics go anywhere, servers listen on loopback only, and no
# token is written into the home folder.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

from tests.conftest import shared_folder
from tests.helpers.forks import ForkedProgram, forked_commands
from tests.helpers.lm_eval import write_rows
from tests.helpers.runs import (
    RecordingProgress,
    assert_same_results,
    list_shards,
    run_experiment,
    wait_for,
    write_arc,
)
from tests.helpers.trace_tasks import write_task
from tracker.api import Results
from tracker.benchmarks.factory import list_tasks
from tracker.ledger.blocks import BLOCK_SIZE


@pytest.fixture(scope="session", autouse=True)
def _tasks(_cache, tmp_path_factory) -> None:
    """Read lm-eval's tasks once, although workers side by side begin with these tests."""
    with FileLock(shared_folder(tmp_path_factory) / "tasks.lock"):
        list_tasks()


@pytest.fixture
def measure(experiment, tmp_path) -> Callable[..., Results]:
    """Measure an experiment on the tiny model or another one, in which nothing fails."""

    def measure(
        model: Path | str,
        results: str = "results",
        heard: RecordingProgress | None = None,
        **settings: object,
    ) -> Results:
        options = {"data": str(write_arc(tmp_path / "arc")), **settings}
        outcome = run_experiment(experiment(model, **options), tmp_path / results, heard)
        assert not outcome.outcome.failed, outcome.outcome.failed
        return outcome

    return measure


@pytest.fixture(scope="module")
def forked(tmp_path_factory) -> Iterator[Callable[..., ForkedProgram]]:
    """Give commands, each in a process of its own, which begins at once."""
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    first = "from tests.helpers.checks import take_llamas_as_checked as take; take()"
    with forked_commands(tmp_path_factory.mktemp("forks"), environment, first) as fork:
        yield fork


@pytest.fixture
def long(tiny_llama, experiment) -> Path:
    """Write a study that runs long enough to be interrupted."""
    return experiment(tiny_llama(), limit=5 * BLOCK_SIZE + 5)


@contextmanager
def meanwhile(results: Path, do: Callable[[], None]) -> Iterator[None]:
    """Do something while something is measured, as soon as there is some of it."""
    done: list[bool] = []

    def wait_and_do() -> None:
        wait_for(lambda: list_shards(results))
        do()
        done.append(True)

    thread = threading.Thread(target=wait_and_do)
    thread.start()
    yield
    thread.join()
    assert done


@pytest.fixture
def as_one_process(
    tiny_llama, experiment, tmp_path, monkeypatch
) -> Callable[..., tuple[Results, RecordingProgress]]:
    """Run cells of one model elsewhere, by relative paths: nothing differs, nothing is lost, of
    layers and of heads.

    That of piqa, of which no model can read an answer, fails alone. What is to `do` is done
    meanwhile.
    """

    def check(
        do: Callable[[], None],
        benchmarks: Sequence[str] = ("arc_easy", "piqa", "traces:letters"),
        documents: int = BLOCK_SIZE + 4,
        until: str | None = None,
        **elsewhere: object,
    ) -> tuple[Results, RecordingProgress]:
        monkeypatch.chdir(tmp_path)
        write_arc(Path("data"), documents + 4 * (until is None))
        unreadable = {"goal": "Which?", "sol1": "word " * 400, "sol2": "none", "label": 0}
        write_rows(Path("data/baber/piqa"), validation=[unreadable] * documents)
        write_task(Path("tasks"), [f"Question {n}?" for n in range(documents)], "e" * documents)
        model, readable = f"./{tiny_llama().name}", [name for name in benchmarks if name != "piqa"]
        options = {"data": "./data", "include_path": "./tasks", "limit": None, "until": until}
        options |= {"sample": documents if until is None else None}
        options |= {"component": ["layer", "head"], "head": 1}
        file = experiment(model, benchmark=[*benchmarks], **options)
        plain_results, heard = run_experiment(file, tmp_path / "one"), RecordingProgress()
        with meanwhile(tmp_path / "elsewhere", do):
            other_results = run_experiment(file, tmp_path / "elsewhere", heard, **elsewhere)
        assert other_results.outcome.failed == plain_results.outcome.failed
        ((title, reason),) = other_results.outcome.failed.items()
        assert "piqa" in title
        assert "continuation" in reason
        assert {run.change.component for run in other_results.cells[0].runs} == {"layer", "head"}
        assert_same_results(tmp_path / "one", tmp_path / "elsewhere")
        assert heard.n_counted == heard.n_expected
        assert heard.finished
        repeated = run_experiment(
            experiment(model, "good.yaml", benchmark=readable, **options),
            tmp_path / "elsewhere",
            **elsewhere,
        )
        assert repeated.outcome.models_loaded == 0
        assert repeated.cells == other_results.cells
        assert [cell.benchmark.name for cell in repeated.cells] == readable
        return other_results, heard

    return check
