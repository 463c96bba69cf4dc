"""Read a sweep and its trials, and log into the run of this process's trial.

An agent opens that run when it starts the process as a trial.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import wandb
from typing_extensions import override
from wandb import Run

from tracker.core.changes import Change
from tracker.core.errors import TrackingError
from tracker.core.records import CellRecord, RunRecord
from tracker.core.text import masked
from tracker.tracking.base import PROGRESS, Ending, OpenRuns, SweepTrial, sync_command, when_mended
from tracker.tracking.identity import run_name
from tracker.tracking.runs import DescribedRun, cell_run, layer_run
from tracker.tracking.wandb.backend import WandbBackend
from tracker.tracking.wandb.session import finished, is_offline, log_in, session, start
from tracker.tracking.wandb.writing import labels_of, write

EXIT_CODES: dict[Ending, int] = {"finished": 0, "failed": 1, "killed": 255}
"""Ending → exit code, as in W&B's own hooks: 255 is displayed as killed."""


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


def show_progress(handle: Run) -> None:
    """Define the number of documents as the x-axis of progress figures."""
    handle.define_metric(f"{PROGRESS}*", step_metric=f"{PROGRESS}documents")


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
        """Read the sweep's configuration; raise TrackingError on failure."""
        with self._session("could not be read"):
            if is_offline():
                raise TrackingError("W&B is offline")
            return dict(self._sweep().config)

    def trials(self) -> list[SweepTrial]:
        """List the sweep's trials; raise TrackingError on failure."""
        with self._session("could not be read"):
            runs = self._sweep().runs
            return [SweepTrial(run.id, run.name, run.state, dict(run.config)) for run in runs]

    def fill(self, trial: str, cell: CellRecord, layer: RunRecord) -> None:
        """Write the run of an unfinished trial; raise TrackingError on failure."""
        run = layer_run(cell, layer)
        place: dict[str, Any] = {"entity": self._entity, "project": self._project, "id": trial}
        with self._session("did not take a run"):
            log_in()
            labels = labels_of(cell, run.name, run.kind)
            with finished(start(self._results, **place, resume="must", **labels)) as handle:
                _write(handle, run)

    def _sweep(self) -> Any:
        api: Any = wandb.Api()
        return api.sweep(self._path)

    def _session(self, problem: str) -> AbstractContextManager[None]:
        return session(self._results, f"W&B's sweep {self._path} {problem}")


class WandbTrial:
    """The run that a W&B agent opened for its trial; it is opened once, and ended once."""

    def __init__(self, results: Path) -> None:
        self._results = results.absolute()
        self._handle: Any = None

    def begin(self, cell: CellRecord, layer: Change) -> None:
        """Open the run while the trial's run of the cell is measured."""
        with self._session():
            log_in()
            labels = labels_of(cell, run_name(cell, layer), "layer")
            self._handle = start(self._results, os.getppid(), **labels)
            show_progress(self._handle)

    def update(self, figures: Mapping[str, float]) -> None:
        """Show the progress of the measurement."""
        with self._session():
            self._handle.log(dict(figures))

    def log(self, cell: CellRecord, layer: RunRecord, more: Mapping[str, float]) -> None:
        """Log the trial's run of the cell, with additional figures, and end it."""
        run = layer_run(cell, layer)
        run = replace(run, figures={**run.figures, **more})
        with self._opened("finished", **labels_of(cell, run.name, run.kind)) as handle:
            _write(handle, run)

    def end(self, note: str, status: Ending) -> None:
        """End the run without a measurement, with a note."""
        with self._opened(status) as handle:
            handle.config.update({"tracker": {"note": masked(note)}})

    def close(self) -> None:
        """Mark the run as killed if it is still open."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.finish(exit_code=EXIT_CODES["killed"])

    @contextmanager
    def _opened(self, status: Ending, **names: Any) -> Iterator[Any]:
        with self._session():
            handle, self._handle = self._handle, None
            if handle is None:
                log_in()
                handle = start(self._results, **names)
            with finished(handle, EXIT_CODES[status]):
                yield handle

    def _session(self) -> AbstractContextManager[None]:
        advice = when_mended(sync_command(self._results, "wandb"))
        return session(self._results, "W&B did not take the runs", advice)


def _write(handle: Any, run: DescribedRun) -> None:
    """Write a trial's run, except for the sweep's own settings, which W&B locks."""
    handle.config.update({n: value for n, value in run.config.items() if n not in handle.config})
    write(handle, run, [])
