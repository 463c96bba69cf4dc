"""Ranks of layers: the true one beside the one that the cosine score would give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from tracker.records import CellRecord
from tracker.reporting.formats import defined
from tracker.reporting.leaderboard import LayerBoard, LayerStanding
from tracker.reporting.wording import benchmark_labels

_DECIMALS = 12
"""Figures that agree to here differ by rounding alone."""


@dataclass(frozen=True)
class Ranking:
    """The layers of one cell by two orders.

    Attributes:
        benchmark: Its label.
        rows: Layer, rank by accuracy drop (or loss increase), rank by cosine score; 1 = largest.
    """

    benchmark: str
    rows: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Misjudged:
    """A layer that the cosine score puts in the wrong place.

    Attributes:
        standing: The layer's true standing.
        cosine_rank: The rank that its mean cosine score would give.
        off: Places between the two ranks.
    """

    standing: LayerStanding
    cosine_rank: int
    off: int


def rankings(cells: Sequence[CellRecord]) -> list[Ranking]:
    """Rank the whole layers of every cell by what their removal costs, and by cosine score.

    Equal figures are ranked in the order of the layers, as a pruner that goes through the list
    would: these are the ranks behind `leaderboard.agreements`.

    Args:
        cells: Cells of one model.

    Returns:
        One entry for each cell with at least three layers where both are defined.
    """
    found = []
    for cell, label in zip(cells, benchmark_labels(cells), strict=True):
        runs = [
            run
            for run in cell.whole_layers
            if defined(run.cosine_score) and defined(run.accuracy_drop)
        ]
        if len(runs) > 2:
            true = _from_the_largest([run.accuracy_drop for run in runs])
            proxy = _from_the_largest([run.cosine_score for run in runs])
            layers = [run.layer for run in runs]
            found.append(Ranking(label, tuple(zip(layers, true, proxy, strict=True))))
    return found


def cosine_ranks(board: LayerBoard) -> dict[int, int]:
    """Rank the layers of a leaderboard by their mean cosine score.

    Args:
        board: The leaderboard.

    Returns:
        Layer → rank, 1 = largest, equal ones share the better rank; of the layers that have a
        rank of their own, and none where one of their scores is undefined.
    """
    ranked = [standing for standing in board.layers if standing.rank is not None]
    scores = [standing.cosine_score for standing in ranked if defined(standing.cosine_score)]
    if not scores or len(scores) < len(ranked):
        return {}
    ranks = stats.rankdata(-np.round(np.array(scores), _DECIMALS), method="min")
    return {
        standing.layer: int(rank) for standing, rank in zip(ranked, ranks.tolist(), strict=True)
    }


def misjudged(board: LayerBoard, count: int = 10) -> list[Misjudged]:
    """Find the layers whose rank the cosine score gets most wrong.

    Args:
        board: The leaderboard.
        count: How many at most.

    Returns:
        The largest difference of ranks first; layers in their right place are not in it.
    """
    ranks = cosine_ranks(board)
    found = [
        Misjudged(standing, ranks[standing.layer], abs(standing.rank - ranks[standing.layer]))
        for standing in board.layers
        if standing.rank is not None and standing.layer in ranks
    ]
    wrong = [one for one in found if one.off]
    return sorted(wrong, key=lambda one: (-one.off, one.standing.rank, one.standing.layer))[:count]


def _from_the_largest(values: Sequence[float | None]) -> list[int]:
    ascending = stats.rankdata(np.round(np.array(values, float), _DECIMALS), method="ordinal")
    return [len(values) + 1 - int(rank) for rank in ascending]
