"""Run searches: choose, test, publish each step, and store the results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.config import CellRequest
from tracker.core.errors import CellError, RequestError, TrackerError, TrackingError
from tracker.core.estimates import Estimate
from tracker.core.findings import FindingRecord
from tracker.core.grouping import grouped
from tracker.core.kinds import NUMBERED
from tracker.core.prune_records import PruneRecord, PruneStep, Tested
from tracker.core.records import CellRecord, Place
from tracker.ledger.store import Ledger, keep_finding, keep_search
from tracker.measuring.prepare import look_up
from tracker.runner import RunOutcome, run_cells
from tracker.search.cells import Lender, OpenCell
from tracker.search.planning import refuse_unsavable
from tracker.search.report import Searched, end, finding_of
from tracker.search.request import Goal, SearchRequest
from tracker.search.search import (
    Found,
    Recommended,
    budget_of,
    recommended,
    refuse_mixed,
    refuse_unknown,
    search,
    stays_of,
)
from tracker.search.settings import Constraints
from tracker.team.publish import Publisher, Trial

log = logging.getLogger(__name__)


@dataclass
class Pursued:
    """Results of searches.

    Attributes:
        searched: The results, one per draw.
        recommended: Goal of searches → the recommended set; empty if not requested.
        failed: Search that failed → the reason; also in `outcome`.
        outcome: Outcome of publishing the runs of the steps.
    """

    searched: list[Searched]
    recommended: dict[Goal, Recommended]
    failed: dict[SearchRequest, str]
    outcome: RunOutcome

    @property
    def records(self) -> list[PruneRecord]:
        """The results as stored records."""
        return [one.record for one in self.searched]


def conduct(
    asked: Sequence[SearchRequest], name: str, lender: Lender, publisher: Publisher
) -> tuple[Pursued, FindingRecord]:
    """Run the searches of a file, called `name`, and store their results together.

    Raises RequestError and CellError as `pursue` does.
    """
    found = pursue(asked, lender, publisher, recommend=True)
    failed = {request.title: why for request, why in found.failed.items()}
    finding = finding_of(name, found.searched, found.recommended, failed)
    keep_finding(lender.ledger.root, finding)
    return found, finding


def pursue(
    asked: Sequence[SearchRequest], lender: Lender, publisher: Publisher, recommend: bool = False
) -> Pursued:
    """Run searches, measure each step on the test documents, publish it as a run, and store all.

    A search that was killed continues where it stopped: all its measurements are in the ledger.

    Args:
        asked: The searches, equal models next to each other.
        lender: The results folder, the options of models (which run in this process), and progress.
        publisher: Publishes the steps' runs to the tracking backends.
        recommend: Whether to recommend one set for each goal.

    Returns:
        The results.

    Raises:
        RequestError: Part of a request does not exist or does not fit; nothing was measured.
        CellError: No search could be finished.
    """
    ledger, progress = lender.ledger, lender.progress
    ledger.refuse_unwritable()
    refuse_unknown(asked, lender)
    cells: dict[CellRequest, OpenCell] = {}
    refuse_mixed(asked, lender, cells)
    budgets = [budget_of(each, lender) for each in asked]
    for note in dict.fromkeys(refuse_unsavable(asked, budgets, lender)):
        if note:
            progress.say(note)
    found: list[Found] = []
    failed: dict[SearchRequest, str] = {}
    for request, within in zip(asked, budgets, strict=True):
        try:
            found += search(request, within, lender, cells)
        except TrackerError as error:
            if isinstance(error, RequestError) and len(asked) == 1:
                raise
            log.debug("%s failed", request.title, exc_info=True)
            failed[request] = str(error)
    said = {request.title: why for request, why in failed.items()}
    if not found:
        raise CellError("\n".join(f"{title}: {why}" for title, why in said.items()))
    recommendations: dict[Goal, Recommended] = {}
    for test, chosen in grouped(found, lambda one: one.asked.test()).items():
        for goal in dict.fromkeys(one.asked.goal for one in chosen) if recommend else ():
            some = [one for one in chosen if one.asked.goal == goal]
            recommendations[goal] = recommended(some, lender, cells)
        progress.say(f"{test.title}: testing what was chosen")
        cells[test].measure([ablation for one in chosen for ablation in ablations_of(one)])
    steps = [[_run(one, step) for step in one.steps] for one in found]
    runs = list(dict.fromkeys(run for each in steps for run in each if run is not None))
    outcome = run_cells(runs, ledger, publisher, lender.options, progress) if runs else RunOutcome()
    outcome.failed |= said
    outcome.models_loaded += lender.loaded
    shown = _by_request(runs, outcome.cells, ledger)
    searched = []
    for one, asked_for in zip(found, steps, strict=True):
        tested = cells[one.asked.test()]
        places = [shown[run] for run in asked_for if run in shown]
        record = _record(one, tested, places, stays_of(one.asked, lender))
        keep_search(ledger.root, record)
        answered = tested.paired(ablations_of(one)).scores
        last = next(filter(None, reversed(asked_for)), None)
        searched.append(Searched(one.asked, record, answered, last))
    if not failed:
        for cell in cells.values():
            cell.end()
    return Pursued(searched, recommendations, failed, outcome)


def ablations_of(found: Found) -> list[Ablation]:
    """Return the set after each step, under which test documents are measured."""
    return [found.parts.without(step.removed) for step in found.steps]


def _run(found: Found, step: PruneStep) -> CellRequest | None:
    """Return the request of a step as a run: its removal, in addition to earlier ones.

    None for attentions, MLPs, heads and experts, of which a run can lack only one.
    """
    last = step.layer if step.layer is not None else max(step.removed)
    beneath = tuple(layer for layer in step.removed if layer != last)
    unit, parts = found.asked.unit, found.parts
    if unit != "layer" and beneath:
        return None
    test = replace(found.asked.test(), removed=beneath)
    return test.with_changes(parts.without([last]).changes)


def _by_request(
    runs: Sequence[CellRequest], cells: Iterable[CellRecord], ledger: Ledger
) -> dict[CellRequest, Place]:
    """Find the tracked cell of each step."""
    places = {cell.place[:2]: cell.place for cell in cells}
    found = {}
    for run in runs:
        if (store := look_up(run, ledger).store) is not None:
            key = (store.identity.key, store.views.name_of(store.views.of(run)))
            if key in places:
                found[run] = places[key]
    return found


def _record(
    found: Found, cell: OpenCell, places: Sequence[Place], stays: Constraints
) -> PruneRecord:
    tested = [
        step.model_copy(update={"test": _tested(cell, ablation)})
        for step, ablation in zip(found.steps, ablations_of(found), strict=True)
    ]
    asked, identity, parts = found.asked, cell.store.identity, found.parts
    return PruneRecord(
        name=found.name(identity.key),
        model=identity.model,
        benchmark=identity.benchmark,
        metric=cell.view.metric,
        higher_is_better=cell.higher_is_better,
        part=cell.request.documents.part,
        unit=asked.unit,
        per_layer=parts.per_layer,
        there=len(parts.numbers) if asked.unit in NUMBERED else None,
        strategy=asked.strategy,
        draw=found.draw,
        rescoring=asked.rescored,
        amount=asked.asked,
        protected=stays.protected,
        among=stays.among,
        at_least={one.kind: str(one) for one in stays.least},
        calibration=found.calibration,
        steps=tuple(tested),
        baseline=_tested(cell, INTACT),
        cost=found.cost,
        rests_on=tuple(places),
    )


def _tested(cell: OpenCell, ablation: Ablation) -> Tested:
    """Return the test documents' outcome under an ablation."""
    paired = cell.paired([ablation])
    lost = Estimate(None) if ablation == INTACT else paired.drop(0)
    return Tested(n=len(paired.baseline), level=paired.level(0), lost=lost)


