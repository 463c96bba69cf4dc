"""Cells' runs in W&B while they are measured; what stands here runs in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from typing_extensions import override

from tracker.core.records import CellRecord
from tracker.tracking.base import PROGRESS, Ending, OpenRuns
from tracker.tracking.runs import cell_run
from tracker.tracking.wandb.backend import WandbBackend
from tracker.tracking.wandb.session import session

EXIT_CODES: dict[Ending, int] = {"finished": 0, "failed": 1, "killed": 255}
"""As W&B's own hooks end a run: 255 is shown as killed."""


class WandbLiveRun(OpenRuns):
    """Shows cells of a project; the arguments are those of `WandbBackend`."""

    def __init__(self, project: str, results: Path) -> None:
        super().__init__()
        self._backend = WandbBackend(project, results, in_sweep=False)
        self._results = results.absolute()

    @override
    def begin(self, cell: CellRecord) -> None:
        with self._session():
            run = cell_run(cell)
            handle = self._backend.open(run, watched=os.getppid())
            if handle is not None:
                show_progress(handle)
                self._runs[run.key] = handle

    @override
    def update(self, key: str, figures: Mapping[str, float], step: int) -> None:
        with self._session():
            if key in self._runs:
                self._runs[key].log(dict(figures))

    @override
    def end(self, key: str, status: Ending) -> None:
        with self._session():
            if (handle := self._runs.pop(key, None)) is not None:
                handle.finish(exit_code=EXIT_CODES[status])

    def _session(self) -> Any:
        return session(self._results, "W&B does not show what is measured")


def show_progress(handle: Any) -> None:
    """Draw what is known so far over the documents."""
    handle.define_metric(f"{PROGRESS}*", step_metric=f"{PROGRESS}documents")
