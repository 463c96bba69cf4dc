"""Measuring cells here, in one process: each model is loaded once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tracker.ledger.cache import Checks
from tracker.ledger.cells import CellStore
from tracker.measuring.fill import fill, fill_until, open_cell
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.meter import Meter, Model, open_model

log = logging.getLogger(__name__)


class LocalExecutor:
    """Measures cells one after the other; ModelError if there is no such device."""

    def __init__(self, options: Options) -> None:
        from tracker.models.load import find_device

        find_device(options.device)
        self.models_loaded = 0
        self._options = options

    def measure(self, jobs: Sequence[Job], to: Reporting) -> None:
        """Measure cells, each with all of this process."""
        model: Model | None = None
        for job in jobs:
            request = job.requests[0]
            outcome: CellStore | Exception
            try:
                if model is None or model.settings != request.model_settings:
                    model = None  # frees the previous model before the next one comes
                    to.progress.say(f"loading {job.cells[0].source.name}")
                    model = open_model(request, self._options)
                    self.models_loaded += 1
                    if model.loaded.offloaded is not None:
                        to.progress.say(f"{model.loaded.identity.name}: {model.loaded.offloaded}")
                outcome, _ = measure_cell(job, model, self._options, to)
            except Exception as error:
                log.debug("%s failed", job.title, exc_info=True)
                outcome = error
            for cell in job.cells:
                to.done(cell, outcome)


def measure_cell(
    job: Job, model: Model, options: Options, to: Reporting
) -> tuple[CellStore, list[str]]:
    """Measure what a cell lacks with a loaded model; it, and what the self-check said.

    RequestError for layers that do not fit the model, or a document that lacks what is read of it.
    """
    request = job.requests[0]
    meter = Meter(job.requests, job.benchmark, model, options)
    store, lacking, race = open_cell(job, meter.facts, to.ledger, to.progress)
    if not lacking:
        return store, []
    for cell in job.cells:
        to.begun(cell, store)
    to.progress.say(f"{request.benchmark}: checking that sharing is exact for this model")
    lost = meter.check(Checks(to.ledger.root))
    for line in lost:
        to.progress.say(line)
    if race is None:
        fill(store, lacking, meter, request.extent, to.progress)
    else:
        fill_until(race, store, meter, to.progress)
    return store, lost
