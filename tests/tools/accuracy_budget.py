"""Count how often the model chosen within a budget of accuracy really loses more.

Documents' outcomes are drawn; no model is needed. Each layer that is removed turns some right
answers wrong, and some wrong answers right, so that the true accuracy of every set is known. Two
searches, one greedy on calibration documents and one in a fixed order, end by the rule of
`tracker prune`. What test documents recommend is then compared with the true accuracy.

    python -m tests.tools.accuracy_budget
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import product
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

from tracker.analysis.paired import PairedOutcomes
from tracker.cli.terminal import echo
from tracker.schema.estimates import Estimate
from tracker.schema.prune_records import HeldOutResult, PruneStep
from tracker.search.accuracy_budget import AccuracyBudget
from tracker.search.conduct import recommend_within
from tracker.stats.accuracy import accuracy_drop, budget_excess

SEARCHES = 200
LAYERS, RIGHT, N_CALIBRATION = 12, 0.65, 200
BUDGETS = (AccuracyBudget.parse("2pp", None), AccuracyBudget.parse("5pp", None))
KEPT = AccuracyBudget.parse(None, "95%")
Sets = Sequence[tuple[int, ...]]


class Documents:
    """Outcomes of random documents under any removal: `flips` are one draw a layer and document."""

    def __init__(self, generator: np.random.Generator, count: int, lost: NDArray, won: NDArray):
        self.right = generator.random(count) < RIGHT
        self.lost = generator.random((len(lost), count)) < lost[:, None]
        self.won = generator.random((len(won), count)) < won[:, None]

    def under(self, removed: Sequence[int]) -> NDArray[np.float64]:
        """Return which answers are right after the removal of layers, in ascending order."""
        right = self.right.copy()
        for layer in sorted(removed):
            right = np.where(right, ~self.lost[layer], self.won[layer])
        return right.astype(float)

    def paired(self, sets: Sets) -> PairedOutcomes:
        ablated = np.stack([self.under(removed) for removed in sets], axis=1)
        return PairedOutcomes(self.under(()), ablated, np.full(len(ablated), 1 / len(ablated)))


def true_accuracy(removed: Sequence[int], lost: NDArray, won: NDArray) -> float:
    """Compute the accuracy of the model without some layers, over all documents."""
    right = RIGHT
    for layer in sorted(removed):
        right = right * (1 - lost[layer]) + (1 - right) * won[layer]
    return right


def walk(documents: Documents, budget: AccuracyBudget, order: Sequence[int] | None) -> Sets:
    """Remove layers, the cheapest first or in an order, until the budget is clearly exceeded."""
    sets: list[tuple[int, ...]] = []
    removed: tuple[int, ...] = ()
    for index in range(LAYERS - 1):
        candidates = [layer for layer in range(LAYERS) if layer not in removed]
        if order is not None:
            candidates = [order[index]]
        losses = [-documents.under((*removed, layer)).mean() for layer in candidates]
        removed = tuple(sorted((*removed, candidates[int(np.argmin(losses))])))
        sets.append(removed)
        if budget.is_clearly_exceeded(documents.paired([removed])):
            break
    return sets


def search(sets: Sets, documents: Documents, strategy: str) -> SimpleNamespace:
    """Make the tested search that removed these sets, as `recommend_within` reads it."""
    paired = documents.paired(sets)
    n = len(paired.weights)
    steps = [
        PruneStep(
            removed=removed,
            test=HeldOutResult(n=n, level=paired.level(index), lost=paired.drop(index)),
        )
        for index, removed in enumerate(sets)
    ]
    record = SimpleNamespace(steps=steps, baseline=HeldOutResult(n=n, level=Estimate(None)))
    return SimpleNamespace(
        request=SimpleNamespace(strategy=strategy), record=record, outcomes=paired
    )


def simulate(
    seed: int, budget: AccuracyBudget, n_test: int, gains: float
) -> tuple[bool, bool, bool]:
    """Return whether a set is shown, is shown and loses too much, and estimated and loses so."""
    generator = np.random.default_rng(seed)
    allowed = budget.max_drop + (1 - budget.kept_share) * RIGHT
    losses = generator.exponential(0.35 * allowed, LAYERS)
    won = np.full(LAYERS, gains / LAYERS)
    lost = (losses + (1 - RIGHT) * won) / RIGHT
    calibration = Documents(generator, N_CALIBRATION, lost, won)
    test = Documents(generator, n_test, lost, won)
    orders = {"accuracy": None, "cosine_oneshot": generator.permutation(LAYERS).tolist()}
    searches = [search(walk(calibration, budget, o), test, name) for name, o in orders.items()]
    result = recommend_within(budget, searches)  # type: ignore[arg-type]

    def is_over(removed: tuple[int, ...]) -> bool:
        loss = budget.kept_share * RIGHT - true_accuracy(removed, lost, won)
        return bool(removed) and loss > budget.max_drop

    return bool(result.removed), is_over(result.removed), is_over(result.estimated)


def worst_error(bound: Callable[[NDArray, float], float], drops: Sequence[float]) -> float:
    """Compute the largest probability that a loss above a budget is shown to be within it.

    The removal turns no wrong answer right, which is the worst case.

    Args:
        bound: Function of which documents are lost, and of a budget: upper end of what is lost
            beyond the budget.
        drops: The budgets.
    """
    largest = 0.0
    for drop, n in product(drops, np.unique(np.geomspace(20, 3000, 100).astype(int))):
        for n_lost in range(int(drop * n) + 1):
            if bound((np.arange(n) < n_lost).astype(float), drop) > 0:
                break
            # The loss is as small as a loss above the budget can be.
            largest = max(largest, float(binom.cdf(n_lost, n, drop)))
    return largest


def usual_bound(lost: NDArray, drop: float) -> float:
    """Return the upper end of the interval of Bonett and Price, beyond a budget."""
    return (accuracy_drop(lost, np.zeros(len(lost))).high or 0.0) - drop


def budget_bound(lost: NDArray, drop: float) -> float:
    """Return the upper end of the interval that decides about a budget."""
    return budget_excess(lost, np.zeros(len(lost)), max_drop=drop).high or 0.0


def main(count: int = SEARCHES) -> None:
    """Print the shares of simulated searches whose chosen model loses more than the budget."""
    for name, bound in (
        ("Bonett and Price", usual_bound),
        ("one more lost document", budget_bound),
    ):
        error = worst_error(bound, (0.01, 0.02, 0.05))
        echo(f"{name}: at most {100 * error:.1f} % false statements (exact)")
    echo("| budget | test documents | wrong turned right | shown | loses more | by estimate |")
    echo("|---|---|---|---|---|---|")
    for budget, n_test, gains in product((*BUDGETS, KEPT), (100, 400, 1600), (0.0, 0.2)):
        assert budget is not None
        results = np.mean([simulate(seed, budget, n_test, gains) for seed in range(count)], axis=0)
        shares = " | ".join(f"{100 * share:.1f} %" for share in results)
        echo(f"| {budget.text} | {n_test:,} | {100 * gains:.0f} % | {shares} |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