def figures(record: PruneRecord) -> dict[str, float]:
    """Return the figures by which a sweep's page compares searches."""
    test, cost = end(record), record.cost
    found = {
        "search/test_accuracy": test.level.value,
        "search/test_accuracy_low": test.level.low,
        "search/test_accuracy_high": test.level.high,
        "search/baseline_accuracy": record.baseline.level.value,
        "search/removed": float(len(record.removed)),
        "search/evaluations": cost.evaluations,
        "search/passes": cost.passes,
        "search/seconds": cost.seconds,
    }
    return {name: value for name, value in found.items() if value is not None}


def _log(track: Sequence[str], results: Path, found: Pursued) -> None:
    """Log the last step that is a run as the trial's run, with the figures of the search, and end.

    Of several draws it is the first. If W&B refuses, `found.outcome` records it.
    """
    record, request = found.searched[0].record, found.searched[0].request
    trial = Trial(track, results, request.changes.single if request else Change())
    if not trial.joins:
        return
    try:
        places = record.rests_on[-1:]
        cell = next((c for c in found.outcome.cells if c.place in places), None)
        if request is None or cell is None:
            trial.leave(f"{record.label}: no step of it is a run")
        else:
            trial.log(cell, figures(record))
    except TrackingError as error:
        found.outcome.unpublished[f"the trial of {record.label}"] = str(error)


@contextmanager
def trial(track: Sequence[str], results: Path) -> Iterator[Callable[[Pursued], None]]:
    """Join the trial of this process, if it is one; yield a function that takes the results.

    An error inside ends the trial as failed.
    """
    try:
        yield partial(_log, track, results)
    except BaseException as error:
        Trial(track, results, Change()).fail(error)
        raise
