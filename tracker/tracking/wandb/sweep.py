"""A W&B sweep as it is now: what was asked of its trials, and the runs that they left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import wandb

from tracker.core.errors import TrackingError
from tracker.core.records import CellRecord, RunRecord
from tracker.tracking.base import SweepTrial
from tracker.tracking.runs import layer_run
from tracker.tracking.wandb.runs import labels_of
from tracker.tracking.wandb.session import finished, is_offline, log_in, session, start
from tracker.tracking.wandb.writing import add_config, write


class WandbSweep:
    """A sweep.

    Args:
        path: `ENTITY/PROJECT/ID`.
        results: The results folder, which keeps the files of runs that are written.
    """

    def __init__(self, path: str, results: Path) -> None:
        self._path = path
        self._entity, self._project, self._id = path.split("/")
        self._results = results.absolute()

    def config(self) -> dict[str, Any]:
        """Read the sweep as it stands in its file; TrackingError if that is impossible."""
        with self._session("could not be read"):
            if is_offline():
                raise TrackingError("W&B is offline")
            return dict(self._sweep().config)

    def trials(self) -> list[SweepTrial]:
        """List the trials that were handed out; TrackingError if that is impossible."""
        with self._session("could not be read"):
            return [
                SweepTrial(run.id, run.name, run.state, dict(run.config))
                for run in self._sweep().runs
            ]

    def fill(self, trial: str, cell: CellRecord, layer: RunRecord) -> None:
        """Write the run of a trial that left without it; TrackingError if that is impossible."""
        run = layer_run(cell, layer)
        place: dict[str, Any] = {"entity": self._entity, "project": self._project, "id": trial}
        with self._session("did not take a run"):
            log_in()
            labels = labels_of(cell, run.name, run.kind)
            with finished(start(self._results, **place, resume="must", **labels)) as handle:
                add_config(handle, run)
                write(handle, run, [])

    def _sweep(self) -> Any:
        api: Any = wandb.Api()
        return api.sweep(self._path)

    def _session(self, problem: str) -> Any:
        return session(self._results, f"W&B's sweep {self._path} {problem}")
