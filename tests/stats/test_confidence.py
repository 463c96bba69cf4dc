"""Confidence sequences against the definition, all orders of a population, and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize

from tests.stats.drawn import BLOCK, Array, drops, errors, layers_of, looks, missed, shuffled
from tracker.stats import confidence as module
from tracker.stats.confidence import (
    BOLD,
    BOLD_ON,
    BOLDEST,
    EARLY,
    EARLY_SHARE,
    MeanSequences,
    horizons,
)

STEPS = 250


# -- the definition --------------------------------------------------------------------------------


class Book:
    """The games of one series in [0, 1], one candidate, bet and document at a time."""

    def __init__(self, population: int, chance: float, within: float | None = None) -> None:
        self.population, self.chance, self.within = population, chance, within
        self.x: list[float] = []
        self.horizons = [float(each) for each in horizons(population)]
        shares = [1 / len(self.horizons)] * len(self.horizons)
        if within is not None:
            self.horizons = self.horizons[:EARLY]
            shares = [EARLY_SHARE / len(self.horizons)] * len(self.horizons) + [1 - EARLY_SHARE]
        self.boldness = 2 * (math.log(2 / chance) + math.log(len(shares)))
        steps = itertools.product(range(STEPS + 1), (1, -1))
        self.games = {(step / STEPS, side): list(shares) for step, side in steps}
        self.low, self.high = 0.0, 1.0

    def look(self, x: list[float], low: float, high: float) -> None:
        """Bet on further documents, while candidates from low to high are left."""
        for value in x:
            seen, total = len(self.x), sum(self.x)
            mean = (total + 0.5) / (seen + 1)
            variance = (sum(v * v for v in self.x) + 0.5) / (seen + 1) - mean**2
            left = self.population - seen
            scale = self.population / left
            ends = [(self.population * bound - total) / left for bound in (low, high)]
            worst = min(1.0, max(0.5, ends[1], 1 - ends[0]))
            bets = [math.sqrt(self.boldness / variance / tau) * scale for tau in self.horizons]
            if self.within is not None:
                bets.append(self.within / variance * scale)
            for (candidate, side), stakes in self.games.items():
                rest = (self.population * candidate - total) / left
                if not 0 <= rest <= 1:
                    continue
                room = rest if side == 1 else 1 - rest
                for n, bet in enumerate(bets):
                    if n < BOLD and seen >= BOLD_ON:
                        stakes[n] = 0.0
                        continue
                    cut = min(bet, BOLDEST / max(1e-9, room if n < BOLD else worst))
                    stakes[n] *= 1 + side * cut * (value - rest)
            self.x.append(value)
        rejected: dict[int, list[float]] = {1: [], -1: []}
        for (candidate, side), stakes in self.games.items():
            if low <= candidate <= high and sum(stakes) >= 2 / self.chance:
                rejected[side].append(candidate)
        least = sum(self.x) / self.population
        most = least + 1 - len(self.x) / self.population
        self.low = max([self.low, least, *rejected[1]])
        self.high = min([self.high, most, *rejected[-1]])


@pytest.mark.parametrize("within", [None, 0.04])
@pytest.mark.parametrize("seed", range(4))
def test_one_candidate_and_one_bet_at_a_time(seed: int, within: float | None) -> None:
    generator = np.random.default_rng(seed)
    share = [0.5, 0.95, 0.02, 0.3][seed]
    values = generator.random(320) ** 3 if seed == 3 else generator.random(320) < share
    x = np.asarray(values, dtype=np.float64)[:, None]
    sequence = MeanSequences(320, 1, level=0.9, together=3, lowest=0, highest=1, within=within)
    book = Book(320, 0.1 / 3, within)
    for start in range(0, 320, 29):
        part = x[start : start + 29]
        book.look(part[:, 0].tolist(), float(sequence.low[0]), float(sequence.high[0]))
        sequence.add(part)
        # Never more than the games allow, and little less.
        slack = 0.03 * (book.high - book.low) + 1e-12
        assert book.low - slack < sequence.low[0] < book.low + 1 / STEPS
        assert book.high - 1 / STEPS < sequence.high[0] < book.high + slack
    assert sequence.low[0] == pytest.approx(sequence.high[0], abs=1e-12)


def test_the_bound_of_documents_that_are_all_right() -> None:
    # Among a billion documents each draw is the same; then 30 right ones, looked at once, leave
    # a product of 1 + λ (1 - m) of each stake, where no λ risks more than BOLDEST.
    sequence = MeanSequences(10**9, 1, lowest=0, highest=1)
    sequence.add(np.ones((30, 1)))
    right = (np.arange(30) + 0.5) / (np.arange(30) + 1)
    tau = horizons(10**9)[:, None]
    bets = np.sqrt(2 * math.log(2 / 0.05 * len(tau)) / (right * (1 - right) * tau))

    def lacking(mean: float) -> float:
        cut = np.minimum(bets, BOLDEST / np.where(np.arange(len(tau)) < BOLD, mean, 1)[:, None])
        return float(np.mean(np.prod(1 + cut * (1 - mean), axis=1)) - 2 / 0.05)

    exact = optimize.brentq(lacking, 0.01, 0.99)
    assert 0.99 * exact < sequence.low[0] <= exact
    assert sequence.high[0] == 1


def made(sequence: MeanSequences, mean: float, side: int) -> Array:
    """Return the capital of each bet above (1) or below (-1) a mean in [0, 1], [bets, series]."""
    which = np.arange(len(sequence.low))
    stakes = (sequence._bold_stakes(which), sequence._cautious_stakes(which))
    logs = np.concatenate([of(np.full((2, len(which)), mean)) for of in stakes])
    return np.exp(logs)[:, 0 if side == 1 else 1]


@pytest.mark.parametrize("within", [None, 0.2])
@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize(
    "values", [(1, 1, -1, -1, 0, 0), (1, 0, 0, 0, 0, -0.7), (1, 1, 1, 1, 1, -1)]
)
def test_over_all_orders_no_bet_against_the_true_mean_is_more_than_fair(values, side, within):
    # All 720 orders, one a series.
    orders = np.array(list(itertools.permutations(values)), dtype=np.float64).T
    sequence = MeanSequences(6, 720, within=within)
    true = (np.mean(values) + 1) / 2
    for _ in looks(sequence, orders, 1):
        means = made(sequence, float(true), side).mean(axis=1)
        # A cut that is the same in all orders so far keeps a bet fair; the others are worth more.
        bold = len(sequence._bold)
        assert means[:bold] == pytest.approx(np.ones(bold), abs=1e-9)
        assert (means < 1 + 1e-9).all()


@given(st.floats(-BOLDEST, 50))
def test_what_is_said_of_a_logarithm_is_never_too_much(y: float) -> None:
    bound = sum(weight * y**power for power, weight in enumerate(module._WEIGHTS))
    assert bound <= math.log1p(y) + 1e-12


# -- what is promised ------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [1, 5, 31, 32, 33, 570])
def test_at_the_end_they_are_the_mean(documents: int) -> None:
    values = shuffled(drops(documents, 0.25, 0.1), 4)
    sequence = MeanSequences(documents, 4)
    widths = [sequence.high - sequence.low for _ in looks(sequence, values)]
    assert sequence.low.tolist() == sequence.high.tolist()
    assert sequence.low == pytest.approx(values.mean(axis=0), abs=1e-12)
    assert (np.diff(widths, axis=0) <= 0).all()


def test_who_is_left_out_keeps_its_bounds_and_changes_no_other() -> None:
    values = shuffled(drops(320, 0.2, 0.05), 3)
    alone, one_leaves = MeanSequences(320, 2, together=3), MeanSequences(320, 3)
    stay, both = np.array([0, 2]), np.array([0, 1])
    for start in range(0, 320, BLOCK):
        rows = slice(start, start + BLOCK)
        alone.add(values[rows][:, stay], both)
        if start < 96:
            one_leaves.add(values[rows])
            left = one_leaves.low[1], one_leaves.high[1]
        else:
            one_leaves.add(values[rows][:, stay], stay)
        assert one_leaves.low[stay].tolist() == alone.low.tolist()
        assert one_leaves.high[stay].tolist() == alone.high.tolist()
    assert (one_leaves.low[1], one_leaves.high[1]) == left
    assert one_leaves.seen.tolist() == [320, 96, 320]
    # It comes back: as if it had never been away.
    whole = MeanSequences(320, 1, together=3)
    for start in range(0, 320, BLOCK):
        rows = slice(start, start + BLOCK)
        whole.add(values[rows][:, 1:2])
        if start >= 96:
            one_leaves.add(values[rows][:, 1:2], np.array([1]))
    assert one_leaves.low[1] == whole.low[0] == one_leaves.high[1]


@pytest.mark.parametrize("bad", [1.5, -1.1, math.nan, math.inf])
def test_a_value_that_cannot_be_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="a value is not from -1 to 1"):
        MeanSequences(10, 1).add(np.array([[0.5], [bad]]))


def test_more_documents_than_there_are_are_refused() -> None:
    sequence = MeanSequences(5, 1)
    sequence.add(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="more than all 5 documents"):
        sequence.add(np.zeros((3, 1)))


# -- beside plain betting --------------------------------------------------------------------------


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
    assert errors(shuffled(CELLS[cell], orders), 0.8) <= 0.2


@pytest.mark.parametrize("cell", [cell for cell in CELLS if len(CELLS[cell]) <= 2000])
def test_no_more_errors_where_one_width_is_wanted(cell: str) -> None:
    assert errors(shuffled(CELLS[cell], 400), 0.8, within=0.05) <= 0.2


def test_all_layers_together() -> None:
    # 20 cells of 12 layers on the same documents in the same order, from harmless to ruinous.
    generator, wrong = np.random.default_rng(5), 0
    population = layers_of(generator, 600, np.linspace(0.03, 0.9, 12), 0.03)
    for _ in range(20):
        sequence = MeanSequences(600, 12, level=0.8)
        wrong += missed(sequence, generator.permutation(population)).any()
    assert wrong <= 4
