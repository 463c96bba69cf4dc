"""Compute ranks, rank correlations and overlaps of rankings of layers.

Values that agree to twelve decimals are ties. The rank of a tied value is the mean of the tied
ranks (midrank).

Neighbouring layers have similar values, so that a series over layers is smooth. Two unrelated
smooth series often correlate strongly by chance. A permutation test must take the smoothness into
account. The random reorderings of `surrogate_series` are therefore as smooth as the original
series.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import scipy  # imports its slow submodules on first use
from numpy.typing import ArrayLike, NDArray

from tracker.stats.arrays import Array, IntArray, safe_divide

AUTOCORRELATIONS = np.append(np.arange(-19, 20) / 20, 0.98)
"""Possible autocorrelations of neighbouring layers, with equal prior probabilities."""


def surrogate_series(values: Array, n_draws: int, seed: int) -> Array:
    """Reorder a series over layers at random, so that the series stays equally smooth.

    The values are modelled as a monotonic function of a stationary Gaussian AR(1) series. For each
    draw, the function samples an autocorrelation from its posterior distribution, and simulates a
    Gaussian AR(1) series. The values are then reordered to the ranks of the simulated series. For
    values without autocorrelation, the reorderings are almost uniformly random permutations. The
    posterior distribution is computed from the restricted likelihood of the values' normal scores.

    Args:
        values: `[layers]` in the order of depth, finite and not all equal.
        n_draws: Number of series.
        seed: Seed of the generator.

    Returns:
        `[draws, layers]`, the reordered values.

    References:
        J. Theiler, S. Eubank, A. Longtin, B. Galdrikian, J. D. Farmer, Physica D 58 (1992) 77-94
        (surrogates: a linear Gaussian series under a monotonic function). W.-K. Cheang,
        G. C. Reinsel, Journal of the American Statistical Association 95 (2000) 1173-1184 (the
        restricted likelihood of short AR series). X.-L. Meng, Annals of Statistics 22 (1994)
        1142-1160 (p-values that draw the nuisance parameter).
    """
    orders = _draw_ranks(tuple(scipy.stats.rankdata(values).tolist()), n_draws, seed)
    return np.asarray(np.sort(values)[orders], dtype=np.float64)


@lru_cache(maxsize=16)  # by every proxy, coefficient and subset the same drops are redrawn
def _draw_ranks(ranks: tuple[float, ...], n_draws: int, seed: int) -> NDArray[np.int32]:
    """Draw random ranks of layers, `[draws, layers]`, that are as smooth over depth as `ranks`.

    The returned ranks begin at 0.
    """
    rng = np.random.default_rng(seed)
    scores = scipy.special.ndtri(np.array(ranks) / (len(ranks) + 1))
    rho = rng.choice(AUTOCORRELATIONS, size=n_draws, p=smoothness_likelihood(scores))
    series = rng.standard_normal((len(ranks), n_draws))
    for layer in range(1, len(ranks)):
        series[layer] = np.sqrt(1 - rho**2) * series[layer] + rho * series[layer - 1]
    return series.T.argsort(axis=1).argsort(axis=1).astype(np.int32)


def smoothness_likelihood(scores: Array) -> Array:
    """Return the likelihood of each of `AUTOCORRELATIONS`, given scores in the order of layers.

    The function uses the restricted likelihood of an AR(1) series with unknown mean and variance,
    and scales the likelihoods so that their sum is 1.
    """
    n, rho = len(scores), AUTOCORRELATIONS[:, None]
    # The inverse of an AR(1) covariance has three diagonals, so none has to be inverted.
    weights = np.where(np.isin(np.arange(n), (0, n - 1)), 1.0, 1 - rho) / (1 + rho)
    totals = weights.sum(axis=1)
    centred = scores - (weights @ scores / totals)[:, None]
    innovations = (centred[:, 1:] - rho * centred[:, :-1]) ** 2 / (1 - rho**2)
    squares = centred[:, 0] ** 2 + innovations.sum(axis=1)
    variances = np.log(1 - AUTOCORRELATIONS**2) + np.log(squares)
    return np.asarray(scipy.special.softmax(-(np.log(totals) + (n - 1) * variances) / 2))


TIE_DECIMALS = 12
"""Values that agree to this number of decimals are ties."""
Coefficient = Literal["spearman", "kendall", "pearson"]
COEFFICIENTS: tuple[Coefficient, ...] = get_args(Coefficient)
"""Spearman's rho, Kendall's tau-b, and Pearson's r."""
RELABELLINGS = 4999
_EPS = 1e-9
_PAIRS_AT_ONCE = 2_000_000
"""Maximum number of pairs of layers that are compared at once."""


def rounded_values(values: ArrayLike) -> Array:
    """Round values so that ties are exactly equal; infinite values become NaN."""
    array = np.asarray(values, dtype=np.float64)
    finite = np.where(np.isfinite(array), array, np.nan)
    return np.asarray(np.round(finite, TIE_DECIMALS), dtype=np.float64)


