"""Scores and choices against naive ones, over models from which the layers are really cut.

What each strategy removes is held against a naive one in `test_constraints`.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.helpers.searches import naive_proxy
from tracker.core.prune_records import PruneStep
from tracker.search.cells import OpenCell
from tracker.search.scores import Losses, Scores, Set
from tracker.search.settings import Budget
from tracker.search.strategies import STRATEGIES, Search

from .conftest import GO, LAYERS, WHOLE

WITHIN = Budget((1.0,) * LAYERS, GO)


def run(cell: OpenCell, strategy: str, **more: object) -> list[PruneStep]:
    scores = Scores([cell], WHOLE)
    return list(STRATEGIES[strategy](Search(scores, WITHIN, **more)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["cosine", "relative_update", "perplexity", "taylor"])
def test_proxies_are_those_of_the_model_that_is_left(cell, truth, name) -> None:
    removed: Set = ()
    for step in run(cell, name)[:2]:
        expected = naive_proxy(name, truth, removed)
        chosen = min(expected, key=lambda layer: expected[layer])
        assert step.layer == chosen
        assert step.score == pytest.approx(expected[chosen], rel=2e-3, abs=1e-5)
        (second,) = set(step.runner_up) - set(removed)
        others = sorted(expected.values())
        assert step.margin.value == pytest.approx(others[1] - others[0], rel=2e-2, abs=2e-5)
        assert expected[second] == pytest.approx(others[1])
        removed = step.removed
    once = naive_proxy(name, truth, ())
    order = sorted(once, key=lambda layer: once[layer])
    assert [step.layer for step in run(cell, f"{name}_oneshot")] == order[:GO]


def test_level_sets_are_ordered_as_it_is_said() -> None:
    """By the other measure, then the later one; rounding decides nothing."""
    sets = [(0,), (1,), (2,), (3,)]
    values = np.array([[0.1, 0.1, 0.1 + 1e-16, 0.3], [0.3, 0.3, 0.3, 0.0]])
    found = Losses(sets, values, np.full(2, 0.5), np.array([0.1, 0.2, 0.1 + 1e-15, 0.0]))
    assert found.order == [3, 2, 0, 1]
    step = found.step(())
    assert (step.layer, step.runner_up) == (3, (2,))
    level = Losses(sets[:2], values[:, :2], np.full(2, 0.5), np.zeros(2)).step(())
    assert (level.layer, level.margin.value, level.separates) == (1, 0, None)


def test_how_many_documents_would_tell_two_apart() -> None:
    """The interval narrows with the root of the documents: it must be as far as the margin."""
    rng = np.random.default_rng(0)
    first = rng.normal(0, 1, 100)
    values = np.stack([first, first + rng.normal(0.05, 1, 100)], axis=1)
    order = np.argsort(values.mean(axis=0))
    step = Losses([(0,), (1,)], values, np.full(100, 0.01), np.zeros(2)).step(())
    apart = values[:, order[1]] - values[:, order[0]]
    half = 1.984 * apart.std(ddof=1) / 10
    assert step.margin.low == pytest.approx(apart.mean() - half, abs=1e-3)
    assert step.separates == pytest.approx(100 * (half / apart.mean()) ** 2, rel=0.01)
    # Beside twenty more it is the best of many: at 0.05 / 21.
    more = np.concatenate([values, np.full((100, 20), 1.0)], axis=1)
    sets = [(n,) for n in range(22)]
    wide = Losses(sets, more, np.full(100, 0.01), np.zeros(22)).step(())
    assert wide.runner_up == step.runner_up
    half = 3.118 * apart.std(ddof=1) / 10
    assert wide.margin.low == pytest.approx(apart.mean() - half, abs=1e-3)


def test_what_is_not_finite_goes_last_or_is_refused() -> None:
    values = np.array([[np.nan, 0.2], [0.0, 0.2]])
    found = Losses([(0,), (1,)], values, np.full(2, 0.5), np.array([np.nan, 1.0]))
    assert found.step(()).layer == 1
    with pytest.raises(Exception, match="no removal has a finite score"):
        Losses([(0,)], values[:, :1], np.full(2, 0.5), np.zeros(1)).step(())
