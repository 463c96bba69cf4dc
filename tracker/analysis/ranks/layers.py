"""Ranks the layers of one model by what their removal costs.

Only what is comparable is averaged: a benchmark counts once in a model's mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracker.analysis.claims import Claims, claims
from tracker.analysis.comparable import countable
from tracker.analysis.layer_figures import relevance_estimate
from tracker.core.estimates import Estimate
from tracker.core.grouping import grouped
from tracker.core.identities import ModelIdentity
from tracker.core.records import CellRecord, RunRecord
from tracker.stats.combined import mean
from tracker.stats.rank_agreement import places
from tracker.stats.support import pairs
from tracker.stats.support import ranks as rank_intervals


@dataclass(frozen=True)
class LayerStanding:
    """Where one layer of a model stands.

    Attributes:
        relevance: Mean accuracy relevance over the benchmarks.
        drop: Mean accuracy drop over the benchmarks, a fraction.
        deciding: The same with the interval that decides what is shown: it holds for all layers.
        cosine_score: Mean cosine score over the benchmarks; None where one is undefined.
        benchmarks: How many benchmarks define its relevance.
        rank: 1 = matters most; undefined where a benchmark is lacking. From the best to the worst
            that it may be: all ranks of a board lie between theirs with 95 % confidence.
        shown: What is shown of it, in a word or two.
    """

    layer: int
    relevance: Estimate
    drop: Estimate
    deciding: Estimate
    cosine_score: float | None
    benchmarks: int
    rank: Estimate
    shown: str


@dataclass(frozen=True)
class LayerBoard:
    """The layers of one model, by the lower end of what each costs; those without one come last.

    Attributes:
        cells: The cells that count, in the order of the page.
        left_out: Benchmark → why it does not count.
        claims: What is shown of the layers.
    """

    model: ModelIdentity
    cells: tuple[CellRecord, ...]
    layers: tuple[LayerStanding, ...]
    left_out: dict[str, str]
    claims: Claims

    @property
    def ranked(self) -> list[LayerStanding]:
        """Those that have a rank, the most relevant first."""
        ranked = [standing for standing in self.layers if standing.rank.value is not None]
        return sorted(ranked, key=lambda standing: (standing.rank.value, standing.layer))

    @property
    def by_depth(self) -> list[LayerStanding]:
        """All of them, the first layer first."""
        return sorted(self.layers, key=lambda standing: standing.layer)


def layer_board(cells: Sequence[CellRecord]) -> LayerBoard:
    """Rank the layers of one model; none where no benchmark counts."""
    counted, left_out = countable(cells)
    every = ((cell, run) for cell in counted for run in cell.whole_layers)
    by_layer = grouped(every, lambda of_cell: of_cell[1].change.layer)
    relevances = {
        layer: [relevance_estimate(cell, run) for cell, run in of_cells]
        for layer, of_cells in by_layer.items()
    }
    benchmarks = {
        layer: sum(relevance.value is not None for relevance in mine)
        for layer, mine in relevances.items()
    }
    full = [layer for layer in by_layer if benchmarks[layer] == len(counted)]
    placed = ranked(counted, [[run for _, run in by_layer[layer]] for layer in full])
    ranks = dict(zip(full, placed, strict=True))
    standings, found = [], claims(cells)
    for layer, of_cells in by_layer.items():
        runs, relevance = [run for _, run in of_cells], mean(relevances[layer])
        scores = [run.cosine_score for run in runs if run.cosine_score is not None]
        drop = mean([run.drop for run in runs])
        standings.append(
            LayerStanding(
                layer=layer,
                relevance=relevance,
                drop=drop,
                deciding=found.drops.get(layer, Estimate(drop.value, reason=drop.reason)),
                cosine_score=sum(scores) / len(scores) if len(scores) == len(runs) else None,
                benchmarks=benchmarks[layer],
                rank=ranks.get(layer, Estimate(None, reason=relevance.reason)),
                shown=found.word(layer),
            )
        )
    standings.sort(key=lambda s: (*by_lower_end(s.deciding), s.layer))
    return LayerBoard(cells[0].model, tuple(counted), tuple(standings), left_out, found)


def by_lower_end(drop: Estimate) -> tuple[bool, float]:
    """Return a sort key: drops that are surely largest come first, those without interval last."""
    return None in (drop.value, drop.low), -(drop.low or 0.0)


def ranked(cells: Sequence[CellRecord], rows: Sequence[Sequence[RunRecord]]) -> list[Estimate]:
    """Rank what has a relevance on every benchmark by its mean, 1 = the largest.

    What the baseline has above chance scales all runs of a benchmark alike, so it is held fixed in
    the intervals: it changes no order on a benchmark.

    Args:
        cells: The benchmarks.
        rows: Of each thing its run on each of them.

    Returns:
        The ranks, each from the best to the worst that it may be: all of them at once, with 95 %
        confidence.
    """
    by_mean = places([mean_relevance(cells, runs).value for runs in rows])
    levels = [cell.baseline.value for cell in cells]
    exact = [Estimate(level, low=level, high=level) for level in levels]
    fixed = [c.model_copy(update={"baseline": e}) for c, e in zip(cells, exact, strict=True)]
    wide = [mean_relevance(fixed, runs, pairs(len(rows))) for runs in rows]
    return [
        Estimate(place, *between)
        for place, between in zip(by_mean, rank_intervals(wide), strict=True)
    ]


def mean_relevance(
    cells: Sequence[CellRecord], runs: Sequence[RunRecord], family: int = 1
) -> Estimate:
    """Average the relevance of one thing over benchmarks, of each its run.

    A family of such intervals holds at once.
    """
    each = zip(cells, runs, strict=True)
    return mean([relevance_estimate(cell, run, family) for cell, run in each])
