"""Decide which statements about one model's layers are statistically supported.

Reports, leaderboards and experiment trackers show these statements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

from tracker.analysis.comparable import benchmark_labels, select_ranked_cells
from tracker.analysis.paired import choice_variance, outcome_variance
from tracker.schema.changes import WHOLE_LAYER, Change
from tracker.schema.estimates import Estimate
from tracker.schema.formats import join_words
from tracker.schema.grouping import group_by
from tracker.schema.identities import CHOICE_PROBABILITIES, CHOICE_PROBABILITY
from tracker.schema.records import CellRecord, RunRecord
from tracker.stats.accuracy import ALPHA, REPORTED_DROP, documents_needed
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
_OPTIONS_SHARE = 0.1
"""Share of the error rate for `Claims.options`; drops of the two measures share the rest."""

_ByCell = dict[str, dict[int, Estimate]]
"""Key of a cell → layer → figure with an interval; all intervals hold together."""


class NextStep(NamedTuple):
    """Suggested number of documents, with which fewer layers stay undecided.

    Attributes:
        measure: Measure whose drop is tested: `choice_probability`, or "" for the metric of
            `cells`.
        loss: Size of the loss to detect, as a fraction, e.g. 0.02 for 2 percentage points.
        documents: Suggested number of documents of each benchmark.
        seconds: Estimated seconds to measure the missing documents; None if unknown.
    """

    measure: str
    loss: float
    documents: int
    seconds: float | None


@dataclass(frozen=True)
class Claims:
    """Statistically supported statements about the layers of one model.

    The statements are about means over benchmarks. With at least 95 % confidence, all statements
    about the model are true. Layers are 0-based numbers.

    Attributes:
        cells: Results on which the statements are based, one for each benchmark.
        layers: Layers that are measured on the benchmarks of all `cells`.
        drops: Layer → mean accuracy drop (or loss increase), with a corrected confidence interval.
        verdicts: Layer → `costs` (removal significantly reduces accuracy), `helps` (increases
            accuracy) or `open` (undecided).
        choices: Layer → mean drop of the choice probability, with a corrected confidence interval.
            The dict is empty if a benchmark has no answer options, or if `drops` already contains
            drops of the choice probability.
        options: Key of a cell → layer → drop in the log of the options' total probability.
        family: Number of comparisons for which the confidence intervals are corrected.
    """

    cells: tuple[CellRecord, ...]
    layers: tuple[int, ...]
    drops: dict[int, Estimate]
    verdicts: dict[int, Verdict]
    choices: dict[int, Estimate]
    options: _ByCell
    family: int

    @property
    def costly(self) -> list[int]:
        """List of the layers whose removal significantly reduces accuracy."""
        return [layer for layer in self.layers if self.verdicts[layer] == "costs"]

    @property
    def helpful(self) -> list[int]:
        """List of the layers whose removal significantly improves the model."""
        return [layer for layer in self.layers if self.verdicts[layer] == "helps"]

    @property
    def small(self) -> list[int]:
        """List of the layers whose accuracy drop is significantly below `SMALL_DROP`."""
        if not self.is_accuracy:
            return []
        return [layer for layer in self.layers if self.drops[layer].side(SMALL_DROP) < 0]

    @property
    def less_probable(self) -> dict[int, Estimate]:
        """Layer → drop of the choice probability, if significantly above 0.

        Layers whose removal significantly changes accuracy are left out.
        """
        return self._choices_of_open_layers(1)

    @property
    def more_probable(self) -> dict[int, Estimate]:
        """Layer → drop of the choice probability, if significantly below 0.

        Layers whose removal significantly changes accuracy are left out.
        """
        return self._choices_of_open_layers(-1)

    def _choices_of_open_layers(self, side: int) -> dict[int, Estimate]:
        verdicts, drops = self.verdicts, self.choices.items()
        return {i: drop for i, drop in drops if drop.side() == side and verdicts[i] == "open"}

    @property
    def small_by_choice(self) -> list[int]:
        """List of the layers whose removal hardly reduces the choice probability.

        The drop of the choice probability is significantly below `SMALL_DROP`. Layers in `costly`,
        `helpful`, `small`, `less_probable` or `more_probable` are left out.
        """
        others = {*self.costly, *self.helpful, *self.small, *self.less_probable}
        others |= {*self.more_probable}
        drops = self.choices.items()
        return [i for i, drop in drops if drop.side(SMALL_DROP) < 0 and i not in others]

    @property
    def open(self) -> list[int]:
        """List of the layers about which no statement is statistically supported."""
        settled = {*self.costly, *self.helpful, *self.small}
        settled |= {*self.less_probable, *self.more_probable, *self.small_by_choice}
        return [layer for layer in self.layers if layer not in settled]

    @property
    def by_cosine(self) -> list[int]:
        """List of the `len(costly)` layers with the highest cosine scores.

        The list is empty if the cosine score of any layer is undefined.
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
        """List of the costly layers that a selection by highest cosine score wrongly omits.

        A layer is wrongly omitted if its removal costs significantly more accuracy than the removal
        of a layer in `by_cosine`.
        """
        costly, chosen_layers = self.costly, self.by_cosine
        ends = (self.drops[layer].high for layer in chosen_layers if layer not in costly)
        lowest = min((high for high in ends if high is not None), default=math.inf)
        left_out = [layer for layer in costly if layer not in chosen_layers]
        return [layer for layer in left_out if self.drops[layer].side(lowest) > 0]

    @property
    def broken(self) -> list[int]:
        """List of the layers whose removal makes all answer options unlikely.

        On at least one benchmark, the removal divides the total probability of the options by at
        least 10. Only layers in `costly` or `less_probable` are listed.
        """

        def is_broken(cell: CellRecord, layer: int) -> bool:
            surprise = -(cell.baseline_options_logprob or 0.0)
            return self.options[cell.key][layer].side(max(math.log(10), surprise / 2)) > 0

        layers = sorted({*self.costly, *self.less_probable})
        return [i for i in layers if any(is_broken(cell, i) for cell in self.cells)]

    @property
    def at_chance(self) -> list[CellRecord]:
        """List of cells where the intact model's accuracy is not significantly above chance."""
        levels = ((cell, cell.baseline.low, cell.chance_accuracy) for cell in self.cells)
        return [
            cell
            for cell, low, chance in levels
            if low is not None and chance is not None and low <= chance
        ]

    @property
    def is_accuracy(self) -> bool:
        """True if the drops are accuracy drops; False if they are loss increases."""
        return all(cell.higher_is_better for cell in self.cells)

    def word(self, layer: int) -> str:
        """Return a short text about a layer, such as `matters` or `open` (undecided)."""
        if layer not in self.layers:
            return "not measured on all benchmarks"
        word = verdict_word(self.verdicts[layer], self.drops[layer], self.is_accuracy)
        if word != "open" or layer not in self.choices:
            return word
        small = f"choice below {SMALL_DROP_TEXT}" if layer in self.small_by_choice else word
        side = self.choices[layer].side()
        return {1: "less probable", -1: "more probable"}.get(side, small)

    def next_steps(self) -> list[NextStep]:
        """Suggest how many documents to measure, so that fewer layers stay undecided.

        With the suggested number, about half of the undecided layers would be decided. The list has
        at most one suggestion for accuracy, and one for the choice probability.
        """
        open_layers = {*self.open} if self.is_accuracy else set()
        runs = chain.from_iterable(cell.whole_layers for cell in self.cells)
        open_runs = [run for run in runs if run.change.layer in open_layers]
        choice_runs = open_runs if self.choices else []
        n_measured = min((cell.n for cell in self.cells), default=0)
        steps = []
        for measure, variances in {
            "": list(filter(None, map(outcome_variance, open_runs))),
            CHOICE_PROBABILITY: list(filter(None, map(choice_variance, choice_runs))),
        }.items():
            for loss in _LOSSES if variances else ():
                count = documents_needed(variances, self.family, len(self.cells), loss)
                if count > n_measured:
                    steps.append(NextStep(measure, loss, count, self._measuring_time(count)))
                    break
        return steps

    def _measuring_time(self, documents: int) -> float | None:
        """Estimate the seconds to measure up to `documents` documents of each benchmark.

        Returns None if the speed of a cell's measurement is unknown.
        """
        total = 0.0
        for cell in self.cells:
            if cell.outcome_seconds is None:
                return None
            total += max(documents - cell.n, 0) * (1 + len(cell.runs)) * cell.outcome_seconds
        return total

    def lacking(self, documents: int) -> list[CellRecord]:
        """List the cells whose benchmark has fewer than `documents` documents."""
        return [cell for cell in self.cells if cell.benchmark.documents < documents]


