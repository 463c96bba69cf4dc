"""Confidence sequences against the definition, all orders of a population, and simulation."""

from __future__ import annotations

import doctest
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import optimize, stats

from tracker.metrics import sequences as module
from tracker.metrics.sequences import BETS, BOLDEST, MeanSequences

Array = NDArray[np.float64]
BLOCK = 32
STEPS = 400


def test_docstring_examples() -> None:
    assert doctest.testmod(module).failed == 0


def looks(sequence: MeanSequences, values: Array, block: int = BLOCK) -> Iterator[int]:
    """Look after every block; yields how many documents were seen."""
    for start in range(0, len(values), block):
        sequence.add(values[start : start + block])
        yield min(start + block, len(values))


def shuffled(values: Array, count: int, seed: int = 0) -> Array:
    """`count` random orders of one population, as columns."""
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(values) for _ in range(count)], axis=1)


def drops(documents: int, lost: float, won: float) -> Array:
    """Paired differences of so many documents: shares lost and won, the rest ties."""
    found = np.zeros(documents)
    lose, win = round(documents * lost), round(documents * won)
    found[:lose], found[lose : lose + win] = 1, -1
    return found


# -- the definition --------------------------------------------------------------------------------


class Book:
    """The games of one series in [0, 1], one candidate, bet and document at a time."""

    def __init__(self, population: int, chance: float, within: float | None = None) -> None:
        self.population, self.chance, self.within = population, chance, within
        self.x: list[float] = []
        self.games = {
            (step / STEPS, side): [1.0] * (len(BETS) if within is None else 1)
            for step in range(STEPS + 1)
            for side in (1, -1)
        }
        self.low, self.high = 0.0, 1.0

    def look(self, x: list[float], low: float, high: float) -> None:
        """Bet on further documents, while candidates from low to high are left."""
        mean = (sum(self.x) + 0.5) / (len(self.x) + 1)
        squares = (sum(v * v for v in self.x) + 0.5) / (len(self.x) + 1)
        for value in x:
            left, total = self.population - len(self.x), sum(self.x)
            scale = self.population / left
            ends = [(self.population * bound - total) / left for bound in (low, high)]
            cap = BOLDEST / min(1.0, max(0.5, ends[1], 1 - ends[0]))
            best = BETS if self.within is None else [self.within / (squares - mean**2)]
            bets = [min(bet * scale, cap) for bet in best]
            for (candidate, side), capital in self.games.items():
                rest = (self.population * candidate - total) / left
                for n, bet in enumerate(bets):
                    capital[n] *= max(0.0, 1 + side * bet * (value - rest))
            self.x.append(value)
        rejected: dict[int, list[float]] = {1: [], -1: []}
        for (candidate, side), capital in self.games.items():
            if low <= candidate <= high and np.mean(capital) >= 2 / self.chance:
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
    values = generator.random(150) ** 3 if seed == 3 else generator.random(150) < share
    x = np.asarray(values, dtype=np.float64)[:, None]
    sequence = MeanSequences(150, 1, level=0.9, together=3, lowest=0, highest=1, within=within)
    book = Book(150, 0.1 / 3, within)
    for start in range(0, 150, 13):
        part = x[start : start + 13]
        book.look(part[:, 0].tolist(), float(sequence.low[0]), float(sequence.high[0]))
        sequence.add(part)
        # Never more than the games allow, and little less, but for the boldest bets at first.
        slack = (0.05 if len(book.x) > 30 else 0.3) * (book.high - book.low) + 1e-12
        assert book.low - slack < sequence.low[0] < book.low + 1 / STEPS
        assert book.high - 1 / STEPS < sequence.high[0] < book.high + slack
    assert sequence.low[0] == pytest.approx(sequence.high[0], abs=1e-12)


def test_the_bound_of_documents_that_are_all_right() -> None:
    # Among a billion documents each draw is the same; then 30 right ones, looked at once, leave
    # (1 + λ (1 - m)) ^ 30 of each stake, where no λ risks more than BOLDEST.
    sequence = MeanSequences(10**9, 1, lowest=0, highest=1)
    sequence.add(np.ones((30, 1)))
    bets = np.minimum(BETS, BOLDEST)
    exact = optimize.brentq(lambda m: np.mean((1 + bets * (1 - m)) ** 30) - 2 / 0.05, 0.01, 0.99)
    assert 0.94 * exact < sequence.low[0] <= exact
    assert sequence.high[0] == 1


def capital(sequence: MeanSequences, mean: float, side: int) -> Array:
    """What each bet above (1) or below (-1) a mean in [0, 1] made of its stake, [series, bets]."""
    distance = (mean - sequence._centre)[:, None]
    odd, even = (
        sum(part * distance**degree for degree, part in enumerate(terms))
        for terms in (sequence._odd, sequence._even)
    )
    return np.exp(side * odd + even)


@pytest.mark.parametrize("side", [1, -1])
def test_over_all_orders_no_bet_against_the_true_mean_is_more_than_fair(side: int) -> None:
    # Two drops, two gains, two ties: all 720 orders, one a series.
    orders = np.array(list(itertools.permutations([1.0, 1, -1, -1, 0, 0]))).T
    sequence = MeanSequences(6, 720)
    for seen in looks(sequence, orders, 1):
        means = capital(sequence, 0.5, side).mean(axis=0)
        assert (means < 1 + 1e-9).all()
        if seen < 4:  # after that bets are so large that what is known of them is less
            assert means[-1] > 0.995


