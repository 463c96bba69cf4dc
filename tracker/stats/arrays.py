"""What the measures take: arrays of figures, and which documents belong together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Numbers = NDArray[np.int64]
"""Of documents, layers or series, 0-based; or how many there are."""
Strata = Sequence[str] | NDArray[np.generic]
"""`[documents]`, e.g. each document's task."""


def divided(over: Array | float, under: Array, otherwise: Array | float = math.nan) -> Array:
    """Divide where the denominator is above 0; there is something else where it is not."""
    found = np.full(np.broadcast_shapes(np.shape(over), under.shape), otherwise, dtype=np.float64)
    return np.divide(over, under, out=found, where=under > 0)
