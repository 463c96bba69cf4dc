"""Compare layer rankings by proxies with layer rankings by accuracy drop.

This module also compares the accuracy drops of two models for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from tracker.analysis.boards import LayerBoard, PartStanding
from tracker.analysis.comparable import benchmark_labels, comparison_key, named_models
from tracker.schema.estimates import Estimate
from tracker.schema.formats import MetricFormat, is_finite, metric_format
from tracker.schema.grouping import group_by
from tracker.schema.proxies import OBSERVED
from tracker.schema.records import CellRecord, CorrelationRecord
from tracker.stats.arrays import Array
from tracker.stats.rank_agreement import differing_rank_share, min_ranks
from tracker.stats.support import subtract, widen


@dataclass(frozen=True)
class MisjudgedLayer:
    """Layer that the cosine score ranks clearly too high or too low.

    Attributes:
        standing: Leaderboard entry of the layer.
        cosine_rank: Rank of the layer by mean cosine score.
        off: Number of ranks from `cosine_rank` to the confidence interval of the rank by relevance.
    """

    standing: PartStanding
    cosine_rank: int
    off: int


def cosine_ranks(board: LayerBoard) -> dict[int, int]:
    """Rank layers by cosine score; return layer → rank, where rank 1 is the largest score.

    The dict contains the layers that have a rank by accuracy relevance. The dict is empty if any of
    these layers has no cosine score. Layers with equal scores share the best of their ranks.
    """
    scores = {standing.layer: standing.cosine_score for standing in board.ranked}
    if not scores or not all(map(is_finite, scores.values())):
        return {}
    return dict(zip(scores, min_ranks(list(scores.values())), strict=True))


def find_misjudged(board: LayerBoard) -> list[MisjudgedLayer]:
    """Find layers that the cosine score ranks significantly too high or too low.

    The cosine rank of a misjudged layer is outside the confidence interval of its rank by
    relevance. The most misjudged layer comes first.
    """
    layers, ranks = [], cosine_ranks(board)
    for standing in board.ranked if ranks else ():
        rank = ranks[standing.layer]
        best, worst = map(int, standing.rank.bounds or (1, len(board.ranked)))
        if (off := max(best - rank, rank - worst)) > 0:
            layers.append(MisjudgedLayer(standing, rank, off))
    return sorted(layers, key=lambda layer: -layer.off)  # ties stay in their order


def find_correlation(
    cell: CellRecord,
    subset: str = "all",
    coefficient: str = "spearman",
    proxy: str = "cosine_score",
) -> CorrelationRecord | None:
    """Find the correlation between a proxy and the accuracy drop (or loss increase) in a cell.

    Args:
        cell: Record of one model on one benchmark.
        subset: `all` for all layers; `inner` for all layers except the first two and the last two.
        coefficient: `spearman`, `kendall` or `pearson`.
        proxy: Name of the proxy.

    Returns:
        The record of the correlation; None if the cell does not contain it.
    """
    key = (proxy, coefficient, subset)
    records = (r for r in cell.correlations if (r.proxy, r.coefficient, r.subset) == key)
    return next(records, None)


def _proxies_and_drops(cell: CellRecord, proxy: str) -> Array:
    """Return a `[2, layers]` array with the proxy and the accuracy drop of each layer."""
    figures = ((run.figure(proxy), run.drop.value) for run in cell.whole_layers)
    defined = [pair for pair in figures if all(map(is_finite, pair))]
    return np.array(defined, dtype=np.float64).reshape(-1, 2).T


@dataclass(frozen=True)
class Agreement:
    """Agreement between the layer rankings by one proxy and by accuracy drop, over several cells.

    Attributes:
        proxy: Name of the proxy's field.
        spearman: Spearman correlation between proxy and accuracy drop, for each model and
            benchmark.
        differ: Share of layers whose rank by the proxy is not the rank by accuracy drop, averaged
            over the cells.
        chance: Expected value of `differ` for random rankings.
    """

    proxy: str
    spearman: tuple[float, ...]
    differ: float | None
    chance: float | None


def agreements(cells: Sequence[CellRecord]) -> list[Agreement]:
    """Compute how well each proxy's layer ranking agrees with the ranking by accuracy drop."""
    # Skip cells whose layers were measured on different documents: their layers have no order.
    ordered_cells = [cell for cell in cells if not cell.is_raced]
    rows = []
    for proxy in OBSERVED:
        records = (find_correlation(cell, proxy=proxy.name) for cell in ordered_cells)
        values = (record.estimate.value for record in records if record)
        spearman = tuple(value for value in values if value is not None)
        figures = (_proxies_and_drops(cell, proxy.name) for cell in ordered_cells)
        pairs = [differing_rank_share(*table[:, None]) for table in figures if table.shape[1] > 2]
        share, chance = np.mean(pairs, axis=0).tolist() if pairs else (None, None)
        rows.append(Agreement(proxy.name, spearman, share, chance))
    return rows


