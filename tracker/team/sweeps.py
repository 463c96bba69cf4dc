"""Complete crashed trials of a W&B sweep with results from the results folder."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tracker.ledger.store import Ledger
from tracker.measuring.derive import derive_record
from tracker.measuring.prepare import find_cell, find_earlier_request, with_clusters
from tracker.schema.config import FIELDS_BY_KEY, CellRequest, Changes, run_request
from tracker.schema.errors import ResultsError, TrackerError
from tracker.schema.experiment import Experiment
from tracker.schema.records import CellRecord, RunRecord
from tracker.tracking import in_sweep, open_sweep
from tracker.tracking.base import SweepTrial

_GRID_KEYS = ("method", "parameters", "run_cap")
_UNFINISHED_STATES = ("crashed", "failed", "killed", "preempted")
"""States of unfinished runs that no agent continues."""
log = logging.getLogger(__name__)


@dataclass
class SweepResult:
    """Result of completing the killed and failed trials of a sweep.

    Attributes:
        unfinished: Number of killed and failed trials before the completion.
        filled: Titles of the trials that were completed.
        wanting: Title of a trial → reason why the results folder has no results of the trial.
        failed: Title of a trial → reason why W&B did not accept the results.
    """

    unfinished: int = 0
    filled: list[str] = field(default_factory=list)
    wanting: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def trial_request(settings: dict[str, Any]) -> CellRequest:
    """Build the measurement request that the sweep settings of a trial describe.

    RequestError is raised if the settings are invalid.
    """
    return run_request({key: settings[key] for key in FIELDS_BY_KEY if key in settings})


def find_sweep_request(request: CellRequest, results: Path) -> CellRequest | None:
    """Return a request with all ablations of the sweep, for one trial's model and benchmark.

    `request` is the request of the trial, for one ablation. None is returned outside a sweep, and
    if the sweep cannot be read or does not contain the trial.
    """
    if not in_sweep():
        return None
    try:
        with closing(open_sweep("", results)) as sweep:
            config = sweep.config()
        grid = {name: config[name] for name in _GRID_KEYS if name in config}
        cells = Experiment.model_validate(grid).cells()
    except (TrackerError, ValidationError):
        log.debug("the sweep could not be read", exc_info=True)
        return None

    def without_change(cell: CellRequest) -> CellRequest:
        return replace(cell, changes=Changes(control=cell.changes.control))

    return next((cell for cell in cells if without_change(cell) == without_change(request)), None)


def fill_sweep(path: str, ledger: Ledger) -> SweepResult:
    """Complete a sweep's killed and failed trials with results from the results folder.

    RequestError is raised if `path` does not name a sweep. TrackingError is raised if the sweep
    cannot be read.
    """
    result = SweepResult()
    with closing(open_sweep(path, ledger.root)) as sweep:
        trials: list[SweepTrial] = [t for t in sweep.trials() if t.state in _UNFINISHED_STATES]
        result.unfinished = len(trials)
        for trial in trials:
            title = trial.name
            try:
                request = trial_request(trial.settings)
                title = f"{trial.name} ({request.title}, {request.changes.first_change.label()})"
                cell_and_run = _find_measured_run(request, ledger)
            except TrackerError as error:
                result.wanting[title] = str(error)
                continue
            try:
                sweep.fill(trial.id, *cell_and_run)
                result.filled.append(title)
            except TrackerError as error:
                result.failed[title] = str(error)
    return result


def _find_measured_run(request: CellRequest, ledger: Ledger) -> tuple[CellRecord, RunRecord]:
    """Read the stored results of a trial: the benchmark's record, and the ablation's record.

    ResultsError is raised if the trial is not fully measured.
    """
    full_request = replace(request, until=None)
    store = find_cell(full_request, ledger).store
    stopped_request = find_earlier_request(request, store)
    used_request = (
        stopped_request
        if stopped_request is not None and find_cell(stopped_request, ledger).complete
        else full_request
    )
    if store is None or not find_cell(used_request, ledger).complete:
        raise ResultsError(f"{ledger.root} does not contain all outcomes of the run")
    (clustered_request,) = with_clusters([used_request])
    view, change = store.views.view_of(clustered_request), request.changes.first_change
    if (reason := request.invalid_reason(change, store.identity.model.layers)) is not None:
        raise ResultsError(f"the run is invalid: {reason}")
    record = derive_record(store, view)
    return record, next(run for run in record.runs if run.change == change)
