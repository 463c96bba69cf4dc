"""Define budgets of accuracy: the largest acceptable loss of a pruned model.

max_drop: {value: 2pp}
keep_accuracy: {value: 95%}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

from tracker.analysis.paired import PairedOutcomes
from tracker.benchmarks.benchmark import choose_metric
from tracker.schema.errors import ExperimentError
from tracker.schema.estimates import Estimate
from tracker.search.cells import OpenCell
from tracker.stats.accuracy import LEVEL, OutcomeVariance, budget_excess
from tracker.stats.support import widen

WALK_FACTOR = 2.0
"""A search ends as soon as its loss on calibration documents exceeds this many budgets."""

TOLERANCE = 1e-9
"""Largest difference of two losses that is due to rounding."""


class BudgetVerdict(NamedTuple):
    """Result of testing which models of a search are within a budget of accuracy.

    A column is the number of a model in the array of outcomes. The models are ordered from the
    largest to the smallest.

    Attributes:
        shown: Column of the smallest model that is significantly within the budget. All larger
            models must be significantly within the budget too. The value is None if there is no
            such model.
        estimated: Column of the smallest model whose estimated loss is within the budget; None if
            no model's is.
        needed: Number of test documents with which the model in column `estimated` would probably
            be significantly within the budget; None if unknown.
        smallest_excess: The smallest estimate of a model's loss minus the budget; None if no loss
            is defined.
    """

    shown: int | None
    estimated: int | None
    needed: int | None
    smallest_excess: float | None


@dataclass(frozen=True)
class AccuracyBudget:
    """The largest acceptable loss of accuracy.

    Attributes:
        text: The budget for messages, such as `lose at most 2pp`.
        max_drop: The largest acceptable loss, as a fraction.
        kept_share: The share of the intact model's accuracy that a pruned model must keep; 1 if the
            budget is in percentage points (`max_drop`).
    """

    text: str
    max_drop: float = 0.0
    kept_share: float = 1.0

    @classmethod
    def parse(cls, max_drop: str | None, keep_accuracy: str | None) -> AccuracyBudget | None:
        """Build the budget from its two settings; return None if both are None."""
        if max_drop is not None:
            return cls(f"lose at most {max_drop}", max_drop=float(max_drop[:-2]) / 100)
        if keep_accuracy is not None:
            text = f"keep {keep_accuracy} of the accuracy"
            return cls(text, kept_share=float(keep_accuracy[:-1]) / 100)
        return None

    def is_clearly_exceeded(self, paired: PairedOutcomes) -> bool:
        """Return whether the accuracy loss exceeds `WALK_FACTOR` times the budget.

        A loss that is not a number exceeds every budget.
        """
        intact = float(paired.weights @ paired.baseline)
        allowed = self.max_drop + (1 - self.kept_share) * intact
        return not paired.mean_drops[0] <= WALK_FACTOR * allowed + TOLERANCE

    def excess(self, paired: PairedOutcomes, index: int) -> Estimate:
        """Estimate by how much the accuracy loss of the model in column `index` exceeds the budget.

        The model is significantly within the budget if the upper end of the estimate's interval is
        at most 0.
        """
        outcomes = paired.baseline, paired.ablated[:, index], paired.weights
        return budget_excess(*outcomes, self.max_drop, self.kept_share)

    def judge(
        self, paired: PairedOutcomes, columns: Sequence[int], n_documents: int, n_searches: int = 1
    ) -> BudgetVerdict:
        """Find the smallest model within the budget, by a significance test and by estimate.

        Args:
            paired: Outcomes of the test documents, with one column for each model.
            columns: Numbers of the columns to test, the column of the largest model first.
            n_documents: Number of test documents.
            n_searches: Number of searches for which the intervals are simultaneous.

        Returns:
            The column of the smallest model that is significantly within the budget, and the column
            of the smallest model whose estimated loss is within the budget.
        """
        excesses = [self.excess(paired, column) for column in columns]
        n_shown = count_shown(widen(excesses, [n_documents] * len(excesses), n_searches))
        values = {k: e.value for k, e in enumerate(excesses) if e.value is not None}
        within = [k for k, value in values.items() if value <= TOLERANCE]
        needed = None
        if within:
            needed = count_needed(excesses[: within[-1] + 1], n_documents, n_searches)
        return BudgetVerdict(
            columns[n_shown - 1] if n_shown else None,
            columns[within[-1]] if within else None,
            needed,
            min(values.values(), default=None),
        )

    def larger_option(self, excess: float, paired: PairedOutcomes) -> str:
        """Return the command-line option for a budget whose allowed loss is larger by `excess`.

        The larger budget is rounded up. The text is empty if the larger budget would allow the loss
        of the whole accuracy.
        """
        if self.kept_share == 1:
            points = math.ceil(1000 * (self.max_drop + excess) - 1e-6) / 10
            return f"--max-drop {points:g}pp" if points < 100 else ""
        share = self.kept_share - excess / float(paired.weights @ paired.baseline)
        percent = math.floor(1000 * share + 1e-6) / 10
        return f"--keep-accuracy {percent:g}%" if percent > 0 else ""


def count_shown(excesses: Sequence[Estimate]) -> int:
    """Count the first steps of a search that are all significantly within a budget.

    The steps are tested in a fixed order, from the smallest to the largest removal. The test stops
    at the first step that is not significantly within the budget. The fixed order makes a
    correction for the number of steps unnecessary. The result is wrong only if the first step that
    really exceeds the budget passes the test. The probability of this error is at most the level of
    one test.

    Args:
        excesses: Loss minus the budget after each step, with intervals that are simultaneous for
            all searches whose results are compared.

    Returns:
        The number of steps before the first step whose interval has a positive upper end.

    References:
        W. Maurer, L. A. Hothorn, W. Lehmacher, Biometrie in der chemisch-pharmazeutischen Industrie
        6 (1995) 3-18.

    Examples:
        >>> count_shown([Estimate(-0.04, -0.06, -0.02), Estimate(-0.01, -0.03, 0.01)])
        1
    """
    is_shown = [excess.high is not None and excess.high <= 0 for excess in excesses]
    return (*is_shown, False).index(False)


def refuse_untestable(cell: OpenCell, title: str) -> None:
    """Raise ExperimentError if lower values of the metric are better, as for a loss.

    Args:
        cell: The model and benchmark of the test documents.
        title: Name of the search in the message.

    Raises:
        ExperimentError: Lower values of the metric are better.
    """
    metric = choose_metric(cell.benchmark, cell.request.metric)
    if not cell.benchmark.tasks[0].higher_is_better.get(metric, True):
        raise ExperimentError(
            f"{title}: {metric} is not an accuracy; 'max_drop' and 'keep_accuracy' need a metric "
            "such as acc, from 0 to 1, whose higher values are better. Set 'metric' to such a "
            "metric, or set 'remove' or 'keep' instead"
        )


def count_needed(excesses: Sequence[Estimate], n_documents: int, n_searches: int) -> int | None:
    """Estimate how many test documents would show that a model is within the budget.

    Args:
        excesses: Loss minus budget, with a 95 % interval, for the model's search step and all
            earlier steps.
        n_documents: Number of measured test documents.
        n_searches: Number of searches whose results are compared.

    Returns:
        The number of documents for a test with the power `TEST_POWER`. None if no number is large
        enough, because the estimated loss after a step is at least as large as the budget.
    """
    counts = []
    for excess in excesses:
        if excess.value is None or excess.bounds is None or excess.value > -TOLERANCE:
            return None
        half_width = (excess.bounds[1] - excess.bounds[0]) / 2
        variance = n_documents * (half_width / NormalDist().inv_cdf((1 + LEVEL) / 2)) ** 2
        outcomes = OutcomeVariance(variance, binary=False)
        counts.append(outcomes.count_documents(-excess.value, n_searches))
    return max(counts, default=None)
