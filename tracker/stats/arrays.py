"""What the measures take: arrays of figures, and which documents belong together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Numbers = NDArray[np.int64]
"""Of documents, layers or series, 0-based; or how many there are."""
Strata = Sequence[str] | NDArray[np.generic]
"""`[documents]`, e.g. each document's task."""
