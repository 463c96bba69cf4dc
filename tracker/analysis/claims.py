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
"""The losses for which a number of documents is named, the first that takes more than there are."""
SMALL_IN_WORDS = f"{100 * SMALL:g} pp"
FIRST = 5
"""A layer that is surely among so many largest falls of log-probability is named."""

_ByCell = dict[str, dict[int, Estimate]]
"""A cell's key → layer → a figure, whose interval holds together with all others."""


@dataclass(frozen=True)
class Claims:
    """What is shown of the whole layers of one model, on average over some benchmarks.

    With probability 95 % or more everything that `costly`, `helpful` and `small` name is so, all of
    it together; likewise what `falling` names, and `broken`. Layers are by their 0-based number.

    Attributes:
        cells: The measurements that it rests on, one a benchmark, each of all `layers`.
        layers: The layers that are measured on all of these benchmarks.
        drops: Layer → its mean drop (or loss increase), with an interval that holds for all layers.
        verdicts: Layer → what is shown of it.
        gold: The falls of the right answer's log-probability, benchmark by benchmark.
        options: The falls of the log-probability of all options together.
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
        """The layers of which nothing of this is shown."""
        known = {*self.costly, *self.helpful, *self.small}
        return [layer for layer in self.layers if layer not in known]

    @property
    def by_cosine(self) -> list[int]:
        """As many layers as are costly, those of the highest mean cosine scores; none without."""
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
        """The costly layers that a choice of as many by mean cosine score leaves out, for others
        that are shown to cost less."""
        costly, taken = self.costly, self.by_cosine
        ends = (self.drops[layer].high for layer in taken if layer not in costly)
        least = min((high for high in ends if high is not None), default=math.inf)
        left_out = [layer for layer in costly if layer not in taken]
        return [layer for layer in left_out if least < _low(self.drops, layer)]

    @property
    def falling(self) -> dict[int, list[CellRecord]]:
        """The layers whose removal is shown to be among the `FIRST` that lower the log-probability
        of the right answer most → on which benchmarks."""
        found: dict[int, list[CellRecord]] = {}
        for cell in self.cells:
            falls = self.gold[cell.key]
            for layer, (_, worst) in zip(falls, ranks([*falls.values()]), strict=True):
                if worst <= FIRST and _low(falls, layer) > 0:
                    found.setdefault(layer, []).append(cell)
        return found

    @property
    def broken(self) -> list[int]:
        """The layers without which all options together are shown to become unlikely on a
        benchmark: they keep a tenth of their probability at most, and their logarithm falls by half
        of itself at least."""

        def is_broken(cell: CellRecord, layer: int) -> bool:
            surprise = -(cell.baseline_options_logprob or 0.0)
            return _low(self.options[cell.key], layer) > max(math.log(10), surprise / 2)

        return [lay for lay in self.layers if any(is_broken(cell, lay) for cell in self.cells)]

    @property
    def at_chance(self) -> list[CellRecord]:
        """The measurements whose intact model is not shown to be above guessing."""
        return [
            cell
            for cell in self.cells
            if cell.baseline.low is not None
            and cell.chance_accuracy is not None
            and cell.baseline.low <= cell.chance_accuracy
        ]

    @property
    def has_gold(self) -> bool:
        """True where some fall of the right answer's log-probability is defined."""
        return any(
            fall.value is not None for falls in self.gold.values() for fall in falls.values()
        )

    @property
    def is_accuracy(self) -> bool:
        """Whether drops are of accuracies, and no increases of a loss."""
        return all(cell.higher_is_better for cell in self.cells)

    def word(self, layer: int) -> str:
        """Say in a word or two what is shown of a layer."""
        if layer not in self.layers:
            return "not measured on all benchmarks"
        return shown_word(self.verdicts[layer], self.drops[layer], self.is_accuracy)

    def settled_by(self) -> tuple[float, int] | None:
        """Find the loss that more documents would reveal, and how many of each benchmark.

        The first one of `_LOSSES` that takes more than are measured, under half of the open layers
        or more. None where nothing is open, figures are no accuracies, or no outcome has changed.
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
        """Return the measurements whose benchmark has fewer documents."""
        return [cell for cell in self.cells if cell.benchmark.documents < documents]


def claims(cells: Sequence[CellRecord]) -> Claims:
    """Find what is shown of one model's layers.

    Args:
        cells: Its measurements. One a benchmark counts, as on a leaderboard; what was stopped at an
            answer does not: its answer says what is shown. Where none counts, as of losses, it is
            the first one whose layers were all measured on the same documents.

    Returns:
        What is shown, and what is open.
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
    """Average what one thing costs, with an interval that holds for a family of things.

    Args:
        runs: Its run on each benchmark.
        family: How many things there are.

    Returns:
        The mean drop.
    """
    wide = together([run.drop for run in runs], [run.n for run in runs], family)
    return mean(wide) if len(wide) > 1 else wide[0]  # with its exact test


def shown_word(verdict: Verdict, drop: Estimate, is_accuracy: bool = True) -> str:
    """Say in a word or two what is shown of a removal, of its drop or increase of a loss."""
    if verdict == "costs":
        return "matters"
    if verdict == "helps":
        return "better without"
    return f"below {SMALL_IN_WORDS}" if is_accuracy and _is_small(drop) else "open"


def _is_small(drop: Estimate) -> bool:
    return drop.high is not None and drop.high < SMALL


def shown_runs(cell: CellRecord, runs: Sequence[RunRecord]) -> dict[Change, Verdict]:
    """Decide what is shown of runs of one cell, all of it at once.

    Args:
        cell: The cell. The confidence sequences of one that a question stopped hold for all runs
            already.
        runs: Its runs that stand side by side.

    Returns:
        What is shown of each run's change.
    """
    shown = verdicts(_all_at_once(cell, runs, len(runs)))
    return dict(zip((run.change for run in runs), shown, strict=True))


def shown_words(cell: CellRecord) -> dict[Change, str]:
    """Return in a word or two what is shown of each run of a cell, all runs of its kind at once.

    Args:
        cell: The cell.

    Returns:
        A run's order → its `shown_word`; runs without a drop have none.
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
    """Say between which ranks runs of one cell lie by what they cost, all of it at once.

    Args:
        cell: The cell.
        runs: Its runs.

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
    """Widen the intervals of one figure of all runs, so that they hold at once.

    `each` is how many statements are made of a cell, where that is more than one a layer.
    """
    runs = [of[layer] for of in [cell.runs_of() for cell in cells] for layer in layers]
    family = max(len(cells) * each, len(runs), 1)
    wide = iter(together([figure(run) for run in runs], [run.n for run in runs], family))
    return {cell.key: {layer: next(wide) for layer in layers} for cell in cells}


def _low(figures: dict[int, Estimate], layer: int) -> float:
    low = figures[layer].low
    return -math.inf if low is None else low


def _all_at_once(cell: CellRecord, runs: Sequence[RunRecord], family: int) -> list[Estimate]:
    """Find the drops of runs, with intervals that hold for so many statements."""
    drops = [run.drop for run in runs]
    return drops if cell.is_raced else together(drops, [run.n for run in runs], family)


def name_benchmarks(cells: Sequence[CellRecord]) -> str:
    """Name benchmarks, each as shortly as tells it from the others."""
    titles = [cell.benchmark.title for cell in cells]
    return listed(titles if len({*titles}) == len(titles) else benchmark_labels(cells))
