"""Define a value with its interval."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Unit = Literal[
    "text",
    "count",
    "rank",
    "points",
    "percent",
    "score",
    "coefficient",
    "relevance",
    "proxy",
    "metric",
    "p",
    "nats",
    "times",
]
"""Unit of a figure; `WRITTEN` of `core/formats.py` defines how each unit is written."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval, and the p-value of its test if there is one.

    Values are in the record's own units: fractions, nats.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    reason: str | None = None
    """Reason why `value` is None; None if there is a value."""
    unit: Unit | None = None
    """Unit of the figure in a column of several units; None for the column's unit."""

    @property
    def between(self) -> tuple[float, float] | None:
        """Both ends of the interval; None if one of them is undefined."""
        if self.low is None or self.high is None:
            return None
        return (self.low, self.high) if math.isfinite(self.low + self.high) else None

    def side(self, of: float = 0.0) -> int:
        """Return the side of a value on which the interval is: 1 above, −1 below, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > of) - int(self.high < of)

    def __neg__(self) -> Estimate:
        """Return the estimate with the opposite sign: a loss as a gain."""
        value, high, low = (None if x is None else -x for x in (self.value, self.low, self.high))
        return Estimate(value, low, high, reason=self.reason)
