"""Test estimates that are combined, simultaneous intervals, verdicts and ranks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.stats.drawn import Array
from tracker.schema.estimates import Estimate
from tracker.stats.accuracy import accuracy, accuracy_drop
from tracker.stats.resampling import resampled_means
from tracker.stats.support import (
    average,
    count_pairs,
    decide_verdicts,
    divide,
    holm,
    possible_ranks,
    recovered_share,
    subtract,
    widen,
)

LAYERS = 20


def draw_drops(
    rng: np.random.Generator, n_documents: int, costs: np.ndarray, right_share: float = 0.6
) -> list[Estimate]:
    """Draw a model and its removals: each document that is right is lost with a layer's `costs`,
    besides some that change in either direction by chance."""
    intact = rng.random(n_documents) < right_share
    estimates = []
    for cost in costs:
        is_random = rng.random(n_documents) < rng.choice([0.02, 0.1, 0.4])
        ablated = np.where(is_random, rng.random(n_documents) < right_share, intact)
        ablated &= rng.random(n_documents) >= cost
        estimates.append(accuracy_drop(intact.astype(float), ablated.astype(float)))
    return estimates


@pytest.mark.parametrize("documents", [8, 200])
def test_where_nothing_is_there_nothing_is_named(documents: int) -> None:
    rng = np.random.default_rng(documents)
    n_named = 0
    for _ in range(120):
        widened = widen(draw_drops(rng, documents, np.zeros(LAYERS)), [documents] * LAYERS)
        n_named += any(verdict != "open" for verdict in decide_verdicts(widened))
    # 5 % of 120 is 6; more than 12 has probability 0.01 even then.
    assert n_named <= 12


@pytest.mark.parametrize("documents", [60, 400])
def test_ranks_hold_the_true_ones_and_what_is_large_is_named(documents: int) -> None:
    costs = np.zeros(LAYERS)
    costs[[0, 3, 7]] = 0.9, 0.7, 0.5
    rng = np.random.default_rng(documents)
    n_outside = n_wrong = n_missed = 0
    for _ in range(80):
        estimates = draw_drops(rng, documents, costs)
        widened = widen(estimates, [documents] * LAYERS)
        layers = {
            layer for layer, verdict in enumerate(decide_verdicts(widened)) if verdict != "open"
        }
        n_wrong += bool(layers - {0, 3, 7})
        n_missed += bool({0, 3, 7} - layers)
        intervals = possible_ranks(widen(estimates, [documents] * LAYERS, count_pairs(LAYERS)))
        # The others cost the same, so that any place from 4 on is theirs.
        true_ranks = {0: 1, 3: 2, 7: 3}
        n_outside += any(
            not best <= true_ranks.get(layer, worst) <= worst or worst < true_ranks.get(layer, 4)
            for layer, (best, worst) in enumerate(intervals)
        )
    # 5 % of 80 is 4; more than 9 has probability 0.01 even then.
    assert n_wrong <= 9
    assert n_outside <= 9
    assert n_missed <= 9


def test_ranks_by_counting() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        middles, halves = rng.random(6), rng.random(6) / 3
        figures = [Estimate(m, m - h, m + h) for m, h in zip(middles, halves, strict=True)]
        for figure, (best, worst) in zip(figures, possible_ranks(figures), strict=True):
            n_above = sum(subtract(other_figure, figure).low > 0 for other_figure in figures)
            n_below = sum(subtract(figure, other_figure).low > 0 for other_figure in figures)
            assert (best, worst) == (n_above + 1, 6 - n_below)
    assert possible_ranks([Estimate(0.5), Estimate(0.2, 0.1, 0.3)]) == [(1, 2), (1, 2)]


def test_a_wider_interval_is_the_one_of_that_level() -> None:
    """Against scipy's own interval at the level of a family of ten."""
    from scipy import stats

    rng = np.random.default_rng(3)
    values = rng.normal(0.2, 1, 30)
    narrow = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    wide = stats.ttest_1samp(values, 0).confidence_interval(1 - 0.05 / 10)
    (widened, *_) = widen([Estimate(values.mean(), narrow.low, narrow.high)] * 10, [30] * 10)
    assert (widened.low, widened.high) == pytest.approx((wide.low, wide.high), rel=1e-12)


