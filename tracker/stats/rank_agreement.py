"""Compute the agreement of two orders of layers: ranks, ties, coefficients, overlaps and chance.

Values that agree to twelve decimals are ties, because means of the same outcomes may differ by
rounding. Ties share the mean of their ranks (midranks), so no figure depends on the order of the
layers.

Neighbouring layers resemble each other. Two unrelated smooth series often correlate strongly by
accident. A chance level that takes all orders as equally likely is therefore wrong.
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

from tracker.stats.arrays import Array, Numbers, divided

SMOOTHNESS = np.append(np.arange(-19, 20) / 20, 0.98)
"""Autocorrelations of neighbouring layers that are possible, all equally before the data."""


def surrogate_series(values: Array, draws: int, seed: int) -> Array:
    """Draw series that hold the same values in another order, as smooth as the given order.

    The values are modelled as a monotonic function of a stationary Gaussian series of first order,
    AR(1), over equidistant layers. Each draw takes an autocorrelation from its posterior, simulates
    such a series, and sorts the values in the order of the series. Values, outliers and ties are
    therefore kept. For a series without autocorrelation the draws are nearly free permutations. The
    posterior uses the restricted likelihood of the values' normal scores, which accounts for the
    unknown mean of a short series. Drawing from the posterior, instead of taking its mode, accounts
    for the uncertainty that few layers leave.

    Args:
        values: `[layers]` in the order of depth, finite and not all equal.
        draws: Number of series.
        seed: Seed of the generator.

    Returns:
        `[draws, layers]`.

    References:
        J. Theiler, S. Eubank, A. Longtin, B. Galdrikian, J. D. Farmer, Physica D 58 (1992) 77-94
        (surrogates: a linear Gaussian series under a monotonic function). W.-K. Cheang,
        G. C. Reinsel, Journal of the American Statistical Association 95 (2000) 1173-1184 (the
        restricted likelihood of short AR series). X.-L. Meng, Annals of Statistics 22 (1994)
        1142-1160 (p-values that draw the nuisance parameter).
    """
    orders = _drawn_orders(tuple(scipy.stats.rankdata(values).tolist()), draws, seed)
    return np.asarray(np.sort(values)[orders], dtype=np.float64)


@lru_cache(maxsize=16)  # by every proxy, coefficient and subset the same drops are redrawn
def _drawn_orders(ranks: tuple[float, ...], draws: int, seed: int) -> NDArray[np.int32]:
    """Draw the places of a series' values, ascending, which its ranks decide: `[draws, layers]`."""
    generator = np.random.default_rng(seed)
    scores = scipy.special.ndtri(np.array(ranks) / (len(ranks) + 1))
    chosen = generator.choice(SMOOTHNESS, size=draws, p=smoothness_likelihood(scores))
    series = generator.standard_normal((len(ranks), draws))
    for layer in range(1, len(ranks)):
        series[layer] *= np.sqrt(1 - chosen**2)
        series[layer] += chosen * series[layer - 1]
    return series.T.argsort(axis=1).argsort(axis=1).astype(np.int32)


def smoothness_likelihood(scores: Array) -> Array:
    """Return how likely each autocorrelation is: AR(1), mean and variance integrated out."""
    n, rho = len(scores), SMOOTHNESS[:, None]
    # The inverse of an AR(1) covariance has three diagonals, so none has to be inverted.
    weights = np.where(np.isin(np.arange(n), (0, n - 1)), 1.0, 1 - rho) / (1 + rho)
    total = weights.sum(axis=1)
    centred = scores - (weights @ scores / total)[:, None]
    news = (centred[:, 1:] - rho * centred[:, :-1]) ** 2 / (1 - rho**2)
    squares = centred[:, 0] ** 2 + news.sum(axis=1)
    log = -(np.log(total) + (n - 1) * (np.log(1 - SMOOTHNESS**2) + np.log(squares))) / 2
    likelihood = np.exp(log - log.max())
    return np.asarray(likelihood / likelihood.sum(), dtype=np.float64)


DECIMALS = 12
"""Number of decimals to which ties agree."""
Coefficient = Literal["spearman", "kendall", "pearson"]
COEFFICIENTS: tuple[Coefficient, ...] = get_args(Coefficient)
"""Spearman's rho, Kendall's tau-b, and Pearson's r."""
DRAWS = 4999
_EPS = 1e-9
_PAIRS = 2_000_000
"""Pairs of layers that are compared at once."""


def rounded(values: ArrayLike) -> Array:
    """Return the values with rounding errors gone and everything undefined as NaN."""
    numbers = np.asarray(values, dtype=np.float64)
    finite = np.where(np.isfinite(numbers), numbers, np.nan)
    return np.asarray(np.round(finite, DECIMALS), dtype=np.float64)


