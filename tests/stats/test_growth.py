from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from tracker.core.estimates import Estimate
from tracker.stats import effects as module
from tracker.stats.effects import fewest_to_show, growths, unequal_growth
from tracker.stats.support import holm


def growth(first, last, strata=None) -> Estimate:
    """Return the growth of a single column."""
    (found,) = growths(first[:, None], last[:, None], strata)
    return found


def test_darwins_plants() -> None:
    # Fisher (1935), chapter 3: heights of 15 pairs of maize, crossed against self-fertilised, in
    # eighths of an inch. Signed ranks of the log ratios by hand: two negative pairs.
    crossed = np.array([188, 96, 168, 176, 153, 172, 177, 163, 146, 173, 186, 168, 177, 184, 96.0])
    own = np.array([139, 163, 160, 160, 147, 149, 149, 122, 132, 144, 130, 144, 102, 124, 144.0])
    found = growth(own, crossed)
    assert found.value == pytest.approx(stats.gmean(crossed) / stats.gmean(own))
    logs = np.log(crossed / own)
    ranks = stats.rankdata(abs(logs))
    least = min(ranks[logs < 0].sum(), ranks[logs > 0].sum())
    as_far = sum(
        min(total, 120 - total) <= least
        for signs in itertools.product((0, 1), repeat=15)
        for total in [np.dot(signs, range(1, 16))]
    )
    assert found.p_value == pytest.approx(as_far / 2**15)


@pytest.mark.parametrize(
    ("n", "covers", "skewed"),
    [
        *((5, 0.92, False), (12, 0.95, False), (24, 0.95, False), (100, 0.95, False)),
        # Log ratios as skewed as an exponential distribution: too narrow for few documents.
        *((24, 0.92, True), (150, 0.95, True)),
    ],
)
def test_how_often_the_interval_covers(n: int, covers: float, skewed: bool, monkeypatch) -> None:
    monkeypatch.setattr(module, "RESAMPLES", 500)
    generator, held = np.random.default_rng(n), 0
    for _ in range(300):
        logs = generator.exponential(0.3, n) - 0.3 if skewed else generator.normal(0, 0.3, n)
        found = growth(np.ones(n), np.exp(logs))
        held += found.low <= 1 <= found.high
    # Four standard deviations to either side.
    assert held / 300 == pytest.approx(covers, abs=4 * (covers * (1 - covers) / 300) ** 0.5)


def test_without_any_growth() -> None:
    found = growth(np.array([1.0, 3, 0.1]), np.array([1.0, 3, 0.1 + 1e-15]))
    assert (found.value, found.p_value) == (pytest.approx(1), 1)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_undefined_growth_has_a_reason(bad: float) -> None:
    fine, broken = np.array([1.0, 2, 3]), np.array([1.0, bad, 3])
    for pair in ((fine, broken), (broken, fine)):
        found = growth(*pair)
        assert (found.value, found.low, found.p_value) == (None, None, None)
        assert found.reason == "nothing to grow, or not finite, in 1 of 3 documents"
    assert growth(fine[:1], fine[:1]).reason == "1 document, and growth needs two"
    assert growth(fine[:0], fine[:0]).reason == "0 documents, and growth needs two"


def test_kruskal_and_walliss_own_example() -> None:
    # Bottles from three machines (Kruskal & Wallis 1952, table 1.1): H = 5.66 without the
    # correction, p = 0.059; the third has too few bottles for the approximation, so it is doubled.
    one, two = [340, 345, 330, 342, 338.0], [339, 333, 344.0]
    three = [347, 343, 349, 355.0]
    assert unequal_growth([np.array(x) for x in (one, two, three)]) is None
    groups = [np.array(2 * x) for x in (one, two, three)]
    assert unequal_growth(groups) == pytest.approx(stats.kruskal(*groups).pvalue)
    ranks = stats.rankdata(np.concatenate(groups))
    means = [ranks[:10].mean(), ranks[10:16].mean(), ranks[16:].mean()]
    spread = sum(size * (mean - 12.5) ** 2 for size, mean in zip((10, 6, 8), means, strict=True))
    # Twelve pairs of ties take 12 (2³ − 2) / (24³ − 24) of the variance.
    statistic = 12 / (24 * 25) * spread / (1 - 12 * 6 / (24**3 - 24))
    assert unequal_growth(groups) == pytest.approx(stats.chi2.sf(statistic, 2))


@pytest.mark.parametrize("tests", [1, 3, 29])
def test_with_one_document_fewer_nothing_can_be_shown(tests: int) -> None:
    fewest = fewest_to_show(tests, 0.05)
    for documents, shown in ((fewest - 1, False), (fewest, True)):
        grown = np.exp(np.random.default_rng(0).random((documents, tests)) + 1)
        found = growths(np.ones_like(grown), grown)
        adjusted = holm([each.p_value for each in found])
        assert [p < 0.05 for p in adjusted] == [shown] * tests
