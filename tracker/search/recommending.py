"""Recommend the lightest model within a budget of accuracy, by its test documents."""

from __future__ import annotations

from tracker.schema.prune_records import PruneStep
from tracker.search.accuracy_budget import AccuracyBudget, count_needed, count_shown
from tracker.search.report import Searches, test_outcome
from tracker.search.search import RANDOM_REASON, Recommendation
from tracker.search.strategies import RANDOM_STRATEGY
from tracker.stats.support import widen

_TOLERANCE = 1e-9


def recommend_within(budget: AccuracyBudget, searches: Searches) -> Recommendation:
    """Recommend the lightest set that test documents show to be within a budget of accuracy.

    Each search is a fixed sequence of tests, from its lightest removal on (`count_shown`). The
    intervals are simultaneous for all searches (Bonferroni). Random draws are never recommended.

    Args:
        budget: The budget.
        searches: The tested searches, all with this budget.

    Returns:
        The set that is shown, the lightest set whose estimate is within the budget, and the reason
        if no set is shown.
    """
    informed = [search for search in searches if search.request.strategy != RANDOM_STRATEGY]
    if not informed:
        return Recommendation(reason=RANDOM_REASON)
    shown, estimated = list[PruneStep](), list[tuple[PruneStep, int | None]]()
    nearest = list[tuple[float, str]]()
    for search in informed:
        paired, steps, n = search.outcomes, search.record.steps, search.record.baseline.n
        excesses = [budget.excess(paired, index) for index in range(len(steps))]
        n_shown = count_shown(widen(excesses, [n] * len(steps), len(informed)))
        shown += steps[:n_shown][-1:]
        for index, (step, excess) in enumerate(zip(steps, excesses, strict=True)):
            if excess.value is None:
                continue
            nearest.append((excess.value, budget.nearest_option(paired, index)))
            if excess.value <= _TOLERANCE:
                needed = count_needed(excesses[: index + 1], n, len(informed))
                estimated.append((step, needed))
    if not estimated:
        nearest_option = min(nearest, default=(0.0, ""))[1]
        return Recommendation(n_sets=len(informed), nearest=nearest_option)
    step, needed = max(estimated, key=lambda pair: _lightness(pair[0]))
    lightest = max(shown, key=_lightness).removed if shown else ()
    return Recommendation(lightest, len(informed), estimated=step.removed, n_needed=needed)


def _lightness(step: PruneStep) -> tuple[float, ...]:
    """Order steps by how much they remove; of equal steps, by the smaller loss."""
    loss = test_outcome(step).lost.value or 0.0
    return -(step.parameters or 0), len(step.removed), -loss
