"""Complete the trials of a W&B sweep from the ledger."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tracker.core.config import KEYS, CellRequest, Changes, run_request
from tracker.core.errors import ResultsError, TrackerError
from tracker.core.experiment import Experiment
from tracker.core.records import CellRecord, RunRecord
from tracker.ledger.store import Ledger
from tracker.measuring.derive import record_of
from tracker.measuring.prepare import asked_before, look_up
from tracker.tracking import in_sweep, open_sweep
from tracker.tracking.base import SweepTrial

_OF_A_GRID = ("method", "parameters", "run_cap")
_UNFINISHED = ("crashed", "failed", "killed", "preempted")
"""States of a run that no agent continues."""
log = logging.getLogger(__name__)


@dataclass
class SweepFilled:
    """Result of completing a sweep's killed and failed trials.

    Attributes:
        unfinished: Number of such trials.
        filled: Trials that are finished now.
        wanting: Trial → reason why it must still be measured.
        failed: Trial → reason why W&B did not accept its results.
    """

    unfinished: int = 0
    filled: list[str] = field(default_factory=list)
    wanting: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def trial_request(settings: dict[str, Any]) -> CellRequest:
    """Build a trial's request from its settings; raise RequestError if they are invalid."""
    return run_request({key: settings[key] for key in KEYS if key in settings})


def asked_of_cell(request: CellRequest, results: Path) -> CellRequest | None:
    """Find the cell of a trial in the grid of this process's sweep.

    Returns None outside a sweep, and if its grid cannot be read or does not contain the trial.
    """
    if not in_sweep():
        return None
    try:
        with closing(open_sweep("", results)) as sweep:
            config = sweep.config()
        known = {name: config[name] for name in _OF_A_GRID if name in config}
        cells = Experiment.model_validate(known).cells()
    except (TrackerError, ValidationError):
        log.debug("the sweep could not be read", exc_info=True)
        return None

    def of_any_run(cell: CellRequest) -> CellRequest:
        return replace(cell, changes=Changes(control=cell.changes.control))

    return next((cell for cell in cells if of_any_run(cell) == of_any_run(request)), None)


def fill_sweep(path: str, ledger: Ledger) -> SweepFilled:
    """Complete the runs of a sweep's killed and failed trials from the ledger.

    RequestError is raised if the path names no sweep, TrackingError if it could not be read.
    """
    done = SweepFilled()
    with closing(open_sweep(path, ledger.root)) as sweep:
        trials: list[SweepTrial] = [t for t in sweep.trials() if t.state in _UNFINISHED]
        done.unfinished = len(trials)
        for trial in trials:
            title = trial.name
            try:
                request = trial_request(trial.settings)
                title = f"{trial.name} ({request.title}, {request.changes.single.label()})"
                found = _measured(request, ledger)
            except TrackerError as error:
                done.wanting[title] = str(error)
                continue
            try:
                sweep.fill(trial.id, *found)
                done.filled.append(title)
            except TrackerError as error:
                done.failed[title] = str(error)
    return done


def _measured(request: CellRequest, ledger: Ledger) -> tuple[CellRecord, RunRecord]:
    """Return a trial's cell and run; raise ResultsError if the ledger lacks them."""
    plain = replace(request, until=None)
    store = look_up(plain, ledger).store
    raced = asked_before(request, store)
    whole = raced if raced is not None and look_up(raced, ledger).complete else plain
    if store is None or not look_up(whole, ledger).complete:
        raise ResultsError(f"{ledger.root} does not hold all of it")
    view, wanted = store.views.of(whole), request.changes.single
    if (why := request.why_invalid(wanted, store.identity.model.layers)) is not None:
        raise ResultsError(f"it is no run: {why}")
    record = record_of(store, view)
    return record, next(run for run in record.runs if run.change == wanted)
