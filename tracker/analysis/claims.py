"""Statements about one model's layers: which are shown, and which are open.

A page, a terminal, a leaderboard and a tracker name a layer where this module does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from tracker.analysis.comparable import benchmark_labels, countable
from tracker.analysis.paired import outcome_variance
from tracker.core.changes import WHOLE_LAYER, Change
from tracker.core.estimates import Estimate
from tracker.core.formats import listed
from tracker.core.grouping import grouped
from tracker.core.records import CellRecord, RunRecord
from tracker.stats.accuracy import MEANT, documents_needed
from tracker.stats.support import Verdict, mean, pairs, ranks, together, verdicts

SMALL = MEANT
"""A drop below this, a fraction, is called small."""
_LOSSES = (SMALL, 0.03, 0.02, 0.01)
"""Losses in order; the first that needs more documents than measured is reported."""
SMALL_IN_WORDS = f"{100 * SMALL:g} pp"
FIRST = 5
"""Layers are named if they are surely among this many largest falls of log-probability."""

_ByCell = dict[str, dict[int, Estimate]]
"""A cell's key → layer → a figure, whose interval holds together with all others."""


@dataclass(frozen=True)
class Claims:
    """Supported statements about the whole layers of one model, averaged over benchmarks.

    All statements of `costly`, `helpful` and `small` are true together with a probability of 95 %
    or more. The same holds for `falling`, and for `broken`. Layers are 0-based numbers.

    Attributes:
        cells: Cells that the statements rest on, one for each benchmark, each with all `layers`.
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
        """The layers that are shown to matter."""
        return [layer for layer in self.layers if self.verdicts[layer] == "costs"]

    @property
    def helpful(self) -> list[int]:
        """The layers without which the model is shown to do better."""
        return [layer for layer in self.layers if self.verdicts[layer] == "helps"]

    @property
    def small(self) -> list[int]:
        """The layers that are shown to cost less than `SMALL`."""
        if not self.is_accuracy:
            return []
        return [layer for layer in self.layers if _is_small(self.drops[layer])]

    @property
    def open(self) -> list[int]:
        """The layers about which no statement is supported."""
        known = {*self.costly, *self.helpful, *self.small}
        return [layer for layer in self.layers if layer not in known]

    @property
    def by_cosine(self) -> list[int]:
        """The layers of the highest mean cosine scores, as many as are costly; [] if undefined."""
        runs = [cell.runs_of() for cell in self.cells]
        scores = {
            layer: sum(score for score in mine if score is not None)
            for layer in self.layers
            if None not in (mine := [of[layer].cosine_score for of in runs])
        }
        if len(scores) < len(self.layers):
            return []
        return sorted(scores, key=lambda layer: (-scores[layer], layer))[: len(self.costly)]

    @property
    def missed(self) -> list[int]:
        """The costly layers that a choice of as many by mean cosine score misses.

        The choice takes layers instead that are shown to cost less.
        """
        costly, taken = self.costly, self.by_cosine
        ends = (self.drops[layer].high for layer in taken if layer not in costly)
        least = min((high for high in ends if high is not None), default=math.inf)
        left_out = [layer for layer in costly if layer not in taken]
        return [layer for layer in left_out if least < _low(self.drops, layer)]

    @property
    def falling(self) -> dict[int, list[CellRecord]]:
        """The layers whose removal lowers the right answer's log-probability most → benchmarks.

        A layer is listed where it is shown to be among the `FIRST` largest falls.
        """
        found: dict[int, list[CellRecord]] = {}
        for cell in self.cells:
            falls = self.gold[cell.key]
            for layer, (_, worst) in zip(falls, ranks([*falls.values()]), strict=True):
                if worst <= FIRST and _low(falls, layer) > 0:
                    found.setdefault(layer, []).append(cell)
        return found

    @property
    def broken(self) -> list[int]:
        """The layers without which all options are shown to become unlikely on a benchmark.

        The options together keep a tenth of their probability at most, and its logarithm falls by
        at least half of itself.
        """

        def is_broken(cell: CellRecord, layer: int) -> bool:
            surprise = -(cell.baseline_options_logprob or 0.0)
            return _low(self.options[cell.key], layer) > max(math.log(10), surprise / 2)

        return [lay for lay in self.layers if any(is_broken(cell, lay) for cell in self.cells)]

    @property
    def at_chance(self) -> list[CellRecord]:
        """The cells whose intact model is not shown to be above chance."""
        return [
            cell
            for cell in self.cells
            if cell.baseline.low is not None
            and cell.chance_accuracy is not None
            and cell.baseline.low <= cell.chance_accuracy
        ]

    @property
    def has_gold(self) -> bool:
        """True if some fall of the right answer's log-probability is defined."""
        return any(
            fall.value is not None for falls in self.gold.values() for fall in falls.values()
        )

    @property
    def is_accuracy(self) -> bool:
        """True if the drops are of accuracies; False if they are increases of a loss."""
        return all(cell.higher_is_better for cell in self.cells)

    def word(self, layer: int) -> str:
        """Return the verdict on a layer in a word or two."""
        if layer not in self.layers:
            return "not measured on all benchmarks"
        return shown_word(self.verdicts[layer], self.drops[layer], self.is_accuracy)

    def settled_by(self) -> tuple[float, int] | None:
        """Find the loss that more documents would reveal, and their number for each benchmark.

        It is the first of `_LOSSES` that needs more documents than measured, for half of the open
        layers or more. None if nothing is open, drops are no accuracies, or no outcome changed.
        """
        undecided = {*self.open} if self.is_accuracy else set()
        runs = [
            run for cell in self.cells for run in cell.whole_layers if run.change.layer in undecided
        ]
        variances = list(filter(None, map(outcome_variance, runs)))
        for loss in _LOSSES if variances else ():
            needed = documents_needed(variances, len(self.layers), len(self.cells), loss)
            if needed > min(cell.n for cell in self.cells):
                return loss, needed
        return None

    def lacking(self, documents: int) -> list[CellRecord]:
        """Return the cells whose benchmark has fewer documents."""
        return [cell for cell in self.cells if cell.benchmark.documents < documents]


