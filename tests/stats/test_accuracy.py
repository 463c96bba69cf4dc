"""Test accuracies, drops and their power against the literature and drawn outcomes."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from tests.stats.drawn import Array
from tracker.schema.estimates import Estimate
from tracker.stats.accuracy import (
    REPORTED_DROP,
    OutcomeVariance,
    accuracy,
    accuracy_drop,
    accuracy_relevance,
    chance_accuracy,
    document_ratios,
    documents_needed,
    drop_sd,
    weights_by_task,
)


def paired_outcomes(n_both: int, n_lost: int, n_won: int, n_neither: int) -> tuple[Array, Array]:
    """Array of documents that are right with both models, the first, the second, none."""
    baseline = np.repeat([1.0, 1.0, 0.0, 0.0], [n_both, n_lost, n_won, n_neither])
    ablated = np.repeat([1.0, 0.0, 1.0, 0.0], [n_both, n_lost, n_won, n_neither])
    return baseline, ablated


# -- weights ---------------------------------------------------------------------------------------


def test_weights_reproduce_the_mean_over_documents_and_the_mean_of_task_means() -> None:
    tasks = ["b", "a", "b", "b", "c", "a"]
    outcomes = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    assert outcomes @ weights_by_task(tasks, by_size=True) == pytest.approx(4 / 6)
    by_task = (1 / 2 + 2 / 3 + 1) / 3
    assert outcomes @ weights_by_task(tasks, by_size=False) == pytest.approx(by_task)
    for by_size in (True, False):
        assert weights_by_task(tasks, by_size).sum() == pytest.approx(1)
        assert weights_by_task([], by_size).tolist() == []


@pytest.mark.parametrize("by_size", [True, False])
def test_units_share_what_a_task_weighs(by_size: bool) -> None:
    tasks, units = ["a", "b", "a", "a"], np.array([1.0, 7.0, 2.0, 3.0])
    task_weights = weights_by_task(tasks, by_size)
    weights = weights_by_task(tasks, by_size, units)
    total = task_weights[[0, 2, 3]].sum()
    assert weights == pytest.approx([total / 6, task_weights[1], total / 3, total / 2])


def test_units_that_are_missing_or_nothing() -> None:
    weights = weights_by_task(["a"] * 3, True, np.array([1.0, math.nan, 3.0]))
    assert weights.tolist() == [0.25, 0, 0.75]
    assert weights_by_task(["a"] * 2, True, np.zeros(2)).tolist() == [0.5, 0.5]
    assert weights_by_task(["a"] * 2, True, np.array([0.125, 0.375])).tolist() == [0.25, 0.75]


# -- accuracy --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
    [
        *((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)),
        *((0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)),
    ],
)
def test_accuracy_interval_is_wilsons(right: int, n: int, low: float, high: float) -> None:
    ends = (pytest.approx(end, abs=5e-5) for end in (low, high))
    assert accuracy(np.repeat([1.0, 0.0], [right, n - right])) == Estimate(right / n, *ends)


def test_equal_weights_are_the_same_as_none() -> None:
    outcomes = np.array([1.0, 0.0, 1.0])
    assert accuracy(outcomes, np.full(3, 1 / 3)) == accuracy(outcomes)
    pair = (outcomes, 1 - outcomes)
    assert accuracy_drop(*pair, np.full(3, 1 / 3)) == accuracy_drop(*pair)


def test_accuracy_of_fractions_is_a_t_interval() -> None:
    outcomes = np.array([0.2, 0.4, 0.9, 0.3, 0.35])
    estimate = accuracy(outcomes)
    low, high = stats.t.interval(0.95, 4, loc=outcomes.mean(), scale=stats.sem(outcomes))
    assert estimate.bounds == pytest.approx((low, high))
    weighted = accuracy(outcomes, np.array([0.5, 0.2, 0.1, 0.1, 0.1]))
    assert weighted.value == pytest.approx(0.1 + 0.08 + 0.09 + 0.03 + 0.035)


def test_unequal_weights_leave_width_when_every_document_is_right() -> None:
    estimate = accuracy(np.ones(3), np.array([0.25, 0.25, 0.5]))
    assert estimate.value == 1
    # Two right and two wrong documents of weight 1/3 besides, all divided by 7/3.
    mean, variance = 5 / 7, (2 / 7) ** 2 * (3 / 8 + 2 / 9) + (5 / 7) ** 2 * (2 / 9)
    half_width = 1.959963984540054 * math.sqrt(variance) / (7 / 3)
    assert estimate.bounds == pytest.approx((mean - half_width, mean + half_width))


@pytest.mark.parametrize(
    ("outcomes", "reason"),
    [
        ([], "no documents"),
        ([1.0, math.nan, 1.0], "1 of 3 documents has no finite score"),
        ([1.0, math.nan, math.inf], "2 of 3 documents have no finite score"),
    ],
)
def test_undefined_accuracies_and_drops(outcomes: list[float], reason: str) -> None:
    values, ones = np.array(outcomes), np.ones(len(outcomes))
    for estimate in (accuracy(values), accuracy_drop(values, ones), accuracy_drop(ones, values)):
        assert estimate == Estimate(None, reason=reason)


def test_one_document() -> None:
    estimate = accuracy(np.array([1.0]))
    assert (estimate.value, estimate.low) == (1, pytest.approx(0.2065, abs=5e-5))
    assert accuracy(np.array([0.5])) == Estimate(0.5)
    assert accuracy_drop(np.array([0.75]), np.array([0.25])) == Estimate(0.5)


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.5, -0.5], [math.nan, 0.5]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        accuracy(np.array([0.0, 1.0]), np.array(weights))


# -- accuracy drop ---------------------------------------------------------------------------------


def test_drops_of_the_literature() -> None:
    # Armitage & Berry, Statistical Methods in Medical Research (1994) p. 127: two media for
    # culturing tuberculosis.
    drop = accuracy_drop(*paired_outcomes(20, 12, 2, 16))
    assert (drop.value, drop.p_value) == (10 / 50, pytest.approx(0.0129, abs=5e-5))
    # Fagerland et al., BMC Medical Research Methodology 13 (2013) 91: airways before and after.
    drop = accuracy_drop(*paired_outcomes(1, 1, 7, 12))
    assert (drop.value, drop.p_value) == pytest.approx((-6 / 21, 0.0703), abs=5e-5)
    # Bonett & Price's interval by Bonett's own R package statpsych: ci.prop.ps(.05, 12, 4, 26, 6).
    drop = accuracy_drop(*paired_outcomes(6, 26, 4, 12))
    expected = (22 / 48, 0.2548067, 0.6251933)
    assert (drop.value, drop.low, drop.high) == pytest.approx(expected, abs=5e-8)


@given(*[st.integers(0, 40)] * 4)
def test_interval_against_the_published_formula(both, lost, won, neither) -> None:
    n = both + lost + won + neither
    assume(n > 0)
    drop = accuracy_drop(*paired_outcomes(both, lost, won, neither))
    p12, p21 = (lost + 1) / (n + 2), (won + 1) / (n + 2)
    half_width = 1.959963984540054 * math.sqrt((p12 + p21 - (p12 - p21) ** 2) / (n + 2))
    assert drop.value == (lost - won) / n
    assert drop.bounds == pytest.approx((p12 - p21 - half_width, p12 - p21 + half_width))
    assert p12 - p21 - half_width <= drop.value <= p12 - p21 + half_width


def test_drop_of_fractions_is_the_paired_t_interval() -> None:
    """Also where one of the two happens to hold none: a document may change by a part."""
    first, second = np.array([0.9, 0.5, 0.7, 0.4]), np.array([0.6, 0.5, 0.1, 0.5])
    binary = np.array([1.0, 0.0, 1.0, 1.0])
    for intact, ablated in ((first, second), (binary, second), (first, binary)):
        drop = accuracy_drop(intact, ablated)
        reference = stats.ttest_rel(intact, ablated).confidence_interval(0.95)
        assert drop.bounds == pytest.approx((reference.low, reference.high))
        assert drop.p_value is None


def test_drop_without_any_change_is_not_certain() -> None:
    weights = weights_by_task(["a"] * 10 + ["b"] * 30, False)
    drop = accuracy_drop(*paired_outcomes(30, 0, 0, 10), weights)
    assert (drop.value, drop.p_value) == (0, 1)
    assert drop.low < 0 < drop.high


@pytest.mark.parametrize(
    ("n", "lost", "won"), [(100, 0.15, 0.05), (100, 0.03, 0.03), (500, 0.3, 0.1), (30, 0.2, 0.2)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_drop_interval_covers_the_truth(n: int, lost: float, won: float, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    weights = weights_by_task(["a"] * (n // 3) + ["b"] * (n - n // 3), False) if weighted else None
    n_covered = 0
    for _ in range(600):
        cells = rng.choice(4, size=n, p=[0.4, lost, won, 0.6 - lost - won])
        drop = accuracy_drop((cells < 2) * 1.0, (cells % 2 == 0) * (cells < 3) * 1.0, weights)
        n_covered += drop.low <= lost - won <= drop.high
    assert 0.92 <= n_covered / 600 <= 0.995


# -- chance and relevance --------------------------------------------------------------------------


def test_chance_is_the_mean_of_one_over_the_choices() -> None:
    assert chance_accuracy(np.array([2, 4, 4, 4])) == 0.3125
    assert chance_accuracy(np.array([0, 0])) == 0
    assert chance_accuracy(np.array([2, 4]), np.array([0.25, 0.75])) == 0.3125
    assert math.isnan(chance_accuracy(np.array([], dtype=np.int64)))
    # Where there is no choice, nobody is wrong.
    assert chance_accuracy(np.array([1, 2])) == 0.75


@pytest.mark.parametrize("n", [3, 49, 98, 1000])
def test_equal_documents_are_averaged_without_rounding(n: int) -> None:
    """49 · (0.25 / 49) is less than 0.25: a baseline at chance would be above it."""
    assert chance_accuracy(np.full(n, 4)) == 0.25
    assert accuracy(np.ones(n)).value == accuracy_drop(np.ones(n), np.zeros(n)).value == 1


@pytest.mark.parametrize(
    ("baseline", "ablated", "chance", "relevance"),
    [
        (0.75, 0.75, 0.25, 0.0),
        (0.75, 0.25, 0.25, 1.0),
        (0.75, 0.10, 0.25, 1.0),  # below chance is no worse than chance
        (0.75, 0.50, 0.25, 0.5),
        (0.50, 0.75, 0.25, -1.0),  # the removal helps
        (0.40, 0.10, 0.0, 0.75),
    ],
)
def test_relevance(baseline: float, ablated: float, chance: float, relevance: float) -> None:
    assert accuracy_relevance(baseline, ablated, chance).value == pytest.approx(relevance)


@pytest.mark.parametrize(
    ("baseline", "ablated", "chance", "reason"),
    [
        (0.25, 0.1, 0.25, "not above chance"),
        (0.2, 0.1, 0.25, "not above chance"),
        (np.mean(np.full(99, 1 / 3)), 0.1, 33 / 99, "not above chance"),  # equal up to rounding
        (None, 0.1, 0.25, "the baseline accuracy is undefined"),
        (math.nan, 0.1, 0.25, "the baseline accuracy is undefined"),
        (0.5, None, 0.25, "the ablated accuracy is undefined"),
        (0.5, 0.4, math.nan, "the chance accuracy is undefined"),
    ],
)
def test_undefined_relevance(baseline, ablated, chance, reason) -> None:
    relevance = accuracy_relevance(baseline, ablated, chance)
    assert relevance.value is None
    assert reason in relevance.reason


SUMS = np.array([-30.0, -2.0, 0.0, -9.0])
UNITS = np.array([10.0, 4.0, 0.0, 6.0])


@pytest.mark.parametrize(
    ("aggregation", "ratio"),
    # 41 nats in 20 bytes are 41 / 20 / ln 2 = 2.96 bits per byte.
    [("ratio", -2.05), ("bits_per_byte", 2.05 / math.log(2))],
)
def test_the_weighted_mean_of_documents_is_the_ratio_of_sums(
    aggregation: str, ratio: float
) -> None:
    weights = weights_by_task(["a"] * 4, True, UNITS)
    assert weights @ document_ratios(aggregation, SUMS, UNITS) == pytest.approx(ratio)


def test_ratios_of_documents() -> None:
    assert document_ratios("ratio", SUMS, UNITS).tolist() == [-3, -0.5, 0, -1.5]
    assert document_ratios("ratio", np.array([-0.5]), np.array([1])).tolist() == [-0.5]
    missing = np.array([0, 2, math.nan])
    assert np.isnan(document_ratios("ratio", np.array([1.0, math.nan, math.nan]), missing)).all()


@pytest.mark.parametrize(
    ("lost", "won", "documents"),
    [
        # Chow, Shao & Wang, Sample Size Calculations in Clinical Research, example 6.4.3.
        (0.5, 0.2, 59),
        # The example that the calculators after Connor (1987, page 209) give.
        (0.45, 0.05, 23),
    ],
)
def test_the_literature(lost: float, won: float, documents: int) -> None:
    variance = OutcomeVariance(lost + won, binary=True)
    assert variance.count_documents(lost - won) == documents
    assert (
        variance.detectable_change(documents)
        <= lost - won
        < variance.detectable_change(documents - 1)
    )


@pytest.mark.parametrize(("documents", "share"), [(200, 0.2), (1000, 0.2), (150, 0.5)])
def test_drawn_outcomes_are_found_as_often_as_said(documents: int, share: float) -> None:
    drop = OutcomeVariance(share, binary=True).detectable_change(documents)
    rng = np.random.default_rng(0)
    cells = [(share + drop) / 2, (share - drop) / 2, 1 - share]
    n_lost, n_won, _ = rng.multinomial(documents, cells, size=20_000).T
    is_detected = np.abs(n_lost - n_won) / np.sqrt(n_lost + n_won) > stats.norm.ppf(0.975)
    assert is_detected.mean() == pytest.approx(0.8, abs=0.015)


def test_drawn_losses_are_found_as_often_as_said() -> None:
    """Differences with long tails, whose mean is near enough to normal."""
    documents, sd = 150, 0.5
    increase = OutcomeVariance(sd**2, binary=False).detectable_change(documents)
    losses = np.random.default_rng(0).laplace(0, sd / 2**0.5, size=(10_000, documents))
    p = stats.ttest_1samp(losses + increase, 0, axis=1).pvalue
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.02)


def test_a_drop_changes_what_it_loses() -> None:
    """Of 100 documents of which one changes, a drop of 3 points would still lose three."""
    variance = OutcomeVariance(0.01, binary=True)
    assert variance.count_documents(REPORTED_DROP) == OutcomeVariance(
        REPORTED_DROP, binary=True
    ).count_documents(REPORTED_DROP)
    smallest = variance.detectable_change(100)
    assert OutcomeVariance(smallest, binary=True).detectable_change(100) == pytest.approx(smallest)
    assert variance.detectable_change(3) is None


def test_a_mean_over_benchmarks_takes_a_part_of_each() -> None:
    """Against drawn outcomes of two benchmarks, whose mean drop is tested with 29 others."""
    drop, share = 0.05, 0.2
    n_documents = documents_needed([OutcomeVariance(share, binary=True)] * 3, 30, 2, drop)
    rng = np.random.default_rng(0)
    cells = [(share + drop) / 2, (share - drop) / 2, 1 - share]
    n_lost, n_won, _ = rng.multinomial(2 * n_documents, cells, size=20_000).T
    is_detected = np.abs(n_lost - n_won) / np.sqrt(n_lost + n_won) > stats.norm.ppf(1 - 0.025 / 30)
    assert is_detected.mean() == pytest.approx(0.8, abs=0.025)


def test_the_docs_name_the_documents_of_the_function() -> None:
    page = (Path(__file__).parents[2] / "docs" / "decide.md").read_text()
    rows = re.findall(r"^\| (\d+) pp \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    assert len(rows) == 4
    variance = OutcomeVariance(0.105, binary=True)
    for drop, *counts in rows:
        # Thirty layers have 45 % of the error rate.
        expected = [documents_needed([variance], 67, k, int(drop) / 100) for k in (1, 2)]
        assert [int(count.replace(",", "")) for count in counts] == expected


def test_the_spread_of_drops() -> None:
    intact, ablated = np.array([1.0, 1, 0, 0, 1]), np.array([1.0, 0, 0, 1, 0])
    assert drop_sd(intact, ablated).value == pytest.approx(np.std(intact - ablated, ddof=1))
    # A document that weighs nothing is none, and a task's few documents make a mean less sure.
    weights = np.array([0.25, 0.25, 0.25, 0.25, 0.0])
    expected = np.std((intact - ablated)[:4], ddof=1)
    assert drop_sd(intact, ablated, weights).value == pytest.approx(expected * (5 / 4) ** 0.5)
    assert drop_sd(intact[:1], ablated[:1]).reason == "one document has no spread"
    undefined = drop_sd(np.array([1.0, np.nan]), np.zeros(2))
    assert undefined.reason == "1 of 2 documents has no finite score"
