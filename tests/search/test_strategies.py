"""Scores and choices against naive ones, over models from which the layers are really cut.

What each strategy removes is held against a naive one in `test_constraints`.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.searches import naive_proxy
from tracker.schema.prune_records import PruneStep
from tracker.search.cells import OpenCell
from tracker.search.scores import Losses, PartSet, Scores
from tracker.search.settings import Budget
from tracker.search.strategies import STRATEGIES, Search

from .conftest import LAYER_PARTS, LAYERS, N_REMOVED

BUDGET = Budget((1.0,) * LAYERS, N_REMOVED, parts=LAYER_PARTS)


def run_strategy(cell: OpenCell, strategy: str, **options: object) -> list[PruneStep]:
    scores = Scores([cell], LAYER_PARTS)
    return list(STRATEGIES[strategy](Search(scores, BUDGET, **options)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cosine", "relative_update", "perplexity", "taylor"])
def test_proxies_are_of_the_pruned_model(cell, truth, name) -> None:
    removed: PartSet = ()
    for step in run_strategy(cell, name)[:2]:
        expected = naive_proxy(name, truth, removed)
        best_layer = min(expected, key=lambda layer: expected[layer])
        assert step.layer == best_layer
        assert step.score == pytest.approx(expected[best_layer], rel=2e-3, abs=1e-5)
        (runner_up,) = set(step.runner_up) - set(removed)
        best, second, *_ = sorted(expected.values())
        assert step.margin.value == pytest.approx(second - best, rel=2e-2, abs=2e-5)
        assert expected[runner_up] == pytest.approx(second)
        removed = step.removed
    initial_scores = naive_proxy(name, truth, ())
    order = sorted(initial_scores, key=lambda layer: initial_scores[layer])
    assert [step.layer for step in run_strategy(cell, f"{name}_oneshot")] == order[:N_REMOVED]


def test_ties_are_broken_as_documented() -> None:
    """By the other measure, then the later one; rounding decides nothing."""
    sets = [(0,), (1,), (2,), (3,)]
    values = np.array([[0.1, 0.1, 0.1 + 1e-16, 0.3], [0.3, 0.3, 0.3, 0.0]])
    losses = Losses(sets, values, np.full(2, 0.5), np.array([0.1, 0.2, 0.1 + 1e-15, 0.0]))
    assert losses.order == [3, 2, 0, 1]
    step = losses.choose_step(())
    assert (step.layer, step.runner_up) == (3, (2,))
    tied_step = Losses(sets[:2], values[:, :2], np.full(2, 0.5), np.zeros(2)).choose_step(())
    assert (tied_step.layer, tied_step.margin.value, tied_step.separates) == (1, 0, None)


def test_needed_documents_separate_two_sets() -> None:
    """The interval narrows with the root of the documents: it must be as far as the margin."""
    rng = np.random.default_rng(0)
    first_losses = rng.normal(0, 1, 100)
    values = np.stack([first_losses, first_losses + rng.normal(0.05, 1, 100)], axis=1)
    order = np.argsort(values.mean(axis=0))
    step = Losses([(0,), (1,)], values, np.full(100, 0.01), np.zeros(2)).choose_step(())
    differences = values[:, order[1]] - values[:, order[0]]
    half_width = 1.984 * differences.std(ddof=1) / 10
    assert step.margin.low == pytest.approx(differences.mean() - half_width, abs=1e-3)
    assert step.separates == pytest.approx(100 * (half_width / differences.mean()) ** 2, rel=0.01)
    # Beside twenty more it is the best of many: at 0.05 / 21.
    more_values = np.concatenate([values, np.full((100, 20), 1.0)], axis=1)
    sets = [(n,) for n in range(22)]
    many_step = Losses(sets, more_values, np.full(100, 0.01), np.zeros(22)).choose_step(())
    assert many_step.runner_up == step.runner_up
    half_width = 3.118 * differences.std(ddof=1) / 10
    assert many_step.margin.low == pytest.approx(differences.mean() - half_width, abs=1e-3)


def test_infinite_scores_go_last_or_are_refused() -> None:
    values = np.array([[np.nan, 0.2], [0.0, 0.2]])
    losses = Losses([(0,), (1,)], values, np.full(2, 0.5), np.array([np.nan, 1.0]))
    assert losses.choose_step(()).layer == 1
    with pytest.raises(Exception, match="no removal has a finite score"):
        Losses([(0,)], values[:, :1], np.full(2, 0.5), np.zeros(1)).choose_step(())
