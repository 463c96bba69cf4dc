from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.stats.drawn import Array, ar1
from tracker.core.estimates import Estimate
from tracker.stats import rank_agreement
from tracker.stats.correlation import correlate, correlation_difference, partial_correlate
from tracker.stats.rank_agreement import COEFFICIENTS, row_coefficients, surrogate_series
from tracker.stats.resampling import resampled_means

SCIPY = {"spearman": stats.spearmanr, "kendall": stats.kendalltau, "pearson": stats.pearsonr}

# Multiples of 0.25: ties are common, and exact.
few = st.integers(-4, 4).map(lambda k: k / 4)
columns = st.integers(2, 9).flatmap(
    lambda n: st.tuples(*[st.lists(few, min_size=n, max_size=n)] * 2)
)


def naive_tau_b(x: list[float], y: list[float]) -> float:
    """Kendall's tau-b over the pairs, as Kendall defines it."""
    balance = untied_x = untied_y = 0
    for i, j in itertools.combinations(range(len(x)), 2):
        a, b = (x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])
        balance += a * b
        untied_x += a != 0
        untied_y += b != 0
    return balance / math.sqrt(untied_x * untied_y) if untied_x and untied_y else math.nan


def test_spearman_of_the_textbook() -> None:
    # IQ and hours of television of ten people: rho = -29/165, p = 0.63.
    iq = np.array([106, 100, 86, 101, 99, 103, 97, 113, 112, 110], dtype=float)
    hours = np.array([7, 27, 2, 50, 28, 29, 20, 12, 6, 17], dtype=float)
    found = correlate(iq, hours, coefficient="spearman")
    # Nearly the textbook's p: ten people are no series, and look like none.
    assert found == Estimate(
        pytest.approx(-29 / 165), p_value=pytest.approx(0.627, abs=0.05), reason=None
    )


@given(columns)
def test_rows_against_scipy_and_the_definition(pair: tuple[list[float], list[float]]) -> None:
    x, y = (np.array(column) for column in pair)
    constant = np.ptp(x) == 0 or np.ptp(y) == 0
    for coefficient in COEFFICIENTS:
        (row,) = row_coefficients(x[None], y[None], coefficient)
        if constant:
            assert math.isnan(row)
        else:
            assert row == pytest.approx(SCIPY[coefficient](x, y).statistic, abs=1e-12)
        if coefficient == "kendall":
            assert row == pytest.approx(naive_tau_b(*pair), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_many_rows_in_chunks(coefficient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_agreement, "_PAIRS", 100)
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 6, (37, 8)) / 6, generator.integers(0, 6, (37, 8)) / 6
    y[3], x[4], y[5, 2], x[6, 1] = 0.5, 0.25, np.nan, np.inf
    rows = row_coefficients(x, y, coefficient)
    assert np.flatnonzero(np.isnan(rows)).tolist() == [3, 4, 5, 6]
    expected = [SCIPY[coefficient](a, b).statistic for a, b in zip(x[7:], y[7:], strict=True)]
    assert rows[7:] == pytest.approx(expected, abs=1e-12)
    single = row_coefficients(x[:1], y, coefficient)
    assert single == pytest.approx(
        row_coefficients(np.repeat(x[:1], 37, axis=0), y, coefficient), nan_ok=True
    )


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_a_constant_row_has_no_coefficient_whatever_its_mean_rounds_to(coefficient: str) -> None:
    """Ten times 0.7, less their mean, is not nothing: without a look at the row, it correlates."""
    for layers, value in itertools.product(range(3, 20), (0.1, 0.7, 1 / 3)):
        constant, other = np.full((1, layers), value), np.arange(float(layers))[None]
        for x, y in ((constant, other), (other, constant), (constant, constant)):
            assert np.isnan(row_coefficients(x, y, coefficient)).all()


