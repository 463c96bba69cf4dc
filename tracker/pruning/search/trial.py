"""The run that a W&B agent opened for a search: it gets the last step's run, and what it took."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tracker.core.config import CellRequest
from tracker.core.errors import TrackingError
from tracker.core.prune_records import PruneRecord
from tracker.pruning.search.conduct import Pursued
from tracker.pruning.search.figures import end
from tracker.team.publish import Trial

_ANY = CellRequest(model="any", benchmark="any", layers=(0,))


def figures(record: PruneRecord) -> dict[str, float]:
    """What a sweep's page compares searches by."""
    test, cost = end(record), record.cost
    found = {
        "search/test_accuracy": test.accuracy,
        "search/test_accuracy_low": test.low,
        "search/test_accuracy_high": test.high,
        "search/baseline_accuracy": record.baseline.accuracy,
        "search/removed": float(len(record.removed)),
        "search/evaluations": cost.evaluations,
        "search/passes": cost.passes,
        "search/seconds": cost.seconds,
    }
    return {name: value for name, value in found.items() if value is not None}


def _log(track: Sequence[str], results: Path, found: Pursued) -> None:
    """Log the last step as the trial's run, with the figures of the search, and end.

    Of several draws it is the first. Where W&B refuses, `found.outcome` says so.
    """
    record, request = found.searched[0].record, found.searched[0].request
    trial = Trial(track, results, request or _ANY)
    if not trial.joins:
        return
    try:
        cell = next((c for c in found.outcome.cells if c.place == record.rests_on[-1]), None)
        if request is None or cell is None:
            trial.leave(f"{record.label}: its last step is no run")
        else:
            trial.log(cell, figures(record))
    except TrackingError as error:
        found.outcome.unpublished[f"the trial of {record.label}"] = str(error)


@contextmanager
def trial(track: Sequence[str], results: Path) -> Iterator[Callable[[Pursued], None]]:
    """Join the trial that this process is, if it is one: it gets what is found.

    What goes wrong inside ends it.
    """
    try:
        yield partial(_log, track, results)
    except BaseException as error:
        Trial(track, results, _ANY).fail(error)
        raise
