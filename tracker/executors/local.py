"""Measure cells in this process; each model is loaded once."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from tracker.core.errors import attempt
from tracker.ledger.cache import Checks
from tracker.ledger.cells import CellStore
from tracker.measuring.fill import fill, open_work
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.worker import Worker

log = logging.getLogger(__name__)


class LocalExecutor:
    """Measures cells one after the other; raises ModelError if the device does not exist."""

    def __init__(self, options: Options) -> None:
        from tracker.models.load import find_device

        find_device(options.device)
        self._options = options

    def measure(self, jobs: Sequence[Job], to: Reporting) -> int:
        """Measure cells in this process; return the number of loaded models."""
        worker = Worker(self._options)
        for job in jobs:
            measured = attempt(partial(measure_cell, job, worker, to))
            if isinstance(measured, Exception):
                log.debug("%s failed", job.title, exc_info=measured)
            for cell in job.cells:
                to.done(cell, measured if isinstance(measured, Exception) else measured[0])
        return worker.models_loaded


def measure_cell(job: Job, worker: Worker, to: Reporting) -> tuple[CellStore, list[str]]:
    """Measure what a cell lacks; return the cell and the lines of the self-check.

    RequestError is raised for layers that the model does not have, and for a document without a
    required field.
    """
    say = to.progress.say
    if not worker.has_loaded(job.requests[0].model):
        say(f"loading {job.cells[0].source.name}")
    facts = worker.open(job.requests, job.benchmark)
    if facts.offloaded and facts.is_fresh:
        say(f"{facts.model.name}: {facts.offloaded}")
    work = open_work(job, facts, to.ledger, to.progress)
    notes: list[str] = []
    if work.left:
        for cell in job.cells:
            to.begun(cell, work.store)
        say(f"{job.requests[0].benchmark}: checking that sharing is exact for this model")
        notes = worker.check(Checks(to.ledger.root))
        for line in notes:
            say(line)
        fill(work, worker.measure, to.progress)
    return work.store, notes
