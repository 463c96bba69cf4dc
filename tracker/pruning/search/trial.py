"""The run that a W&B agent opened for a search: it gets the last step's run, and what it took."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tracker.core.config import CellRequest
from tracker.core.errors import TrackingError
from tracker.core.prune_records import PruneRecord
from tracker.pruning.search.conduct import ConductedSearches
from tracker.team.publish import Trial
from tracker.tracking.base import Ending

_ANY = CellRequest(model="any", benchmark="any", layers=(0,))


class SearchTrial:
    """The trial of a sweep, where this process is one."""

    def __init__(self, track: Sequence[str], results: Path) -> None:
        self._track = track
        self._results = results

    def log(self, found: ConductedSearches) -> None:
        """Log the last step as the trial's run, with the figures of the search, and end.

        Of several draws it is the first. Where W&B refuses, `found.outcome` says so.
        """
        record, request = found.records[0], found.requests[0]
        trial = Trial(self._track, self._results, request or _ANY)
        if not trial.joins:
            return
        title = f"the trial of {record.label}"
        try:
            cell = next((c for c in found.outcome.cells if c.place == record.rests_on[-1]), None)
            if request is None or cell is None:
                trial.leave(f"{record.label}: its last step is no run", "finished")
                return
            trial.log(cell, figures(record))
        except TrackingError as error:
            found.outcome.unpublished[title] = str(error)

    def leave(self, error: BaseException) -> None:
        """End as what went wrong says."""
        status: Ending = "failed" if isinstance(error, Exception) else "killed"
        trial = Trial(self._track, self._results, _ANY)
        with suppress(TrackingError):
            trial.leave(str(error) or type(error).__name__, status)


def figures(record: PruneRecord) -> dict[str, float]:
    """What a sweep's page compares searches by."""
    test, cost = record.steps[-1].test, record.cost
    found = {
        "search/test_accuracy": test.accuracy if test else None,
        "search/test_accuracy_low": test.low if test else None,
        "search/test_accuracy_high": test.high if test else None,
        "search/baseline_accuracy": record.baseline.accuracy,
        "search/removed": float(len(record.removed)),
        "search/evaluations": cost.evaluations,
        "search/passes": cost.passes,
        "search/seconds": cost.seconds,
    }
    return {name: value for name, value in found.items() if value is not None}


@contextmanager
def trial(track: Sequence[str], results: Path) -> Iterator[SearchTrial]:
    """Join the trial that this process is, if it is one; what goes wrong inside ends it."""
    joined = SearchTrial(track, results)
    try:
        yield joined
    except BaseException as error:
        joined.leave(error)
        raise
