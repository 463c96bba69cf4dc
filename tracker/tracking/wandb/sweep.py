"""Read a W&B sweep and its trials, and log results to the run of a trial.

When a W&B agent starts the process of a trial, the agent also creates the run of the trial.
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

from tracker.schema.changes import Change
from tracker.schema.errors import TrackingError
from tracker.schema.records import CellRecord, RunRecord
from tracker.schema.text import mask_secrets
from tracker.tracking.base import (
    PROGRESS,
    OpenRuns,
    RunStatus,
    SweepTrial,
    retry_advice,
    sync_command,
)
from tracker.tracking.identity import run_name
from tracker.tracking.runs import DescribedRun, describe_cell, describe_run
from tracker.tracking.wandb.backend import WandbBackend
from tracker.tracking.wandb.writing import (
    finish_run,
    is_offline,
    log_in,
    run_labels,
    start_run,
    wandb_session,
    write_run,
)

EXIT_CODES: dict[RunStatus, int] = {"finished": 0, "failed": 1, "killed": 255}
"""Exit code by final status, as in W&B's own hooks; W&B displays 255 as killed."""


class WandbLiveRun(OpenRuns):
    """Live runs in a W&B project, which show the progress of measurements."""

    def __init__(self, project: str, results: Path) -> None:
        super().__init__()
        self._backend = WandbBackend(project, results, in_sweep=False)
        self._results = results.absolute()

    @override
    def begin(self, cell: CellRecord) -> None:
        with self._session():
            run = describe_cell(cell)
            handle = self._backend.open(run, watched_pid=os.getppid())
            if handle is not None:
                show_progress(handle)
                self._runs[run.key] = handle

    @override
    def update(self, key: str, figures: Mapping[str, float], step: int) -> None:
        with self._session():
            if key in self._runs:
                self._runs[key].log(dict(figures))

    @override
    def end(self, key: str, status: RunStatus) -> None:
        with self._session():
            if (handle := self._runs.pop(key, None)) is not None:
                handle.finish(exit_code=EXIT_CODES[status])

    def _session(self) -> Any:
        """Configure the W&B SDK, and convert exceptions to TrackingError."""
        return wandb_session(self._results, "W&B does not show the progress of the measurement")


def show_progress(handle: Run) -> None:
    """Plot a run's progress metrics against the number of measured documents."""
    handle.define_metric(f"{PROGRESS}*", step_metric=f"{PROGRESS}documents")


class WandbSweep:
    """A W&B sweep, with methods to list its trials and to complete their runs.

    Args:
        path: Path of the sweep, as `ENTITY/PROJECT/ID`.
        results: The results folder, in which the files of runs are stored.
    """

    def __init__(self, path: str, results: Path) -> None:
        self._path = path
        self._entity, self._project, self._id = path.split("/")
        self._results = results.absolute()

    def config(self) -> dict[str, Any]:
        """Read the configuration of the sweep; raise TrackingError if it cannot be read."""
        with self._session("could not be read"):
            if is_offline():
                raise TrackingError("W&B is offline")
            return dict(self._sweep().config)

    def trials(self) -> list[SweepTrial]:
        """List the trials of the sweep; raise TrackingError if the sweep cannot be read."""
        with self._session("could not be read"):
            runs = self._sweep().runs
            return [SweepTrial(run.id, run.name, run.state, dict(run.config)) for run in runs]

    def fill(self, trial_id: str, cell: CellRecord, layer: RunRecord) -> None:
        """Write the results of the ablation `layer` to the run of an unfinished trial.

        TrackingError is raised if W&B refuses the results or cannot be reached.
        """
        run = describe_run(cell, layer)
        ids: dict[str, Any] = {"entity": self._entity, "project": self._project, "id": trial_id}
        with self._session("did not accept a run"):
            log_in()
            labels = run_labels(cell, run.name, run.kind)
            with finish_run(start_run(self._results, **ids, resume="must", **labels)) as handle:
                _write_trial(handle, run)

    def _sweep(self) -> Any:
        """Return the sweep as an object of the W&B API."""
        api: Any = wandb.Api()
        return api.sweep(self._path)

    def _session(self, problem: str) -> AbstractContextManager[None]:
        """Configure the W&B SDK, and convert exceptions to TrackingError."""
        return wandb_session(self._results, f"W&B's sweep {self._path} {problem}")


class WandbTrial:
    """The run that a W&B agent created for the sweep trial of this process."""

    def __init__(self, results: Path) -> None:
        self._results = results.absolute()
        self._handle: Any = None

    def begin(self, cell: CellRecord, layer: Change) -> None:
        """Open the run of the trial, before the ablation `layer` is measured."""
        with self._session():
            log_in()
            labels = run_labels(cell, run_name(cell, layer), "layer")
            self._handle = start_run(self._results, os.getppid(), **labels)
            show_progress(self._handle)

    def update(self, figures: Mapping[str, float]) -> None:
        """Log interim metrics to the trial's run during the measurement."""
        with self._session():
            self._handle.log(dict(figures))

    def log(self, cell: CellRecord, layer: RunRecord, additions: Mapping[str, float]) -> None:
        """Log the results of the trial and additional metrics, and end the run."""
        run = describe_run(cell, layer)
        run = replace(run, figures={**run.figures, **additions})
        with self._open_run("finished", **run_labels(cell, run.name, run.kind)) as handle:
            _write_trial(handle, run)

    def end(self, note: str, status: RunStatus) -> None:
        """End the trial's run without results; `note` gives the reason."""
        with self._open_run(status) as handle:
            handle.config.update({"tracker": {"note": mask_secrets(note)}})

    def close(self) -> None:
        """Mark the trial's run as killed if the run is still open."""
        handle, self._handle = self._handle, None
        if handle is not None:
            handle.finish(exit_code=EXIT_CODES["killed"])

    @contextmanager
    def _open_run(self, status: RunStatus, **names: Any) -> Iterator[Any]:
        """Yield the run of the trial, and end the run with `status` after the `with` block.

        If the run is not open yet, `names` are the arguments of `wandb.init` that open it.
        """
        with self._session():
            handle, self._handle = self._handle, None
            if handle is None:
                log_in()
                handle = start_run(self._results, **names)
            with finish_run(handle, EXIT_CODES[status]):
                yield handle

    def _session(self) -> AbstractContextManager[None]:
        """Configure the W&B SDK, and convert exceptions to TrackingError."""
        advice = retry_advice(sync_command(self._results, "wandb"))
        return wandb_session(self._results, "W&B did not accept the runs", advice)


def _write_trial(handle: Any, run: DescribedRun) -> None:
    """Write the results of a trial, except for config values that the sweep has locked."""
    handle.config.update({n: value for n, value in run.config.items() if n not in handle.config})
    write_run(handle, run, [])
