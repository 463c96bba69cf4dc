from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tests.stats.drawn import Array, ar1
from tracker.schema.estimates import Estimate
from tracker.stats import rank_agreement
from tracker.stats.correlation import correlate, correlation_difference, partial_correlate
from tracker.stats.rank_agreement import COEFFICIENTS, row_coefficients, surrogate_series
from tracker.stats.resampling import resampled_means

SCIPY = {"spearman": stats.spearmanr, "kendall": stats.kendalltau, "pearson": stats.pearsonr}

# Multiples of 0.25: ties are common, and exact.
quarters = st.integers(-4, 4).map(lambda k: k / 4)
columns = st.integers(2, 9).flatmap(
    lambda n: st.tuples(*[st.lists(quarters, min_size=n, max_size=n)] * 2)
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
    estimate = correlate(iq, hours, coefficient="spearman")
    # Nearly the textbook's p: ten people are no series, and look like none.
    p_value = pytest.approx(0.627, abs=0.05)
    assert estimate == Estimate(pytest.approx(-29 / 165), p_value=p_value)


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
    monkeypatch.setattr(rank_agreement, "_PAIRS_AT_ONCE", 100)
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 6, (37, 8)) / 6, rng.integers(0, 6, (37, 8)) / 6
    y[3], x[4], y[5, 2], x[6, 1] = 0.5, 0.25, np.nan, np.inf
    rows = row_coefficients(x, y, coefficient)
    assert np.flatnonzero(np.isnan(rows)).tolist() == [3, 4, 5, 6]
    expected = [SCIPY[coefficient](a, b).statistic for a, b in zip(x[7:], y[7:], strict=True)]
    assert rows[7:] == pytest.approx(expected, abs=1e-12)
    single = row_coefficients(x[:1], y, coefficient)
    expected = row_coefficients(np.repeat(x[:1], 37, axis=0), y, coefficient)
    assert single == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_a_constant_row_has_no_coefficient_whatever_its_mean_rounds_to(coefficient: str) -> None:
    """Ten times 0.7, less their mean, is not nothing: without a look at the row, it correlates."""
    for layers, value in itertools.product(range(3, 20), (0.1, 0.7, 1 / 3)):
        constant, ascending = np.full((1, layers), value), np.arange(float(layers))[None]
        for x, y in ((constant, ascending), (ascending, constant), (constant, constant)):
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
        ([], [], "a correlation needs at least 3 layers, but 0 are available"),
        ([1.0], [1.0], "a correlation needs at least 3 layers, but 1 is available"),
        ([1.0, 2.0], [1.0, 2.0], "a correlation needs at least 3 layers, but 2 are available"),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], "the proxy is the same in all 3 layers"),
        ([1.0, 2.0, 3.0], [0.0, 0.0, 0.0], "the accuracy drop is the same in all 3 layers"),
        ([1.0, math.nan, 3.0], [1.0, 2.0, 3.0], "the proxy is undefined in 1 of 3 layers"),
        ([1.0, 2.0, 3.0], [None, None, 3.0], "the accuracy drop is undefined in 2 of 3 layers"),
        ([1.0, math.inf, 3.0], [1.0, 2.0, 3.0], "the proxy is undefined in 1 of 3 layers"),
    ],
)
def test_undefined_correlations(coefficient, proxy, drop, reason) -> None:
    estimate = correlate(
        np.array(proxy),
        np.array(drop),
        coefficient=coefficient,
        resamples=(np.array([proxy]), np.ones((9, 3))),
    )
    assert estimate == Estimate(None, reason=reason)


# -- the p-value -----------------------------------------------------------------------------------


