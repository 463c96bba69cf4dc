"""Series over depth that might have been measured instead: as smooth, and related to nothing.

Neighbouring layers resemble each other. Two smooth series that have nothing to do with each other
correlate strongly by accident, so an order of the layers in which all orders are equally likely is
no measure of chance.
"""

from __future__ import annotations

import numpy as np
from scipy import special, stats

from tracker.stats.arrays import Array

_SMOOTHNESS = np.append(np.arange(-19, 20) / 20, 0.98)
"""Autocorrelations of neighbouring layers that are possible, all equally before the data."""


def surrogate_series(values: Array, draws: int, seed: int) -> Array:
    """Draw series that hold the same values in another order, as smooth as the given order.

    The values are taken for a monotonic function of a stationary Gaussian series of first order,
    AR(1), over equidistant layers. Each draw takes an autocorrelation from those that the data
    leave likely, lets such a series run, and puts the smallest value where it is smallest, and so
    on. Values, outliers and ties therefore stay, and of a series without autocorrelation the draws
    are nearly free permutations. How likely an autocorrelation is comes from the restricted
    likelihood of the values' normal scores: it allows for the mean that a short series hides, and
    drawing from all that is likely instead of taking the likeliest allows for the rest of what few
    layers leave open.

    Args:
        values: `[layers]` in the order of depth, finite and not all equal.
        draws: How many series.
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
    generator = np.random.default_rng(seed)
    scores = special.ndtri(stats.rankdata(values) / (len(values) + 1))
    chosen = generator.choice(_SMOOTHNESS, size=draws, p=_likely(scores))
    series = generator.standard_normal((len(values), draws))
    for layer in range(1, len(values)):
        series[layer] *= np.sqrt(1 - chosen**2)
        series[layer] += chosen * series[layer - 1]
    ranks = series.T.argsort(axis=1).argsort(axis=1)
    return np.asarray(np.sort(values)[ranks], dtype=np.float64)


def _likely(scores: Array) -> Array:
    """Return how likely each autocorrelation is: AR(1), mean and variance integrated out."""
    n, rho = len(scores), _SMOOTHNESS[:, None]
    # The inverse of an AR(1) covariance has three diagonals, so none has to be inverted.
    weights = np.where(np.isin(np.arange(n), (0, n - 1)), 1.0, 1 - rho) / (1 + rho)
    total = weights.sum(axis=1)
    centred = scores - (weights @ scores / total)[:, None]
    news = (centred[:, 1:] - rho * centred[:, :-1]) ** 2 / (1 - rho**2)
    squares = centred[:, 0] ** 2 + news.sum(axis=1)
    log = -(np.log(total) + (n - 1) * (np.log(1 - _SMOOTHNESS**2) + np.log(squares))) / 2
    likelihood = np.exp(log - log.max())
    return np.asarray(likelihood / likelihood.sum(), dtype=np.float64)