def midranks(rows: ArrayLike) -> Array:
    """Rank each row from the smallest value, 1, ties sharing the mean of their ranks."""
    return np.asarray(scipy.stats.rankdata(rounded(rows), axis=-1), dtype=np.float64)


def places(values: Sequence[float | None] | Array, lowest_first: bool = False) -> list[int]:
    """Place figures as a leaderboard does, from 1, the largest unless `lowest_first`.

    Equal ones share the better place.
    """
    numbers = rounded(np.array(values, dtype=np.float64))
    found = scipy.stats.rankdata(numbers if lowest_first else -numbers, method="min")
    return [int(place) for place in found]


def row_coefficients(x: Array, y: Array, coefficient: str) -> Array:
    """Correlate each row of one table with the same row of another.

    Args:
        x: `[rows, layers]`, or `[1, layers]` to correlate one row with all rows of the other table.
        y: `[rows, layers]`, or `[1, layers]`.
        coefficient: One of `COEFFICIENTS`.

    Returns:
        `[rows]`; NaN where a row is constant or holds a NaN.

    """
    x, y = rounded(x), rounded(y)
    if coefficient == "kendall":
        values = _kendall_rows(x, y)
    elif coefficient == "spearman":
        values = _pearson_rows(scipy.stats.rankdata(x, axis=1), scipy.stats.rankdata(y, axis=1))
    else:
        values = _pearson_rows(x, y)
    # The spread of a row with a NaN is NaN; comparisons with it are False.
    usable = (np.ptp(x, axis=1) > 0) & (np.ptp(y, axis=1) > 0)
    return np.where(usable, values, np.nan)


def _pearson_rows(x: Array, y: Array) -> Array:
    x = x - x.mean(axis=1, keepdims=True)
    y = y - y.mean(axis=1, keepdims=True)
    spread = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return np.clip(divided((x * y).sum(axis=1), spread), -1, 1)


