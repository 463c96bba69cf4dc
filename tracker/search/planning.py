"""Simulate searches with random scores to predict their cost and their possible results.

A search is refused if the search cannot remove enough, or if no possible result could be saved as a
checkpoint. In models such as Jamba, the types of layers repeat with a period. A checkpoint without
some layers can then be loaded only if the number of adjacent removed layers is a multiple of the
period.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tracker.engine.plan import Workload, count_work
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.planning import read_texts
from tracker.measuring.prepare import check_documents
from tracker.measuring.progress import Progress, Silent
from tracker.models.checkpoint import check_layer_changes, check_part_removal
from tracker.models.sources import ModelSource
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.config import CellRequest
from tracker.schema.errors import ExperimentError, ModelError
from tracker.schema.kinds import NUMBERED_COMPONENTS
from tracker.schema.proxies import proxy_cost
from tracker.schema.search_parts import SearchParts
from tracker.search.cells import ModelCache, engine_passes, plan_with_baseline
from tracker.search.request import SearchGoal, SearchRequest, deciding_request
from tracker.search.scores import Losses, PartSet, Scores
from tracker.search.search import find_budget, refuse_few, refuse_mixed, refuse_unknown
from tracker.search.settings import TIMED, Budget
from tracker.search.strategies import (
    BLIND_STRATEGIES,
    RANDOM_STRATEGY,
    STEPWISE_STRATEGIES,
    STRATEGIES,
    Search,
)

TRIAL_DRAWS = 4
"""Number of runs on random scores that represent the possible results of a search."""


class RandomScores(Scores):
    """Random scores for simulations of a search.

    Different values of `variant` give different random scores.
    """

    def __init__(self, parts: SearchParts, variant: str = "") -> None:
        super().__init__([], parts)
        self._variant = variant
        self._costs: dict[str, list[float]] = {}

    def losses(self, outcome: str, sets: Sequence[PartSet]) -> Losses:
        """Return a random loss for each set of removed parts."""
        if outcome not in self._costs:
            seeds = (f"{outcome}/{part}{self._variant}" for part in range(self.parts.total))
            self._costs[outcome] = [random.Random(seed).random() for seed in seeds]
        costs = self._costs[outcome]
        values = np.array([[sum(costs[part] for part in part_set) for part_set in sets]])
        return Losses(sets, values, np.ones(1), np.zeros(len(sets)))

    def proxy(self, name: str, removed: PartSet, spans: Sequence[range] | None = None) -> Losses:
        """Return a random value of a proxy for each set of layers that could be removed."""
        return RandomScores.losses(self, name, self.candidate_sets(removed, spans))


def possible_results(request: SearchRequest, budget: Budget, n: int = TRIAL_DRAWS) -> list[PartSet]:
    """List possible final results of a search, as sets of removed parts.

    For a strategy that uses documents, the list contains only the results of `n` simulations with
    random scores. Raises ExperimentError if the search cannot remove enough.
    """
    draws = [(draw or 1, "") for draw in request.draw_numbers]
    if request.strategy not in BLIND_STRATEGIES:
        draws = [(1, f"/{k}") for k in range(n)]
    sets: dict[PartSet, None] = {}
    for draw, variant in draws:
        scores = RandomScores(budget.parts, variant)
        search = Search(scores, budget, request.cell.documents.seed, draw)
        try:
            steps = list(STRATEGIES[request.strategy](search))
        except ExperimentError as error:
            raise ExperimentError(f"{request.title}: {error}") from None
        # With a budget of accuracy, any step may be the last one.
        ends = steps if request.accuracy_budget is not None else steps[-1:]
        sets |= dict.fromkeys(step.removed for step in ends)
    return list(sets)


def prepare_searches(
    requests: Sequence[SearchRequest], cache: ModelCache
) -> tuple[list[Budget], list[str]]:
    """Check the requests of all searches, and return the budget of each search.

    Also returns a remark for each search; empty if all possible results of the search can be saved.
    Raises RequestError for an invalid request.
    """
    refuse_unknown(requests, cache)
    refuse_mixed(requests, cache)
    budgets = [find_budget(request, cache) for request in requests]
    return budgets, refuse_unsavable(requests, budgets, cache)


def refuse_unsavable(
    searches: Sequence[SearchRequest], budgets: Sequence[Budget], cache: ModelCache
) -> list[str]:
    """Raise an error if a search cannot remove enough or its results cannot be saved.

    A pruned model can be saved if plain transformers can load its checkpoint.

    Args:
        searches: The searches.
        budgets: The budget of each search.
        cache: Cache that finds the models.

    Returns:
        A remark for each search; empty if all its possible results can be saved.

    Raises:
        ExperimentError: A search strategy cannot remove the requested amount.
        ModelError: No possible result of a search can be saved as a checkpoint.
    """

    find_refusal = functools.cache(partial(_find_refusal, check_layer_changes))

    def describe_result(request: SearchRequest, budget: Budget) -> str:
        """Return a remark if some possible results of a search cannot be saved.

        The remark is empty if all possible results can be saved. Raises ModelError if no possible
        result can be saved.
        """
        if request.is_uniform:
            # Sets of the same size have the same number of parts in each layer.
            sets = {len(part_set): part_set for part_set in possible_results(request, budget, 1)}
            source, parts = cache.source(request.cell.model), budget.parts
            texts = (find_part_refusal(source, parts.removal(s)) for s in sets.values())
            refusals = list(itertools.takewhile(bool, texts))
            if len(refusals) == len(sets):
                raise ModelError(refusals[0])
            return ""
        if request.unit in NUMBERED_COMPONENTS and request.strategy in STEPWISE_STRATEGIES:
            return ""  # they take one part after the other, and whatever goes first can
        refuse = partial(find_refusal, cache.source(request.cell.model))
        if request.unit != "layer" or not refuse(None):
            possible_results(request, budget, 1)
            return ""
        reasons = [refuse(part_set) for part_set in possible_results(request, budget)]
        if not any(reasons):
            return ""
        advice = _recommend_savable_length(len(budget.sizes), refuse)
        message = ". ".join(filter(None, (next(filter(None, reasons)), advice)))
        if all(reasons):
            raise ModelError(f"{request.title}: {message}")
        return (
            f"{request.title}: perhaps the pruned model cannot be saved as a checkpoint: {message}"
        )

    return list(map(describe_result, searches, budgets))


def find_part_refusal(source: ModelSource, removal: Ablation) -> str:
    """Return why a model without these parts of layers cannot be saved; empty if it can."""
    return _find_refusal(check_part_removal, source, removal)


def _find_refusal(check: Callable[..., None], *arguments: object) -> str:
    """Call the function `check`, and return the message if the call raises ModelError.

    The text is empty if the call raises no ModelError.
    """
    try:
        check(*arguments)
    except ModelError as error:
        return str(error)
    return ""


def _recommend_savable_length(n_layers: int, refuse: Callable[[PartSet], str]) -> str:
    """Recommend a number of adjacent layers whose removal leaves a model that can be saved.

    The function `refuse` returns why a model without the given layers cannot be saved. The advice
    is empty if there is no suitable number.
    """
    for length in range(2, n_layers // 2 + 1):
        starts = (0, 1, (n_layers - length) // 2, n_layers - length)
        if not any(refuse(tuple(range(start, start + length))) for start in starts):
            return (
                f"{length} adjacent layers, or a multiple of {length}, can be removed. To remove "
                f"{length}, write strategy: {{value: angular}} and remove: {{value: {length}}}"
            )
    return ""


@dataclass(frozen=True)
class PlannedSearch:
    """Predicted cost of a search, or of the measurement of search results.

    Attributes:
        request: The search, or the request that measures the results of searches.
        documents: Number of documents that are measured.
        evaluations: Number of sets of removed parts to measure; reused results are not counted.
        flops: Number of floating-point operations. Results that an earlier search of the plan
            measures are not counted again.
        dtype: The dtype of the computation, such as `bfloat16`.
        naive_flops: Number of floating-point operations if lm-eval evaluated each set separately;
            None if the search uses proxies.
        steps: Number of parts that the search removes, or number of steps if the search removes
            several units. The value is None for a comparison or a test.
        passes: Cost of the search in forward passes of the intact model over all calibration
            documents; None for a comparison or test.
        at_most: True if the cost is an upper bound.
        note: A remark on whether the results can be saved; empty if there is none.
    """

    request: SearchRequest | CellRequest
    documents: int
    evaluations: float
    flops: float
    dtype: str
    naive_flops: float | None
    steps: int | None = None
    passes: float | None = None
    at_most: bool = False
    note: str = ""


def plan_searches(
    requests: Sequence[SearchRequest], ledger: Ledger, trust_remote_code: bool = False
) -> tuple[list[PlannedSearch], list[PlannedSearch]]:
    """Predict the cost of searches, and the cost of testing their results.

    The function runs the searches with random scores. The real cost is lower if some results are
    already stored. For a budget in seconds, the model is loaded to time its layers.

    Args:
        requests: The searches.
        ledger: The results folder, which stores the measured times of layers.
        trust_remote_code: Whether Python code that is downloaded with a model may run.

    Returns:
        The cost of each search, and the cost of each measurement of the results.

    Raises:
        RequestError: A request is invalid.
    """
    cache = ModelCache(ledger, Options(trust_remote_code=trust_remote_code), Silent())
    budgets, notes = prepare_searches(requests, cache)

    @functools.cache
    def read_documents(request: CellRequest) -> tuple[Workload, str]:
        """Count the tokens of a request's documents, and find the computation's dtype."""
        texts = read_texts(request, cache.source(request.model))
        return count_work(texts.model, texts.documents, texts.max_length), texts.dtype

    def plan_measurement(request: CellRequest, ablations: Sequence[Ablation]) -> PlannedSearch:
        """Predict the cost of measuring some ablations."""
        documents, dtype = read_documents(request)
        flops = documents.flops(plan_with_baseline(ablations, documents.layers))
        naive = documents.naive_flops(list(ablations))
        return PlannedSearch(request, documents.documents, len(ablations), flops, dtype, naive)

    measured: dict[CellRequest, set[object]] = {}
    sets_by_goal: dict[SearchGoal, dict[Ablation, None]] = {}
    test_sets: dict[CellRequest, dict[Ablation, None]] = {}
    searches, measurements = [], []
    for request, budget, note in zip(requests, budgets, notes, strict=True):
        has_budget = request.accuracy_budget is not None
        deciding = deciding_request([request])
        # The rule that ends a walk has documents of its own if others choose the parts.
        extra = [deciding] if has_budget and request.calibration() != (deciding,) else []
        cells = {cell: read_documents(cell)[0] for cell in (*request.calibration(), *extra)}
        for cell, documents in cells.items():
            refuse_few(cell, documents.documents)
        scores_of_draws = list[_CountingScores]()
        for draw in request.draw_numbers:
            choosing = {cell: cells[cell] for cell in request.calibration()}
            scores = _CountingScores(choosing, budget.parts, measured)
            walk = scores
            if extra:
                walk = _CountingScores({deciding: cells[deciding]}, scores.parts, measured)
            search = Search(scores, budget, request.cell.documents.seed, draw or 1)
            steps = list(STRATEGIES[request.strategy](search))
            for step in steps if has_budget else ():  # its rule measures each step
                walk.losses("accuracy", [step.removed])
            scores_of_draws += dict.fromkeys((scores, walk))
            sets = dict.fromkeys(scores.ablation(step.removed) for step in steps)
            test_sets.setdefault(request.test(), {INTACT: None}).update(sets)
            if request.strategy != RANDOM_STRATEGY:
                sets_by_goal.setdefault(request.goal, {})[list(sets)[-1]] = None
        naive = [scores.naive_flops for scores in scores_of_draws if scores.naive_flops is not None]
        searches.append(
            PlannedSearch(
                request,
                documents=sum(documents.documents for documents in cells.values()),
                evaluations=sum(scores.evaluations for scores in scores_of_draws),
                flops=sum(scores.flops for scores in scores_of_draws),
                dtype=read_documents(request.test())[1],
                naive_flops=sum(naive) if len(naive) == len(scores_of_draws) else None,
                steps=len(steps if request.is_mixed else steps[-1].removed),
                passes=sum(scores.passes for scores in scores_of_draws),
                at_most=request.used_rescoring != "full" or has_budget,
                note=note,
            )
        )
    for goal, sets in sets_by_goal.items():
        cell = deciding_request([request for request in requests if request.goal == goal])
        missing = [a for a in (INTACT, *sets) if a not in measured.get(cell, ())]
        if len(sets) > 1 and missing:
            measurements.append(plan_measurement(cell, missing))
    measurements += [plan_measurement(test, list(sets)) for test, sets in test_sets.items()]
    cache.keep_timings()
    return searches, measurements


def check_searches(
    searches: Sequence[SearchRequest], ledger: Ledger, trust_remote_code: bool, progress: Progress
) -> list[str]:
    """Check that searches are possible, without loading weights.

    Returns remarks, for example about checks that were impossible. Raises RequestError if a request
    is invalid.
    """
    cache = ModelCache(ledger, Options(trust_remote_code=trust_remote_code), Silent())
    refuse_unknown(searches, cache)
    requests = [r for search in searches for r in (*search.calibration(), search.test())]
    unchecked = check_documents(requests, progress)
    if not unchecked:
        refuse_mixed(searches, cache)
    # Timing layers would load the weights.
    untimed = [
        search for search in searches if search.amount is None or search.amount.measure not in TIMED
    ]
    budgets = [find_budget(search, cache) for search in untimed]
    notes = refuse_unsavable(untimed, budgets, cache)
    return [*filter(None, notes), *(f"not checked: {text}" for text in unchecked)]


class _CountingScores(RandomScores):
    """Random scores that also count how much it would cost to measure real scores.

    `passes`, `flops` and `naive_flops` have the same meaning as in `PlannedSearch`.
    """

    def __init__(
        self,
        cells: dict[CellRequest, Workload],
        parts: SearchParts,
        measured: dict[CellRequest, set[object]],
    ) -> None:
        super().__init__(parts)
        self.passes = self.flops = 0.0
        self.naive_flops: float | None = 0.0
        self._readings, self._measured = cells, measured
        self._n_documents = sum(reading.documents for reading in cells.values())

    @property
    def evaluations(self) -> float:
        """The number of sets of removed parts that have been scored."""
        return len(self.evaluated) + len(self._observed)

    def losses(self, outcome: str, sets: Sequence[PartSet]) -> Losses:
        """Return random losses, and add the cost of measuring real losses to the prediction."""
        ablations = (INTACT, *(self.ablation(part_set) for part_set in sets))
        ablations = tuple(a for a in ablations if a not in self.evaluated)
        self.evaluated |= set(ablations)
        for request, cell in self._readings.items():
            if ablations:
                share = cell.documents / self._n_documents
                self.passes += engine_passes(ablations, self.layers) * share
            measured = self._measured.setdefault(request, set())
            missing = [ablation for ablation in ablations if ablation not in measured]
            measured.update(missing)
            if missing:
                self.flops += cell.flops(plan_with_baseline(missing, self.layers))
            if self.naive_flops is not None:
                self.naive_flops += cell.naive_flops(missing)
        return super().losses(outcome, sets)

    def proxy(self, name: str, removed: PartSet, spans: Sequence[range] | None = None) -> Losses:
        """Return random values of a proxy, and add the cost of measuring it to the prediction."""
        n_layers = self.layers - len(removed)
        self.naive_flops = None
        if (key := f"{name}/{removed}") not in self._observed:
            self._observed.add(key)
            n_passes = proxy_cost(name, n_layers, is_shared=True) * n_layers / self.layers
            self.passes += n_passes
            for request, cell in self._readings.items():
                measured = self._measured.setdefault(request, set())
                if key not in measured:
                    measured.add(key)
                    self.flops += n_passes * cell.flops(plan_with_baseline((), self.layers))
        return super().proxy(name, removed, spans)
