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

from tests.conftest import of_all_workers
from tests.helpers.forks import Fork, forks
from tests.helpers.lm_eval import write_rows
from tests.helpers.runs import Heard, arc, run, same, shards, wait_for
from tracker.api import Results
from tracker.benchmarks.factory import known_tasks
from tracker.ledger.blocks import BLOCK


@pytest.fixture(scope="session", autouse=True)
def _tasks(_cache, tmp_path_factory) -> None:
    """Read lm-eval's tasks once, although workers side by side begin with these tests."""
    with FileLock(of_all_workers(tmp_path_factory) / "tasks.lock"):
        known_tasks()


@pytest.fixture
def measure(experiment, tmp_path) -> Callable[..., Results]:
    """Measure an experiment on the tiny model or another one, in which nothing fails."""

    def measure(
        model: Path | str, results: str = "results", heard: Heard | None = None, **settings: object
    ) -> Results:
        asked = {"data": str(arc(tmp_path / "arc")), **settings}
        done = run(experiment(model, **asked), tmp_path / results, heard)
        assert not done.outcome.failed, done.outcome.failed
        return done

    return measure


@pytest.fixture(scope="module")
def forked(tmp_path_factory) -> Iterator[Callable[..., Fork]]:
    """Give commands, each in a process of its own, which begins at once."""
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with forks(tmp_path_factory.mktemp("forks"), environment) as found:
        yield found


@pytest.fixture
def long(tiny_llama, experiment) -> Path:
    """Write a study that runs long enough to be interrupted."""
    return experiment(tiny_llama(), limit=5 * BLOCK + 5)


@contextmanager
def meanwhile(results: Path, do: Callable[[], None]) -> Iterator[None]:
    """Do something while something is measured, as soon as there is some of it."""
    done: list[bool] = []

    def wait_and_do() -> None:
        wait_for(lambda: shards(results))
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
) -> Callable[..., tuple[Results, Heard]]:
    """Run cells of one model elsewhere, by relative paths: nothing differs, nothing is lost, of
    layers and of heads.

    That of piqa, of which no model can read an answer, fails alone. What is to `do` is done
    meanwhile.
    """

    def check(
        do: Callable[[], None],
        benchmarks: Sequence[str] = ("arc_easy", "piqa", "arc_challenge"),
        documents: int = BLOCK + 4,
        until: str | None = None,
        **elsewhere: object,
    ) -> tuple[Results, Heard]:
        monkeypatch.chdir(tmp_path)
        arc(Path("data"), documents + 4 * (until is None))
        unreadable = {"goal": "Which?", "sol1": "word " * 400, "sol2": "none", "label": 0}
        write_rows(Path("data/baber/piqa"), validation=[unreadable] * documents)
        model, good = f"./{tiny_llama().name}", [name for name in benchmarks if name != "piqa"]
        asked = {"data": "./data", "limit": None, "until": until}
        asked |= {"sample": documents if until is None else None}
        asked |= {"component": ["layer", "head"], "head": 1}
        file = experiment(model, benchmark=[*benchmarks], **asked)
        alone, heard = run(file, tmp_path / "one"), Heard()
        with meanwhile(tmp_path / "elsewhere", do):
            found = run(file, tmp_path / "elsewhere", heard, **elsewhere)
        assert found.outcome.failed == alone.outcome.failed
        ((title, why),) = found.outcome.failed.items()
        assert "piqa" in title
        assert "continuation" in why
        assert {run.change.component for run in found.cells[0].runs} == {"layer", "head"}
        same(tmp_path / "one", tmp_path / "elsewhere")
        assert heard.counted == heard.expected
        assert heard.finished
        again = run(
            experiment(model, "good.yaml", benchmark=good, **asked),
            tmp_path / "elsewhere",
            **elsewhere,
        )
        assert again.outcome.models_loaded == 0
        assert again.cells == found.cells
        assert [cell.benchmark.name for cell in again.cells] == good
        return found, heard

    return check