def decide_claims(cells: Sequence[CellRecord]) -> Claims:
    """Decide which statements about one model's layers are statistically supported.

    Args:
        cells: Cells of one model. Only one cell of each benchmark is used. Measurements that the
            option `until` stopped early are ignored.

    Returns:
        The supported statements and the undecided layers.
    """
    fallback = [c for c in cells if c.whole_layers and not c.is_raced and not c.removed]
    counted_cells = select_ranked_cells(cells)[0] or fallback[:1]
    runs = [cell.runs_of_kind() for cell in counted_cells]
    layers = tuple(sorted(set.intersection(*map(set, runs)))) if runs else ()
    by_layer = {layer: [runs_by_layer[layer] for runs_by_layer in runs] for layer in layers}
    alpha, family = _accuracy_test_level(counted_cells, len(layers))
    drops = {layer: mean_drop(group, family) for layer, group in by_layer.items()}
    verdicts = decide_verdicts([*drops.values()], alpha)
    choices = {
        layer: mean_drop(group, family, attrgetter("choice_drop"))
        for layer, group in by_layer.items()
        if _has_choices(counted_cells) and all(run.choice_drop.bounds for run in group)
    }
    return Claims(
        cells=tuple(counted_cells),
        layers=layers,
        drops=drops,
        verdicts=dict(zip(layers, verdicts, strict=True)),
        choices=choices,
        options=_options_drops(counted_cells, layers),
        family=family,
    )