def test_what_has_no_interval_is_open_and_does_not_count() -> None:
    figures = [Estimate(0.1, 0.05, 0.15, 0.001)]
    widened = widen([*figures, Estimate(None, reason="no document")], [50, 50])
    assert widened[0] == widen(figures, [50])[0]
    assert decide_verdicts(widened) == ["costs", "open"]


DRAWS = 400


def draw_outcomes(
    rng: np.random.Generator, n: int, right: float, still_right: float, won: float
) -> tuple[Array, Array]:
    """Draw outcomes of a model that is right with `right`, and those after a removal."""
    is_right = rng.random(n) < right
    ablated = np.where(is_right, rng.random(n) < still_right, rng.random(n) < won)
    return is_right.astype(float), ablated.astype(float)


@pytest.mark.parametrize(
    ("n", "right", "still_right", "won"),
    [(100, 0.6, 0.8, 0.1), (300, 0.6, 0.95, 0.05), (300, 0.8, 0.5, 0.2), (60, 0.9, 0.9, 0.5)],
)
def test_the_interval_of_a_relevance_covers_the_truth(n, right, still_right, won) -> None:
    """At least as often as it says: documents are shared, so it is rather too wide."""
    rng, chance, n_covered = np.random.default_rng(1), 0.25, 0
    truth = (right - (right * still_right + (1 - right) * won)) / (right - chance)
    for _ in range(DRAWS):
        intact, ablated = draw_outcomes(rng, n, right, still_right, won)
        base = accuracy(intact)
        above_chance = Estimate(base.value - chance, base.low - chance, base.high - chance)
        relevance = divide(accuracy_drop(intact, ablated), above_chance)
        low, high = relevance.bounds or (-np.inf, np.inf)  # it says that it does not know
        assert low <= relevance.value <= high
        n_covered += low <= truth <= high
    assert n_covered / DRAWS >= 0.93


def test_errors_that_are_shared_are_added_up() -> None:
    estimate = Estimate(0.4, 0.3, 0.6)
    dependent = average([estimate, estimate], independent=False)
    assert (dependent.value, dependent.low, dependent.high) == pytest.approx((0.4, 0.3, 0.6))
    independent = average([estimate, estimate])
    assert independent.bounds == pytest.approx((0.4 - 0.1 / 2**0.5, 0.4 + 0.2 / 2**0.5))


def test_a_certain_denominator_scales_the_interval() -> None:
    positive = divide(Estimate(0.2, 0.1, 0.4), Estimate(0.5, 0.5, 0.5))
    assert (positive.value, positive.low, positive.high) == pytest.approx((0.4, 0.2, 0.8))
    negative = divide(Estimate(-0.2, -0.4, 0.1), Estimate(0.5, 0.5, 0.5))
    assert (negative.value, negative.low, negative.high) == pytest.approx((-0.4, -0.8, 0.2))


def test_what_is_not_defined_says_so() -> None:
    defined, undefined = Estimate(0.5, 0.4, 0.6), Estimate(None, reason="no documents")
    assert divide(defined, undefined).reason == "no documents"
    assert divide(undefined, defined).value is None
    assert divide(defined, Estimate(0.0, -0.1, 0.1)) == Estimate(
        None, reason="the denominator is not above 0"
    )
    quotient = divide(defined, Estimate(0.05, -0.01, 0.11))
    assert (quotient.value, quotient.low) == (pytest.approx(10.0), None)
    assert divide(defined, Estimate(0.1, 0.05, 0.25)).low is None
    # An end at 0, or one as far above the value as 0 is below it, leaves the ratio open as well.
    assert divide(defined, Estimate(0.5, 0.0, 0.75)) == Estimate(1.0)
    assert divide(defined, Estimate(0.5, 0.25, 1.0)) == Estimate(1.0)
    assert divide(Estimate(0.1), defined) == Estimate(0.2)
    assert subtract(defined, undefined).reason == "no documents"
    assert subtract(defined, Estimate(0.1)) == Estimate(0.4)
    assert average([]) == Estimate(None, reason="no figures")
    assert average([undefined]).reason == "no documents"
    assert average([defined, undefined]) == average([defined])
    assert average([defined, Estimate(0.1)]) == Estimate(0.3)


