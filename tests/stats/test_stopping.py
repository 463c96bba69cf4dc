"""Who is settled, and whole races against the truth."""

from __future__ import annotations

import numpy as np
import pytest

from tests.stats.drawn import layers_of
from tracker.core.questions import question
from tracker.stats.stopping import Race, Standing, standing


def bounds(*pairs: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.array(pairs).T
    return low, high


def said(found: Standing) -> tuple[list[int], list[int]]:
    return np.flatnonzero(found.open).tolist(), np.flatnonzero(found.chosen).tolist()


# -- worked examples -------------------------------------------------------------------------------


def test_drops_are_known_when_no_interval_is_wider_than_twice_what_is_allowed() -> None:
    low, high = bounds((0.0, 0.04), (-0.03, 0.02), (0.5, 0.5))
    assert said(standing(low, high, within=0.02)) == ([1], [])
    assert standing(low, high, within=0.025).answered


def test_a_sign_is_known_when_0_is_outside_or_all_that_is_left() -> None:
    low, high = bounds((0.01, 0.4), (-0.2, -0.01), (-0.1, 0.1), (0.0, 0.0), (0.0, 0.1))
    assert said(standing(low, high, within=None)) == ([2, 4], [0, 1])


@pytest.mark.parametrize("within", [0.02, 0.1, None])
@pytest.mark.parametrize("seed", range(20))
def test_narrower_bounds_take_nothing_back(within: float | None, seed: int) -> None:
    generator = np.random.default_rng(seed)
    means = np.sort(generator.normal(size=9).round(1)) / 10
    low, high = means - 1, means + 1
    before = np.ones(9, dtype=bool)
    while before.any() and (high - low).max() > 1e-12:
        found = standing(low, high, within)
        assert not (found.open & ~before).any()
        before = found.open
        # Only those who are still open are looked at.
        low = np.where(before, means - (means - low) * generator.random(9), low)
        high = np.where(before, means + (high - means) * generator.random(9), high)
    assert within is None or not before.any()


# -- whole races -----------------------------------------------------------------------------------

SHARES = [0.3, 0.22, 0.2, 0.11, 0.1, 0.06, 0.05, 0.02, 0.01, 0.0]


def race(text: str, seed: int) -> tuple[Race, np.ndarray]:
    """Run one to its end, with whoever is settled left out; returns it and the true means."""
    generator = np.random.default_rng(seed)
    population = layers_of(generator, 600, np.array(SHARES) + 0.02, 0.02)
    drawn = generator.permutation(population)
    # Of layers that are drawn each for itself, one may win what another loses.
    asked = question(text)
    found = Race(asked, 600, len(SHARES), reach=1.0 if asked.count is None else 2.0)
    for start in range(0, 600, 32):
        if found.standing.answered:
            break
        # Nobody measures what is settled.
        found.look(np.where(found.standing.open, drawn[start : start + 32], np.nan))
    return found, population.mean(axis=0)


@pytest.mark.parametrize("seed", range(6))
def test_a_race_ends_with_the_true_set_and_costs_less_than_everything(seed: int) -> None:
    found, _ = race("top 3", seed)
    assert said(found.standing) == ([], [0, 1, 2])
    assert found.bounds.seen.mean() < 400
    assert found.bounds.seen.min() < found.bounds.seen.max()
    found, _ = race("prune 3", seed)
    assert said(found.standing) == ([], [7, 8, 9])
    found, means = race("top 2 within 5 pp", seed)
    assert found.standing.answered
    assert (means[found.standing.chosen] >= np.sort(means)[-2] - 0.05).all()
    found, _ = race("sign", seed)
    assert said(found.standing) == ([], list(range(9)))
    found, means = race("drop within 5 pp", seed)
    assert found.standing.answered
    assert found.bounds.seen.max() < 600
    assert (abs((found.bounds.low + found.bounds.high) / 2 - means) <= 0.05 + 1e-9).all()