def _has_choices(cells: Sequence[CellRecord]) -> bool:
    """Return whether all cells have choice probabilities in addition to their metric."""
    return all(
        cell.metric not in CHOICE_PROBABILITIES
        and any(run.choice_drop.bounds for run in cell.whole_layers)
        for cell in cells
    )


def _accuracy_test_level(cells: Sequence[CellRecord], n_layers: int) -> tuple[float, int]:
    """Return the error rate of the tests of accuracy drops, and their number of comparisons.

    The tests of accuracy, choice probability and options' log-probability share the error rate
    `ALPHA`. The first result is the part of `ALPHA` for accuracy. The second is `n_layers` ×
    `ALPHA` / first result, rounded up.
    """
    runs = chain.from_iterable(cell.whole_layers for cell in cells)
    has_options = any(run.options_drop.bounds for run in runs)
    share = (1 - _OPTIONS_SHARE * has_options) / (1 + _has_choices(cells))
    return ALPHA * share, math.ceil(n_layers / share - 1e-9)


def mean_drop(
    runs: Sequence[RunRecord],
    n_tests: int,
    figure: Callable[[RunRecord], Estimate] = attrgetter("drop"),
) -> Estimate:
    """Average one ablation's drop (by default the accuracy drop) over benchmarks.

    Args:
        runs: Runs of the ablation, one for each benchmark.
        n_tests: Number of compared ablations, for which the interval is corrected.
        figure: Function that returns the drop of a run.

    Returns:
        The mean drop, with its confidence interval.
    """
    drops = widen([figure(run) for run in runs], [run.units for run in runs], n_tests)
    return average(drops) if len(drops) > 1 else drops[0]  # with its exact test


def verdict_word(verdict: Verdict, drop: Estimate, is_accuracy: bool = True) -> str:
    """Return a short text about the effect of a removal, such as `matters` or `open`.

    `drop` is an accuracy drop, or a loss increase if `is_accuracy` is false.
    """
    if verdict == "costs":
        return "matters"
    if verdict == "helps":
        return "better without"
    return f"below {SMALL_DROP_TEXT}" if is_accuracy and drop.side(SMALL_DROP) < 0 else "open"


