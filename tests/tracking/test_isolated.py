"""The process of W&B's SDK: whatever becomes of it, ours is told and goes on."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.helpers.wandb_double import WandbDouble
from tracker.core.errors import TrackingError
from tracker.tracking import open_backend

from .conftest import cell_record


@pytest.fixture
def really_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users' processes are; those of other tests are forks."""
    monkeypatch.setattr("tracker.tracking.isolated.subprocess", subprocess)


@pytest.mark.usefixtures("really_started")
def test_a_call_whose_process_ends_is_a_tracking_error(lent: WandbDouble, tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    backend = open_backend("wandb", "team/layers", tmp_path)

    def started() -> list[psutil.Process]:
        return list(set(psutil.Process().children(recursive=True)) - before)

    def kill() -> None:
        next(process for process in started() if process.ppid() == os.getpid()).kill()

    def end(how: Callable[[], None]) -> None:
        while len(started()) < 2:  # the process, and the service of the SDK
            time.sleep(0.01)
        how()

    for how in (kill, backend.close):
        lent.delay = 5.0
        ending = threading.Thread(target=end, args=(how,))
        ending.start()
        with pytest.raises(TrackingError, match="the process of W&B has ended"):
            backend.publish(cell_record(layers=(0,)), [], {})
        ending.join()
        lent.delay = 0.0
    assert backend.publish(cell_record(layers=(0,)), [], {}).created == 3
    backend.close()
    assert not started()