MAX_PAIRS = 10
"""Maximum number of pairs of models that are shown."""


@dataclass(frozen=True)
class BenchmarkComparison:
    """Comparison of two models' accuracy drops on `n` documents of one benchmark.

    Attributes:
        differences: Layer → drop of the first model minus drop of the second model, as a fraction
            or in the unit of the loss.
        shown: Layers whose difference is significant at the 5 % level, corrected for testing all
            layers on all benchmarks of the two models.
    """

    benchmark: str
    n: int
    differences: dict[int, Estimate]
    shown: frozenset[int]

    def difference(self, layer: int) -> Estimate:
        """Return the difference between the two models' drops for a layer."""
        undefined = Estimate(None, reason="not measured in both models")
        return self.differences.get(layer, undefined)


@dataclass(frozen=True)
class ModelPair:
    """Comparison of two models with equally many layers.

    Each difference is the drop of model `first` minus the drop of model `second`.
    """

    first: str
    second: str
    measure: MetricFormat
    comparisons: tuple[BenchmarkComparison, ...]

    @property
    def layers(self) -> list[int]:
        """List of the layers that are compared on at least one benchmark."""
        return sorted({layer for shared in self.comparisons for layer in shared.differences})


def pair_models(cells: Sequence[CellRecord]) -> tuple[list[ModelPair], int]:
    """List pairs of models that can be compared layer by layer.

    The models of a pair have equally many layers, and results on a common benchmark with equal
    settings. A pair compares either accuracies or losses. Returns at most `MAX_PAIRS` pairs, and
    the total number of pairs.
    """
    models = {
        label: {comparison_key(cell): cell for cell in group if cell.whole_layers}
        for label, group in named_models(cells).items()
    }
    pairs: list[tuple[str, str, MetricFormat, list[_SharedCells]]] = []
    for (label, first_cells), (other_label, second_cells) in combinations(models.items(), 2):
        keys = [key for key in first_cells if key in second_cells]
        shared = [first_cells[key] for key in keys]
        if not keys or shared[0].model.layers != second_cells[keys[0]].model.layers:
            continue
        other_cells = [second_cells[key] for key in keys]
        rows = zip(benchmark_labels(shared), shared, other_cells, strict=True)
        for measure, group in group_by(rows, lambda row: metric_format(row[1])).items():
            pairs.append((label, other_label, measure, group))
    return [
        ModelPair(label, other_label, measure, _compare_benchmarks(shared))
        for label, other_label, measure, shared in pairs[:MAX_PAIRS]
    ], len(pairs)


_SharedCells = tuple[str, CellRecord, CellRecord]
"""Label of a benchmark, and the cells of two models on this benchmark."""


def _compare_benchmarks(shared: Sequence[_SharedCells]) -> tuple[BenchmarkComparison, ...]:
    """Compare two models' accuracy drops of each layer, on each common benchmark."""
    differences = [drop_differences(cell, other_cell) for _, cell, other_cell in shared]
    family = sum(map(len, differences))
    comparisons = []
    for (label, cell, other_cell), drops in zip(shared, differences, strict=True):
        widened = drop_differences(cell, other_cell, family)
        significant = frozenset(layer for layer, difference in widened.items() if difference.side())
        comparisons.append(BenchmarkComparison(label, cell.n, drops, significant))
    return tuple(comparisons)


def drop_differences(
    cell: CellRecord, other_cell: CellRecord, n_tests: int = 1
) -> dict[int, Estimate]:
    """Return each layer's accuracy drop in one model minus the drop in another model.

    The two models must have equally many layers. Layers that are not measured in both models are
    left out.

    Args:
        cell: Record of the first model.
        other_cell: Record of the other model, whose drops are subtracted.
        n_tests: Number of comparisons for which the confidence intervals are corrected.

    Returns:
        Layer number → drop of the first model minus drop of the other model.
    """
    other_runs = other_cell.runs_of_kind()
    differences = {}
    for run in cell.whole_layers:
        if other_run := other_runs.get(run.change.layer):
            drops = widen([run.drop, other_run.drop], [run.units, other_run.units], n_tests)
            differences[run.change.layer] = subtract(*drops)
    return differences
