"""Run searches on random scores to find which sets they may end with, and what they cost.

A search that cannot end with any set is refused, and so is one whose sets could not be saved. The
class of some models derives a layer's type from its position (Jamba's `attn_layer_period`), so a
checkpoint must lack whole periods or cannot be loaded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

from tracker.core.changes import INTACT, Ablation
from tracker.core.config import CellRequest
from tracker.core.errors import ExperimentError, ModelError
from tracker.core.kinds import NUMBERED
from tracker.core.proxies import passes
from tracker.core.search_parts import SearchParts
from tracker.engine.plan import Reading, reading
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.planning import texts_of
from tracker.measuring.prepare import check_documents
from tracker.measuring.progress import Progress, Silent
from tracker.models.checkpoint import refuse_unsizable
from tracker.models.sources import ModelSource
from tracker.search.cells import Lender, planned
from tracker.search.request import Goal, SearchRequest, deciding
from tracker.search.scores import Losses, Scores, Set, grown
from tracker.search.search import budget_of, refuse_few, refuse_mixed, refuse_unknown
from tracker.search.settings import Budget
from tracker.search.strategies import BLIND, NULL, SCORED, STRATEGIES, Search
from tracker.stats.arrays import Array

TRIED = 4
"""Number of randomly drawn sets that represent the possible results of a search."""


class DrawnScores(Scores):
    """Random scores: a part's cost is drawn at random, and costs add up.

    Another `lot` draws other costs.
    """

    def __init__(self, parts: SearchParts, lot: str = "") -> None:
        super().__init__([], parts)
        self._lot = lot
        self._costs: dict[str, list[float]] = {}

    def losses(self, by: str, sets: Sequence[Set]) -> Losses:
        """Return random losses of sets."""
        if by not in self._costs:
            lots = (random.Random(f"{by}/{n}{self._lot}") for n in range(self.parts.total))
            self._costs[by] = [removed.random() for removed in lots]
        costs = self._costs[by]
        values: Array = np.array([[sum(costs[part] for part in removed) for removed in sets]])
        return Losses([grown(removed) for removed in sets], values, np.ones(1), np.zeros(len(sets)))

    def proxy(self, name: str, removed: Set, spans: Sequence[range] | None = None) -> Losses:
        """Return a random proxy of the model that lacks some layers."""
        left = [layer for layer in range(self.layers) if layer not in removed]
        spans = [range(n, n + 1) for n in range(len(left))] if spans is None else spans
        sets = [grown(removed, *(left[n] for n in span)) for span in spans]
        return DrawnScores.losses(self, name, sets)


def ends_of(request: SearchRequest, within: Budget, lots: int = TRIED) -> list[Set]:
    """List sets that a search may end with: all of them if it uses no documents.

    Raises ExperimentError if it cannot end with any. Otherwise random scores are drawn `lots`
    times.
    """
    blind = request.strategy in BLIND
    draws = [(draw or 1, "") for draw in request.draws_of]
    sets: dict[Set, None] = {}
    for draw, lot in draws if blind else [(1, f"/{lot}") for lot in range(lots)]:
        scores = DrawnScores(within.parts_of(request.unit), lot)
        given = Search(scores, within, request.cell.documents.seed, draw)
        try:
            *_, step = STRATEGIES[request.strategy](given)
        except ExperimentError as error:
            raise ExperimentError(f"{request.title}: {error}") from None
        sets[step.removed] = None
    return list(sets)


def refuse_unsavable(
    searches: Sequence[SearchRequest], budgets: Sequence[Budget], lender: Lender
) -> list[str]:
    """Refuse searches that can end with nothing, or with nothing that plain transformers loads.

    Models that can be loaded without any one layer are taken to be so without any set.

    Args:
        searches: The searches.
        budgets: When each has removed enough.
        lender: Finds the models.

    Returns:
        One a search: that its sets can be saved or not, as it happens; empty where all can.

    Raises:
        ExperimentError: A strategy cannot remove enough.
        ModelError: No set that a search may end with can be saved; says what could be.
    """

    @cache
    def why_not(source: ModelSource, removed: Set | None) -> str:
        """Return why a set cannot be saved; empty where it can. None: some layers, each alone."""
        try:
            refuse_unsizable(source, removed)
        except ModelError as error:
            return str(error)
        return ""

    def note(request: SearchRequest, within: Budget) -> str:
        cell = request.cell
        if request.unit in NUMBERED and request.strategy in SCORED:
            return ""  # they take one part after the other, and whatever goes first can
        why = partial(why_not, lender.source(cell.model))
        if request.unit != "layer" or not why(None):
            ends_of(request, within, 1)
            return ""
        ends = ends_of(request, within)
        reasons = list(filter(None, map(why, ends)))
        if not reasons:
            return ""
        more = f"{reasons[0]}{_way_out(len(within.each), why)}"
        if len(reasons) == len(ends):
            raise ModelError(f"{request.title}: {more}")
        return f"{request.title}: what it finds may be no checkpoint: {more}"

    return [note(*pair) for pair in zip(searches, budgets, strict=True)]


def _way_out(total: int, why_not: Callable[[Set], str]) -> str:
    """Describe the shortest spans that can be removed at any position; empty if there are none."""
    for length in range(2, total // 2 + 1):
        starts = (0, 1, (total - length) // 2, total - length)
        if not any(why_not(tuple(range(first, first + length))) for first in starts):
            return (
                f". Stretches of {length} layers, or of a multiple, can go: write strategy: "
                f"{{value: angular}} and remove: {{value: {length}}}"
            )
    return ""


@dataclass(frozen=True)
class PlannedSearch:
    """Cost of one search with all its draws, or of deciding between and testing sets.

    Attributes:
        request: The search, or the documents that decide between or test the results of some.
        documents: Number of documents that choose, decide or test.
        evaluations: Number of sets that are scored, if it were alone, or tested.
        flops: Floating-point operations that no earlier search shares.
        dtype: The dtype of these operations, such as `bfloat16`.
        naive_flops: Operations of lm-eval, run once per set; None if proxies are scored.
        steps: Number of parts removed; None for a test.
        passes: Computation of the engine for the sets, in passes of all calibration documents
            through the whole intact model; None for a test.
        at_most: Whether it may take less, since candidates are not all scored again.
        note: A further remark; empty if there is none.
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
    asked: Sequence[SearchRequest], ledger: Ledger, trust_remote_code: bool = False
) -> tuple[list[PlannedSearch], list[PlannedSearch]]:
    """Count the cost of searches and their tests, as if nothing of it were measured.

    Which sets are tried depends on what will be measured. How many they are does not (but for what
    `at_least` leaves), and how much they share hardly does. A budget in seconds loads the model,
    to time it.

    Args:
        asked: The searches.
        ledger: The results folder, which keeps timings.
        trust_remote_code: Whether code from a download may run.

    Returns:
        One plan a search, and one for what else is measured: to recommend one of the sets, and to
        test them.

    Raises:
        RequestError: Something that was asked for does not exist or does not fit.
    """
    lender = Lender(ledger, Options(trust_remote_code=trust_remote_code), Silent())
    refuse_unknown(asked, lender)
    refuse_mixed(asked, lender, {})

    @cache
    def read(request: CellRequest) -> tuple[Reading, str]:
        """Count what a cell's documents take, and say in what type of numbers."""
        texts = texts_of(request, lender.source(request.model))
        return reading(texts.model, texts.documents, texts.max_length), texts.dtype

    known: dict[CellRequest, set[object]] = {}
    compared: dict[Goal, dict[Ablation, None]] = {}
    tested: dict[CellRequest, dict[Ablation, None]] = {}
    searches, more = [], []
    budgets = [budget_of(request, lender) for request in asked]
    notes = refuse_unsavable(asked, budgets, lender)
    for request, within, note in zip(asked, budgets, notes, strict=True):
        cells = {each: read(each)[0] for each in request.calibration()}
        for each, there in cells.items():
            refuse_few(each, there.documents)
        counts = [_Counted(cells, within.parts_of(request.unit), known) for _ in request.draws_of]
        steps = 0
        for draw, scores in zip(request.draws_of, counts, strict=True):
            given = Search(scores, within, request.cell.documents.seed, draw or 1)
            found = [step.removed for step in STRATEGIES[request.strategy](given)]
            steps = len(found[-1])
            sets = dict.fromkeys(scores.ablation(removed) for removed in found)
            tested.setdefault(request.test(), {INTACT: None}).update(sets)
            if request.strategy != NULL:
                compared.setdefault(request.goal, {})[scores.ablation(found[-1])] = None
        naive = [scores.naive_flops for scores in counts]
        searches.append(
            PlannedSearch(
                request,
                documents=sum(each.documents for each in cells.values()),
                evaluations=sum(scores.evaluations for scores in counts),
                flops=sum(scores.flops for scores in counts),
                dtype=read(request.test())[1],
                naive_flops=None if None in naive else sum(each or 0.0 for each in naive),
                steps=steps,
                passes=sum(scores.passes for scores in counts),
                at_most=request.rescored != "full",
                note=note,
            )
        )
    for goal, sets in compared.items():
        decides = deciding([one for one in asked if one.goal == goal])
        lacking = [one for one in (INTACT, *sets) if one not in known.get(decides, ())]
        if len(sets) > 1 and lacking:
            more.append(_measuring(decides, lacking, *read(decides)))
    more += [_measuring(test, list(sets), *read(test)) for test, sets in tested.items()]
    lender.keep_timings()
    return searches, more


