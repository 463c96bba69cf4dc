"""Whether two orders of the layers agree, beside what chance gives, over several benchmarks.

Values that agree to twelve decimals are ties, and ties share the mean of their ranks (midranks), so
that no figure depends on which layer is counted first. `correlation.rank_disagreement`, a pruner's
order, breaks ties by layer instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tracker.stats.surrogates import surrogate_series

Array = NDArray[np.float64]
DRAWS = 4999
_DECIMALS = 12
_EPS = 1e-9


@dataclass(frozen=True)
class Disagreement:
    """In how many layers two ranks differ, on average over benchmarks.

    Attributes:
        share: The share of layers.
        chance: The share that random orders of these values give on average, exactly.
        shuffled_p: How often freely shuffled layers disagree as rarely.
        smooth_p: How often layers do that are shuffled as smoothly over depth as they are; the
            larger p-value of redrawing either series.
    """

    share: float
    chance: float
    shuffled_p: float
    smooth_p: float


def disagreement(proxy: Array, drop: Array, beyond: float, seed: int = 0) -> Disagreement:
    """Say in how many layers the two ranks differ by more than a threshold.

    The chance level is exact under the uniform permutation: any rank meets any other with the
    probability 1 / layers, so it is the share of all layers × layers pairs of ranks that differ by
    more. For ranks without ties and the threshold 0 it is 1 - 1 / layers. The p-values relabel the
    layers of one series, the same way in every benchmark, because a layer's figures in several
    benchmarks belong together; (k + 1) / (m + 1) for k of m relabellings.

    Args:
        proxy: `[benchmarks, layers]`, finite.
        drop: `[benchmarks, layers]`, finite, no row constant.
        beyond: Ranks that differ by no more than this agree; 0 = exact ranks.
        seed: Seed of the relabellings.

    Returns:
        The share, its chance level, and one-sided p-values of agreeing better than chance.

    Raises:
        ValueError: The tables' shapes differ.

    Examples:
        Two random orders of 30 layers have 96.7 % of their exact ranks apart.

        >>> layers = np.arange(30.0)[None]
        >>> found = disagreement(layers, layers, 0)
        >>> found.share, round(found.chance, 3), found.shuffled_p
        (0.0, 0.967, 0.0002)
    """
    x, y = midranks(proxy), midranks(drop)
    if x.shape != y.shape:
        raise ValueError(f"tables of the shapes {x.shape} and {y.shape} do not match")

    def shares(others: Array) -> Array:
        """Shares of `[draws, benchmarks, layers]` beside x."""
        return np.asarray((np.abs(others - x) > beyond + _EPS).mean(axis=(1, 2)), np.float64)

    apart = np.abs(x[:, :, None] - y[:, None, :]) > beyond + _EPS
    share = float(shares(y[None])[0])
    generator = np.random.default_rng(seed)
    free = generator.permuted(np.tile(np.arange(x.shape[1]), (DRAWS, 1)), axis=1)
    # Relabelling x by an order is relabelling y by its inverse.
    by_drop, by_proxy = (smooth_orders(each.mean(axis=0), DRAWS, seed) for each in (y, x))

    def p_value(orders: NDArray[np.int64]) -> float:
        drawn = np.moveaxis(y[:, orders], 0, 1)
        return float(((shares(drawn) <= share + _EPS).sum() + 1) / (len(orders) + 1))

    smooth = max(p_value(by_drop), p_value(by_proxy.argsort(axis=1)))
    return Disagreement(share, float(apart.mean()), p_value(free), smooth)


def mean_spearman_p(proxy: Array, drop: Array, seed: int = 0) -> float:
    """Test that a proxy and the drop have nothing to do with each other in any benchmark.

    The statistic is the mean over benchmarks of Spearman's coefficient, two-sided. As in
    `correlation.correlate`, each series in turn is redrawn as smooth over depth as it is, and the
    larger p-value stands; here the redrawn order is that of the mean ranks over the benchmarks,
    and relabels the layers of every benchmark alike.

    Args:
        proxy: `[benchmarks, layers]`, finite, no row constant.
        drop: `[benchmarks, layers]`, the same.
        seed: Seed of the relabellings.

    Returns:
        (k + 1) / (m + 1) for k of m relabellings that correlate as strongly.
    """
    x, y = (_standardised(midranks(each)) for each in (proxy, drop))
    count = x.shape[0] * x.shape[1]
    observed = abs(float((x * y).sum() / count))
    worst = 0
    for kept, redrawn in ((x, y), (y, x)):
        orders = smooth_orders(redrawn.mean(axis=0), DRAWS, seed)
        drawn = np.einsum("bl,bml->m", kept, redrawn[:, orders]) / count
        worst = max(worst, int((np.abs(drawn) >= observed - _EPS).sum()))
    return (worst + 1) / (DRAWS + 1)


def smooth_orders(values: Array, draws: int, seed: int) -> NDArray[np.int64]:
    """Draw orders of the layers in which a series stays as smooth over depth as it is.

    Args:
        values: `[layers]` in the order of depth, finite; equal ones count as ascending.
        draws: How many orders.
        seed: Seed of the generator.

    Returns:
        `[draws, layers]`: the layer whose value stands at each depth; see `surrogate_series`.
    """
    ranks = stats.rankdata(values, method="ordinal").astype(np.float64)
    places = surrogate_series(ranks, draws, seed).astype(np.int64) - 1
    return np.asarray(ranks.argsort()[places], dtype=np.int64)


def overlap(proxy: Array, drop: Array, count: int) -> float:
    """Say which share of the most relevant layers by one order is among those of the other.

    Layers that tie for the last places have an equal share of each, so that of the largest `count`
    of L layers chance alone has exactly count / L in common.

    Args:
        proxy: `[layers]`, finite.
        drop: `[layers]`, finite.
        count: How many are the most relevant ones, at most `layers`.

    Returns:
        The share, 0 to 1. For the least relevant ones give both with the sign turned.

    Examples:
        >>> overlap(np.array([4.0, 3.0, 2.0, 1.0]), np.array([4.0, 0.0, 0.0, 0.0]), 2)
        0.6666666666666666
    """
    return float((_among(proxy, count) * _among(drop, count)).sum() / count)


def midranks(rows: Array) -> Array:
    """Rank each row from the smallest value, 1, ties sharing the mean of their ranks."""
    rounded = np.round(rows, _DECIMALS)
    return np.asarray(stats.rankdata(rounded, axis=-1), dtype=np.float64)


def _among(values: Array, count: int) -> Array:
    """How much of each layer is among the largest: 0, 1, or a share where they tie."""
    rounded = np.round(values, _DECIMALS)
    last = np.sort(rounded)[-count]
    surely, tied = rounded > last, rounded == last
    shares = np.where(tied, (count - surely.sum()) / tied.sum(), surely.astype(np.float64))
    return np.asarray(shares, dtype=np.float64)


def _standardised(rows: Array) -> Array:
    spread = rows.std(axis=1, keepdims=True)
    return np.asarray((rows - rows.mean(axis=1, keepdims=True)) / spread, dtype=np.float64)