def test_a_bet_above_earns_less_against_a_higher_mean() -> None:
    sequence = MeanSequences(400, 3)
    sequence.add(shuffled(drops(400, 0.3, 0.1), 3)[:96])
    low, high = (sequence.low.min() + 1) / 2, (sequence.high.max() + 1) / 2
    above, below = (
        np.array([capital(sequence, mean, side) for mean in np.linspace(low, high, 50)])
        for side in (1, -1)
    )
    assert (np.diff(above, axis=0) < 0).all()
    assert (np.diff(below, axis=0) > 0).all()


@given(st.floats(-BOLDEST, 50))
def test_what_is_said_of_a_logarithm_is_never_too_much(y: float) -> None:
    assert y - y**2 / 2 + y**3 / 3 - module._C * y**4 <= math.log1p(y) + 1e-12


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


def test_more_certainty_and_more_company_make_them_wider() -> None:
    values = shuffled(drops(1000, 0.2, 0.1), 1)[:320]

    def width(**said: float) -> float:
        sequence = MeanSequences(1000, 1, **said)
        sequence.add(values)
        return float(sequence.high[0] - sequence.low[0])

    assert width() < width(level=0.99) < width(level=0.999)
    assert width() < width(together=30)
    assert width(together=50, level=0.95) == width(level=0.999)


def test_not_much_wider_than_an_interval_that_is_looked_at_once() -> None:
    values = shuffled(drops(2000, 0.06, 0.04), 20)
    sequence = MeanSequences(2000, 20, together=1)
    for seen in looks(sequence, values):
        once = stats.norm.ppf(0.975) * values[:, 0].std() * math.sqrt(1 / seen - 1 / 2000)
        if 500 < seen < 1500:
            assert 1 < float((sequence.high - sequence.low).mean()) / (2 * once) < 1.9


@pytest.mark.parametrize("bad", [1.5, -1.1, math.nan, math.inf])
def test_a_value_that_cannot_be_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="a value is not from -1 to 1"):
        MeanSequences(10, 1).add(np.array([[0.5], [bad]]))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="0 documents"):
        MeanSequences(0, 1)
    with pytest.raises(ValueError, match="from 1 to 1"):
        MeanSequences(5, 1, lowest=1, highest=1)
    with pytest.raises(ValueError, match="for 2 series"):
        MeanSequences(5, 2).add(np.zeros((1, 3)))
    sequence = MeanSequences(5, 1)
    sequence.add(np.zeros((3, 1)))
    with pytest.raises(ValueError, match="more than all 5 documents"):
        sequence.add(np.zeros((3, 1)))


# -- coverage --------------------------------------------------------------------------------------


def errors(values: Array, level: float) -> float:
    """The share of series whose mean some look's interval missed."""
    n, count = values.shape
    sequence, missed = MeanSequences(n, count, level=level, together=1), np.zeros(count, dtype=bool)
    mean = values.mean(axis=0)
    for _ in looks(sequence, values):
        missed |= (sequence.low > mean + 1e-9) | (sequence.high < mean - 1e-9)
    return float(missed.mean())


def naive_errors(values: Array, level: float) -> float:
    """The same for an interval that is right when it is looked at once."""
    n, count = values.shape
    missed, mean = np.zeros(count, dtype=bool), values.mean(axis=0)
    far = stats.norm.ppf((1 + level) / 2)
    for seen in range(BLOCK, n, BLOCK):
        sd = values[:seen].std(axis=0, ddof=1)
        half = far * sd * math.sqrt(1 / seen - 1 / n)
        missed |= abs(values[:seen].mean(axis=0) - mean) > half + 1e-9
    return float(missed.mean())


CELLS = {
    "no drop": drops(2000, 0.06, 0.06),
    "a drop of 1 pp": drops(1500, 0.05, 0.04),
    "a drop near 1": drops(1000, 0.97, 0),
    "ties but for a few": drops(1000, 0.004, 0.002),
    "one document is lost": drops(100, 0.01, 0),
    "all the same": drops(100, 0, 0),
    "half lost, half won": drops(570, 0.5, 0.5),
    "parts of a point": np.random.default_rng(1).beta(0.3, 0.4, 1200) - 0.5,
    "fifteen thousand": drops(15000, 0.06, 0.05),
}


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize("cell", CELLS)
def test_no_more_errors_than_promised(cell: str, level: float) -> None:
    assert errors(shuffled(CELLS[cell], 400), level) <= 1 - level


@pytest.mark.parametrize("cell", ["no drop", "a drop of 1 pp", "half lost, half won"])
def test_an_interval_for_one_look_makes_more(cell: str) -> None:
    values = shuffled(CELLS[cell], 600)
    assert naive_errors(values, level=0.95) > 0.15


def test_all_layers_together() -> None:
    # 40 cells of 12 layers on the same documents in the same order, from harmless to ruinous.
    generator, wrong = np.random.default_rng(5), 0
    population = np.stack(
        [generator.permutation(drops(600, lost, 0.03)) for lost in np.linspace(0.03, 0.9, 12)],
        axis=1,
    )
    mean = population.mean(axis=0)
    for _ in range(40):
        values, missed = generator.permutation(population), False
        sequence = MeanSequences(600, 12, level=0.8)
        for _ in looks(sequence, values):
            missed |= bool(((sequence.low > mean + 1e-9) | (sequence.high < mean - 1e-9)).any())
        wrong += missed
    assert wrong <= 8
