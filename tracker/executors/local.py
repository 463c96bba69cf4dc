"""Measuring cells here, in one process: each model is loaded once."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tracker.ledger.cache import Checks
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring.fill import fill, fill_until, open_cell
from tracker.measuring.job import Begun, Done, Job, Options
from tracker.measuring.meter import Meter, Model, open_model
from tracker.measuring.progress import Progress

log = logging.getLogger(__name__)


class LocalExecutor:
    """Measures cells one after the other; ModelError if there is no such device."""

    def __init__(self, options: Options) -> None:
        from tracker.models.load import find_device

        find_device(options.device)
        self.models_loaded = 0
        self._options = options

    def measure(
        self, jobs: Sequence[Job], ledger: Ledger, progress: Progress, begun: Begun, done: Done
    ) -> None:
        """Measure cells, each with all of this process."""
        model: Model | None = None
        for job in jobs:
            request = job.requests[0]
            outcome: CellStore | Exception
            try:
                if model is None or model.settings != request.model_settings:
                    model = None  # frees the previous model before the next one comes
                    progress.say(f"loading {job.cells[0].source.name}")
                    model = open_model(request, self._options)
                    self.models_loaded += 1
                    if model.loaded.offloaded is not None:
                        progress.say(f"{model.loaded.identity.name}: {model.loaded.offloaded}")
                outcome, _ = measure_cell(job, model, ledger, self._options, progress, begun)
            except Exception as error:
                log.debug("%s failed", job.title, exc_info=True)
                outcome = error
            for cell in job.cells:
                done(cell, outcome)


def measure_cell(
    job: Job,
    model: Model,
    ledger: Ledger,
    options: Options,
    progress: Progress,
    begun: Begun = lambda asked, store: None,
) -> tuple[CellStore, list[str]]:
    """Measure what a cell lacks with a loaded model; it, and what the self-check said.

    RequestError for layers that do not fit the model, or a document that lacks what is read of it.
    """
    request = job.requests[0]
    meter = Meter(job.requests, job.benchmark, model, options)
    store, lacking, race = open_cell(job, meter.facts, ledger)
    if not lacking:
        return store, []
    for cell in job.cells:
        begun(cell, store)
    progress.say(f"{request.benchmark}: checking that sharing is exact for this model")
    lost = meter.check(Checks(ledger.root))
    for line in lost:
        progress.say(line)
    if race is None:
        fill(store, lacking, meter, request.extent, progress)
    else:
        fill_until(race, store, meter, progress)
    return store, lost
