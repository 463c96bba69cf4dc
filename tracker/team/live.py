"""Show progress, speed and interim results in tracking backends while a measurement runs.

A thread reads the interim results and updates the backends, so the measurement never waits for a
backend.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event, Thread

from tracker.analysis.records import unmeasured_record
from tracker.analysis.stopping import InterimEstimates, interim_estimates
from tracker.ledger.cells import CellStore
from tracker.schema.errors import TrackerError, attempt
from tracker.schema.records import CellRecord
from tracker.schema.views import View
from tracker.tracking.base import PROGRESS, LiveRun, RunStatus
from tracker.tracking.figures import defined_figures
from tracker.tracking.identity import run_key

GRACE_PERIOD = 5.0
"""Seconds of measurement after which a cell's run opens; shorter measurements are not shown."""
UPDATE_INTERVAL = 10.0
"""Minimum number of seconds between two updates from the ledger."""
_TIME_DIVISOR = 20
"""Divisor of the time for updates: they may take at most one twentieth of the time."""
_CLOSE_TIMEOUT = 5.0
"""Maximum number of seconds that closing waits for an update in progress."""
_MAX_SHOWN_RUNS = 100
"""Maximum number of a cell's runs whose accuracy drops are shown during measurement."""
log = logging.getLogger(__name__)


@dataclass(eq=False)
class _LiveCell:
    """Model and benchmark that is being measured, with its live runs in tracking backends."""

    store: CellStore
    view: View
    record: CellRecord
    due_time: float
    first_interim: InterimEstimates | None = None
    """The progress of the cell when its run was opened."""
    first_time: float = 0.0
    """The time of `first_interim`."""
    live_runs: tuple[LiveRun, ...] = ()
    """The live runs (of different backends) in which the cell is open."""

    @property
    def key(self) -> str:
        """Key of the summary run of this model and benchmark, which shows the progress."""
        return run_key(self.record, "cell")


class LiveUpdater:
    """Thread that shows interim results of measurements in tracking backends.

    A backend that fails gets no further updates about the measurement.
    """

    def __init__(self, live_runs: tuple[LiveRun, ...]) -> None:
        self._live_runs = live_runs
        self._messages: SimpleQueue[tuple[Hashable, _LiveCell | RunStatus, Event] | None] = (
            SimpleQueue()
        )
        self._cells: dict[Hashable, _LiveCell] = {}
        self._thread: Thread | None = None

    def begin(self, name: Hashable, store: CellStore, view: View) -> None:
        """Start to show the progress of a measurement, until `end` is called with `name`."""
        if not self._live_runs:
            return
        record = unmeasured_record(
            store,
            view,
            supersedes=view.supersedes,
            missing=view.runs,
            provenance=store.identity.provenance,
            unfinished="it is being measured",
        )
        cell = _LiveCell(store, view, record, time.monotonic() + GRACE_PERIOD)
        if self._thread is None:
            self._thread = Thread(target=self._process_messages, name="tracker-live", daemon=True)
            self._thread.start()
        self._messages.put((name, cell, Event()))

    def end(self, name: Hashable, status: RunStatus) -> Event:
        """Ask the updating thread to end the live runs of a measurement.

        Returns an event that is set when the live runs have ended.
        """
        event = Event()
        if self._thread is None:
            event.set()
        else:
            self._messages.put((name, status, event))
        return event

    def close(self) -> None:
        """Stop the thread, and mark unfinished live runs as killed; never raise an exception."""
        self._messages.put(None)
        if self._thread is not None:
            # A run that is cut off in the middle of a call cannot be marked as killed.
            self._thread.join(_CLOSE_TIMEOUT)
        for live_run in self._live_runs:
            live_run.close()

    def _process_messages(self) -> None:
        while True:
            next_due = min((cell.due_time for cell in self._cells.values()), default=math.inf)
            wait = None if next_due == math.inf else max(0.0, next_due - time.monotonic())
            try:
                message = self._messages.get(timeout=wait)
            except Empty:
                for cell in self._cells.values():
                    if cell.due_time <= time.monotonic():
                        self._update_cell(cell)
                continue
            if message is None:
                return
            name, content, event = message
            if isinstance(content, _LiveCell):
                self._cells[name] = content
            elif ended_cell := self._cells.pop(name, None):
                for live_run in ended_cell.live_runs:
                    with suppress(TrackerError):
                        live_run.end(ended_cell.key, content)
            event.set()

    def _update_cell(self, cell: _LiveCell) -> None:
        """Send a measurement's interim results to its live runs.

        A live run that fails gets no further updates.
        """
        start = time.monotonic()
        interim = attempt(partial(interim_estimates, cell.store, cell.view))
        if isinstance(interim, Exception):
            log.debug("%s: no estimate yet", cell.record.title, exc_info=interim)
            cell.due_time = time.monotonic() + UPDATE_INTERVAL
            return
        duration = time.monotonic() - start
        is_first = cell.first_interim is None
        if is_first:
            cell.first_interim, cell.first_time = interim, start
            cell.live_runs = self._live_runs
        figures = progress_figures(
            cell.first_interim or interim, interim, start - cell.first_time, cell.record
        )
        working_runs = []
        for live_run in cell.live_runs:
            try:
                if is_first:
                    live_run.begin(cell.record)
                live_run.update(cell.key, figures, interim.documents)
                working_runs.append(live_run)
            except TrackerError:
                log.debug("the progress of %s is no longer shown", cell.record.title, exc_info=True)
        cell.live_runs = tuple(working_runs)
        cell.due_time = time.monotonic() + max(UPDATE_INTERVAL, _TIME_DIVISOR * duration)


def progress_figures(
    first_interim: InterimEstimates, interim: InterimEstimates, seconds: float, record: CellRecord
) -> Mapping[str, float]:
    """Compute progress, speed and interim accuracy drops of a running measurement.

    Args:
        first_interim: Interim results at the time when the live run was opened.
        interim: The current interim results.
        seconds: Number of seconds between the two sets of interim results.
        record: The record of the cell.

    Returns:
        Name of a metric, with the prefix `PROGRESS` → value. Accuracy drops are fractions between
        −1 and 1; increases of a loss are in the unit of the loss.
    """
    n_new = interim.documents - first_interim.documents
    n_left = None if interim.requested is None else interim.requested - interim.documents
    figures: dict[str, float | None] = {
        "documents": interim.documents,
        "documents_wanted": interim.requested,
        "tokens_per_second": (interim.tokens - first_interim.tokens) / seconds
        if n_new > 0
        else None,
        "seconds_left": seconds * n_left / n_new if n_new > 0 and n_left is not None else None,
    }
    widths = []
    for run, drop in interim.drops.items():
        if drop.low is not None and drop.high is not None:
            widths.append((drop.high - drop.low) / 2)
        if len(widths) <= _MAX_SHOWN_RUNS:
            label = run.label(max(2, len(str(record.model.layers - 1))))
            ends = {"": drop.value, "_low": drop.low, "_high": drop.high}
            figures |= {f"accuracy_drop{end}/{label}": value for end, value in ends.items()}
    figures["half_width"] = sum(widths) / len(widths) if widths else None
    return {PROGRESS + name: value for name, value in defined_figures(figures).items()}