def check_searches(
    searches: Sequence[SearchRequest], ledger: Ledger, trust_remote_code: bool, progress: Progress
) -> list[str]:
    """Check searches without loading a model's weights; report to `progress` what is read.

    Returns remarks, including everything that could not be checked. Raises RequestError as
    `plan_searches` does.
    """
    lender = Lender(ledger, Options(trust_remote_code=trust_remote_code), Silent())
    refuse_unknown(searches, lender)
    requests = [r for search in searches for r in (*search.calibration(), search.test())]
    unchecked = check_documents(requests, progress)
    if not unchecked:
        refuse_mixed(searches, lender, {})
    # Timing layers would load the weights.
    timeless = [search for search in searches if search.amount.measure != "seconds"]
    budgets = [budget_of(search, lender) for search in timeless]
    notes = refuse_unsavable(timeless, budgets, lender)
    return [*filter(None, notes), *(f"not checked: {text}" for text in unchecked)]


def _measuring(
    request: CellRequest, sets: Sequence[Ablation], there: Reading, dtype: str
) -> PlannedSearch:
    """Count the cost of measuring some sets."""
    flops, naive_flops = there.flops(planned(sets, there.layers)), there.naive_flops(list(sets))
    return PlannedSearch(request, there.documents, len(sets), flops, dtype, naive_flops)


