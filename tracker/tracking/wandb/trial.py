"""The run that a W&B agent opens for a trial of its sweep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tracker.records import CellRecord, RunRecord
from tracker.text import masked
from tracker.tracking.wandb.runs import layer_run
from tracker.tracking.wandb.session import finished, log_in, publishing, start
from tracker.tracking.wandb.writing import add_config, write


class WandbTrial:
    """The run that a W&B agent opened for its trial."""

    def __init__(self, results: Path) -> None:
        self._results = results.absolute()

    def log(self, cell: CellRecord, layer: RunRecord) -> None:
        """Log the run of the cell that the trial asked for, and end."""
        run = layer_run(cell, layer)
        with self._opened(**run.labels) as handle:
            add_config(handle, run)
            write(handle, run, [])

    def end(self, note: str, failed: bool) -> None:
        """End with nothing measured, and say why; `failed` is how the sweep shows the run."""
        with self._opened(exit_code=int(failed)) as handle:
            handle.config.update({"tracker": {"note": masked(note)}})

    @contextmanager
    def _opened(self, exit_code: int = 0, **names: Any) -> Iterator[Any]:
        with publishing(self._results, "wandb"):
            log_in()
            handle = start(self._results, **names)
            with finished(handle, exit_code):
                yield handle