def _kendall_rows(x: Array, y: Array) -> Array:
    """Return tau-b: the sum of concordance signs over the pairs, divided by the untied pairs."""
    first, second = np.triu_indices(x.shape[1], k=1)
    values = []
    step = max(1, _PAIRS // max(len(first), 1))
    for start in range(0, max(len(x), len(y)), step):
        signs = []
        for table in (x, y):
            block = table if len(table) == 1 else table[start : start + step]
            signs.append(np.sign(block[:, first] - block[:, second]).astype(np.float32))
        balance = np.einsum("ij,ij->i", *np.broadcast_arrays(*signs))
        one, other = (np.abs(sign).sum(axis=1, dtype=np.float64) for sign in signs)
        values.append(divided(balance, np.sqrt(one * other)))
    return np.concatenate(values)


def overlap(first: Array, second: Array, k: int) -> Array:
    """Return the share of the `k` largest layers that two rankings have in common.

    Ties are broken at random, independently in each ranking, and the expected overlap is returned.
    Of m layers that are tied for the last j of the k ranks, each has one with the probability j /
    m. Rankings in which all layers are tied therefore overlap by k / layers, like two random
    orders.

    Args:
        first: `[rows, layers]`.
        second: The same layers, `[rows, layers]` or `[1, layers]`.
        k: Number of layers, at least 1 and at most all.

    Returns:
        `[rows]`, in [0, 1]; NaN where a figure is.

    Examples:
        >>> one = np.array([[4.0, 3.0, 2.0, 1.0]])
        >>> overlap(one, np.array([[4.0, 1.0, 3.0, 2.0]]), k=2).tolist()
        [0.5]
    """
    shared = (_places(first, k) * _places(second, k)).sum(axis=1) / k
    defined = np.isfinite(first).all(axis=1) & np.isfinite(second).all(axis=1)
    return np.where(defined, shared, np.nan)


def _places(rows: Array, k: int) -> Array:
    """Return the probability that each layer is among the `k` largest of its row, ties random."""
    figures = rounded(rows)
    last = np.sort(figures, axis=1)[:, -k][:, None]
    above, tied = figures > last, figures == last
    left = k - above.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN is equal to nothing
        return np.asarray(above + tied * left / tied.sum(axis=1, keepdims=True))


def ranks_apart(proxy: Array, drop: Array, beyond: float = 0) -> tuple[float, float]:
    """Return the share of layers whose two ranks differ, and its chance level.

    The chance level is exact under random permutation: any two ranks meet with the probability 1 /
    layers, so it is the share of all layers × layers pairs of ranks that differ by more. Without
    ties and with the threshold 0 it is 1 - 1 / layers.

    Args:
        proxy: `[benchmarks, layers]`.
        drop: `[benchmarks, layers]`.
        beyond: Largest difference of ranks that still agree; 0 = exact ranks.

    Returns:
        The share, and its mean over random orders of these values, both over all benchmarks; NaN if
        a value is not finite, because its rank is unknown.

    Examples:
        >>> ranks_apart(np.array([[0.1, 0.2, 0.3, 0.4]]), np.array([[0.0, 0.2, 0.1, 0.5]]))
        (0.5, 0.75)
    """
    x, y = midranks(proxy), midranks(drop)
    if not (np.isfinite(proxy).all() and np.isfinite(drop).all()):
        return math.nan, math.nan
    pairs = np.abs(x[:, :, None] - y[:, None, :]) > beyond + _EPS
    return float((np.abs(x - y) > beyond + _EPS).mean()), float(pairs.mean())


@dataclass(frozen=True)
class Disagreement:
    """Share of layers in which two ranks differ, on average over benchmarks.

    Attributes:
        share: The share of layers.
        chance: The share that random orders of these values give on average, exactly.
        shuffled_p: Share of free shuffles of the layers that disagree as rarely.
        smooth_p: Share of shuffles of the same smoothness over depth that disagree as rarely; the
            larger p-value of redrawing either series.
    """

    share: float
    chance: float
    shuffled_p: float
    smooth_p: float


def disagreement(proxy: Array, drop: Array, beyond: float, seed: int = 0) -> Disagreement:
    """Test whether the ranks of two series agree better than chance.

    Share and chance level are those of `ranks_apart`. The p-values relabel the layers of one
    series, the same way in every benchmark, because a layer's values in several benchmarks are
    dependent. They are (k + 1) / (m + 1) for k of m relabellings.

    Args:
        proxy: `[benchmarks, layers]`, finite.
        drop: `[benchmarks, layers]`, finite, no row constant.
        beyond: Largest difference of ranks that still agree; 0 = exact ranks.
        seed: Seed of the relabellings.

    Returns:
        The share, its chance level, and one-sided p-values of agreeing better than chance.

    Examples:
        Two random orders of 30 layers have 96.7 % of their exact ranks apart.

        >>> layers = np.arange(30.0)[None]
        >>> found = disagreement(layers, layers, 0)
        >>> found.share, round(found.chance, 3), found.shuffled_p
        (0.0, 0.967, 0.0002)
    """
    share, chance = ranks_apart(proxy, drop, beyond)
    x, y = midranks(proxy), midranks(drop)
    generator = np.random.default_rng(seed)
    free = generator.permuted(np.tile(np.arange(x.shape[1]), (DRAWS, 1)), axis=1)
    # Relabelling x by an order is relabelling y by its inverse.
    by_drop, by_proxy = (smooth_orders(each.mean(axis=0), DRAWS, seed) for each in (y, x))

    def p_value(orders: Numbers) -> float:
        drawn = np.moveaxis(y[:, orders], 0, 1)
        shares = (np.abs(drawn - x) > beyond + _EPS).mean(axis=(1, 2))
        return float(((shares <= share + _EPS).sum() + 1) / (len(orders) + 1))

    smooth = max(p_value(by_drop), p_value(by_proxy.argsort(axis=1)))
    return Disagreement(share, chance, p_value(free), smooth)


def mean_spearman_p(proxy: Array, drop: Array, seed: int = 0) -> float:
    """Test that a proxy and the drop are unrelated in every benchmark.

    The statistic is the mean over benchmarks of Spearman's coefficient, two-sided. As in
    `correlation.correlate`, each series in turn is redrawn with the same smoothness over depth, and
    the larger p-value is returned. The redrawn order is that of the mean ranks over the benchmarks.
    It relabels the layers of all benchmarks in the same way.

    Args:
        proxy: `[benchmarks, layers]`, finite, no row constant.
        drop: `[benchmarks, layers]`, the same.
        seed: Seed of the relabellings.

    Returns:
        (k + 1) / (m + 1) for k of m relabellings that correlate as strongly.
    """
    x, y = (scipy.stats.zscore(midranks(each), axis=1) for each in (proxy, drop))
    count = x.shape[0] * x.shape[1]
    observed = abs(float((x * y).sum() / count))
    worst = 0
    for kept, redrawn in ((x, y), (y, x)):
        orders = smooth_orders(redrawn.mean(axis=0), DRAWS, seed)
        drawn = np.einsum("bl,bml->m", kept, redrawn[:, orders]) / count
        worst = max(worst, int((np.abs(drawn) >= observed - _EPS).sum()))
    return (worst + 1) / (DRAWS + 1)


def smooth_orders(values: Array, draws: int, seed: int) -> Numbers:
    """Draw orders of the layers in which a series stays as smooth over depth as it is.

    Args:
        values: `[layers]` in the order of depth, finite; equal ones count as ascending.
        draws: Number of orders.
        seed: Seed of the generator.

    Returns:
        `[draws, layers]`: the index of the layer whose value is put at each depth; see
        `surrogate_series`.
    """
    ranks = scipy.stats.rankdata(values, method="ordinal").astype(np.float64)
    positions = surrogate_series(ranks, draws, seed).astype(np.int64) - 1
    return np.asarray(ranks.argsort()[positions], dtype=np.int64)
