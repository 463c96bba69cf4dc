"""Confidence sequences against the definition, all orders of a population, and simulation."""

from __future__ import annotations

import doctest
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, stats

from tracker.metrics import sequences as module
from tracker.metrics.sequences import FRACTIONS, STEPS, MeanSequences

Array = NDArray[np.float64]
BLOCK = 32


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


def by_the_book(x: list[float], population: int, chance: float, steps: int) -> tuple[float, float]:
    """The interval of values in [0, 1] after the last look, one candidate and bet at a time."""

    def wealth(values: list[float], mean: float) -> float:
        total = 0.0
        for fraction in FRACTIONS:
            capital = 1.0
            for t, value in enumerate(values):
                rest = (population * mean - sum(values[:t])) / (population - t)
                if rest <= 0:
                    return math.inf if sum(values[:t]) > population * mean else 0.0
                capital *= 1 + fraction * (value / rest - 1)
            total += capital / len(FRACTIONS)
        return total

    candidates = [step / steps for step in range(steps + 1)]
    low = [m for m in candidates if wealth(x, m) >= 2 / chance]
    high = [m for m in candidates if wealth([1 - v for v in x], 1 - m) >= 2 / chance]
    return (
        max([sum(x) / population, *low]),
        min([(sum(x) + population - len(x)) / population, *high]),
    )


@pytest.mark.parametrize("seed", range(4))
def test_one_candidate_and_one_bet_at_a_time(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 100)
    generator = np.random.default_rng(seed)
    share = [0.5, 0.95, 0.02, 0.3][seed]
    values = generator.random(90) ** 3 if seed == 3 else generator.random(90) < share
    x = np.asarray(values, dtype=np.float64)[:, None]
    sequence = MeanSequences(90, 1, level=0.9, together=3, lowest=0, highest=1)
    low, high = 0.0, 1.0
    for seen in looks(sequence, x, 13):
        least, most = by_the_book(x[:seen, 0].tolist(), 90, 0.1 / 3, 100)
        low, high = max(low, least), min(high, most)
        assert sequence.low[0] == pytest.approx(low, abs=1e-12)
        assert sequence.high[0] == pytest.approx(high, abs=1e-12)
    assert low == pytest.approx(high, abs=1e-12)


def test_the_bound_of_documents_that_are_all_right() -> None:
    # Among a billion documents each draw is the same; then 30 right ones leave
    # (1 + f (1 / m - 1)) ^ 30 of each stake.
    sequence = MeanSequences(10**9, 1, lowest=0, highest=1)
    sequence.add(np.ones((30, 1)))
    exact = optimize.brentq(
        lambda m: np.mean((1 + FRACTIONS * (1 / m - 1)) ** 30) - 2 / 0.05, 0.01, 0.99
    )
    assert exact - 1 / STEPS < sequence.low[0] <= exact
    assert sequence.high[0] == 1


def test_over_all_orders_every_bet_against_the_true_mean_is_fair() -> None:
    # Two drops, two gains, two ties: all 720 orders, one a series.
    orders = np.array(list(itertools.permutations([1.0, 1, -1, -1, 0, 0]))).T
    sequence = MeanSequences(6, 720)
    for seen in looks(sequence, orders, 1):
        means = np.exp(sequence._capital[..., STEPS // 2]).mean(axis=0)
        assert (means < 1 + 1e-9).all()
        if seen < 5:  # after that, a rest of -1 alone makes bets smaller
            assert means == pytest.approx(np.ones_like(means))


def test_a_bet_above_earns_less_against_a_higher_mean() -> None:
    sequence = MeanSequences(400, 3)
    sequence.add(shuffled(drops(400, 0.3, 0.1), 3)[:96])
    above, below = sequence._capital[:, 0], sequence._capital[:, 1]
    possible = slice(STEPS // 4, STEPS * 3 // 4)  # no document decides these alone
    assert (np.diff(above[..., possible]) < 0).all()
    assert (np.diff(below[..., possible]) > 0).all()


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
}


@pytest.mark.parametrize("cell", CELLS)
def test_no_more_errors_than_promised(cell: str) -> None:
    assert errors(shuffled(CELLS[cell], 150), level=0.8) <= 0.2


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
