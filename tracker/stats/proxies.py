"""The cheap proxies' names, and how their per-document sums become one figure per layer.

The figures per token come from `tracker.stats.influence`; nothing here needs torch.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

PROXIES = ("cosine_score", "angular_distance", "relative_update")
"""Every proxy that is set beside the accuracy drop; larger = the layer changes more."""


def cosine_score(cosine_similarity: float | None) -> float | None:
    """Turn a layer's mean cosine similarity into Block Influence, 1 - cosine.

    Args:
        cosine_similarity: Mean over tokens of the cosine between layer input and output.

    Returns:
        0 = the layer turns nothing; at most 2. None when the similarity is None.

    References:
        ShortGPT, arXiv 2403.03853.

    Examples:
        >>> cosine_score(0.75)
        0.25
    """
    return None if cosine_similarity is None else 1 - cosine_similarity


def proxy_means(
    sums: NDArray[np.float64], tokens: NDArray[np.int64] | NDArray[np.float64]
) -> NDArray[np.float64]:
    """Average a proxy over all tokens of all documents, so that each token counts once.

    A long document weighs more than a short one. The tokens are each document's context and gold
    continuation.

    Args:
        sums: `[documents, layers]`, the proxy summed over each document's tokens.
        tokens: `[documents]`, how many tokens each sum holds.

    Returns:
        `[layers]`; NaN without tokens, and in a layer with a NaN in any document.

    Raises:
        ValueError: The sums and the tokens do not belong to the same documents.

    Examples:
        >>> proxy_means(np.array([[1.0, 2.0], [5.0, 4.0]]), np.array([2, 10])).tolist()
        [0.5, 0.5]
    """
    if sums.ndim != 2 or tokens.shape != sums.shape[:1]:
        raise ValueError(f"sums of the shape {sums.shape} but tokens of the shape {tokens.shape}")
    total = int(tokens.sum())
    if not total:
        return np.full(sums.shape[1], np.nan)
    return np.asarray(sums.sum(axis=0) / total, dtype=np.float64)
