"""What the tests of the runner share."""

from __future__ import annotations

import os

# Read when Ray is imported: no statistics go anywhere, servers listen on loopback only, and no
# token is written into the home folder.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.runner.elsewhere import Heard, arc, run, typed
from tracker.api import Results


@pytest.fixture
def one_thread(monkeypatch):
    """Compute here as the workers of the tests do, so that sums are added in the same order."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def measure(experiment: Callable[..., Path], tmp_path: Path) -> Callable[..., Results]:
    """Measure an experiment on the tiny model or another one, in which nothing fails."""

    def measure(
        model: Path | str, results: str = "results", heard: Heard | None = None, **settings: object
    ) -> Results:
        done = run(experiment(model, **settings), tmp_path / results, heard)
        assert not done.outcome.failed, done.outcome.failed
        return done

    return measure


@pytest.fixture
def one_cell_fails(
    tiny_llama: Callable[..., Path], experiment: Callable[..., Path], tmp_path: Path
) -> Callable[..., None]:
    """Run ARC's two tasks in some way; one of them, whose answer no model can read, fails alone."""

    def run_both(*options: str) -> None:
        data = arc(tmp_path / "data", 12)
        broken = data / "allenai/ai2_arc/ARC-Easy/test.jsonl"
        broken.write_text(broken.read_text().replace("that 3", "word " * 400))
        file = experiment(tiny_llama(), benchmark=["arc_easy", "arc_challenge"], data=str(data))
        where = ("--results", tmp_path / "results", "--track", "none")
        code, said = typed("run", file, *where, *options)
        assert code == 1, said
        assert "continuation" in said
        assert "to run just what failed, give the same command again" in said
        assert "arc_challenge · 0-shot" in said

    return run_both