def rejection_rate(x: Array, y: Array, coefficient: str) -> float:
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
    rng = np.random.default_rng(12)
    x, y = ar1(rng, rho_x, 400, layers), ar1(rng, rho_y, 400, layers)
    # Two standard errors of 5 % in 400 pairs.
    assert rejection_rate(x, y, coefficient) <= 0.072


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_the_p_value_against_a_count_by_scipy(coefficient: str) -> None:
    """Kendall's and Pearson's are of the values, Spearman's is of the ranks; the larger stands."""
    rng = np.random.default_rng(5)
    for layers in (5, 9, 20):
        x = np.exp(2 * rng.normal(size=layers))
        y = x + 3 * np.exp(2 * rng.normal(size=layers))
        estimate = correlate(x, y, coefficient=coefficient, surrogates=99, seed=layers)
        if coefficient == "spearman":
            x, y = stats.rankdata(x), stats.rankdata(y)
        statistic = SCIPY[coefficient]
        strength = abs(statistic(x, y).statistic) - 1e-9
        counts = []
        for fixed, redrawn in ((x, y), (y, x)):
            values = [
                statistic(fixed, row).statistic for row in surrogate_series(redrawn, 99, layers)
            ]
            counts.append(np.sum(np.abs(values) >= strength))
        assert estimate.p_value == (max(counts) + 1) / 100


# -- the interval ----------------------------------------------------------------------------------


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_interval_covers_the_coefficient_of_other_documents(coefficient: str) -> None:
    """A proxy for 20 layers and the outcomes of 400 documents that really lose accuracy."""
    rng, estimates = np.random.default_rng(0), []
    loss = np.linspace(0.0, 0.3, 20)
    proxy = loss + 0.03 * np.sin(7 * np.arange(20.0))
    for seed in range(120):
        is_right = rng.random((400, 1)) < 0.7
        luck = rng.random((2, 400, 20))
        differences = is_right.astype(float) - np.where(is_right, luck[0] > loss, luck[1] < 0.05)
        resamples = resampled_means(differences, 200, seed)
        drop, settings = differences.mean(axis=0), {"coefficient": coefficient, "surrogates": 1}
        estimates.append(correlate(proxy, drop, resamples=(proxy[None], resamples), **settings))
    expected = np.mean([estimate.value for estimate in estimates])
    assert np.mean([estimate.low <= expected <= estimate.high for estimate in estimates]) > 0.85


def test_interval_resamples_proxy_and_drop_together() -> None:
    # One and the same quantity on both sides: the same resampled documents always agree.
    values = np.random.default_rng(0).normal(size=(50, 6))
    resampled = resampled_means(values, 100, seed=0)
    means = values.mean(axis=0)
    paired = correlate(means, means, coefficient="spearman", resamples=(resampled, resampled))
    assert paired.bounds == pytest.approx((1, 1))
    series = (resampled, means[None])
    unpaired = correlate(means, means, coefficient="spearman", resamples=series)
    assert unpaired.low < 0.9
    assert unpaired.high == 1  # clipped
    series = (resampled, -means[None])
    negative = correlate(means, -means, coefficient="spearman", resamples=series)
    assert negative.low == -1


# -- ranks -----------------------------------------------------------------------------------------


def naive_partial(x: Array, y: Array, z: Array) -> float:
    """Correlate the residuals of regressions of two series' ranks on the ranks of a third."""
    *series, control = (stats.rankdata(values) for values in (x, y, z))
    fits = (np.polyval(np.polyfit(control, ranks, 1), control) for ranks in series)
    residuals = [ranks - fit for ranks, fit in zip(series, fits, strict=True)]
    return float(stats.pearsonr(*residuals).statistic)


@given(st.integers(0, 10_000))
def test_partial_ranks_against_residuals_of_a_regression(seed: int) -> None:
    series = np.random.default_rng(seed).integers(0, 12, (3, 15)).astype(float)
    estimate = partial_correlate(*series, surrogates=1)
    assert estimate.value == pytest.approx(naive_partial(*series), abs=1e-9)
    assert estimate.low is None


@pytest.mark.parametrize("fixed", [False, True], ids=["all drawn", "the third fixed"])
@pytest.mark.parametrize("noise", [2.0, 6.0])
def test_the_interval_of_a_partial_correlation_against_a_loop(noise: float, fixed: bool) -> None:
    """Recompute the coefficient of each resample, and move the percentiles to the value."""
    rng = np.random.default_rng(8)
    layers = np.array([np.arange(12), np.sin(np.arange(12)) * 6, np.arange(12) % 5])
    documents = layers + layers[[1, 2, 0]] + noise * rng.normal(size=(60, 3, 12))
    means = documents.mean(axis=0)
    resamples = [resampled_means(documents[:, series], 300, seed=1) for series in range(3)]
    if fixed:
        resamples[2] = means[2][None]
    estimate = partial_correlate(*means, resamples=tuple(resamples), surrogates=1)
    value = naive_partial(*means)
    rows = zip(*(np.broadcast_to(table, (300, 12)) for table in resamples), strict=True)
    low, median, high = np.quantile([naive_partial(*row) for row in rows], [0.025, 0.5, 0.975])
    expected = np.clip([value, value + low - median, value + high - median], -1, 1)
    assert [estimate.value, estimate.low, estimate.high] == pytest.approx(expected, abs=1e-9)
    assert estimate.low < estimate.value


