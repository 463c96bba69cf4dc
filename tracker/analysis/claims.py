"""Decide which statements about one model's layers are statistically supported.

Report pages, terminal output, leaderboards and experiment trackers name only layers that this
module selects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain

from tracker.analysis.comparable import benchmark_labels, select_countable
from tracker.analysis.paired import outcome_variance
from tracker.core.changes import WHOLE_LAYER, Change
from tracker.core.estimates import Estimate
from tracker.core.formats import join_words
from tracker.core.grouping import group_by
from tracker.core.records import CellRecord, RunRecord
from tracker.stats.accuracy import REPORTED_DROP, documents_needed
from tracker.stats.support import (
    Verdict,
    average,
    count_pairs,
    decide_verdicts,
    possible_ranks,
    widen,
)

SMALL_DROP = REPORTED_DROP
"""A drop below this fraction is called small."""
_LOSSES = (SMALL_DROP, 0.03, 0.02, 0.01)
"""Losses in order; the first loss that needs more documents than measured is reported."""
SMALL_DROP_TEXT = f"{100 * SMALL_DROP:g} pp"
TOP_FALLS = 5
"""Layers are named if their fall of log-probability is surely among this many largest falls."""

_ByCell = dict[str, dict[int, Estimate]]
"""Key of a cell → layer → figure with an interval; all intervals hold together."""


@dataclass(frozen=True)
class Claims:
    """Statistically supported statements about one model's layers, averaged over benchmarks.

    All statements of `costly`, `helpful` and `small` hold simultaneously with at least 95 %
    confidence. All statements of `falling` hold simultaneously with at least 95 % confidence, and
    so do all statements of `broken`. Layers are 0-based numbers.

    Attributes:
        cells: Cells that the statements are based on, one for each benchmark. Every cell contains
            all `layers`.
        layers: Layers that are measured on the benchmarks of all `cells`.
        drops: Layer → mean accuracy drop (or loss increase), with an interval simultaneous over all
            layers.
        verdicts: Layer → statistically supported statement about the layer.
        gold: Cell key → layer → fall of the right answer's log-probability when the layer is
            removed.
        options: Cell key → layer → fall of the log of all answer options' total probability.
    """

    cells: tuple[CellRecord, ...]
    layers: tuple[int, ...]
    drops: dict[int, Estimate]
    verdicts: dict[int, Verdict]
    gold: _ByCell
    options: _ByCell

    @property
    def costly(self) -> list[int]:
        """List of the layers whose removal is shown to cost accuracy."""
        return [layer for layer in self.layers if self.verdicts[layer] == "costs"]

    @property
    def helpful(self) -> list[int]:
        """List of the layers whose removal is shown to improve the model."""
        return [layer for layer in self.layers if self.verdicts[layer] == "helps"]

    @property
    def small(self) -> list[int]:
        """List of the layers whose removal is shown to cost less accuracy than `SMALL_DROP`."""
        if not self.is_accuracy:
            return []
        return [layer for layer in self.layers if self.drops[layer].side(SMALL_DROP) < 0]

    @property
    def open(self) -> list[int]:
        """List of the layers that are not shown to be costly, helpful or small."""
        settled = {*self.costly, *self.helpful, *self.small}
        return [layer for layer in self.layers if layer not in settled]

    @property
    def by_cosine(self) -> list[int]:
        """List of the layers with the highest cosine scores, as many as there are costly layers.

        The list is empty if a cosine score is undefined.
        """
        runs = [cell.runs_of_kind() for cell in self.cells]
        scores = {
            layer: [s for by_layer in runs if (s := by_layer[layer].cosine_score) is not None]
            for layer in self.layers
        }
        if any(len(values) < len(runs) for values in scores.values()):
            return []
        return sorted(scores, key=lambda layer: (-sum(scores[layer]), layer))[: len(self.costly)]

    @property
    def missed(self) -> list[int]:
        """List of the costly layers that do not have one of the highest cosine scores.

        Some layer in `by_cosine` is shown to cost less accuracy than each of these missed layers.
        """
        costly, chosen_layers = self.costly, self.by_cosine
        ends = (self.drops[layer].high for layer in chosen_layers if layer not in costly)
        lowest = min((high for high in ends if high is not None), default=math.inf)
        left_out = [layer for layer in costly if layer not in chosen_layers]
        return [layer for layer in left_out if self.drops[layer].side(lowest) > 0]

    @property
    def falling(self) -> dict[int, list[CellRecord]]:
        """Layers whose removal lowers the right answer's log-probability most → cells that show it.

        A cell is listed if the layer's fall of log-probability is shown to be among the `TOP_FALLS`
        largest in the cell.
        """
        cells_by_layer: dict[int, list[CellRecord]] = {}
        for cell in self.cells:
            falls = self.gold[cell.key]
            for layer, (_, worst) in zip(falls, possible_ranks([*falls.values()]), strict=True):
                if worst <= TOP_FALLS and falls[layer].side() > 0:
                    cells_by_layer.setdefault(layer, []).append(cell)
        return cells_by_layer

    @property
    def broken(self) -> list[int]:
        """List of the layers whose removal makes all answer options unlikely.

        The total probability of all options falls to a tenth or less. The logarithm of this
        probability falls by at least half of the intact model's value.
        """

        def is_broken(cell: CellRecord, layer: int) -> bool:
            surprise = -(cell.baseline_options_logprob or 0.0)
            return self.options[cell.key][layer].side(max(math.log(10), surprise / 2)) > 0

        return [i for i in self.layers if any(is_broken(cell, i) for cell in self.cells)]

    @property
    def at_chance(self) -> list[CellRecord]:
        """List of cells in which the intact model is not shown to be above chance."""
        levels = ((cell, cell.baseline.low, cell.chance_accuracy) for cell in self.cells)
        return [
            cell
            for cell, low, chance in levels
            if low is not None and chance is not None and low <= chance
        ]

    @property
    def has_gold(self) -> bool:
        """True if any fall of the right answer's log-probability is defined."""
        falls = chain.from_iterable(falls.values() for falls in self.gold.values())
        return any(fall.value is not None for fall in falls)

    @property
    def is_accuracy(self) -> bool:
        """True if the drops are accuracy drops; False if they are loss increases."""
        return all(cell.higher_is_better for cell in self.cells)

    def word(self, layer: int) -> str:
        """Return the verdict on a layer in a few words, e.g. `matters`, or `open` if undecided."""
        if layer not in self.layers:
            return "not measured on all benchmarks"
        return verdict_word(self.verdicts[layer], self.drops[layer], self.is_accuracy)

    def settling_documents(self) -> tuple[float, int] | None:
        """Return an accuracy loss that more documents could detect, and the documents needed.

        The loss is the first entry of `_LOSSES` that needs more documents than measured, for at
        least half of the undecided layers (`open`). The result is None if no layer is undecided, if
        the metric is a loss, or if no ablation changed an outcome.
        """
        open_layers = {*self.open} if self.is_accuracy else set()
        runs = chain.from_iterable(cell.whole_layers for cell in self.cells)
        open_runs = [run for run in runs if run.change.layer in open_layers]
        variances = list(filter(None, map(outcome_variance, open_runs)))
        for loss in _LOSSES if variances else ():
            n_documents = documents_needed(variances, len(self.layers), len(self.cells), loss)
            if n_documents > min(cell.n for cell in self.cells):
                return loss, n_documents
        return None

    def lacking(self, documents: int) -> list[CellRecord]:
        """List the cells whose benchmark has fewer than `documents` documents."""
        return [cell for cell in self.cells if cell.benchmark.documents < documents]