def run_verdicts(cell: CellRecord, runs: Sequence[RunRecord]) -> dict[Change, Verdict]:
    """Decide for each run whether its drop is significant, corrected for testing all runs.

    Args:
        cell: Record of one model on one benchmark.
        runs: Runs of the cell that are tested together.

    Returns:
        Change that a run makes to the model → `costs`, `helps` or `open`.
    """
    verdicts = decide_verdicts(*_corrected_drops(cell, runs))
    return dict(zip((run.change for run in runs), verdicts, strict=True))


def _corrected_drops(cell: CellRecord, runs: Sequence[RunRecord]) -> tuple[list[Estimate], float]:
    """Return each run's drop with a corrected confidence interval, and the tests' error rate."""
    alpha, family = error_share(cell, runs)
    return _widened_drops(cell, runs, family), alpha


def error_share(cell: CellRecord, runs: Sequence[RunRecord]) -> tuple[float, int]:
    """Return the error rate of the tests of the runs' drops, and their number of comparisons.

    For whole layers, tests of accuracy get only a part of the error rate `ALPHA`. Tests of other
    drops, e.g. of the choice probability, get the other part.
    """
    if all(run.change.kind == WHOLE_LAYER for run in runs) and not cell.is_raced:
        return _accuracy_test_level([cell], len(runs))
    return ALPHA, len(runs)


def verdict_words(cell: CellRecord) -> dict[Change, str]:
    """Return a short text about each run, such as `matters`.

    Significance is corrected for comparing all runs of one kind, e.g. all attention heads.

    Args:
        cell: Record of one model on one benchmark.

    Returns:
        Change made by the run → text. Runs without a drop are left out.
    """

    def family(run: RunRecord) -> tuple[bool, Change]:
        return run.change.kind == WHOLE_LAYER, run.change.kind.family

    words = {}
    for runs in group_by(cell.runs, family).values():
        drops, alpha = _corrected_drops(cell, runs)
        for run, drop, verdict in zip(runs, drops, decide_verdicts(drops, alpha), strict=True):
            if drop.value is not None:
                words[run.change] = verdict_word(verdict, drop, cell.higher_is_better)
    return words


def cell_ranks(cell: CellRecord, runs: Sequence[RunRecord]) -> list[tuple[int, int]]:
    """Compute the best and the worst possible rank of each run by its drop.

    Args:
        cell: Record of one model on one benchmark.
        runs: Runs of the cell that are ranked.

    Returns:
        The best and the worst possible rank of each run; rank 1 is the largest drop.
    """
    return possible_ranks(_widened_drops(cell, runs, count_pairs(len(runs))))


def _options_drops(cells: Sequence[CellRecord], layers: Collection[int]) -> _ByCell:
    """Return each layer's drop in the log of the options' total probability.

    The confidence intervals are corrected for comparing all layers on all benchmarks.

    Args:
        cells: Cells of one model, one for each benchmark.
        layers: Numbers of the layers.

    Returns:
        Key of the cell → layer number → drop.
    """
    runs = [runs[layer] for runs in map(CellRecord.runs_of_kind, cells) for layer in layers]
    family = math.ceil(len(runs) / _OPTIONS_SHARE) or 1
    falls = iter(widen([run.options_drop for run in runs], [run.units for run in runs], family))
    return {cell.key: {layer: next(falls) for layer in layers} for cell in cells}


def _widened_drops(cell: CellRecord, runs: Sequence[RunRecord], family: int) -> list[Estimate]:
    """Return the drops of runs, with intervals corrected for `family` comparisons."""
    drops = [run.drop for run in runs]
    return drops if cell.is_raced else widen(drops, [run.units for run in runs], family)


def name_benchmarks(cells: Sequence[CellRecord]) -> str:
    """Return a text that lists the benchmarks of the cells."""
    titles = [cell.benchmark.title for cell in cells]
    return join_words(titles if len({*titles}) == len(titles) else benchmark_labels(cells))
