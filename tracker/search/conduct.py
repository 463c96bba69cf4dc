"""Run searches, recommend a model, and test, store and publish the results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

from tracker.ledger.store import Ledger, write_finding, write_search
from tracker.measuring.prepare import find_cell
from tracker.runner import RunOutcome, run_cells
from tracker.schema.changes import INTACT, Ablation, Change
from tracker.schema.config import CellRequest
from tracker.schema.errors import CellError, RequestError, TrackerError, TrackingError
from tracker.schema.estimates import Estimate
from tracker.schema.findings import FindingRecord
from tracker.schema.grouping import group_by
from tracker.schema.kinds import NUMBERED_COMPONENTS
from tracker.schema.prune_records import HeldOutResult, PruneRecord, PruneStep
from tracker.schema.records import CellRecord, RecordKey
from tracker.schema.search_parts import MixedParts
from tracker.search.accuracy_budget import AccuracyBudget, BudgetVerdict
from tracker.search.cells import ModelCache, OpenCell
from tracker.search.planning import find_part_refusal, prepare_searches
from tracker.search.report import GoalResult, Searches, TestedSearch, build_finding, test_outcome
from tracker.search.request import SearchGoal, SearchRequest
from tracker.search.search import (
    RANDOM_REASON,
    Recommendation,
    SearchDraw,
    find_constraints,
    recommend_set,
    run_search,
)
from tracker.search.settings import Constraints
from tracker.search.strategies import RANDOM_STRATEGY
from tracker.team.publish import Publisher, Trial

NO_ACCURACY = "the unpruned model has an accuracy of 0"
"""Reason why no set is recommended, although none can lose accuracy."""


IsSavable = Callable[[TestedSearch, PruneStep], bool]
"""Function that returns whether the model after a step of a search can be saved."""


def judge_steps(
    budget: AccuracyBudget, search: TestedSearch, n_searches: int, is_savable: IsSavable
) -> BudgetVerdict:
    """Find a search's smallest model within a budget, by a significance test and by estimate.

    The result contains the indices of the search steps that give the models. Models that cannot be
    saved are ignored. The intervals are simultaneous for `n_searches` searches.
    """
    indices = [i for i, step in enumerate(search.record.steps) if is_savable(search, step)]
    return budget.judge(search.outcomes, indices, search.record.baseline.n, n_searches)


def end_within_budget(search: TestedSearch, n_searches: int, is_savable: IsSavable) -> TestedSearch:
    """Set a search's result to its last step that is significantly within the accuracy budget.

    The function returns a copy of the search whose field `shown` is the index of this step, or −1
    if no step is significantly within the budget. A search without a budget of accuracy is returned
    unchanged.
    """
    budget = search.request.accuracy_budget
    if budget is None:
        return search
    shown = judge_steps(budget, search, max(1, n_searches), is_savable).shown
    return replace(search, shown=-1 if shown is None else shown)


def recommend_within(
    budget: AccuracyBudget, searches: Searches, is_savable: IsSavable = lambda search, step: True
) -> Recommendation:
    """Recommend the smallest model that is significantly within a budget of accuracy.

    The steps of a search are tested on test documents, the smallest removal first (see
    `count_shown`). The intervals are simultaneous for all searches (Bonferroni). Searches of the
    strategy `random` are ignored.

    Args:
        budget: The budget.
        searches: The tested searches, all with this budget.
        is_savable: Function that returns whether the model after a step can be saved; other steps
            are ignored.

    Returns:
        The removed parts of the recommended model, or the reason why no model is recommended. The
        result also contains the removed parts of the smallest model whose estimated loss is within
        the budget.
    """
    informed = [search for search in searches if search.request.strategy != RANDOM_STRATEGY]
    if not informed:
        return Recommendation(reason=RANDOM_REASON)
    n_sets, paired = len(informed), informed[0].outcomes
    if not paired.weights @ paired.baseline:
        return Recommendation(n_sets=n_sets, reason=NO_ACCURACY)
    verdicts = [
        (search.record.steps, judge_steps(budget, search, n_sets, is_savable))
        for search in informed
    ]
    shown = [steps[v.shown] for steps, v in verdicts if v.shown is not None]
    estimated = [(steps[v.estimated], v.needed) for steps, v in verdicts if v.estimated is not None]
    excesses = [v.smallest_excess for _, v in verdicts if v.smallest_excess is not None]
    if not excesses:
        reason = "every tested model either cannot be saved or has no finite score"
        return Recommendation(n_sets=n_sets, reason=reason)
    if not estimated:
        return Recommendation(n_sets=n_sets, nearest=budget.larger_option(min(excesses), paired))
    step, needed = max(estimated, key=lambda pair: _lightness(pair[0]))
    lightest = max(shown, key=_lightness).removed if shown else ()
    return Recommendation(lightest, n_sets, estimated=step.removed, n_needed=needed)


def _lightness(step: PruneStep) -> tuple[float, ...]:
    """Return a sort key that puts smaller models last; then, models with smaller losses."""
    loss = test_outcome(step).lost.value or 0.0
    return -(step.parameters or 0), len(step.removed), -loss


log = logging.getLogger(__name__)


@dataclass
class SearchResults:
    """Results of several searches: the removed parts, recommendations and errors.

    Attributes:
        searches: The searches with their test results, one entry per random draw.
        goals: The searches and the recommended set of parts for each goal; empty if not requested.
        failed: The reason of the failure of each failed search.
        outcome: Outcome of measuring and publishing the search steps as ablation runs.
    """

    searches: list[TestedSearch]
    goals: list[GoalResult]
    failed: dict[SearchRequest, str]
    outcome: RunOutcome

    @property
    def records(self) -> list[PruneRecord]:
        """The records of the searches, as stored in the results folder."""
        return [search.record for search in self.searches]


def run_search_file(
    requests: Sequence[SearchRequest], name: str, cache: ModelCache, publisher: Publisher
) -> tuple[SearchResults, FindingRecord]:
    """Run the searches of an experiment file and store a common report.

    Returns the results of the searches, and the report. Raises RequestError and CellError as
    `run_searches` does.
    """
    results = run_searches(requests, cache, publisher, wants_recommendation=True)
    reasons = {request.title: reason for request, reason in results.failed.items()}
    finding = build_finding(name, results.goals, reasons)
    write_finding(cache.ledger.root, finding)
    return results, finding


def run_searches(
    requests: Sequence[SearchRequest],
    cache: ModelCache,
    publisher: Publisher,
    wants_recommendation: bool = False,
) -> SearchResults:
    """Run searches, measure each step on test documents, and store and publish the results.

    An interrupted search continues from the measurements that are stored in the ledger.

    Args:
        requests: The searches, with searches of the same model next to each other.
        cache: Cache of models, with the results folder and the options for loading models.
        publisher: Publisher of the steps to the tracking backends.
        wants_recommendation: Whether to recommend one set of parts for each goal, such as removing
            8 layers.

    Returns:
        The tested searches, the recommendations and the errors.

    Raises:
        RequestError: A request is invalid. Nothing was measured.
        CellError: No search could be finished.
    """
    ledger, progress = cache.ledger, cache.progress
    ledger.refuse_unwritable()
    budgets, notes = prepare_searches(requests, cache)
    for note in filter(None, dict.fromkeys(notes)):
        progress.say(note)
    draws: list[SearchDraw] = []
    failures: dict[SearchRequest, str] = {}
    for request, budget in zip(requests, budgets, strict=True):
        try:
            draws += run_search(request, budget, cache)
        except TrackerError as error:
            if isinstance(error, RequestError) and len(requests) == 1:
                raise
            log.debug("%s failed", request.title, exc_info=True)
            failures[request] = str(error)
    reasons = {request.title: reason for request, reason in failures.items()}
    if not draws:
        raise CellError("\n".join(f"{title}: {reason}" for title, reason in reasons.items()))
    recommended: dict[SearchGoal, Recommendation] = {}
    for test, test_draws in group_by(draws, lambda draw: draw.request.test()).items():
        for goal, goal_draws in group_by(test_draws, lambda draw: draw.request.goal).items():
            if wants_recommendation and goal_draws[0].request.accuracy_budget is None:
                recommended[goal] = recommend_set(goal_draws, cache)
        progress.say(f"{test.title}: testing what was chosen")
        cache.cell(test).measure([ablation for draw in test_draws for ablation in draw.ablations])
    runs_of_draws = [tuple(map(draw.run_request, draw.steps)) for draw in draws]
    runs = list(dict.fromkeys(filter(None, chain.from_iterable(runs_of_draws))))
    outcome = run_cells(runs, ledger, publisher, cache.options, progress) if runs else RunOutcome()
    outcome.failed |= reasons
    outcome.models_loaded += cache.n_loaded
    record_keys = _find_record_keys(runs, outcome.cells, ledger)
    rounded: dict[tuple[RecordKey | None, str], int | None] = {
        (cell.record_key, run.ablation): run.rounded for cell in outcome.cells for run in cell.runs
    }
    searches = []
    for draw, draw_runs in zip(draws, runs_of_draws, strict=True):
        request, cell = draw.request, cache.cell(draw.request.test())
        keys = [None if run is None else record_keys.get(run) for run in draw_runs]
        names = [(key, ablation.name) for key, ablation in zip(keys, draw.ablations, strict=True)]
        tracked = list(filter(None, keys))
        constraints = find_constraints(request, cache)
        record = _build_record(draw, cell, tracked, constraints, [rounded.get(n) for n in names])
        write_search(ledger.root, record)
        outcomes = cell.outcomes(draw.ablations).scores
        searches.append(TestedSearch(request, record, outcomes, draw_runs))

    def is_savable(search: TestedSearch, step: PruneStep) -> bool:
        source, removal = cache.source(search.request.cell.model), search.record.parts.removal
        return not search.request.is_uniform or not find_part_refusal(source, removal(step.removed))

    goals = list[GoalResult]()
    if wants_recommendation:
        for goal, group in group_by(searches, lambda search: search.request.goal).items():
            if (accuracy_budget := group[0].request.accuracy_budget) is not None:
                recommended[goal] = recommend_within(accuracy_budget, group, is_savable)
            n_sets = recommended[goal].n_sets
            ended = [end_within_budget(search, n_sets, is_savable) for search in group]
            goals.append(GoalResult(ended, recommended[goal]))
        searches = [search for goal_result in goals for search in goal_result.searches]
    if not failures:
        for cell in cache.cells.values():
            cell.end()
    return SearchResults(searches, goals, failures, outcome)


def _find_record_keys(
    runs: Sequence[CellRequest], cells: Iterable[CellRecord], ledger: Ledger
) -> dict[CellRequest, RecordKey]:
    """Find the stored record of each ablation run.

    Args:
        runs: Requests for ablation runs.
        cells: Records of results, each of one model on one benchmark.
        ledger: The results folder.

    Returns:
        A dict from the request of a run to the key of its record. Runs without a record are left
        out.
    """
    tracked = {cell.record_key[:2]: cell.record_key for cell in cells}
    stores = {run: find_cell(run, ledger).store for run in runs}
    keys = {
        run: (store.identity.key, store.views.view_name(store.views.view_of(run)))
        for run, store in stores.items()
        if store is not None
    }
    return {run: tracked[key] for run, key in keys.items() if key in tracked}


def _build_record(
    draw: SearchDraw,
    cell: OpenCell,
    tracked: Sequence[RecordKey],
    constraints: Constraints,
    rounded: Sequence[int | None],
) -> PruneRecord:
    """Build the record of one random draw of a search, to store it in the results folder.

    Args:
        draw: The draw.
        cell: The model with the test documents.
        tracked: Keys of the records in which the steps were measured as ablation runs.
        constraints: Constraints of the search.
        rounded: For each step, the number of documents whose outcome may depend on floating-point
            rounding; None if unknown.

    Returns:
        The record.
    """
    steps = [
        step.model_copy(update={"test": _test_outcome(cell, ablation, count)})
        for step, ablation, count in zip(draw.steps, draw.ablations, rounded, strict=True)
    ]
    request, identity, parts = draw.request, cell.store.identity, draw.parts
    budget = request.accuracy_budget
    return PruneRecord(
        name=draw.name(identity.key),
        model=identity.model,
        benchmark=identity.benchmark,
        metric=cell.view.metric,
        higher_is_better=cell.higher_is_better,
        part=cell.request.documents.part,
        unit=request.unit,
        per_layer=parts.per_layer,
        per_layers=[kind.per_layer for kind in parts.kinds]
        if isinstance(parts, MixedParts)
        else (),
        there=len(parts.numbers) if request.unit in NUMBERED_COMPONENTS else None,
        strategy=request.strategy,
        draw=draw.draw,
        rescoring=request.used_rescoring,
        amount=request.amount_text,
        budget=None if budget is None else budget.text,
        protected=constraints.protected,
        among=constraints.among,
        at_least={minimum.kind: str(minimum) for minimum in constraints.minimums},
        calibration=draw.calibration,
        steps=tuple(steps),
        baseline=_test_outcome(cell, INTACT),
        cost=draw.cost,
        rests_on=tuple(tracked),
    )


def _test_outcome(cell: OpenCell, ablation: Ablation, rounded: int | None = None) -> HeldOutResult:
    """Return the mean outcome and the drop of an ablation on the test documents."""
    paired = cell.outcomes([ablation])
    drop = Estimate(None) if ablation == INTACT else paired.drop(0)
    return HeldOutResult(n=len(paired.baseline), level=paired.level(0), lost=drop, rounded=rounded)


def search_figures(search: TestedSearch) -> dict[str, float]:
    """Return the metrics of a search that W&B shows for a sweep."""
    record, cost = search.record, search.record.cost
    accuracy = test_outcome(search.final_step).level
    values = {
        "search/test_accuracy": accuracy.value,
        "search/test_accuracy_low": accuracy.low,
        "search/test_accuracy_high": accuracy.high,
        "search/baseline_accuracy": record.baseline.level.value,
        "search/removed": float(len(search.final_step.removed)),
        "search/evaluations": cost.evaluations,
        "search/passes": cost.passes,
        "search/seconds": cost.seconds,
    }
    return {name: value for name, value in values.items() if value is not None}


def _log_trial(targets: Sequence[str], folder: Path, results: SearchResults) -> None:
    """Log the result of a search to the trial of a W&B sweep, and end the trial.

    For a search with several random draws, only the first draw is logged. Errors of W&B are added
    to `results.outcome`.
    """
    search = results.searches[0]
    record, request = search.record, search.run_request
    trial = Trial(targets, folder, request.changes.first_change if request else Change())
    if not trial.is_tracked:
        return
    try:
        cells = (c for c in results.outcome.cells if c.record_key in record.rests_on)
        change = request.changes.first_change if request else None
        cell = next((c for c in cells if change in [run.change for run in c.runs]), None)
        if cell is None:
            reason = "no step was measured on test documents"
            if search.shown == -1:
                reason = f"no removal meets the budget '{record.budget}' with 95 % confidence"
            trial.end_unmeasured(f"{record.label}: {reason}")
        else:
            trial.log(cell, search_figures(search))
    except TrackingError as error:
        results.outcome.unpublished[f"the trial of {record.label}"] = str(error)


@contextmanager
def join_trial(targets: Sequence[str], folder: Path) -> Iterator[Callable[[SearchResults], None]]:
    """Run a search as a trial of a W&B sweep; yield a function that logs the search's result.

    `targets` contains the tracking backends, and `folder` is the results folder. An error in the
    `with` block marks the trial as failed.
    """
    try:
        yield partial(_log_trial, targets, folder)
    except BaseException as error:
        Trial(targets, folder, Change()).fail(error)
        raise
