"""Recommend the lightest model within a budget of accuracy, by its test documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tracker.schema.prune_records import PruneStep
from tracker.search.accuracy_budget import TOLERANCE, AccuracyBudget, count_needed, count_shown
from tracker.search.report import Searches, TestedSearch, test_outcome
from tracker.search.search import RANDOM_REASON, Recommendation
from tracker.search.strategies import RANDOM_STRATEGY
from tracker.stats.support import widen

NO_ACCURACY = "the unpruned model has an accuracy of 0"
"""Reason why no set is recommended, although none can lose accuracy."""


IsSavable = Callable[[TestedSearch, PruneStep], bool]
"""Function that returns whether the model after a step of a search can be saved."""


def find_shown(
    budget: AccuracyBudget, search: TestedSearch, n_searches: int, is_savable: IsSavable
) -> list[int]:
    """List the savable steps of a search that test documents show to be within a budget.

    The steps are given by index. The intervals hold for `n_searches` searches together.
    """
    steps = [i for i, step in enumerate(search.record.steps) if is_savable(search, step)]
    excesses = [budget.excess(search.outcomes, index) for index in steps]
    n_documents = [search.record.baseline.n] * len(steps)
    return steps[: count_shown(widen(excesses, n_documents, n_searches))]


def end_within_budget(search: TestedSearch, n_searches: int, is_savable: IsSavable) -> TestedSearch:
    """Return a search that ends at its last shown step, if it has a budget of accuracy."""
    budget = search.request.accuracy_budget
    if budget is None:
        return search
    shown = find_shown(budget, search, max(1, n_searches), is_savable)
    return replace(search, shown=shown[-1] if shown else -1)


def recommend_within(
    budget: AccuracyBudget,
    searches: Searches,
    is_savable: IsSavable = lambda search, step: True,
) -> Recommendation:
    """Recommend the lightest set that test documents show to be within a budget of accuracy.

    Each search is a fixed sequence of tests, from its lightest removal on (`count_shown`). The
    intervals are simultaneous for all searches (Bonferroni). Random draws are never recommended.

    Args:
        budget: The budget.
        searches: The tested searches, all with this budget.
        is_savable: Function that returns whether the model after a step can be saved. All other
            steps are left out, whatever their results are.

    Returns:
        The set that is shown, the lightest set whose estimate is within the budget, and the reason
        if no set is shown.
    """
    informed = [search for search in searches if search.request.strategy != RANDOM_STRATEGY]
    if not informed:
        return Recommendation(reason=RANDOM_REASON)
    shown, estimated = list[PruneStep](), list[tuple[PruneStep, int | None]]()
    if not informed[0].outcomes.weights @ informed[0].outcomes.baseline:
        return Recommendation(n_sets=len(informed), reason=NO_ACCURACY)
    values = list[float]()
    for search in informed:
        paired, n = search.outcomes, search.record.baseline.n
        steps = {i: step for i, step in enumerate(search.record.steps) if is_savable(search, step)}
        excesses = [budget.excess(paired, index) for index in steps]
        shown += [steps[i] for i in find_shown(budget, search, len(informed), is_savable)[-1:]]
        for n_tested, step in enumerate(steps.values(), 1):
            excess = excesses[n_tested - 1]
            if excess.value is None:
                continue
            values.append(excess.value)
            if excess.value <= TOLERANCE:
                needed = count_needed(excesses[:n_tested], n, len(informed))
                estimated.append((step, needed))
    if not estimated:
        if not values:
            reason = "no tested removal has a score and can be saved"
            return Recommendation(n_sets=len(informed), reason=reason)
        nearest = budget.nearest_option(min(values), informed[0].outcomes)
        return Recommendation(n_sets=len(informed), nearest=nearest)
    step, needed = max(estimated, key=lambda pair: _lightness(pair[0]))
    lightest = max(shown, key=_lightness).removed if shown else ()
    return Recommendation(lightest, len(informed), estimated=step.removed, n_needed=needed)


def _lightness(step: PruneStep) -> tuple[float, ...]:
    """Order steps by how much they remove; of equal steps, by the smaller loss."""
    loss = test_outcome(step).lost.value or 0.0
    return -(step.parameters or 0), len(step.removed), -loss
