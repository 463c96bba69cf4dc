"""Test simultaneous intervals, verdicts and ranks against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from tracker.core.estimates import Estimate
from tracker.stats.accuracy import accuracy_drop
from tracker.stats.support import difference, pairs, ranks, together, verdicts

LAYERS = 20


def drops(
    rng: np.random.Generator, documents: int, costs: np.ndarray, right: float = 0.6
) -> list[Estimate]:
    """Draw a model and its removals: each document that is right is lost with a layer's `costs`,
    besides some that change in either direction by chance."""
    base = rng.random(documents) < right
    found = []
    for cost in costs:
        noise = rng.random(documents) < rng.choice([0.02, 0.1, 0.4])
        other = np.where(noise, rng.random(documents) < right, base)
        other &= rng.random(documents) >= cost
        found.append(accuracy_drop(base.astype(float), other.astype(float)))
    return found


@pytest.mark.parametrize("documents", [8, 200])
def test_where_nothing_is_there_nothing_is_named(documents: int) -> None:
    rng = np.random.default_rng(documents)
    named = 0
    for _ in range(120):
        found = together(drops(rng, documents, np.zeros(LAYERS)), [documents] * LAYERS)
        named += any(verdict != "open" for verdict in verdicts(found))
    # 5 % of 120 is 6; more than 12 has probability 0.01 even then.
    assert named <= 12


@pytest.mark.parametrize("documents", [60, 400])
def test_ranks_hold_the_true_ones_and_what_is_large_is_named(documents: int) -> None:
    costs = np.zeros(LAYERS)
    costs[[0, 3, 7]] = 0.9, 0.7, 0.5
    rng = np.random.default_rng(documents)
    outside = wrong = missed = 0
    for _ in range(80):
        narrow = drops(rng, documents, costs)
        found = together(narrow, [documents] * LAYERS)
        shown = {layer for layer, verdict in enumerate(verdicts(found)) if verdict != "open"}
        wrong += bool(shown - {0, 3, 7})
        missed += bool({0, 3, 7} - shown)
        between = ranks(together(narrow, [documents] * LAYERS, pairs(LAYERS)))
        # The others cost the same, so that any place from 4 on is theirs.
        true = {0: 1, 3: 2, 7: 3}
        outside += any(
            not best <= true.get(layer, worst) <= worst or worst < true.get(layer, 4)
            for layer, (best, worst) in enumerate(between)
        )
    # 5 % of 80 is 4; more than 9 has probability 0.01 even then.
    assert wrong <= 9
    assert outside <= 9
    assert missed <= 9


def test_ranks_by_counting() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        middles, halves = rng.random(6), rng.random(6) / 3
        figures = [Estimate(m, m - h, m + h) for m, h in zip(middles, halves, strict=True)]
        for mine, (best, worst) in zip(figures, ranks(figures), strict=True):
            above = sum(difference(other, mine).low > 0 for other in figures)
            below = sum(difference(mine, other).low > 0 for other in figures)
            assert (best, worst) == (above + 1, 6 - below)
    assert ranks([Estimate(0.5), Estimate(0.2, 0.1, 0.3)]) == [(1, 2), (1, 2)]


def test_a_wider_interval_is_the_one_of_that_level() -> None:
    """Against scipy's own interval at the level of a family of ten."""
    from scipy import stats

    rng = np.random.default_rng(3)
    values = rng.normal(0.2, 1, 30)
    narrow = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    wide = stats.ttest_1samp(values, 0).confidence_interval(1 - 0.05 / 10)
    (found, *_) = together([Estimate(values.mean(), narrow.low, narrow.high)] * 10, [30] * 10)
    assert (found.low, found.high) == pytest.approx((wide.low, wide.high), rel=1e-12)


def test_what_has_no_interval_is_open_and_does_not_count() -> None:
    alone = [Estimate(0.1, 0.05, 0.15, 0.001)]
    both = together([*alone, Estimate(None, reason="no document")], [50, 50])
    assert both[0] == together(alone, [50])[0]
    assert verdicts(both) == ["costs", "open"]
