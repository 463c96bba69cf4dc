"""Decide which statements about one model's layers are supported.

Report pages, terminal, leaderboards and trackers name only the layers that this module names.
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
    """Supported statements about one model's layers, over benchmarks.

    All statements of `costly`, `helpful` and `small` are true together with a probability of 95 %
    or more. The same holds for `falling`, and for `broken`. Layers are 0-based numbers.

    Attributes:
        cells: Cells that support the statements, one for each benchmark, each with all `layers`.
        layers: Layers that are measured on all of these benchmarks.
        drops: Layer → mean drop (or loss increase), with an interval simultaneous over all layers.
        verdicts: Layer → supported statement about it.
        gold: Falls of the right answer's log-probability, for each benchmark.
        options: Falls of the log-probability of all options together, for each benchmark.
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
        """List of the layers without which the model is shown to be better."""
        return [layer for layer in self.layers if self.verdicts[layer] == "helps"]

    @property
    def small(self) -> list[int]:
        """List of the layers whose removal is shown to cost less than `SMALL_DROP`."""
        if not self.is_accuracy:
            return []
        return [layer for layer in self.layers if self.drops[layer].side(SMALL_DROP) < 0]

    @property
    def open(self) -> list[int]:
        """List of the layers about which no statement is supported."""
        settled = {*self.costly, *self.helpful, *self.small}
        return [layer for layer in self.layers if layer not in settled]

    @property
    def by_cosine(self) -> list[int]:
        """List of the layers with the highest cosine scores, as many as there are costly layers.

        Empty if a cosine score is undefined.
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
        """List of the costly layers that are not among as many layers of highest cosine score.

        The cosine score chooses other layers instead, which are shown to cost less.
        """
        costly, chosen_layers = self.costly, self.by_cosine
        ends = (self.drops[layer].high for layer in chosen_layers if layer not in costly)
        lowest = min((high for high in ends if high is not None), default=math.inf)
        left_out = [layer for layer in costly if layer not in chosen_layers]
        return [layer for layer in left_out if self.drops[layer].side(lowest) > 0]

    @property
    def falling(self) -> dict[int, list[CellRecord]]:
        """Layers whose removal reduces the right answer's log-probability most → cells.

        For each layer, the cells in which its fall is shown to be among the `TOP_FALLS` largest.
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
        """List of the layers without which all options become unlikely.

        The options' total probability falls to a tenth or less, and its logarithm falls by at least
        half of the intact model's value.
        """

        def is_broken(cell: CellRecord, layer: int) -> bool:
            surprise = -(cell.baseline_options_logprob or 0.0)
            return self.options[cell.key][layer].side(max(math.log(10), surprise / 2)) > 0

        return [i for i in self.layers if any(is_broken(cell, i) for cell in self.cells)]

    @property
    def at_chance(self) -> list[CellRecord]:
        """List of the cells whose intact model is not shown to be above chance."""
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
        """True if the drops are drops of accuracy; False if they are increases of a loss."""
        return all(cell.higher_is_better for cell in self.cells)

    def word(self, layer: int) -> str:
        """Return the verdict on a layer in a word or two."""
        if layer not in self.layers:
            return "not measured on all benchmarks"
        return verdict_word(self.verdicts[layer], self.drops[layer], self.is_accuracy)

    def settling_documents(self) -> tuple[float, int] | None:
        """Find the loss that more documents would reveal, and the number of documents needed.

        The loss is the first of `_LOSSES` that needs more documents than measured, for half of the
        open layers or more. None if no layer is open, drops are no accuracies, or no outcome
        changed.
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
        """List the cells whose benchmark has fewer than a number of documents."""
        return [cell for cell in self.cells if cell.benchmark.documents < documents]


def decide_claims(cells: Sequence[CellRecord]) -> Claims:
    """Decide which statements about one model's layers are supported.

    Args:
        cells: Cells of the model. One for each benchmark counts, as on a leaderboard. Cells that a
            question stopped early do not count, because their answer says what is supported. If no
            cell counts (e.g. for losses), the first cell with all layers on the same documents is
            used.

    Returns:
        The supported statements, and the open layers.
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
    """Average a change's drop over benchmarks, with a simultaneous interval.

    The intervals hold for all changes of the family together.

    Args:
        runs: The run of the change on each benchmark.
        family: Number of changes in the family.

    Returns:
        The mean drop.
    """
    drops = widen([run.drop for run in runs], [run.n for run in runs], family)
    return average(drops) if len(drops) > 1 else drops[0]  # with its exact test


def verdict_word(verdict: Verdict, drop: Estimate, is_accuracy: bool = True) -> str:
    """Return the verdict on a removal in a word or two.

    `is_accuracy` is False for the increase of a loss.
    """
    if verdict == "costs":
        return "matters"
    if verdict == "helps":
        return "better without"
    return f"below {SMALL_DROP_TEXT}" if is_accuracy and drop.side(SMALL_DROP) < 0 else "open"


def run_verdicts(cell: CellRecord, runs: Sequence[RunRecord]) -> dict[Change, Verdict]:
    """Decide which statements about a cell's runs are supported together.

    Args:
        cell: The cell. If a question stopped it, its confidence sequences hold for all runs.
        runs: Runs of the cell that are shown together.

    Returns:
        The change of each run → verdict.
    """
    verdicts = decide_verdicts(_widened_drops(cell, runs, len(runs)))
    return dict(zip((run.change for run in runs), verdicts, strict=True))


def verdict_words(cell: CellRecord) -> dict[Change, str]:
    """Return the verdict on each run of a cell in words.

    The verdicts hold simultaneously for all runs of the same kind.

    Args:
        cell: The cell.

    Returns:
        Change of a run → its `verdict_word`; runs without a drop are left out.
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
    """Compute the possible ranks of a cell's runs by their drops.

    Args:
        cell: The cell.
        runs: Runs of the cell.

    Returns:
        The best and the worst rank of each, 1 for the largest drop.
    """
    return possible_ranks(_widened_drops(cell, runs, count_pairs(len(runs))))


def _widen_figures(
    cells: Sequence[CellRecord],
    layers: Collection[int],
    figure: Callable[[RunRecord], Estimate],
    n_statements: int = 0,
) -> _ByCell:
    """Widen the intervals of a figure so that the intervals of all runs hold together.

    `n_statements` is the number of statements for each cell, if it is more than one for each layer.
    """
    runs = [runs[layer] for runs in map(CellRecord.runs_of_kind, cells) for layer in layers]
    family = max(len(cells) * n_statements, len(runs), 1)
    estimates = iter(widen([figure(run) for run in runs], [run.n for run in runs], family))
    return {cell.key: {layer: next(estimates) for layer in layers} for cell in cells}


def _widened_drops(cell: CellRecord, runs: Sequence[RunRecord], family: int) -> list[Estimate]:
    """Return the drops of runs, with simultaneous intervals."""
    drops = [run.drop for run in runs]
    return drops if cell.is_raced else widen(drops, [run.n for run in runs], family)


def name_benchmarks(cells: Sequence[CellRecord]) -> str:
    """Name benchmarks as briefly as possible, with no two names equal."""
    titles = [cell.benchmark.title for cell in cells]
    return join_words(titles if len({*titles}) == len(titles) else benchmark_labels(cells))