def test_rounding_errors_are_ties() -> None:
    drop = np.array([0.1 + 0.2, 0.3, 0.1, 0.4])
    proxy = np.array([1.0, 2.0, 0.5, 3.0])
    exact = correlate(proxy, np.array([0.3, 0.3, 0.1, 0.4]), coefficient="kendall")
    assert correlate(proxy, drop, coefficient="kendall") == exact


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
@pytest.mark.parametrize(
    ("proxy", "drop", "reason"),
    [
        ([], [], "0 layers, and a correlation needs at least 3"),
        ([1.0], [1.0], "1 layer, and a correlation needs at least 3"),
        ([1.0, 2.0], [1.0, 2.0], "2 layers, and a correlation needs at least 3"),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "the proxy is the same in all 3 layers"),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], "the accuracy drop is the same in all 3 layers"),
        ([1.0, math.nan, 3.0], [1.0, 2.0, 3.0], "the proxy is undefined in 1 of 3 layers"),
        ([1.0, 2.0, 3.0], [None, None, 3.0], "the accuracy drop is undefined in 2 of 3 layers"),
        ([1.0, math.inf, 3.0], [1.0, 2.0, 3.0], "the proxy is undefined in 1 of 3 layers"),
    ],
)
def test_undefined_correlations(coefficient, proxy, drop, reason) -> None:
    found = correlate(
        np.array(proxy),
        np.array(drop),
        coefficient=coefficient,
        resampled=(np.array([proxy]), np.ones((9, 3))),
    )
    assert found == Estimate(None, reason=reason)


# -- the p-value -----------------------------------------------------------------------------------


def rejected(x: Array, y: Array, coefficient: str) -> float:
    """Return the share of the pairs that are called significant at 5 %."""
    p_values = [
        correlate(a, b, coefficient=coefficient, surrogates=199, seed=seed).p_value
        for seed, (a, b) in enumerate(zip(x, y, strict=True))
    ]
    return float(np.mean(np.array(p_values) <= 0.05))


@pytest.mark.parametrize(
    ("rho_x", "rho_y", "layers", "coefficient"),
    [
        (0.0, 0.0, 30, "spearman"),
        (0.9, 0.9, 30, "spearman"),
        (0.9, 0.9, 30, "kendall"),
        (0.9, 0.0, 30, "spearman"),
        (0.9, 0.9, 12, "spearman"),
    ],
)
def test_unrelated_series_are_significant_as_often_as_said(rho_x, rho_y, layers, coefficient):
    generator = np.random.default_rng(12)
    x, y = ar1(generator, rho_x, 400, layers), ar1(generator, rho_y, 400, layers)
    # Two standard errors of 5 % in 400 pairs.
    assert rejected(x, y, coefficient) <= 0.072


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_the_p_value_against_a_count_by_scipy(coefficient: str) -> None:
    """Kendall's and Pearson's are of the values, Spearman's is of the ranks; the larger stands."""
    generator = np.random.default_rng(5)
    for layers in (5, 9, 20):
        x = np.exp(2 * generator.normal(size=layers))
        y = x + 3 * np.exp(2 * generator.normal(size=layers))
        found = correlate(x, y, coefficient=coefficient, surrogates=99, seed=layers)
        if coefficient == "spearman":
            x, y = stats.rankdata(x), stats.rankdata(y)
        statistic = SCIPY[coefficient]
        observed = abs(statistic(x, y).statistic) - 1e-9
        counts = [
            sum(
                abs(statistic(kept, drawn).statistic) >= observed
                for drawn in surrogate_series(redrawn, 99, layers)
            )
            for kept, redrawn in ((x, y), (y, x))
        ]
        assert found.p_value == (max(counts) + 1) / 100


# -- the interval ----------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_interval_covers_the_coefficient_of_other_documents(coefficient: str) -> None:
    """A proxy for 20 layers and the outcomes of 400 documents that really lose accuracy."""
    generator, found = np.random.default_rng(0), []
    loss = np.linspace(0.0, 0.3, 20)
    proxy = loss + 0.03 * np.sin(7 * np.arange(20.0))
    for seed in range(120):
        right = generator.random((400, 1)) < 0.7
        lucky = generator.random((2, 400, 20))
        differences = right.astype(float) - np.where(right, lucky[0] > loss, lucky[1] < 0.05)
        drawn = resampled_means(differences, 200, seed)
        drop, said = differences.mean(axis=0), {"coefficient": coefficient, "surrogates": 1}
        found.append(correlate(proxy, drop, resampled=(proxy[None], drawn), **said))
    expected = np.mean([each.value for each in found])
    assert np.mean([each.low <= expected <= each.high for each in found]) > 0.85


def test_interval_resamples_proxy_and_drop_together() -> None:
    # One and the same quantity on both sides: the same resampled documents always agree.
    values = np.random.default_rng(0).normal(size=(50, 6))
    resampled = resampled_means(values, 100, seed=0)
    means = values.mean(axis=0)
    both = correlate(means, means, coefficient="spearman", resampled=(resampled, resampled))
    assert (both.low, both.high) == (pytest.approx(1), pytest.approx(1))
    fixed = (resampled, means[None])
    one = correlate(means, means, coefficient="spearman", resampled=fixed)
    assert one.low < 0.9
    assert one.high == 1  # clipped
    fixed = (resampled, -means[None])
    mirrored = correlate(means, -means, coefficient="spearman", resampled=fixed)
    assert mirrored.low == -1