def decide_claims(cells: Sequence[CellRecord]) -> Claims:
    """Decide which statements about one model's layers are statistically supported.

    Args:
        cells: Cells of one model. For each benchmark, the cell that leaderboards use is used here
            too. Cells that the option `until` stopped early are not used. If no cell is usable
            (e.g. for losses), the first cell that measured all layers on the same documents is
            used.

    Returns:
        The supported statements, and the layers about which no statement is supported.
    """
    fallback = [c for c in cells if c.whole_layers and not c.is_raced and not c.removed]
    counted_cells = select_countable(cells)[0] or fallback[:1]
    runs = [cell.runs_of_kind() for cell in counted_cells]
    layers = tuple(sorted(set.intersection(*map(set, runs)))) if runs else ()
    family = len(layers)
    drops = {layer: mean_drop([by_layer[layer] for by_layer in runs], family) for layer in layers}
    gold_family = count_pairs(family)
    return Claims(
        cells=tuple(counted_cells),
        layers=layers,
        drops=drops,
        verdicts=dict(zip(layers, decide_verdicts([*drops.values()]), strict=True)),
        gold=_widen_figures(counted_cells, layers, lambda run: run.gold_drop, gold_family),
        options=_widen_figures(counted_cells, layers, lambda run: run.options_drop),
    )


