"""Metrics that divide a sum over all documents by another one, as weighted means of documents.

A document brings a pair (sum, units): log-likelihood and bytes, right tokens and tokens. The ratio
of both sums is the mean of the documents' own ratios, weighted by their units, so that drops,
intervals and resampling work as for any other metric.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tracker.stats.arrays import Array, divided

RATIO = "ratio"
"""The plain ratio of both sums."""
SCALES = {RATIO: 1.0, "bits_per_byte": -1 / math.log(2)}
"""Aggregations that are a ratio of sums, ours or lm-eval's, and by what the ratio is multiplied."""


def ratio_of_sums(how: str, pairs: Sequence[tuple[float, float]]) -> float:
    """Aggregate a metric over documents.

    Args:
        how: The aggregation, one of `SCALES`.
        pairs: One (sum, units) a document.

    Returns:
        The scaled ratio; NaN without units.

    Examples:
        >>> ratio_of_sums("ratio", [(1, 2), (5, 6)])
        0.75
    """
    total = sum(units for _, units in pairs)
    return SCALES[how] * sum(part for part, _ in pairs) / total if total else math.nan


def document_ratios(how: str, sums: Array, units: Array) -> Array:
    """Give every document its own ratio.

    Args:
        how: The aggregation, one of `SCALES`.
        sums: `[documents]`.
        units: `[documents]`, 0 or more.

    Returns:
        `[documents]`, scaled; 0 for an empty document, whose weight is 0 too, and NaN for one that
        has a sum but no units.

    Examples:
        >>> document_ratios("ratio", np.array([1.0, 0.0]), np.array([2.0, 0.0])).tolist()
        [0.5, 0.0]
    """
    nothing = np.where((units == 0) & (sums == 0), 0.0, np.nan)
    return divided(SCALES[how] * sums, units, nothing)
