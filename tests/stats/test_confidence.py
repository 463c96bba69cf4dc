"""Confidence sequences against the definition, all orders of a population, and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from tests.stats.drawn import (
    BLOCK,
    Array,
    add_blocks,
    draw_layers,
    drops,
    error_rate,
    missed_means,
    shuffled,
)
from tracker.stats import confidence as module
from tracker.stats.confidence import (
    BOLD_DOCUMENTS,
    EARLY_STAKE,
    MAX_RISK,
    N_BOLD_BETS,
    N_EARLY_BETS,
    MeanSequences,
    horizons,
)

STEPS = 250


# -- the definition --------------------------------------------------------------------------------


class NaiveBetting:
    """The games of one series in [0, 1], one candidate, bet and document at a time."""

    def __init__(self, population: int, chance: float, half_width: float | None = None) -> None:
        self.population, self.chance, self.half_width = population, chance, half_width
        self.x: list[float] = []
        self.horizons = [float(horizon) for horizon in horizons(population)]
        shares = [1 / len(self.horizons)] * len(self.horizons)
        if half_width is not None:
            self.horizons = self.horizons[:N_EARLY_BETS]
            shares = [EARLY_STAKE / len(self.horizons)] * len(self.horizons) + [1 - EARLY_STAKE]
        self.log_factor = 2 * (math.log(2 / chance) + math.log(len(shares)))
        steps = itertools.product(range(STEPS + 1), (1, -1))
        self.games = {(step / STEPS, side): list(shares) for step, side in steps}
        self.low, self.high = 0.0, 1.0

    def look(self, values: list[float], low: float, high: float) -> None:
        """Bet on further documents, while candidates from low to high are left."""
        for value in values:
            n_seen, total = len(self.x), sum(self.x)
            mean = (total + 0.5) / (n_seen + 1)
            variance = (sum(v * v for v in self.x) + 0.5) / (n_seen + 1) - mean**2
            n_left = self.population - n_seen
            scale = self.population / n_left
            ends = [(self.population * bound - total) / n_left for bound in (low, high)]
            max_loss = min(1.0, max(0.5, ends[1], 1 - ends[0]))
            bets = [math.sqrt(self.log_factor / variance / tau) * scale for tau in self.horizons]
            if self.half_width is not None:
                bets.append(self.half_width / variance * scale)
            for (candidate, side), stakes in self.games.items():
                rest_mean = (self.population * candidate - total) / n_left
                if not 0 <= rest_mean <= 1:
                    continue
                max_bet_loss = rest_mean if side == 1 else 1 - rest_mean
                for n, bet in enumerate(bets):
                    if n < N_BOLD_BETS and n_seen >= BOLD_DOCUMENTS:
                        stakes[n] = 0.0
                        continue
                    limit = max_bet_loss if n < N_BOLD_BETS else max_loss
                    risk = min(bet, MAX_RISK / max(1e-9, limit))
                    stakes[n] *= 1 + side * risk * (value - rest_mean)
            self.x.append(value)
        rejected: dict[int, list[float]] = {1: [], -1: []}
        for (candidate, side), stakes in self.games.items():
            if low <= candidate <= high and sum(stakes) >= 2 / self.chance:
                rejected[side].append(candidate)
        certain_low = sum(self.x) / self.population
        certain_high = certain_low + 1 - len(self.x) / self.population
        self.low = max([self.low, certain_low, *rejected[1]])
        self.high = min([self.high, certain_high, *rejected[-1]])


@pytest.mark.parametrize("half_width", [None, 0.04])
@pytest.mark.parametrize("seed", range(4))
def test_one_candidate_and_one_bet_at_a_time(seed: int, half_width: float | None) -> None:
    rng = np.random.default_rng(seed)
    share = [0.5, 0.95, 0.02, 0.3][seed]
    values = rng.random(320) ** 3 if seed == 3 else rng.random(320) < share
    x = np.asarray(values, dtype=np.float64)[:, None]
    settings = {"min_value": 0, "max_value": 1, "half_width": half_width}
    sequence = MeanSequences(320, 1, level=0.9, family=3, **settings)
    naive = NaiveBetting(320, 0.1 / 3, half_width)
    for start in range(0, 320, 29):
        block = x[start : start + 29]
        naive.look(block[:, 0].tolist(), float(sequence.low[0]), float(sequence.high[0]))
        sequence.add(block)
        # Never more than the games allow, and little less.
        slack = 0.03 * (naive.high - naive.low) + 1e-12
        assert naive.low - slack < sequence.low[0] < naive.low + 1 / STEPS
        assert naive.high - 1 / STEPS < sequence.high[0] < naive.high + slack
    assert sequence.low[0] == pytest.approx(sequence.high[0], abs=1e-12)


def test_the_bound_of_documents_that_are_all_right() -> None:
    # Among a billion documents each draw is the same; then 30 right ones, looked at once, leave
    # a product of 1 + λ (1 - m) of each stake, where no λ risks more than MAX_RISK.
    sequence = MeanSequences(10**9, 1, min_value=0, max_value=1)
    sequence.add(np.ones((30, 1)))
    means = (np.arange(30) + 0.5) / (np.arange(30) + 1)
    tau = horizons(10**9)[:, None]
    bets = np.sqrt(2 * math.log(2 / 0.05 * len(tau)) / (means * (1 - means) * tau))

    def missing_capital(mean: float) -> float:
        losses = np.where(np.arange(len(tau)) < N_BOLD_BETS, mean, 1)[:, None]
        risks = np.minimum(bets, MAX_RISK / losses)
        return float(np.mean(np.prod(1 + risks * (1 - mean), axis=1)) - 2 / 0.05)

    exact = optimize.brentq(missing_capital, 0.01, 0.99)
    assert 0.99 * exact < sequence.low[0] <= exact
    assert sequence.high[0] == 1


def bet_capital(sequence: MeanSequences, mean: float, side: int) -> Array:
    """Return the capital of each bet above (1) or below (-1) a mean in [0, 1], [bets, series]."""
    indexes = np.arange(len(sequence.low))
    stakes = (sequence._bold_stakes(indexes), sequence._cautious_stakes(indexes))
    candidates = np.full((2, len(indexes)), mean)
    log_capital = np.concatenate([log_stakes(candidates) for log_stakes in stakes])
    return np.exp(log_capital)[:, 0 if side == 1 else 1]


@pytest.mark.parametrize("within", [None, 0.2])
@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize(
    "values", [(1, 1, -1, -1, 0, 0), (1, 0, 0, 0, 0, -0.7), (1, 1, 1, 1, 1, -1)]
)
def test_over_all_orders_no_bet_against_the_true_mean_is_more_than_fair(values, side, within):
    # All 720 orders, one a series.
    orders = np.array(list(itertools.permutations(values)), dtype=np.float64).T
    sequence = MeanSequences(6, 720, half_width=within)
    true_mean = (np.mean(values) + 1) / 2
    for _ in add_blocks(sequence, orders, 1):
        means = bet_capital(sequence, float(true_mean), side).mean(axis=1)
        # A cut that is the same in all orders so far keeps a bet fair; the others are worth more.
        n_bold = len(sequence._bold_taus)
        assert means[:n_bold] == pytest.approx(np.ones(n_bold), abs=1e-9)
        assert (means < 1 + 1e-9).all()


@given(st.floats(-MAX_RISK, 50))
def test_what_is_said_of_a_logarithm_is_never_too_much(y: float) -> None:
    bound = sum(weight * y**power for power, weight in enumerate(module._LOG_COEFFICIENTS))
    assert bound <= math.log1p(y) + 1e-12


# -- what is promised ------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [1, 5, 31, 32, 33, 570])
def test_at_the_end_they_are_the_mean(documents: int) -> None:
    values = shuffled(drops(documents, 0.25, 0.1), 4)
    sequence = MeanSequences(documents, 4)
    widths = [sequence.high - sequence.low for _ in add_blocks(sequence, values)]
    assert sequence.low.tolist() == sequence.high.tolist()
    assert sequence.low == pytest.approx(values.mean(axis=0), abs=1e-12)
    assert (np.diff(widths, axis=0) <= 0).all()


def test_who_is_left_out_keeps_its_bounds_and_changes_no_other() -> None:
    values = shuffled(drops(320, 0.2, 0.05), 3)
    pair, triple = MeanSequences(320, 2, family=3), MeanSequences(320, 3)
    remaining, pair_indexes = np.array([0, 2]), np.array([0, 1])
    for start in range(0, 320, BLOCK):
        rows = slice(start, start + BLOCK)
        pair.add(values[rows][:, remaining], pair_indexes)
        if start < 96:
            triple.add(values[rows])
            bounds = triple.low[1], triple.high[1]
        else:
            triple.add(values[rows][:, remaining], remaining)
        assert triple.low[remaining].tolist() == pair.low.tolist()
        assert triple.high[remaining].tolist() == pair.high.tolist()
    assert (triple.low[1], triple.high[1]) == bounds
    assert triple.seen.tolist() == [320, 96, 320]
    # It comes back: as if it had never been away.
    single = MeanSequences(320, 1, family=3)
    for start in range(0, 320, BLOCK):
        rows = slice(start, start + BLOCK)
        single.add(values[rows][:, 1:2])
        if start >= 96:
            triple.add(values[rows][:, 1:2], np.array([1]))
    assert triple.low[1] == single.low[0] == triple.high[1]


@pytest.mark.parametrize("bad", [1.5, -1.1, math.nan, math.inf])
def test_a_value_that_cannot_be_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="a value is outside the range -1 to 1"):
        MeanSequences(10, 1).add(np.array([[0.5], [bad]]))


def test_more_documents_than_there_are_are_refused() -> None:
    sequence = MeanSequences(5, 1)
    sequence.add(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="more than all 5 documents"):
        sequence.add(np.zeros((3, 1)))


# -- coverage --------------------------------------------------------------------------------------


CELLS = {
    "no drop": drops(2000, 0.06, 0.06),
    "a drop of 1 pp": drops(1500, 0.05, 0.04),
    "a drop near 1": drops(1000, 0.97, 0),
    "ties but for a few": drops(1000, 0.004, 0.002),
    "one document is lost": drops(100, 0.01, 0),
    "all the same": drops(100, 0, 0),
    "half lost, half won": drops(570, 0.5, 0.5),
    "twenty documents": drops(20, 0.35, 0.2),
    "all lost but one": drops(40, 0.975, 0.025),
    "parts of a point": np.random.default_rng(1).beta(0.3, 0.4, 1200) - 0.5,
    "fifteen thousand": drops(15000, 0.06, 0.05),
}


@pytest.mark.parametrize("cell", CELLS)
def test_no_more_errors_than_promised(cell: str) -> None:
    orders = 400 if len(CELLS[cell]) <= 2000 else 50
    assert error_rate(shuffled(CELLS[cell], orders), 0.8) <= 0.2


@pytest.mark.parametrize("cell", [cell for cell in CELLS if len(CELLS[cell]) <= 2000])
def test_no_more_errors_where_one_width_is_wanted(cell: str) -> None:
    assert error_rate(shuffled(CELLS[cell], 400), 0.8, half_width=0.05) <= 0.2


def test_all_layers_together() -> None:
    # 20 cells of 12 layers on the same documents in the same order, from harmless to ruinous.
    rng, n_wrong = np.random.default_rng(5), 0
    population = draw_layers(rng, 600, np.linspace(0.03, 0.9, 12), 0.03)
    for _ in range(20):
        sequence = MeanSequences(600, 12, level=0.8)
        n_wrong += missed_means(sequence, rng.permutation(population)).any()
    assert n_wrong <= 4
