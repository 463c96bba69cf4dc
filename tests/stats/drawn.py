"""What several tests of statistics draw: smooth series, and drops of documents."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def ar1(generator: np.random.Generator, rho: float, count: int, layers: int) -> Array:
    """Stationary Gaussian series of first order, variance 1, one a row."""
    series = generator.normal(size=(count, layers))
    for layer in range(1, layers):
        series[:, layer] = rho * series[:, layer - 1] + math.sqrt(1 - rho**2) * series[:, layer]
    return series


def drops(documents: int, lost: float, won: float) -> Array:
    """Paired differences of so many documents: shares lost and won, the rest ties."""
    lose, win = round(documents * lost), round(documents * won)
    return np.repeat([1.0, -1.0, 0.0], [lose, win, documents - lose - win])


def layers_of(
    dice: np.random.Generator, documents: int, lost: Iterable[float], won: float
) -> Array:
    """Drops `[documents, layers]`, each layer in an order of its own: its share lost, and won."""
    return np.stack([dice.permutation(drops(documents, one, won)) for one in lost], axis=1)