@pytest.mark.parametrize("half", [Estimate(0.5, low=0.4), Estimate(0.5, high=0.6)])
def test_half_an_interval_is_none(half: Estimate) -> None:
    defined = Estimate(0.5, 0.4, 0.6)
    assert divide(half, defined) == divide(defined, half) == Estimate(1.0)
    assert subtract(half, defined) == subtract(defined, half) == Estimate(0.0)
    assert average([half, defined]) == Estimate(0.5)


def test_worked_by_hand():
    losses, remainders = np.array([0.3, 0.1]), np.array([0.05, 0.05])
    resamples = np.tile(losses, (40, 1)) * np.linspace(0.5, 1.5, 40)[:, None]
    estimate = recovered_share(losses, remainders, resamples, np.tile(remainders, (40, 1)))
    assert estimate.value == pytest.approx(0.75)
    ends = np.quantile(1 - 0.1 / resamples.sum(1), [0.025, 0.975])
    assert [estimate.low, estimate.high] == pytest.approx(ends)
    # A stand-in may do worse than nothing.
    assert recovered_share(losses, 2 * losses, resamples, 2 * resamples).value == pytest.approx(-1)


@pytest.mark.parametrize("lost", [0.0, -0.1, 0.01])
def test_a_loss_that_may_be_nothing_cannot_be_won_back(lost):
    rng = np.random.default_rng(0)
    resamples = lost + 0.05 * rng.standard_normal((400, 2))
    estimate = recovered_share(np.full(2, lost), np.zeros(2), resamples, 0 * resamples)
    assert estimate.value is None
    assert estimate.reason == "the sum of the drops is not significantly above 0"

    undefined = recovered_share(np.array([np.nan]), np.zeros(1), resamples, resamples)
    assert undefined.reason == "the accuracy drop of a layer is not a finite number"


def test_the_interval_covers_what_more_documents_would_give():
    """Paired 0/1 outcomes of three layers, dear and cheap, as a benchmark of 150 documents."""
    rng = np.random.default_rng(7)
    right_share, wrong_removed, wrong_stand_in = 0.6, (0.5, 0.2, 0.05), (0.3, 0.1, 0.05)
    truth = 1 - sum(wrong_stand_in) / sum(wrong_removed)
    n_covered = n_defined = 0
    for _ in range(300):
        is_right = rng.random((150, 1)) < right_share
        luck = rng.random((150, 3))
        is_lost = is_right & (luck < np.array(wrong_removed))
        is_still_lost = is_right & (luck < np.array(wrong_stand_in))
        resamples = [resampled_means(x.astype(float), 400, 3) for x in (is_lost, is_still_lost)]
        estimate = recovered_share(is_lost.mean(0), is_still_lost.mean(0), *resamples)
        if estimate.value is not None:
            n_defined += 1
            n_covered += estimate.low <= truth <= estimate.high
    assert n_defined == 300
    assert n_covered / n_defined > 0.91


p_values = st.lists(st.one_of(st.none(), st.floats(0, 1)), max_size=6)


@given(p_values)
def test_it_is_the_closed_bonferroni_test(given_p: list[float | None]) -> None:
    # A hypothesis is rejected when every set of hypotheses that holds it is, by Bonferroni: its
    # adjusted p-value is the largest of theirs.
    indexes = [index for index, p in enumerate(given_p) if p is not None]
    for index, adjusted in enumerate(holm(given_p)):
        if given_p[index] is None:
            assert adjusted is None
            continue
        families = (
            members
            for size in range(1, len(indexes) + 1)
            for members in itertools.combinations(indexes, size)
            if index in members
        )
        largest = max(
            min(1.0, len(subset) * min(given_p[i] for i in subset)) for subset in families
        )
        assert adjusted == pytest.approx(largest)