# -- ranks -----------------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_partial_ranks_against_residuals_of_a_regression(seed: int) -> None:
    x, y, z = np.random.default_rng(seed).integers(0, 12, (3, 15)).astype(float)
    ranks = [stats.rankdata(each) for each in (x, y, z)]
    one, other = (each - np.polyval(np.polyfit(ranks[2], each, 1), ranks[2]) for each in ranks[:2])
    found = partial_correlate(x, y, z, surrogates=1)
    assert found.value == pytest.approx(stats.pearsonr(one, other).statistic, abs=1e-9)
    assert found.low is None


def test_unrelated_partial_series_are_significant_as_often_as_said() -> None:
    generator, p_values = np.random.default_rng(5), []
    for _ in range(300):
        z, x, y = ar1(generator, 0.8, 3, 30)
        p_values.append(partial_correlate(z + x, y - z, z, surrogates=199).p_value)
    assert np.mean(np.array(p_values) < 0.05) <= 0.08


@pytest.mark.parametrize(
    ("x", "y", "z", "reason"),
    [
        ([1, 2, 3], [1, 3, 2], [2, 1, 3], "3 layers, and a partial correlation needs at least 4"),
        ([1, 2, 3, 4], [1, 3, 2, math.nan], [2, 1, 3, 4], "undefined in 1 of 4 layers"),
        ([1, 2, 3, 4], [1, 3, 2, 4], [2, 2, 2, 2], "a series is the same in all 4 layers"),
        ([1, 2, 3, 4], [1, 3, 2, 4], [4, 3, 2, 1], "has the ranks of what is held fixed"),
    ],
)
def test_undefined_partial_correlations(x, y, z, reason: str) -> None:
    found = partial_correlate(*(np.array(each, dtype=float) for each in (x, y, z)))
    assert (found.value, found.low, found.p_value) == (None, None, None)
    assert reason in found.reason


def test_the_difference_of_two_coefficients_is_paired() -> None:
    # Two proxies that share their noise: their difference is surer than either.
    generator = np.random.default_rng(0)
    truth, drop = np.arange(30.0), np.arange(30.0) + generator.normal(0, 8, 30)
    noise = generator.normal(0, 6, (500, 30))
    drops = drop + noise
    one = (drop, drop + noise)
    other = (truth, truth + generator.normal(0, 6, (500, 30)))
    found = correlation_difference(one, other, (drop, drops), "spearman")
    assert found.value == pytest.approx(1 - stats.spearmanr(truth, drop).statistic)
    assert found.low <= found.value <= found.high <= 2
    same = correlation_difference(one, one, (drop, drops), "spearman")
    assert (same.value, same.low, same.high) == (0, 0, 0)
    flat = (np.ones(30), np.ones((500, 30)))
    assert correlation_difference(one, flat, (drop, drops), "spearman").reason == (
        "the proxy is the same in all 30 layers"
    )


def dealt_anew(values: Array, within: Array) -> list[Array]:
    """Every way to deal values anew within their groups."""
    places = [np.flatnonzero(within == group) for group in np.unique(within)]
    found = []
    for order in itertools.product(*(itertools.permutations(some) for some in places)):
        dealt = values.copy()
        for some, mine in zip(places, order, strict=True):
            dealt[some] = values[list(mine)]
        found.append(dealt)
    return found


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_parts_are_dealt_anew_within_their_layers(coefficient) -> None:
    within = np.array([1, 0, 1, 0, 1, 0, 2])
    x = np.array([5.0, 1.0, 7.0, 3.0, 6.0, 2.0, 9.0])
    y = np.array([0.3, 0.1, 0.7, 0.2, 0.6, 0.4, 0.1])
    every = np.array(dealt_anew(x, within))
    found = row_coefficients(every, y[None], coefficient)
    (value,) = row_coefficients(x[None], y[None], coefficient)
    rarer = min((found >= value - 1e-9).mean(), (found <= value + 1e-9).mean())
    mine = correlate(x, y, coefficient=coefficient, within=within, what="expert")
    assert mine.p_value == pytest.approx(min(1, 2 * rarer), abs=0.03)