def midranks(rows: ArrayLike) -> Array:
    """Return the ranks in each row (1 = smallest); tied values get the mean of their ranks."""
    return np.asarray(scipy.stats.rankdata(rounded_values(rows), axis=-1), dtype=np.float64)


def min_ranks(values: Sequence[float | None] | Array, lowest_first: bool = False) -> list[int]:
    """Return the rank of each value; rank 1 is the largest value.

    If `lowest_first` is True, rank 1 is the smallest value. Tied values get the best of their
    ranks.
    """
    array = rounded_values(np.array(values, dtype=np.float64))
    ranks = scipy.stats.rankdata(array if lowest_first else -array, method="min")
    return list(map(int, ranks))


def row_coefficients(x: Array, y: Array, coefficient: str) -> Array:
    """Compute the correlation of each row of `x` with the same row of `y`.

    Args:
        x: Array `[rows, layers]`, or `[1, layers]` to use one row for all rows of `y`.
        y: Array `[rows, layers]`, or `[1, layers]` to use one row for all rows of `x`.
        coefficient: Name of the correlation coefficient, one of `COEFFICIENTS`.

    Returns:
        `[rows]`, the coefficients; NaN if a row is constant or contains a NaN.
    """
    x, y = rounded_values(x), rounded_values(y)
    # The spread of a row with a NaN is NaN; comparisons with it are False.
    is_defined = (np.ptp(x, axis=1) > 0) & (np.ptp(y, axis=1) > 0)
    if coefficient == "kendall":
        return np.where(is_defined, _kendall_rows(x, y), np.nan)
    if coefficient == "spearman":
        x, y = (scipy.stats.rankdata(rows, axis=1) for rows in (x, y))
    x, y = (rows - rows.mean(axis=1, keepdims=True) for rows in (x, y))
    spread = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    values = np.clip(safe_divide((x * y).sum(axis=1), spread), -1, 1)
    return np.where(is_defined, values, np.nan)


