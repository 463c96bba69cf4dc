"""What is known of searches before anything is measured: sets that they may end with.

A search that can end with none is refused, and so is one whose sets could not be saved: there are
models whose class computes from a layer's place what the layer is (Jamba's `attn_layer_period`), so
that a checkpoint lacks whole periods or cannot be loaded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np

from tracker.core.errors import ExperimentError, ModelError
from tracker.core.kinds import NUMBERED
from tracker.core.search_parts import SearchParts
from tracker.models.checkpoint import refuse_unsizable
from tracker.models.sources import ModelSource, find_model
from tracker.search.budgets import Budget
from tracker.search.request import SearchRequest
from tracker.search.scores import Losses, Scores, Set, grown
from tracker.search.strategies import BLIND, SCORED, STRATEGIES, Search
from tracker.stats.arrays import Array

TRIED = 4
"""Sets, drawn at random, that stand for what a search may end with."""


class DrawnScores(Scores):
    """Scores that are made up: a part's cost is drawn at random, and costs add up.

    Another `lot` draws other costs.
    """

    def __init__(self, parts: SearchParts, lot: str = "") -> None:
        super().__init__([], parts)
        self._lot = lot
        self._costs: dict[str, list[float]] = {}

    def losses(self, by: str, sets: Sequence[Set]) -> Losses:
        """Make up what sets cost."""
        if by not in self._costs:
            lots = (random.Random(f"{by}/{n}{self._lot}") for n in range(self.parts.total))
            self._costs[by] = [each.random() for each in lots]
        costs = self._costs[by]
        values: Array = np.array([[sum(costs[part] for part in each) for each in sets]])
        return Losses([grown(each) for each in sets], values, np.ones(1), np.zeros(len(sets)))

    def proxy(self, name: str, removed: Set, spans: Sequence[range] | None = None) -> Losses:
        """Make up a proxy of the model that lacks some layers."""
        left = [layer for layer in range(self.layers) if layer not in removed]
        spans = [range(n, n + 1) for n in range(len(left))] if spans is None else spans
        sets = [grown(removed, *(left[n] for n in span)) for span in spans]
        return DrawnScores.losses(self, name, sets)


def ends_of(asked: SearchRequest, within: Budget, lots: int = TRIED) -> list[Set]:
    """List sets that a search may end with: all of them where it looks at no document.

    ExperimentError where it can end with none. By so many `lots` scores are made up.
    """
    blind = asked.strategy in BLIND
    draws = [(draw or 1, "") for draw in asked.draws_of]
    found: dict[Set, None] = {}
    for draw, lot in draws if blind else [(1, f"/{lot}") for lot in range(lots)]:
        scores = DrawnScores(within.parts_of(asked.unit), lot)
        given = Search(scores, within, asked.cell.seed, draw)
        try:
            *_, step = STRATEGIES[asked.strategy](given)
        except ExperimentError as error:
            raise ExperimentError(f"{asked.title}: {error}") from None
        found[step.removed] = None
    return list(found)


def refuse_unsavable(
    searches: Sequence[SearchRequest], budgets: Sequence[Budget], trust_remote_code: bool = False
) -> list[str]:
    """Refuse searches that can end with nothing, or with nothing that plain transformers loads.

    Models that can be loaded without any one layer are taken to be so without any set.

    Args:
        searches: The searches.
        budgets: When each has removed enough.
        trust_remote_code: Whether code from a download may run.

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
            refuse_unsizable(source, removed, trust_remote_code)
        except ModelError as error:
            return str(error)
        return ""

    def note(asked: SearchRequest, within: Budget) -> str:
        cell = asked.cell
        if asked.unit in NUMBERED and asked.strategy in SCORED:
            return ""  # they take one part after the other, and whatever goes first can
        why = partial(why_not, find_model(cell.model, cell.revision, cell.model_args))
        if asked.unit != "layer" or not why(None):
            ends_of(asked, within, 1)
            return ""
        ends = ends_of(asked, within)
        reasons = list(filter(None, map(why, ends)))
        if not reasons:
            return ""
        more = f"{reasons[0]}{_way_out(len(within.each), why)}"
        if len(reasons) == len(ends):
            raise ModelError(f"{asked.title}: {more}")
        return f"{asked.title}: what it finds may be no checkpoint: {more}"

    return [note(*each) for each in zip(searches, budgets, strict=True)]


def _way_out(total: int, why_not: Callable[[Set], str]) -> str:
    """Describe the shortest stretches that can be removed wherever they lie; or nothing."""
    for length in range(2, total // 2 + 1):
        starts = (0, 1, (total - length) // 2, total - length)
        if not any(why_not(tuple(range(first, first + length))) for first in starts):
            return (
                f". Stretches of {length} layers, or of a multiple, can go: write strategy: "
                f"{{value: angular}} and remove: {{value: {length}}}"
            )
    return ""
