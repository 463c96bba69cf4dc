"""Measure cells in this process; consecutive cells share a loaded model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

from tracker.ledger.cache import Checks
from tracker.ledger.cells import CellStore
from tracker.measuring.fill import fill_cell, open_work
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.worker import Worker
from tracker.schema.errors import attempt

log = logging.getLogger(__name__)


class LocalExecutor:
    """Executor that measures cells one by one; raises ModelError if the device is missing."""

    def __init__(self, options: Options) -> None:
        from tracker.models.load import find_device

        find_device(options.device)
        self._options = options

    def measure(self, jobs: Sequence[Job], reporting: Reporting) -> int:
        """Measure cells in this process; return the number of times that a model was loaded."""
        worker = Worker(self._options)
        for job in jobs:
            outcome = attempt(partial(measure_cell, job, worker, reporting))
            if isinstance(outcome, Exception):
                log.debug("%s failed", job.title, exc_info=outcome)
            for cell in job.cells:
                reporting.on_end(cell, outcome if isinstance(outcome, Exception) else outcome[0])
        return worker.models_loaded


def measure_cell(job: Job, worker: Worker, reporting: Reporting) -> tuple[CellStore, list[str]]:
    """Measure the missing outcomes of a job's cell; return (cell, messages of the self-check).

    RequestError is raised if a request names a layer that the model does not have, or if a document
    lacks a required field.
    """
    say = reporting.progress.say
    if not worker.has_loaded(job.requests[0].model):
        say(f"loading {job.cells[0].source.name}")
    facts = worker.open(job.requests, job.benchmark)
    if facts.offloaded and facts.is_fresh:
        say(f"{facts.model.name}: {facts.offloaded}")
    work = open_work(job, facts, reporting)
    notes: list[str] = []
    if work.missing_responses:
        for cell in job.cells:
            reporting.on_begin(cell, work.store)
        say(f"{job.requests[0].benchmark}: checking results against pruned models")
        notes = worker.check(Checks(reporting.ledger.root))
        for line in notes:
            say(line)
        fill_cell(work, worker.measure, reporting.progress)
    return work.store, notes
