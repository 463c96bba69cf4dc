"""One cell measured in a scheduler's job, in the shared results folder, without publishing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tracker.benchmarks.benchmark import open_benchmark
from tracker.core.config import CellRequest
from tracker.core.errors import CellError, TrackerError
from tracker.executors.local import measure_cell
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring.job import Job, Options
from tracker.measuring.meter import open_model
from tracker.measuring.prepare import look_up
from tracker.measuring.progress import Silent

STARTS = 4
"""How many starts of a job in a row may end without a new shard."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobEnd:
    """What a job says to the process that submitted it.

    Attributes:
        error: What went wrong; None when nothing of the cell is missing any more.
        lost: What the self-check said.
        models_loaded: How many times it loaded the model.
    """

    error: TrackerError | None = None
    lost: tuple[str, ...] = ()
    models_loaded: int = 0


class CellJob:
    """Measures one cell, for requests that differ in their runs alone.

    Called again after an interruption, it continues from the shards.
    """

    def __init__(self, requests: Sequence[CellRequest], results: Path, options: Options) -> None:
        self._requests = requests
        self._results = results
        self._options = options
        self._shards = -1
        self._starts = 0

    def __call__(self) -> JobEnd:
        """Measure what the cell lacks."""
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        try:
            return self._run()
        except TrackerError as error:
            return JobEnd(error)
        except Exception as error:
            log.info("failed", exc_info=True)
            return JobEnd(CellError(f"{type(error).__name__}: {error}"))

    def _run(self) -> JobEnd:
        ledger = Ledger(self._results)
        asked = [look_up(request, ledger) for request in self._requests]
        cells = tuple(cell for cell in asked if not cell.complete)
        if not cells:
            return JobEnd()
        found = len(shards(cells[0].store))
        self._starts = self._starts + 1 if found == self._shards else 1
        self._shards = found
        if self._starts > STARTS:
            raise CellError(
                f"its job was stopped {STARTS} times before a single block of documents was "
                "measured; give it more time: --slurm timeout_min=240"
            )
        log.info("loading %s", cells[0].source.name)
        model = open_model(cells[0].request, self._options)
        job = Job(cells, open_benchmark(cells[0].request))
        _, lost = measure_cell(job, model, ledger, self._options, _Log())
        return JobEnd(lost=tuple(lost), models_loaded=1)


class _Log(Silent):
    """Writes what is said into the job's log."""

    def say(self, message: str) -> None:
        log.info(message)


def shards(store: CellStore | None) -> list[Path]:
    """List the files of a cell's shards; none where the cell is not known yet."""
    return [] if store is None else store.shards()