def claims(cells: Sequence[CellRecord]) -> Claims:
    """Decide which statements about one model's layers are supported.

    Args:
        cells: Cells of the model. One for each benchmark counts, as on a leaderboard. Cells that a
            question stopped early do not count, because their answer says what is supported. If no
            cell counts (e.g. for losses), the first cell with all layers on the same documents is
            used.

    Returns:
        The supported statements, and the open layers.
    """
    counting: Sequence[CellRecord] = countable(cells)[0]
    if not counting:
        counting = [c for c in cells if c.whole_layers and not c.is_raced and not c.removed][:1]
    every = [{run.change.layer for run in cell.whole_layers} for cell in counting]
    layers = tuple(sorted(set.intersection(*every))) if every else ()
    runs = [cell.runs_of() for cell in counting]
    drops = {layer: mean_drop([of[layer] for of in runs], len(layers)) for layer in layers}
    return Claims(
        cells=tuple(counting),
        layers=layers,
        drops=drops,
        verdicts=dict(zip(layers, verdicts([*drops.values()]), strict=True)),
        gold=_together(counting, layers, lambda run: run.gold_drop, pairs(len(layers))),
        options=_together(counting, layers, lambda run: run.options_drop),
    )


def mean_drop(runs: Sequence[RunRecord], family: int) -> Estimate:
    """Average the drop of one change over benchmarks, with an interval for a family of changes.

    Args:
        runs: The run of the change on each benchmark.
        family: Number of changes in the family.

    Returns:
        The mean drop.
    """
    wide = together([run.drop for run in runs], [run.n for run in runs], family)
    return mean(wide) if len(wide) > 1 else wide[0]  # with its exact test


def shown_word(verdict: Verdict, drop: Estimate, is_accuracy: bool = True) -> str:
    """Return the verdict on a removal in a word or two, for a drop or the increase of a loss."""
    if verdict == "costs":
        return "matters"
    if verdict == "helps":
        return "better without"
    return f"below {SMALL_IN_WORDS}" if is_accuracy and _is_small(drop) else "open"


def _is_small(drop: Estimate) -> bool:
    return drop.high is not None and drop.high < SMALL


def shown_runs(cell: CellRecord, runs: Sequence[RunRecord]) -> dict[Change, Verdict]:
    """Decide which statements about runs of one cell are supported, simultaneously.

    Args:
        cell: The cell. If a question stopped it, its confidence sequences hold for all runs.
        runs: Runs of the cell that are shown together.

    Returns:
        The change of each run → verdict.
    """
    shown = verdicts(_all_at_once(cell, runs, len(runs)))
    return dict(zip((run.change for run in runs), shown, strict=True))


def shown_words(cell: CellRecord) -> dict[Change, str]:
    """Return the verdict on each run of a cell in words, simultaneous over runs of its kind.

    Args:
        cell: The cell.

    Returns:
        Change of a run → its `shown_word`; runs without a drop are left out.
    """
    families = grouped(
        cell.runs, lambda run: (run.change.kind == WHOLE_LAYER, run.change.kind.family)
    )
    words = {}
    for runs in families.values():
        drops = _all_at_once(cell, runs, len(runs))
        for run, drop, verdict in zip(runs, drops, verdicts(drops), strict=True):
            if drop.value is not None:
                words[run.change] = shown_word(verdict, drop, cell.higher_is_better)
    return words


def ranks_in(cell: CellRecord, runs: Sequence[RunRecord]) -> list[tuple[int, int]]:
    """Compute the possible ranks of runs of one cell by their drops, simultaneously.

    Args:
        cell: The cell.
        runs: Runs of the cell.

    Returns:
        The best and the worst rank of each, 1 for the largest drop.
    """
    return ranks(_all_at_once(cell, runs, pairs(len(runs))))


def _together(
    cells: Sequence[CellRecord],
    layers: Collection[int],
    figure: Callable[[RunRecord], Estimate],
    each: int = 0,
) -> _ByCell:
    """Widen the intervals of one figure of all runs, so that they hold simultaneously.

    `each` is the number of statements for each cell, if it is more than one for each layer.
    """
    runs = [of[layer] for of in [cell.runs_of() for cell in cells] for layer in layers]
    family = max(len(cells) * each, len(runs), 1)
    wide = iter(together([figure(run) for run in runs], [run.n for run in runs], family))
    return {cell.key: {layer: next(wide) for layer in layers} for cell in cells}


def _low(figures: dict[int, Estimate], layer: int) -> float:
    low = figures[layer].low
    return -math.inf if low is None else low


def _all_at_once(cell: CellRecord, runs: Sequence[RunRecord], family: int) -> list[Estimate]:
    """Return the drops of runs, with intervals simultaneous for a family of statements."""
    drops = [run.drop for run in runs]
    return drops if cell.is_raced else together(drops, [run.n for run in runs], family)


def name_benchmarks(cells: Sequence[CellRecord]) -> str:
    """Name benchmarks as briefly as possible, with no two names equal."""
    titles = [cell.benchmark.title for cell in cells]
    return listed(titles if len({*titles}) == len(titles) else benchmark_labels(cells))
