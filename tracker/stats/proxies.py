"""How what is observed of each document becomes one figure a layer."""

from __future__ import annotations

import numpy as np

from tracker.stats.arrays import Array, Numbers, divided


def per_token(sums: Array, tokens: Array) -> Array:
    """Average a proxy over each document's tokens `[documents, layers]`; 0 without any.

    An empty text has no tokens, and therefore no weight.
    """
    return sums / np.maximum(tokens, 1)[:, None]


def proxy_means(sums: Array, tokens: Numbers | Array) -> Array:
    """Average a proxy over all tokens of all documents, so that each token counts once.

    A long document weighs more than a short one. The tokens are each document's context and gold
    continuation.

    Args:
        sums: `[documents, layers]`, the proxy summed over each document's tokens.
        tokens: `[documents]`, how many tokens each sum holds.

    Returns:
        `[layers]`; NaN without tokens, and in a layer with a NaN in any document.

    Examples:
        >>> proxy_means(np.array([[1.0, 2.0], [5.0, 4.0]]), np.array([2, 10])).tolist()
        [0.5, 0.5]
    """
    return divided(sums.sum(axis=0), np.full(sums.shape[1], tokens.sum(), dtype=np.float64))