def test_unrelated_partial_series_are_significant_as_often_as_said() -> None:
    rng, p_values = np.random.default_rng(5), []
    for _ in range(300):
        z, x, y = ar1(rng, 0.8, 3, 30)
        p_values.append(partial_correlate(z + x, y - z, z, surrogates=199).p_value)
    assert np.mean(np.array(p_values) < 0.05) <= 0.08


@pytest.mark.parametrize(
    ("x", "y", "z", "reason"),
    [
        ([1, 2, 3], [1, 3, 2], [2, 1, 3], "needs at least 4 layers, but 3 are available"),
        ([1, 2, 3, 4], [1, 3, 2, math.nan], [2, 1, 3, 4], "undefined in 1 of 4 layers"),
        ([1, 2, 3, 4], [1, 3, 2, 4], [2, 2, 2, 2], "a series is the same in all 4 layers"),
        ([1, 2, 3, 4], [1, 3, 2, 4], [4, 3, 2, 1], "has the order of the variable held fixed"),
    ],
)
def test_undefined_partial_correlations(x, y, z, reason: str) -> None:
    estimate = partial_correlate(*(np.array(series, dtype=float) for series in (x, y, z)))
    assert (estimate.value, estimate.low, estimate.p_value) == (None, None, None)
    assert reason in estimate.reason


def test_the_difference_of_two_coefficients_is_paired() -> None:
    # Two proxies that share their noise: their difference is surer than either.
    rng = np.random.default_rng(0)
    truth, drop = np.arange(30.0), np.arange(30.0) + rng.normal(0, 8, 30)
    noise = rng.normal(0, 6, (500, 30))
    drops = drop + noise
    noisy_proxy = (drop, drop + noise)
    true_proxy = (truth, truth + rng.normal(0, 6, (500, 30)))
    difference = correlation_difference(noisy_proxy, true_proxy, (drop, drops), "spearman")
    assert difference.value == pytest.approx(1 - stats.spearmanr(truth, drop).statistic)
    assert difference.low <= difference.value <= difference.high <= 2
    zero = correlation_difference(noisy_proxy, noisy_proxy, (drop, drops), "spearman")
    assert (zero.value, zero.low, zero.high) == (0, 0, 0)
    constant = (np.ones(30), np.ones((500, 30)))
    undefined = correlation_difference(noisy_proxy, constant, (drop, drops), "spearman")
    assert undefined.reason == "the proxy is the same in all 30 layers"


def permutations_within(values: Array, layers: Array) -> list[Array]:
    """Every way to deal values anew within their groups."""
    groups = [np.flatnonzero(layers == group) for group in np.unique(layers)]
    rows = []
    for order in itertools.product(*(itertools.permutations(indexes) for indexes in groups)):
        permuted = values.copy()
        for indexes, sources in zip(groups, order, strict=True):
            permuted[indexes] = values[list(sources)]
        rows.append(permuted)
    return rows


@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_parts_are_dealt_anew_within_their_layers(coefficient) -> None:
    layers = np.array([1, 0, 1, 0, 1, 0, 2])
    x = np.array([5.0, 1.0, 7.0, 3.0, 6.0, 2.0, 9.0])
    y = np.array([0.3, 0.1, 0.7, 0.2, 0.6, 0.4, 0.1])
    permutations = np.array(permutations_within(x, layers))
    coefficients = row_coefficients(permutations, y[None], coefficient)
    (value,) = row_coefficients(x[None], y[None], coefficient)
    tail = min((coefficients >= value - 1e-9).mean(), (coefficients <= value + 1e-9).mean())
    estimate = correlate(x, y, coefficient=coefficient, groups=layers, noun="expert")
    assert estimate.p_value == pytest.approx(min(1, 2 * tail), abs=0.03)
