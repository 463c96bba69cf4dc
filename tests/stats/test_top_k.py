"""Sequential top-k against the definition, all orders of a population, and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tests.stats.drawn import BLOCK, Array, layers_of
from tracker.stats.stopping import FRACTIONS, MOST, SequentialTopK


def raced(duels: SequentialTopK, drawn: Array, block: int = BLOCK) -> SequentialTopK:
    """Look until it is answered, at nobody who is settled."""
    for start in range(0, len(drawn), block):
        if duels.open.any():
            duels.look(np.where(duels.open, drawn[start : start + block], np.nan))
    return duels


def population(shares: list[float], documents: int, seed: int = 0) -> Array:
    """Draw drops of runs; each loses its share of the documents and wins 3 %."""
    return layers_of(np.random.default_rng(seed), documents, np.array(shares) + 0.03, 0.03)


# -- the definition --------------------------------------------------------------------------------


def by_the_book(a: Array, b: Array, n: int, null: float, reach: float) -> float:
    """Compute the capital of bets that b is larger, if a is larger by `null`, one by one."""
    total = 0.0
    for fraction in FRACTIONS:
        capital, seen = 1.0, 0.0
        for t, difference in enumerate(a - b):
            rest = (n * null - seen) / (n - t)
            risked = min(fraction * n / (n - t), MOST)
            capital *= 1 + risked * (rest - difference) / max(reach - rest, 1e-6 * reach)
            seen += difference
        total += capital / len(FRACTIONS)
    return total


@pytest.mark.parametrize("within", [None, 0.05])
@pytest.mark.parametrize("seed", range(4))
def test_one_pair_and_one_bet_at_a_time(seed: int, within: float | None) -> None:
    generator = np.random.default_rng(seed)
    drawn = generator.permutation(population([0.3, 0.1, 0.25, 0.2, 0.0], 300, seed))
    duels = SequentialTopK(300, 5, 2, within=within, level=0.9, reach=2)
    beaten: set[tuple[int, int]] = set()  # (who, by whom), and the same within the tolerance
    nearly: set[tuple[int, int]] = set()
    for start in range(0, 300, 20):
        contending = np.flatnonzero(duels.open)
        if not contending.size:
            break
        seen = drawn[: start + 20]
        duels.look(drawn[start : start + 20])
        for a, b in itertools.permutations(contending, 2):
            capital = by_the_book(seen[:, a], seen[:, b], 300, -1e-9, 2)
            if capital >= 6 / 0.1:
                beaten.add((a, b))
            if within and by_the_book(seen[:, a], seen[:, b], 300, within + 1e-9, 2) >= 6 / 0.1:
                nearly.add((a, b))
        # All sets of two of which nobody is beaten by anyone outside.
        sets = [
            set(pair)
            for pair in itertools.combinations(range(5), 2)
            if not any((a, b) in beaten for a in pair for b in set(range(5)) - set(pair))
        ]
        chosen, settled = set(np.flatnonzero(duels.chosen)), set(np.flatnonzero(~duels.open))
        if duels.open.any() or within is None:
            assert all(chosen <= one and not (settled - chosen) & one for one in sets)
        else:
            others = set(range(5)) - chosen
            assert all((b, a) in nearly for one in sets for a in chosen - one for b in others & one)
        if len(sets) == 1:
            assert not duels.open.any()
    assert duels.chosen.sum() == 2


def test_over_all_orders_every_duel_between_equals_is_fair() -> None:
    # Two runs that are both right twice, never on the same document: the null hypothesis.
    made = []
    for order in itertools.permutations([(1.0, 0.0), (1, 0), (0, 1), (0, 1), (0, 0), (1, 1)]):
        duels = SequentialTopK(6, 2, 1)
        for values in order[:4]:
            duels.look(np.array([values]))
        assert duels.open.all()
        made.append(np.exp(duels._capital[:, [0, 1], [1, 0], 0]))
    # Later a bet may be cut, where nothing but the worst can follow.
    assert np.mean(made, axis=0) == pytest.approx(np.ones((len(FRACTIONS), 2)), abs=1e-6)


# -- what is promised ------------------------------------------------------------------------------


@pytest.mark.parametrize("documents", [2, 31, 32, 33, 200])
@pytest.mark.parametrize("seed", range(3))
def test_all_documents_answer_but_for_ties(documents: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, 2, (documents, 5)).astype(float)
    means = drawn.mean(axis=0)
    third, fourth = np.sort(means)[[-3, -4]]
    duels = raced(SequentialTopK(documents, 5, 3), drawn)
    assert duels.open.any() == (third == fourth)
    assert (means[duels.chosen] >= third).all()
    if third > fourth:
        assert duels.chosen.tolist() == (means >= third).tolist()
    else:
        assert means[duels.open] == pytest.approx(third)
    tolerant = raced(SequentialTopK(documents, 5, 3, within=0.001), drawn)
    assert not tolerant.open.any()
    assert tolerant.chosen.sum() == 3
    assert (means[tolerant.chosen] >= third).all()


def test_an_exact_distance_of_the_tolerance_is_tolerated() -> None:
    drawn = np.zeros((200, 2))
    drawn[:10, 0], drawn[10:12, 1] = 1, 1  # 4 pp apart
    duels = raced(SequentialTopK(200, 2, 1, within=0.04, reach=2), drawn[::-1])
    assert not duels.open.any()


def test_what_does_not_fit_is_refused() -> None:
    duels = SequentialTopK(5, 2, 1)
    for bad in ([[2.0, 0.0]], [[math.nan, 0.0]]):
        with pytest.raises(ValueError, match="more than 1 apart"):
            duels.look(np.array(bad))
    duels.look(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="more than all 5 documents"):
        duels.look(np.zeros((3, 2)))


# -- simulation ------------------------------------------------------------------------------------

CELLS = {
    "a clear gap": ([0.4, 0.3, 0.12, 0.1, 0.02, 0.0], 400),
    "a small gap": ([0.21, 0.2, 0.19, 0.18, 0.17, 0.16], 300),
    "a tie": ([0.3, 0.1, 0.1, 0.1, 0.0, 0.0], 300),
    "one ruined, few documents": ([0.9, 0.05, 0.04, 0.03, 0.02, 0.01], 100),
    "fifteen thousand": ([0.2, 0.13, 0.1, 0.05, 0.01, 0.0], 15000),
}


def wrong(drawn: Array, races: int = 100, kind=SequentialTopK, within=None, reach=2) -> float:
    """Return the share of races at 80 % whose answer, or what was settled of it, is wrong."""
    generator, errors = np.random.default_rng(3), 0
    means = drawn.mean(axis=0)
    for _ in range(races):
        duels = kind(len(drawn), 6, 2, within=within, level=0.8, reach=reach)
        raced(duels, generator.permutation(drawn))
        last, slack = np.sort(means)[-2], (within or 0) + 1e-9
        out = ~duels.chosen & ~duels.open
        bad = (means[duels.chosen] < last - slack).any() or (means[out] > last + slack).any()
        errors += bool(bad)
    return errors / races


@pytest.mark.parametrize("within", [None, 0.01])
@pytest.mark.parametrize("cell", CELLS)
def test_no_more_errors_than_promised(cell: str, within: float | None) -> None:
    races = 40 if cell == "fifteen thousand" else 100
    assert wrong(population(*CELLS[cell]), races, within=within) <= 0.2


def paired(shares: list[float], documents: int) -> Array:
    """Draw drops of runs from one intact model, right on six of ten: no two are 2 apart."""
    generator, right = np.random.default_rng(4), 6 * documents // 10
    found = np.zeros((documents, len(shares)))
    for column, share in zip(found.T, shares, strict=True):
        column[generator.permutation(right)[: round((share + 0.03) * documents)]] = 1
        column[right + generator.permutation(documents - right)[: round(0.03 * documents)]] = -1
    return found


@pytest.mark.parametrize("cell", ["a small gap", "a tie", "one ruined, few documents"])
def test_half_the_range_makes_no_more_errors_than_promised(cell: str) -> None:
    shares, documents = CELLS[cell]
    drawn = paired([min(share, 0.5) for share in shares], documents)
    assert wrong(drawn, reach=1) <= 0.2