def mean_drop(runs: Sequence[RunRecord], family: int) -> Estimate:
    """Average the accuracy drop of one ablation over benchmarks, with a simultaneous interval.

    The interval is corrected for comparing `family` ablations.

    Args:
        runs: Runs of the ablation, one for each benchmark.
        family: Number of ablations whose intervals must hold simultaneously.

    Returns:
        The mean accuracy drop, with its interval.
    """
    drops = widen([run.drop for run in runs], [run.n for run in runs], family)
    return average(drops) if len(drops) > 1 else drops[0]  # with its exact test


def verdict_word(verdict: Verdict, drop: Estimate, is_accuracy: bool = True) -> str:
    """Return the verdict on a removal in a few words, e.g. `matters`, or `open` if undecided.

    `is_accuracy` is False if `drop` is a loss increase.
    """
    if verdict == "costs":
        return "matters"
    if verdict == "helps":
        return "better without"
    return f"below {SMALL_DROP_TEXT}" if is_accuracy and drop.side(SMALL_DROP) < 0 else "open"


def run_verdicts(cell: CellRecord, runs: Sequence[RunRecord]) -> dict[Change, Verdict]:
    """Decide which statements about a cell's runs hold simultaneously.

    Args:
        cell: Record of one model on one benchmark. After early stopping by `until`, the intervals
            need no correction, because confidence sequences hold for all runs.
        runs: Runs of the cell whose verdicts must hold simultaneously.

    Returns:
        Change that a run makes to the model → verdict on the run.
    """
    verdicts = decide_verdicts(_widened_drops(cell, runs, len(runs)))
    return dict(zip((run.change for run in runs), verdicts, strict=True))


def verdict_words(cell: CellRecord) -> dict[Change, str]:
    """Return the verdict on each run of a cell in a few words.

    The verdicts hold simultaneously for all runs of the same kind.

    Args:
        cell: Record of one model on one benchmark.

    Returns:
        Change that a run makes to the model → its `verdict_word`. Runs without a drop are left out.
    """

    def family(run: RunRecord) -> tuple[bool, Change]:
        return run.change.kind == WHOLE_LAYER, run.change.kind.family

    words = {}
    for runs in group_by(cell.runs, family).values():
        drops = _widened_drops(cell, runs, len(runs))
        for run, drop, verdict in zip(runs, drops, decide_verdicts(drops), strict=True):
            if drop.value is not None:
                words[run.change] = verdict_word(verdict, drop, cell.higher_is_better)
    return words


def cell_ranks(cell: CellRecord, runs: Sequence[RunRecord]) -> list[tuple[int, int]]:
    """Compute the best and the worst possible rank of each run of a cell, ranked by drop.

    Args:
        cell: Record of one model on one benchmark.
        runs: Runs of the cell that are ranked.

    Returns:
        The best and the worst possible rank of each run; rank 1 is the largest drop.
    """
    return possible_ranks(_widened_drops(cell, runs, count_pairs(len(runs))))


def _widen_figures(
    cells: Sequence[CellRecord],
    layers: Collection[int],
    figure: Callable[[RunRecord], Estimate],
    n_statements: int = 0,
) -> _ByCell:
    """Widen the intervals of one statistic so that they hold simultaneously for all runs.

    `n_statements` is the number of statements per cell, if there are more statements than layers.
    """
    runs = [runs[layer] for runs in map(CellRecord.runs_of_kind, cells) for layer in layers]
    family = max(len(cells) * n_statements, len(runs), 1)
    estimates = iter(widen([figure(run) for run in runs], [run.n for run in runs], family))
    return {cell.key: {layer: next(estimates) for layer in layers} for cell in cells}


def _widened_drops(cell: CellRecord, runs: Sequence[RunRecord], family: int) -> list[Estimate]:
    """Return the drops of runs, with intervals simultaneous over `family` runs."""
    drops = [run.drop for run in runs]
    return drops if cell.is_raced else widen(drops, [run.n for run in runs], family)


def name_benchmarks(cells: Sequence[CellRecord]) -> str:
    """List the benchmarks of the cells in one text, by their shortest distinct names."""
    titles = [cell.benchmark.title for cell in cells]
    return join_words(titles if len({*titles}) == len(titles) else benchmark_labels(cells))
