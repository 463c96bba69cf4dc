"""Show cells in trackers while they are measured: progress, speed and interim results.

Measuring never waits for it. It only signals the start and the end of a cell. A thread does the
rest from the ledger, and skips updates while it is busy.
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
from tracker.analysis.stopping import Interim, interim_estimates
from tracker.core.errors import TrackerError, attempt
from tracker.core.records import CellRecord
from tracker.core.views import View
from tracker.ledger.cells import CellStore
from tracker.tracking.base import PROGRESS, Ending, LiveRun
from tracker.tracking.figures import only_defined
from tracker.tracking.identity import run_key

GRACE = 5.0
"""Seconds after which a cell's run opens; shorter measurements are not shown."""
EVERY = 10.0
"""Minimum number of seconds between two updates from the ledger."""
_SHARE = 20
"""Updates may take one part in this many of the time."""
_PATIENCE = 5.0
"""Seconds that closing waits for an update in progress."""
_SHOWN = 100
"""Maximum number of a cell's runs whose drops are shown."""
log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Cell:
    """A cell that is being measured."""

    store: CellStore
    view: View
    record: CellRecord
    began: float
    due: float
    first: Interim | None = None
    """Its progress when its run was opened."""
    shown: tuple[LiveRun, ...] = ()
    """The live runs in which the cell is open."""

    @property
    def key(self) -> str:
        """The run key of its own run."""
        return run_key(self.record, "cell")


class Live:
    """Shows cells in live runs while they are measured; a failing one does not affect others."""

    def __init__(self, live_runs: tuple[LiveRun, ...]) -> None:
        self._live_runs = live_runs
        self._said: SimpleQueue[tuple[Hashable, _Cell | Ending, Event] | None] = SimpleQueue()
        self._cells: dict[Hashable, _Cell] = {}
        self._thread: Thread | None = None

    def begin(self, name: Hashable, store: CellStore, view: View) -> None:
        """Show a cell, identified by `name`, from now on."""
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
        now = time.monotonic()
        cell = _Cell(store, view, record, now, now + GRACE)
        if self._thread is None:
            self._thread = Thread(target=self._work, name="tracker-live", daemon=True)
            self._thread.start()
        self._said.put((name, cell, Event()))

    def end(self, name: Hashable, status: Ending) -> Event:
        """End a cell's run; the returned event is set when other writers may use the run."""
        left = Event()
        if self._thread is None:
            left.set()
        else:
            self._said.put((name, status, left))
        return left

    def close(self) -> None:
        """Mark unfinished runs as killed; never raises."""
        self._said.put(None)
        if self._thread is not None:
            # A run that is cut off in the middle of a call cannot be marked as killed.
            self._thread.join(_PATIENCE)
        for live_run in self._live_runs:
            live_run.close()

    def _work(self) -> None:
        while True:
            due = min((cell.due for cell in self._cells.values()), default=math.inf)
            wait = None if due == math.inf else max(0.0, due - time.monotonic())
            try:
                said = self._said.get(timeout=wait)
            except Empty:
                for cell in self._cells.values():
                    if cell.due <= time.monotonic():
                        self._look(cell)
                continue
            if said is None:
                return
            name, what, left = said
            if isinstance(what, _Cell):
                self._cells[name] = what
            elif ended := self._cells.pop(name, None):
                for live_run in ended.shown:
                    with suppress(TrackerError):
                        live_run.end(ended.key, what)
            left.set()

    def _look(self, cell: _Cell) -> None:
        """Update a cell in its live runs; those that fail are dropped for this cell."""
        start = time.monotonic()
        found = attempt(partial(interim_estimates, cell.store, cell.view))
        if isinstance(found, Exception):
            log.debug("%s: no estimate yet", cell.record.title, exc_info=found)
            cell.due = time.monotonic() + EVERY
            return
        taken = time.monotonic() - start
        opening = cell.first is None
        if opening:
            cell.first, cell.shown = found, self._live_runs
        figures = progress_figures(cell.first or found, found, start - cell.began, cell.record)
        kept = []
        for live_run in cell.shown:
            try:
                if opening:
                    live_run.begin(cell.record)
                live_run.update(cell.key, figures, found.documents)
                kept.append(live_run)
            except TrackerError:
                log.debug("%s is not shown any more", cell.record.title, exc_info=True)
        cell.shown = tuple(kept)
        cell.due = time.monotonic() + max(EVERY, _SHARE * taken)


def progress_figures(
    first: Interim, now: Interim, seconds: float, record: CellRecord
) -> Mapping[str, float]:
    """Compute the progress figures of a cell that is being measured.

    Args:
        first: The interim results when its run was opened.
        now: The current interim results.
        seconds: The time between the two.
        record: The record of the cell.

    Returns:
        Figures under names that begin with `PROGRESS`; drops are fractions, or in the metric's
        unit.
    """
    new = now.documents - first.documents
    left = None if now.wanted is None else now.wanted - now.documents
    figures: dict[str, float | None] = {
        "documents": now.documents,
        "documents_wanted": now.wanted,
        "tokens_per_second": (now.tokens - first.tokens) / seconds if new > 0 else None,
        "seconds_left": seconds * left / new if new > 0 and left is not None else None,
    }
    widths = []
    for run, drop in now.drops.items():
        if drop.low is not None and drop.high is not None:
            widths.append((drop.high - drop.low) / 2)
        if len(widths) <= _SHOWN:
            label = run.label(max(2, len(str(record.model.layers - 1))))
            ends = {"": drop.value, "_low": drop.low, "_high": drop.high}
            figures |= {f"accuracy_drop{end}/{label}": value for end, value in ends.items()}
    figures["half_width"] = sum(widths) / len(widths) if widths else None
    return {PROGRESS + name: value for name, value in only_defined(figures).items()}