def _kendall_rows(x: Array, y: Array) -> Array:
    """Return Kendall's tau-b of each row of `x` with the same row of `y`.

    Let c be the number of concordant pairs of layers, and d the number of discordant pairs. Let m
    be the number of pairs without a tie in `x`, and n the number without a tie in `y`. Tau-b is
    (c−d)/√(m·n).
    """
    i, j = np.triu_indices(x.shape[1], k=1)
    values = []
    step = max(1, _PAIRS_AT_ONCE // max(len(i), 1))
    for start in range(0, max(len(x), len(y)), step):
        signs = []
        for table in (x, y):
            block = table if len(table) == 1 else table[start : start + step]
            signs.append(np.sign(block[:, i] - block[:, j]).astype(np.float32))
        balance = np.einsum("ij,ij->i", *np.broadcast_arrays(*signs))
        x_untied, y_untied = (np.abs(sign).sum(axis=1, dtype=np.float64) for sign in signs)
        values.append(safe_divide(balance, np.sqrt(x_untied * y_untied)))
    return np.concatenate(values)


def top_overlap(x: Array, y: Array, k: int) -> Array:
    """Return the fraction of the `k` top layers that two rankings have in common.

    If values are tied, the result is the expected fraction when ties are broken at random.

    Args:
        x: `[rows, layers]`, the values of one ranking; a larger value has a better rank.
        y: `[rows, layers]` or `[1, layers]`, the values of the other ranking for the same layers.
        k: Number of top layers, from 1 to the number of layers.

    Returns:
        `[rows]`, the overlap in [0, 1]; NaN if a value of the row is NaN.

    Examples:
        >>> x, y = np.array([[4.0, 3.0, 2.0, 1.0]]), np.array([[4.0, 1.0, 3.0, 2.0]])
        >>> top_overlap(x, y, k=2).tolist()
        [0.5]
    """
    shares = (_top_probabilities(x, k) * _top_probabilities(y, k)).sum(axis=1) / k
    is_defined = np.isfinite(x).all(axis=1) & np.isfinite(y).all(axis=1)
    return np.where(is_defined, shares, np.nan)


def _top_probabilities(rows: Array, k: int) -> Array:
    """Return the probability of each value to be one of the `k` largest in its row.

    Ties are broken at random.
    """
    figures = rounded_values(rows)
    thresholds = np.sort(figures, axis=1)[:, -k][:, None]
    is_above, is_tied = figures > thresholds, figures == thresholds
    n_left = k - is_above.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN is equal to nothing
        return np.asarray(is_above + is_tied * n_left / is_tied.sum(axis=1, keepdims=True))


def differing_rank_share(proxy: Array, drop: Array, tolerance: float = 0) -> tuple[float, float]:
    """Return the fraction of layers whose rank by the proxy differs from the rank by the drop.

    The function also returns the chance level: the mean fraction over all orders of the layers. If
    there are no ties and `tolerance` is 0, the chance level is 1 - 1 / (number of layers).

    Args:
        proxy: `[benchmarks, layers]`, values of the proxy, which are ranked within each benchmark.
        drop: `[benchmarks, layers]`, accuracy drops, which are ranked within each benchmark.
        tolerance: Largest difference at which two ranks still count as equal.

    Returns:
        The fraction over all benchmarks, and its chance level. Both numbers are NaN if a value is
        not finite.

    Examples:
        >>> proxy, drop = np.array([[0.1, 0.2, 0.3, 0.4]]), np.array([[0.0, 0.2, 0.1, 0.5]])
        >>> differing_rank_share(proxy, drop)
        (0.5, 0.75)
    """
    if not (np.isfinite(proxy).all() and np.isfinite(drop).all()):
        return math.nan, math.nan
    x, y = midranks(proxy), midranks(drop)
    is_apart = np.abs(x[:, :, None] - y[:, None, :]) > tolerance + _EPS
    return float(np.diagonal(is_apart, axis1=1, axis2=2).mean()), float(is_apart.mean())


@dataclass(frozen=True)
class Disagreement:
    """Result of a comparison of layer ranks by two measures.

    Attributes:
        share: Fraction of layers whose two ranks differ, averaged over benchmarks.
        chance: The mean of this fraction over all orders of the layers.
        shuffled_p: p-value from uniformly random orders of the layers.
        smooth_p: p-value from random orders of the layers that keep the values equally smooth over
            depth.
    """

    share: float
    chance: float
    shuffled_p: float
    smooth_p: float


def compare_ranks(proxy: Array, drop: Array, tolerance: float, seed: int = 0) -> Disagreement:
    """Test whether layer ranks by proxy and by drop agree better than by chance.

    The p-values are computed from random orders of the layers in one of the two measures, with the
    same random order on all benchmarks.

    Args:
        proxy: `[benchmarks, layers]`, finite values of the proxy.
        drop: `[benchmarks, layers]`, finite drops; no row is constant.
        tolerance: Largest difference at which two ranks still count as equal.
        seed: Seed of the shuffles.

    Returns:
        The fraction of layers whose two ranks differ and its chance level (see
        `differing_rank_share`), and two one-sided p-values. The first p-value is from uniformly
        random orders of the layers. The second is from random orders that keep the values equally
        smooth over depth.

    Examples:
        On average, 96.7 % of 30 layers have different ranks in two random orders.

        >>> layers = np.arange(30.0)[None]
        >>> result = compare_ranks(layers, layers, 0)
        >>> result.share, round(result.chance, 3), result.shuffled_p
        (0.0, 0.967, 0.0002)
    """
    share, chance = differing_rank_share(proxy, drop, tolerance)
    x, y = midranks(proxy), midranks(drop)
    rng = np.random.default_rng(seed)
    free_orders = rng.permuted(np.tile(np.arange(x.shape[1]), (RELABELLINGS, 1)), axis=1)
    x_orders, y_orders = (smooth_orders(ranks.mean(axis=0), RELABELLINGS, seed) for ranks in (x, y))

    def p_value(orders: IntArray) -> float:
        relabelled = np.moveaxis(y[:, orders], 0, 1)
        shares = (np.abs(relabelled - x) > tolerance + _EPS).mean(axis=(1, 2))
        return float(((shares <= share + _EPS).sum() + 1) / (len(orders) + 1))

    # Relabelling x by an order is relabelling y by its inverse.
    smooth_p = max(p_value(y_orders), p_value(x_orders.argsort(axis=1)))
    return Disagreement(share, chance, p_value(free_orders), smooth_p)


def mean_spearman_p(proxy: Array, drop: Array, seed: int = 0) -> float:
    """Test whether proxy and drop correlate on average over benchmarks; return the p-value.

    The null hypothesis is that proxy and drop are unrelated in every benchmark. The two-sided test
    uses the same random series as `correlation.correlate`.

    Args:
        proxy: `[benchmarks, layers]`, finite values of the proxy; no row is constant.
        drop: `[benchmarks, layers]`, finite drops; no row is constant.
        seed: Seed of the random orders.

    Returns:
        The p-value.
    """
    x, y = (scipy.stats.zscore(midranks(values), axis=1) for values in (proxy, drop))
    strength = abs(float((x * y).sum() / x.size))
    n_as_strong = 0
    for fixed_ranks, redrawn_ranks in ((x, y), (y, x)):
        orders = smooth_orders(redrawn_ranks.mean(axis=0), RELABELLINGS, seed)
        coefficients = np.einsum("bl,bml->m", fixed_ranks, redrawn_ranks[:, orders]) / x.size
        n_as_strong = max(n_as_strong, int((np.abs(coefficients) >= strength - _EPS).sum()))
    return (n_as_strong + 1) / (RELABELLINGS + 1)


def smooth_orders(values: Array, n_draws: int, seed: int) -> IntArray:
    """Draw random orders of layers that keep the series `values` equally smooth.

    Args:
        values: `[layers]`, the series in the order of depth, finite.
        n_draws: Number of orders.
        seed: Seed of the generator.

    Returns:
        `[draws, layers]`, the indexes of the layers in the new order. The orders are drawn from the
        model of `surrogate_series`.
    """
    ranks = scipy.stats.rankdata(values, method="ordinal").astype(np.float64)
    positions = surrogate_series(ranks, n_draws, seed).astype(np.int64) - 1
    return np.asarray(ranks.argsort()[positions], dtype=np.int64)
