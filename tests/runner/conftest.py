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

from tests.runner.elsewhere import Heard, run
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
