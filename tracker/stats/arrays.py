"""Define the array types of other modules, and average proxies over tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
IntArray = NDArray[np.int64]
"""Indexes (0-based) of documents, layers or series; or counts."""
Strata = Sequence[str] | NDArray[np.generic]
"""`[documents]`, the stratum of each document, e.g. its task."""


def safe_divide(over: Array | float, under: Array, fallback: Array | float = math.nan) -> Array:
    """Divide `over` by `under` where `under` is above 0; use `fallback` elsewhere."""
    shape = np.broadcast_shapes(np.shape(over), under.shape)
    quotients = np.full(shape, fallback, dtype=np.float64)
    return np.divide(over, under, out=quotients, where=under > 0)


def chunk_sizes(total: int, size: int) -> Iterator[int]:
    """Yield the sizes of the chunks into which a total is split, each at most `size`."""
    yield from [size] * (total // size)
    if remainder := total % size:
        yield remainder


def token_means(sums: Array, tokens: Array) -> Array:
    """Average a proxy over each document's tokens `[documents, layers]`.

    An empty text has no tokens, and therefore no weight.
    """
    return sums / np.maximum(tokens, 1)[:, None]


def proxy_means(sums: Array, tokens: IntArray | Array) -> Array:
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
    return safe_divide(sums.sum(axis=0), tokens.sum(keepdims=True))
