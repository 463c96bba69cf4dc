"""How well each proxy orders the layers, and which ones the cosine score gets most wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracker.analysis.ranks.layers import LayerBoard, LayerStanding
from tracker.core.formats import defined
from tracker.core.proxies import OBSERVED
from tracker.core.records import CellRecord, CorrelationRecord
from tracker.stats.arrays import Array
from tracker.stats.rank_agreement import places, ranks_apart


@dataclass(frozen=True)
class Misjudged:
    """A layer that the cosine score is shown to put in the wrong place.

    `cosine_rank` is the rank that its mean cosine score would give, `off` places outside of the
    interval of its standing's.
    """

    standing: LayerStanding
    cosine_rank: int
    off: int


def cosine_ranks(board: LayerBoard) -> dict[int, int]:
    """Rank the layers of a leaderboard by their mean cosine score: layer → rank, 1 = largest.

    Equal ones share the better rank. Only layers that have a rank of their own have one, and none
    where one of their scores is undefined.
    """
    scores = {standing.layer: standing.cosine_score for standing in board.ranked}
    if not scores or not all(map(defined, scores.values())):
        return {}
    return dict(zip(scores, places(list(scores.values())), strict=True))


def misjudged(board: LayerBoard) -> list[Misjudged]:
    """Find the layers whose rank by cosine score lies outside of where their rank is shown to be.

    The one that is furthest outside comes first.
    """
    wrong = []
    for layer, rank in cosine_ranks(board).items():
        standing = next(standing for standing in board.ranked if standing.layer == layer)
        best, worst = (int(end) for end in standing.rank.between or (1, len(board.ranked)))
        off = max(best - rank, rank - worst)
        if off > 0:
            wrong.append(Misjudged(standing, rank, off))
    return sorted(wrong, key=lambda misplaced: -misplaced.off)  # ties stay in their order


def correlation(
    cell: CellRecord,
    subset: str = "all",
    coefficient: str = "spearman",
    proxy: str = "cosine_score",
) -> CorrelationRecord | None:
    """Find the correlation of a proxy with the drop (or loss increase).

    Args:
        cell: The cell.
        subset: `all` or `inner`.
        coefficient: `spearman`, `kendall` or `pearson`.
        proxy: Its name.

    Returns:
        The record, or None when the cell does not hold it.
    """
    key = (proxy, coefficient, subset)
    records = (r for r in cell.correlations if (r.proxy, r.coefficient, r.subset) == key)
    return next(records, None)


def _figures(cell: CellRecord, proxy: str) -> Array:
    """A proxy's figures and the drops, `[2, layers]`, of the layers where both are defined."""
    pairs = ((run.figure(proxy), run.drop.value) for run in cell.whole_layers)
    defined_pairs = [pair for pair in pairs if all(map(defined, pair))]
    return np.array(defined_pairs, dtype=np.float64).reshape(-1, 2).T


@dataclass(frozen=True)
class Agreement:
    """How well one proxy orders the layers of some cells.

    Attributes:
        proxy: Its field's name.
        spearman: Spearman with the accuracy drop in every cell where it is defined.
        differ: Mean share of layers whose rank differs between proxy and drop.
        chance: The share that two random orders would give.
    """

    proxy: str
    spearman: tuple[float, ...]
    differ: float | None
    chance: float | None


def agreements(cells: Sequence[CellRecord]) -> list[Agreement]:
    """Say how well each proxy orders the layers of cells of any models, with chance beside it."""
    # Leave out cells whose layers were not looked at on the same documents: they have no order.
    compared = [cell for cell in cells if not cell.is_raced]
    agreements_of = []
    for proxy in (observed.name for observed in OBSERVED):
        records = [correlation(cell, proxy=proxy) for cell in compared]
        values = (record.estimate.value for record in records if record)
        spearman = [value for value in values if value is not None]
        figures = [_figures(cell, proxy) for cell in compared]
        shares = [ranks_apart(*pair[:, None]) for pair in figures if pair.shape[1] > 2]
        differ, chance = np.mean(shares, axis=0).tolist() if shares else (None, None)
        agreements_of.append(Agreement(proxy, tuple(spearman), differ, chance))
    return agreements_of
