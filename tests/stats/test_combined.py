"""Combined intervals cover the truth, agree with exact cases, and say when there is none."""

from __future__ import annotations

import numpy as np
import pytest

from tracker.core.estimates import Estimate
from tracker.stats.accuracy import accuracy, accuracy_drop
from tracker.stats.support import difference, mean, ratio

DRAWS = 400


def outcomes(dice: np.random.Generator, n: int, before: float, kept: float, won: float) -> tuple:
    """Draw a model that is right with `before`; the removal keeps a right answer with `kept`."""
    right = dice.random(n) < before
    after = np.where(right, dice.random(n) < kept, dice.random(n) < won)
    return right.astype(float), after.astype(float)


@pytest.mark.parametrize(
    ("n", "before", "kept", "won"),
    [(100, 0.6, 0.8, 0.1), (300, 0.6, 0.95, 0.05), (300, 0.8, 0.5, 0.2), (60, 0.9, 0.9, 0.5)],
)
def test_the_interval_of_a_relevance_covers_the_truth(n, before, kept, won) -> None:
    """At least as often as it says: documents are shared, so it is rather too wide."""
    dice, chance, held = np.random.default_rng(1), 0.25, 0
    truth = (before - (before * kept + (1 - before) * won)) / (before - chance)
    for _ in range(DRAWS):
        intact, ablated = outcomes(dice, n, before, kept, won)
        base = accuracy(intact)
        above = Estimate(base.value - chance, base.low - chance, base.high - chance)
        found = ratio(accuracy_drop(intact, ablated), above)
        low, high = found.between or (-np.inf, np.inf)  # it says that it does not know
        assert low <= found.value <= high
        held += low <= truth <= high
    assert held / DRAWS >= 0.93


def test_errors_that_are_shared_are_added_up() -> None:
    one = Estimate(0.4, 0.3, 0.6)
    same = mean([one, one], independent=False)
    assert (same.value, same.low, same.high) == pytest.approx((0.4, 0.3, 0.6))
    apart = mean([one, one])
    assert apart.low == pytest.approx(0.4 - 0.1 / 2**0.5)
    assert apart.high == pytest.approx(0.4 + 0.2 / 2**0.5)


def test_a_certain_denominator_scales_the_interval() -> None:
    found = ratio(Estimate(0.2, 0.1, 0.4), Estimate(0.5, 0.5, 0.5))
    assert (found.value, found.low, found.high) == pytest.approx((0.4, 0.2, 0.8))
    negative = ratio(Estimate(-0.2, -0.4, 0.1), Estimate(0.5, 0.5, 0.5))
    assert (negative.value, negative.low, negative.high) == pytest.approx((-0.4, -0.8, 0.2))


def test_what_is_not_defined_says_so() -> None:
    known, unknown = Estimate(0.5, 0.4, 0.6), Estimate(None, reason="no documents")
    assert ratio(known, unknown).reason == "no documents"
    assert ratio(unknown, known).value is None
    assert ratio(known, Estimate(0.0, -0.1, 0.1)) == Estimate(None, reason="a share of nothing")
    reaching = ratio(known, Estimate(0.05, -0.01, 0.11))
    assert (reaching.value, reaching.low) == (pytest.approx(10.0), None)
    assert ratio(known, Estimate(0.1, 0.05, 0.25)).low is None
    # An end at 0, or one as far above the value as 0 is below it, leaves the ratio open as well.
    assert ratio(known, Estimate(0.5, 0.0, 0.75)) == Estimate(1.0)
    assert ratio(known, Estimate(0.5, 0.25, 1.0)) == Estimate(1.0)
    assert ratio(Estimate(0.1), known) == Estimate(0.2)
    assert difference(known, unknown).reason == "no documents"
    assert difference(known, Estimate(0.1)) == Estimate(0.4)
    assert mean([]) == Estimate(None, reason="no figures")
    assert mean([unknown]).reason == "no documents"
    assert mean([known, unknown]) == mean([known])
    assert mean([known, Estimate(0.1)]) == Estimate(0.3)


@pytest.mark.parametrize("half", [Estimate(0.5, low=0.4), Estimate(0.5, high=0.6)])
def test_half_an_interval_is_none(half: Estimate) -> None:
    known = Estimate(0.5, 0.4, 0.6)
    assert ratio(half, known) == ratio(known, half) == Estimate(1.0)
    assert difference(half, known) == difference(known, half) == Estimate(0.0)
    assert mean([half, known]) == Estimate(0.5)
