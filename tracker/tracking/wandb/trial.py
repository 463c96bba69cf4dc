"""The run that a W&B agent opens for a trial of its sweep."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tracker.core.records import CellRecord, RunIdentity, RunRecord
from tracker.core.text import masked
from tracker.tracking.base import Ending, sync_command, when_mended
from tracker.tracking.identity import run_name
from tracker.tracking.runs import layer_run
from tracker.tracking.wandb.live_run import EXIT_CODES, show_progress
from tracker.tracking.wandb.runs import labels_of
from tracker.tracking.wandb.session import finished, log_in, session, start
from tracker.tracking.wandb.writing import add_config, write


class WandbTrial:
    """The run that a W&B agent opened for its trial; it is opened once, and ended once."""

    def __init__(self, results: Path) -> None:
        self._results = results.absolute()
        self._handle: Any = None

    def begin(self, cell: CellRecord, layer: RunIdentity) -> None:
        """Open the run while what the trial asked for, a run of the cell, is measured."""
        with self._session():
            log_in()
            labels = labels_of(cell, run_name(cell, layer), "layer")
            self._handle = start(self._results, os.getppid(), **labels)
            show_progress(self._handle)

    def update(self, figures: Mapping[str, float]) -> None:
        """Show how far the measurement is."""
        with self._session():
            self._handle.log(dict(figures))

    def log(self, cell: CellRecord, layer: RunRecord, more: Mapping[str, float]) -> None:
        """Log the run of the cell that the trial asked for, with more figures, and end."""
        run = layer_run(cell, layer)
        run = replace(run, figures={**run.figures, **more})
        with self._opened("finished", **labels_of(cell, run.name, run.kind)) as handle:
            add_config(handle, run)
            write(handle, run, [])

    def end(self, note: str, status: Ending) -> None:
        """End with nothing measured, and say why."""
        with self._opened(status) as handle:
            handle.config.update({"tracker": {"note": masked(note)}})

    def close(self) -> None:
        """Show the run as killed, where it is still open."""
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