class _Counted(DrawnScores):
    """Random scores that count the cost of computing real ones.

    `known` holds the measurements of earlier searches by cell; `passes`, `flops` and `naive_flops`
    are as in `PlannedSearch`.
    """

    def __init__(
        self,
        readings: dict[CellRequest, Reading],
        parts: SearchParts,
        known: dict[CellRequest, set[object]],
    ) -> None:
        super().__init__(parts)
        self.passes = self.flops = 0.0
        self.naive_flops: float | None = 0.0
        self._readings, self._known = readings, known
        self._everything = sum(each.documents for each in readings.values())

    @property
    def evaluations(self) -> float:
        """The number of sets that were scored."""
        return len(self.evaluated) + len(self._observed)

    def losses(self, by: str, sets: Sequence[Set]) -> Losses:
        """Count the cost of scoring sets, and return random losses."""
        ablations = [INTACT, *(self.ablation(removed) for removed in sets)]
        new = [one for one in ablations if one not in self.evaluated]
        self.evaluated |= set(new)
        for request, there in self._readings.items():
            if new:
                share = there.documents / self._everything
                self.passes += planned(new, self.layers).layer_passes / self.layers * share
            known = self._known.setdefault(request, set())
            lacking = [one for one in new if one not in known]
            known.update(lacking)
            if lacking:
                self.flops += there.flops(planned(lacking, self.layers))
            if self.naive_flops is not None:
                self.naive_flops += there.naive_flops(lacking)
        return super().losses(by, sets)

    def proxy(self, name: str, removed: Set, spans: Sequence[range] | None = None) -> Losses:
        """Count the cost of a proxy of the model without some layers, and return a random one."""
        left = self.layers - len(removed)
        self.naive_flops = None
        if (key := f"{name}/{removed}") not in self._observed:
            self._observed.add(key)
            price = passes(name, left, shared=True) * left / self.layers
            self.passes += price
            for request, there in self._readings.items():
                known = self._known.setdefault(request, set())
                if key not in known:
                    known.add(key)
                    self.flops += price * there.flops(planned((), self.layers))
        return super().proxy(name, removed, spans)
