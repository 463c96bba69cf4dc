"""Compare orders of layers by proxies with orders by drops, and two models layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from tracker.analysis.boards import LayerBoard, PartStanding, sure
from tracker.analysis.comparable import benchmark_labels, model_labels, models_of, setting
from tracker.core.estimates import Estimate
from tracker.core.formats import Measure, defined, measure_of
from tracker.core.proxies import OBSERVED
from tracker.core.records import CellRecord, CorrelationRecord, RunRecord
from tracker.stats.arrays import Array
from tracker.stats.rank_agreement import places, ranks_apart
from tracker.stats.support import difference, together


@dataclass(frozen=True)
class Misjudged:
    """A layer whose rank by cosine score is shown to be wrong.

    `cosine_rank` is the rank that its mean cosine score would give. It is `off` ranks outside the
    interval of the rank in `standing`.
    """

    standing: PartStanding
    cosine_rank: int
    off: int


def cosine_ranks(board: LayerBoard) -> dict[int, int]:
    """Rank the layers of a leaderboard by their mean cosine score: layer → rank, 1 = largest.

    Equal scores share the better rank. Layers without a rank of their own are left out. The result
    is empty if the score of a ranked layer is undefined.
    """
    scores = {standing.layer: standing.cosine_score for standing in board.ranked}
    if not scores or not all(map(defined, scores.values())):
        return {}
    return dict(zip(scores, places(list(scores.values())), strict=True))


def misjudged(board: LayerBoard) -> list[Misjudged]:
    """Find the layers whose rank by cosine score lies outside the interval of their rank.

    The layer that is furthest outside comes first.
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
    """Return the values of a proxy and the drops `[2, layers]` where both are defined."""
    pairs = ((run.figure(proxy), run.drop.value) for run in cell.whole_layers)
    defined_pairs = [pair for pair in pairs if all(map(defined, pair))]
    return np.array(defined_pairs, dtype=np.float64).reshape(-1, 2).T


@dataclass(frozen=True)
class Agreement:
    """Agreement of one proxy with the measured order of layers, over some cells.

    Attributes:
        proxy: Name of the proxy's field.
        spearman: Spearman correlations with the accuracy drop, one for each cell that has one.
        differ: Mean share of layers whose rank differs between proxy and drop.
        chance: Share that two random orders would give.
    """

    proxy: str
    spearman: tuple[float, ...]
    differ: float | None
    chance: float | None


def agreements(cells: Sequence[CellRecord]) -> list[Agreement]:
    """Compute how well each proxy orders the layers of cells, with chance for comparison."""
    # Skip cells whose layers were measured on different documents: their layers have no order.
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


MOST = 10
"""Maximum number of pairs that are shown."""


@dataclass(frozen=True)
class SharedBenchmark:
    """Two models on one benchmark of `n` documents each.

    Attributes:
        differences: Layer → drop of the first model minus drop of the other, as a fraction or in
            the unit of the loss.
        shown: Layers whose difference is shown not to be 0, with 95 % confidence for all layers and
            benchmarks of the pair.
    """

    benchmark: str
    n: int
    differences: dict[int, Estimate]
    shown: frozenset[int]

    def difference(self, layer: int) -> Estimate:
        """Return the difference of a layer, or the reason why there is none."""
        nothing = Estimate(None, reason="not measured in both models")
        return self.differences.get(layer, nothing)


@dataclass(frozen=True)
class Pair:
    """Two models with equally many layers, on the benchmarks that they share in one unit.

    `other` is the label of the model that is subtracted.
    """

    one: str
    other: str
    measure: Measure
    comparisons: tuple[SharedBenchmark, ...]

    @property
    def layers(self) -> list[int]:
        """The layers that at least one benchmark compares."""
        return sorted({layer for shared in self.comparisons for layer in shared.differences})


def pairs_of(cells: Sequence[CellRecord]) -> tuple[list[Pair], int]:
    """Pair models with equally many layers that share a benchmark with its documents and settings.

    Returns the first pairs (at most `MOST`), in the order of the page, and the number of all pairs.
    Accuracies and losses of the same two models are separate pairs.
    """
    groups = models_of(cells)
    labels = model_labels([group[0].model for group in groups])
    known = [{setting(cell): cell for cell in group if cell.whole_layers} for group in groups]
    found: list[Pair] = []
    total = 0
    for i, j in combinations(range(len(groups)), 2):
        shared = [key for key in known[i] if key in known[j]]
        if groups[i][0].model.layers != groups[j][0].model.layers or not shared:
            continue
        mine = [known[i][key] for key in shared]
        measures = list(dict.fromkeys(measure_of(cell) for cell in mine))
        total += len(measures)
        if len(found) >= MOST:
            continue
        names = benchmark_labels(mine)
        for measure in measures:
            here = [
                (name, cell, known[j][key], compare(cell, known[j][key]))
                for key, cell, name in zip(shared, mine, names, strict=True)
                if measure_of(cell) == measure
            ]
            family = sum(len(differences) for *_, differences in here)
            comparisons = []
            for name, one, other, differences in here:
                wide = compare(one, other, family)
                shown = frozenset(layer for layer in wide if sure(wide[layer]))
                comparisons.append(SharedBenchmark(name, one.n, differences, shown))
            found.append(Pair(labels[i], labels[j], measure, tuple(comparisons)))
    return found[:MOST], total


def compare(one: CellRecord, other: CellRecord, family: int = 1) -> dict[int, Estimate]:
    """Subtract the accuracy drops of another model (or precision) from those of one.

    Both models have equally many layers. Only whole layers that both measured are compared. The
    intervals hold simultaneously for `family` differences.
    """
    theirs = other.runs_of()

    def wide(run: RunRecord) -> Estimate:
        return together([run.drop], [run.n], family)[0]

    return {
        run.change.layer: difference(wide(run), wide(theirs[run.change.layer]))
        for run in one.whole_layers
        if run.change.layer in theirs
    }
