"""Test stopping rules and whole races against the truth."""

from __future__ import annotations

import numpy as np
import pytest

from tests.stats.drawn import BLOCK, NOISES, draw_layers, race_smallest
from tracker.schema.questions import parse_question
from tracker.stats.stopping import FIRST_LOOK, Race, forecast_race, half_width, race_state


def bounds(*pairs: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.array(pairs).T
    return low, high


def indexes(*masks: np.ndarray) -> tuple[list[int], ...]:
    return tuple(np.flatnonzero(mask).tolist() for mask in masks)


# -- worked examples -------------------------------------------------------------------------------


def test_drops_are_known_when_no_interval_is_wider_than_twice_what_is_allowed() -> None:
    low, high = bounds((0.0, 0.04), (-0.03, 0.02), (0.5, 0.5))
    assert indexes(*race_state(low, high, tolerance=0.02)) == ([1], [])
    assert not race_state(low, high, tolerance=0.025)[0].any()


def test_a_sign_is_known_when_0_is_outside_or_all_that_is_left() -> None:
    low, high = bounds((0.01, 0.4), (-0.2, -0.01), (-0.1, 0.1), (0.0, 0.0), (0.0, 0.1))
    assert indexes(*race_state(low, high, tolerance=None)) == ([2, 4], [0, 1])


@pytest.mark.parametrize("within", [0.02, 0.1, None])
@pytest.mark.parametrize("seed", range(20))
def test_narrower_bounds_take_nothing_back(within: float | None, seed: int) -> None:
    rng = np.random.default_rng(seed)
    means = np.sort(rng.normal(size=9).round(1)) / 10
    low, high = means - 1, means + 1
    is_open = np.ones(9, dtype=bool)
    while is_open.any() and (high - low).max() > 1e-12:
        still_open, _ = race_state(low, high, within)
        assert not (still_open & ~is_open).any()
        is_open = still_open
        # Only those who are still open are looked at.
        low = np.where(is_open, means - (means - low) * rng.random(9), low)
        high = np.where(is_open, means + (high - means) * rng.random(9), high)
    assert within is None or not is_open.any()


# -- whole races -----------------------------------------------------------------------------------

SHARES = [0.3, 0.22, 0.2, 0.11, 0.1, 0.06, 0.05, 0.02, 0.01, 0.0]


def run_race(text: str, seed: int) -> tuple[Race, np.ndarray]:
    """Run one to its end, with whoever is settled left out; returns it and the true means."""
    rng = np.random.default_rng(seed)
    population = draw_layers(rng, 600, np.array(SHARES) + 0.02, 0.02)
    values = rng.permutation(population)
    # Of layers that are drawn each for itself, one may win what another loses.
    question_ = parse_question(text)
    running = Race(question_, 600, len(SHARES), max_value=1.0 if question_.count is None else 2.0)
    for start in range(0, 600, 32):
        if running.is_answered:
            break
        # Nobody measures what is settled.
        running.update(np.where(running.open, values[start : start + 32], np.nan))
    return running, population.mean(axis=0)


@pytest.mark.parametrize("seed", range(6))
def test_a_race_ends_with_the_true_set_and_costs_less_than_everything(seed: int) -> None:
    result, _ = run_race("top 3", seed)
    assert indexes(result.open, result.chosen) == ([], [0, 1, 2])
    assert result.bounds.seen.mean() < 400
    assert result.bounds.seen.min() < result.bounds.seen.max()
    result, _ = run_race("prune 3", seed)
    assert indexes(result.open, result.chosen) == ([], [7, 8, 9])
    result, means = run_race("top 2 within 5 pp", seed)
    assert result.is_answered
    assert (means[result.chosen] >= np.sort(means)[-2] - 0.05).all()
    result, _ = run_race("sign", seed)
    assert indexes(result.open, result.chosen) == ([], list(range(9)))
    result, means = run_race("drop within 5 pp", seed)
    assert result.is_answered
    assert result.bounds.seen.max() < 600
    assert (abs((result.bounds.low + result.bounds.high) / 2 - means) <= 0.05 + 1e-9).all()


COSTS = [0.5, 0.3, 0.12, 0.05, 0.02]


def draw_losses(n_documents: int) -> np.ndarray:
    """Documents that five layers lose, each its share, and win: some of those that are wrong."""
    rng = np.random.default_rng(3)
    draw, is_wrong = rng.random((n_documents, len(COSTS))), rng.random((n_documents, 1)) < 0.1
    return np.where(is_wrong, -1.0 * (draw > 0.7), draw < COSTS)


def simulate_race(text: str, values: np.ndarray) -> tuple[int, np.ndarray]:
    race, n_looked = Race(parse_question(text), *values.shape), 0
    while n_looked < len(values) and not race.is_answered:
        race.update(values[n_looked : n_looked + 32])
        n_looked += 32
    return min(n_looked, len(values)), race.bounds.seen


@pytest.mark.parametrize("text", ["top 2", "drop within 8 pp"])
def test_from_all_documents_it_is_what_random_orders_take(text: str) -> None:
    values = draw_losses(800)
    forecasts = forecast_race(parse_question(text), values, 800)
    rng = np.random.default_rng(0)
    races = [simulate_race(text, rng.permutation(values)) for _ in range(24)]
    looked, run_documents = (np.array(counts) for counts in zip(*races, strict=True))
    assert 32 < np.median(looked) < 800
    assert np.median(forecasts.looked) == pytest.approx(np.median(looked), rel=0.2)
    assert forecasts.seen.mean(axis=0) == pytest.approx(run_documents.mean(axis=0), rel=0.25)
    assert forecasts.answered.all()


def test_an_exact_tie_is_left_open_by_all_documents() -> None:
    tie = np.zeros((40, 2))
    races = forecast_race(parse_question("top 1"), tie, 100, n_draws=3)
    assert races.looked.tolist() == [100] * 3
    assert races.seen.tolist() == [[100, 100]] * 3
    assert not races.answered.any()


@pytest.mark.parametrize("noise", NOISES)
def test_an_interval_holds_at_every_look_as_often_as_is_said(noise: str) -> None:
    rng, population, draws = np.random.default_rng(0), 1500, 400
    values = NOISES[noise](rng, (population, draws))
    counts = np.arange(FIRST_LOOK, population, BLOCK)
    means = np.cumsum(values, axis=0)[counts - 1] / counts[:, None]
    squares = np.cumsum(values**2, axis=0)[counts - 1] / counts[:, None]
    half_widths = np.array([half_width(count, population, 0.1) for count in counts])
    is_missed = (
        abs(means - values.mean(axis=0)) > np.sqrt(squares - means**2) * half_widths[:, None]
    )
    # A tenth may ever miss; of one look alone hardly any does.
    assert 0.01 < is_missed.any(axis=0).mean() < 0.1 + 3 * (0.1 * 0.9 / draws) ** 0.5
    assert is_missed.mean() < 0.04


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_the_winner_is_as_good_as_the_best_as_often_as_is_said(noise: str, spread: float) -> None:
    """Of 40 candidates, whose means are nearly level, or a little or far apart."""
    rng, n_wrong, shares, draws = np.random.default_rng(1), 0, [], 60
    for _ in range(draws):
        means = rng.exponential(spread, 40) if spread else np.zeros(40)
        values = 0.1 * NOISES[noise](rng, (1200, 40)) + means
        race = race_smallest(values, tolerance=0.005)
        truth = values.mean(axis=0)
        n_wrong += truth[race.chosen].max() > truth.min() + 0.005
        shares.append(race.seen.mean() / len(values))
    assert n_wrong <= 0.05 * draws + 2
    if spread == 0.1:
        assert np.mean(shares) < 0.6, "most leave long before the last document"


def test_all_documents_leave_the_smallest_and_whoever_is_level() -> None:
    values = np.random.default_rng(2).normal(0, 1, (100, 1)) + np.array([[0.1, 0, 0, 0.2]])
    race = race_smallest(values, tolerance=1e-6)
    assert (race.seen == 100).all()
    assert race.chosen.tolist() == [False, True, True, False]
    assert race.means == pytest.approx(values.mean(axis=0))
    with pytest.raises(ValueError, match="more than all 100 documents"):
        race.update(values[:1])


def test_what_has_no_finite_value_is_out_and_costs_infinitely_much() -> None:
    values = np.random.default_rng(3).normal(0, 1, (64, 3))
    values[40, 1] = np.inf
    race = race_smallest(values, tolerance=0.1)
    assert race.means[1] == np.inf
    assert race.seen.tolist() == [64, 64, 64]
    assert not race.chosen[1]
    assert race.chosen.sum() == 1
    undefined = race_smallest(np.full((32, 2), np.nan), tolerance=0.1)
    assert not undefined.open.any()
    assert not undefined.chosen.any()
