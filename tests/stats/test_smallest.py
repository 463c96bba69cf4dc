"""The smallest of means without bounds: simulated error rates, and what it does at the ends."""

from __future__ import annotations

import numpy as np
import pytest

from tests.stats.drawn import BLOCK, NOISES, race_smallest
from tracker.stats.stopping import FIRST, width


@pytest.mark.parametrize("noise", NOISES)
def test_an_interval_holds_at_every_look_as_often_as_is_said(noise: str) -> None:
    dice, population, draws = np.random.default_rng(0), 1500, 400
    values = NOISES[noise](dice, (population, draws))
    looks = np.arange(FIRST, population, BLOCK)
    means = np.cumsum(values, axis=0)[looks - 1] / looks[:, None]
    squares = np.cumsum(values**2, axis=0)[looks - 1] / looks[:, None]
    half = np.array([width(look, population, 0.1) for look in looks])
    missed = abs(means - values.mean(axis=0)) > np.sqrt(squares - means**2) * half[:, None]
    # A tenth may ever miss; of one look alone hardly any does.
    assert 0.01 < missed.any(axis=0).mean() < 0.1 + 3 * (0.1 * 0.9 / draws) ** 0.5
    assert missed.mean() < 0.04


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_the_winner_is_as_good_as_the_best_as_often_as_is_said(noise: str, spread: float) -> None:
    """Of 40 candidates, whose means are nearly level, or a little or far apart."""
    dice, wrong, taken, draws = np.random.default_rng(1), 0, [], 60
    for _ in range(draws):
        means = dice.exponential(spread, 40) if spread else np.zeros(40)
        values = 0.1 * NOISES[noise](dice, (1200, 40)) + means
        race = race_smallest(values, within=0.005)
        truth = values.mean(axis=0)
        wrong += truth[race.chosen].max() > truth.min() + 0.005
        taken.append(race.seen.mean() / len(values))
    assert wrong <= 0.05 * draws + 2
    if spread == 0.1:
        assert np.mean(taken) < 0.6, "most leave long before the last document"


def test_all_documents_leave_the_smallest_and_whoever_is_level() -> None:
    values = np.random.default_rng(2).normal(0, 1, (100, 1)) + np.array([[0.1, 0, 0, 0.2]])
    race = race_smallest(values, within=1e-6)
    assert (race.seen == 100).all()
    assert race.chosen.tolist() == [False, True, True, False]
    assert race.means == pytest.approx(values.mean(axis=0))
    with pytest.raises(ValueError, match="more than all 100 documents"):
        race.look(values[:1])


def test_what_has_no_finite_value_is_out_and_costs_infinitely_much() -> None:
    values = np.random.default_rng(3).normal(0, 1, (64, 3))
    values[40, 1] = np.inf
    race = race_smallest(values, within=0.1)
    assert race.means[1] == np.inf
    assert race.seen.tolist() == [64, 64, 64]
    assert not race.chosen[1]
    assert race.chosen.sum() == 1
    none = race_smallest(np.full((32, 2), np.nan), within=0.1)
    assert not none.open.any()
    assert not none.chosen.any()
