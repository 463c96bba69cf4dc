"""Sequential top-k against the definition, all orders of a population, and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tests.stats.drawn import BLOCK, Array, draw_layers
from tracker.stats.stopping import BET_FRACTIONS, MAX_BET_FRACTION, SequentialTopK


def run_race(duels: SequentialTopK, values: Array, block: int = BLOCK) -> SequentialTopK:
    """Look until it is answered, at nobody who is settled."""
    for start in range(0, len(values), block):
        if duels.open.any():
            duels.update(np.where(duels.open, values[start : start + block], np.nan))
    return duels


def draw_population(shares: list[float], n_documents: int, seed: int = 0) -> Array:
    """Draw drops of runs; each loses its share of the documents and wins 3 %."""
    return draw_layers(np.random.default_rng(seed), n_documents, np.array(shares) + 0.03, 0.03)


# -- the definition --------------------------------------------------------------------------------


def naive_capital(a: Array, b: Array, n: int, null: float, reach: float) -> float:
    """Compute the capital of bets that b is larger, if a is larger by `null`, one by one."""
    total = 0.0
    for fraction in BET_FRACTIONS:
        capital, observed = 1.0, 0.0
        for index, difference in enumerate(a - b):
            rest = (n * null - observed) / (n - index)
            risk = min(fraction * n / (n - index), MAX_BET_FRACTION)
            capital *= 1 + risk * (rest - difference) / max(reach - rest, 1e-6 * reach)
            observed += difference
        total += capital / len(BET_FRACTIONS)
    return total


@pytest.mark.parametrize("tolerance", [None, 0.05])
@pytest.mark.parametrize("seed", range(4))
def test_one_pair_and_one_bet_at_a_time(seed: int, tolerance: float | None) -> None:
    rng = np.random.default_rng(seed)
    values = rng.permutation(draw_population([0.3, 0.1, 0.25, 0.2, 0.0], 300, seed))
    duels = SequentialTopK(300, 5, 2, tolerance=tolerance, level=0.9, max_difference=2)
    every_run = set(range(5))
    beaten: set[tuple[int, int]] = set()  # (who, by whom), and the same within the tolerance
    nearly: set[tuple[int, int]] = set()
    for start in range(0, 300, 20):
        if not duels.open.any():
            break
        runs, prefix = np.flatnonzero(duels.open), values[: start + 20]
        duels.update(values[start : start + 20])
        for a, b in itertools.permutations(runs, 2):
            pair = prefix[:, a], prefix[:, b]
            if naive_capital(*pair, 300, -1e-9, 2) >= 6 / 0.1:
                beaten.add((a, b))
            if tolerance and naive_capital(*pair, 300, tolerance + 1e-9, 2) >= 6 / 0.1:
                nearly.add((a, b))
        # All sets of two of which nobody is beaten by anyone outside.
        sets = [
            {*pair}
            for pair in itertools.combinations(range(5), 2)
            if not any((a, b) in beaten for a in pair for b in every_run - {*pair})
        ]
        chosen, settled = set(np.flatnonzero(duels.chosen)), set(np.flatnonzero(~duels.open))
        for winners in sets:
            if duels.open.any() or tolerance is None:
                assert chosen <= winners
                assert not (settled - chosen) & winners
            else:
                wrong = itertools.product((every_run - chosen) & winners, chosen - winners)
                assert nearly.issuperset(wrong)
        assert len(sets) > 1 or not duels.open.any()
    assert duels.chosen.sum() == 2


def test_over_all_orders_every_duel_between_equals_is_fair() -> None:
    # Two runs that are both right twice, never on the same document: the null hypothesis.
    capitals = []
    for order in itertools.permutations([(1.0, 0.0), (1, 0), (0, 1), (0, 1), (0, 0), (1, 1)]):
        duels = SequentialTopK(6, 2, 1)
        for values in order[:4]:
            duels.update(np.array([values]))
        assert duels.open.all()
        capitals.append(np.exp(duels._capital[:, [0, 1], [1, 0], 0]))
    # Later a bet may be cut, where nothing but the worst can follow.
    assert np.mean(capitals, axis=0) == pytest.approx(np.ones((len(BET_FRACTIONS), 2)), abs=1e-6)


# -- what is promised ------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [2, 31, 32, 33, 200])
@pytest.mark.parametrize("seed", range(3))
def test_all_documents_answer_but_for_ties(documents: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 2, (documents, 5)).astype(float)
    means = values.mean(axis=0)
    third_mean, fourth_mean = np.sort(means)[[-3, -4]]
    duels = run_race(SequentialTopK(documents, 5, 3), values)
    assert duels.open.any() == (third_mean == fourth_mean)
    assert (means[duels.chosen] >= third_mean).all()
    if third_mean > fourth_mean:
        assert duels.chosen.tolist() == (means >= third_mean).tolist()
    else:
        assert means[duels.open] == pytest.approx(third_mean)
    tolerant = run_race(SequentialTopK(documents, 5, 3, tolerance=0.001), values)
    assert not tolerant.open.any()
    assert tolerant.chosen.sum() == 3
    assert (means[tolerant.chosen] >= third_mean).all()


def test_an_exact_distance_of_the_tolerance_is_tolerated() -> None:
    values = np.zeros((200, 2))
    values[:10, 0], values[10:12, 1] = 1, 1  # 4 pp apart
    duels = run_race(SequentialTopK(200, 2, 1, tolerance=0.04, max_difference=2), values[::-1])
    assert not duels.open.any()


def test_what_does_not_fit_is_refused() -> None:
    duels = SequentialTopK(5, 2, 1)
    for values in ([[2.0, 0.0]], [[math.nan, 0.0]]):
        with pytest.raises(ValueError, match="differ by more than 1"):
            duels.update(np.array(values))
    duels.update(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="more than all 5 documents"):
        duels.update(np.zeros((3, 2)))


# -- simulation ------------------------------------------------------------------------------------

CELLS = {
    "a clear gap": ([0.4, 0.3, 0.12, 0.1, 0.02, 0.0], 400),
    "a small gap": ([0.21, 0.2, 0.19, 0.18, 0.17, 0.16], 300),
    "a tie": ([0.3, 0.1, 0.1, 0.1, 0.0, 0.0], 300),
    "one ruined, few documents": ([0.9, 0.05, 0.04, 0.03, 0.02, 0.01], 100),
    "fifteen thousand": ([0.2, 0.13, 0.1, 0.05, 0.01, 0.0], 15000),
}


def error_rate(values: Array, n_races: int = 100, tolerance=None, reach=2) -> float:
    """Return the share of races at 80 % whose answer, or what was settled of it, is wrong."""
    rng, n_errors, means = np.random.default_rng(3), 0, values.mean(axis=0)
    last, slack = np.sort(means)[-2], (tolerance or 0) + 1e-9
    for _ in range(n_races):
        settings = {"tolerance": tolerance, "level": 0.8, "max_difference": reach}
        duels = run_race(SequentialTopK(len(values), 6, 2, **settings), rng.permutation(values))
        out = ~duels.chosen & ~duels.open
        is_wrong = (means[duels.chosen] < last - slack).any() or (means[out] > last + slack).any()
        n_errors += bool(is_wrong)
    return n_errors / n_races


@pytest.mark.parametrize("tolerance", [None, 0.01])
@pytest.mark.parametrize("cell", CELLS)
def test_no_more_errors_than_promised(cell: str, tolerance: float | None) -> None:
    n_races = 40 if cell == "fifteen thousand" else 100
    assert error_rate(draw_population(*CELLS[cell]), n_races, tolerance) <= 0.2


def paired_drops(shares: list[float], n: int) -> Array:
    """Draw drops of runs from one intact model, right on six of ten: no two are 2 apart."""
    rng, n_right = np.random.default_rng(4), 6 * n // 10
    drops = np.zeros((n, len(shares)))
    for column, share in zip(drops.T, shares, strict=True):
        column[rng.permutation(n_right)[: round((share + 0.03) * n)]] = 1
        column[n_right + rng.permutation(n - n_right)[: round(0.03 * n)]] = -1
    return drops


@pytest.mark.parametrize("cell", ["a small gap", "a tie", "one ruined, few documents"])
def test_half_the_range_makes_no_more_errors_than_promised(cell: str) -> None:
    shares, n_documents = CELLS[cell]
    values = paired_drops([min(share, 0.5) for share in shares], n_documents)
    assert error_rate(values, reach=1) <= 0.2
