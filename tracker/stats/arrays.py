"""Define array types for other modules, and compute means of proxies over tokens."""

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
    """Divide two arrays; where the divisor is not positive, the result is `fallback`."""
    shape = np.broadcast_shapes(np.shape(over), under.shape)
    quotients = np.full(shape, fallback, dtype=np.float64)
    return np.divide(over, under, out=quotients, where=under > 0)


def chunk_sizes(total: int, size: int) -> Iterator[int]:
    """Split a total into chunks of at most `size`, and yield the sizes of the chunks."""
    yield from [size] * (total // size)
    if remainder := total % size:
        yield remainder


def token_means(sums: Array, tokens: Array) -> Array:
    """Return each document's mean of a proxy over tokens, as an array `[documents, layers]`.

    The mean is 0 for a document without tokens.
    """
    return sums / np.maximum(tokens, 1)[:, None]


def proxy_means(sums: Array, tokens: IntArray | Array) -> Array:
    """Return the mean of a proxy over all tokens of all documents.

    Each document is weighted by its number of tokens.

    Args:
        sums: `[documents, layers]`, the proxy summed over each document's tokens.
        tokens: `[documents]`, number of tokens of each document.

    Returns:
        `[layers]`, the mean of the proxy. The mean is NaN if there are no tokens or if a value is
        NaN.

    Examples:
        >>> proxy_means(np.array([[1.0, 2.0], [5.0, 4.0]]), np.array([2, 10])).tolist()
        [0.5, 0.5]
    """
    return safe_divide(sums.sum(axis=0), tokens.sum(keepdims=True))
