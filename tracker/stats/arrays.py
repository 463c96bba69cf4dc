"""Define the arrays that other modules take, and average proxies over tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Numbers = NDArray[np.int64]
"""Indexes (0-based) of documents, layers or series; or counts."""
Strata = Sequence[str] | NDArray[np.generic]
"""`[documents]`, e.g. each document's task."""


def divided(over: Array | float, under: Array, otherwise: Array | float = math.nan) -> Array:
    """Divide where the denominator is above 0; use `otherwise` elsewhere."""
    found = np.full(np.broadcast_shapes(np.shape(over), under.shape), otherwise, dtype=np.float64)
    return np.divide(over, under, out=found, where=under > 0)


def per_token(sums: Array, tokens: Array) -> Array:
    """Average a proxy over each document's tokens `[documents, layers]`; 0 without tokens.

    An empty text has no tokens, and therefore no weight.
    """
    return sums / np.maximum(tokens, 1)[:, None]


def proxy_means(sums: Array, tokens: Numbers | Array) -> Array:
    """Average a proxy over all tokens of all documents, so that each token counts once.

    A long document weighs more than a short one. The tokens are each document's context and gold
    continuation.

    Args:
        sums: `[documents, layers]`, the proxy summed over each document's tokens.
        tokens: `[documents]`, number of tokens of each sum.

    Returns:
        `[layers]`; NaN without tokens, and in a layer with a NaN in any document.

    Examples:
        >>> proxy_means(np.array([[1.0, 2.0], [5.0, 4.0]]), np.array([2, 10])).tolist()
        [0.5, 0.5]
    """
    return divided(sums.sum(axis=0), np.full(sums.shape[1], tokens.sum(), dtype=np.float64))
