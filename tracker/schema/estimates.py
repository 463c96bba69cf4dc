"""Define an estimate: a value with its confidence interval."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

FigureUnit = (
    Literal["text", "count", "rank", "points", "percent", "score", "coefficient"]
    | Literal["relevance", "proxy", "metric", "p", "nats", "times"]
)
"""Unit of a figure; `UNIT_FORMATS` of `schema/formats.py` defines how each unit is written."""


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval and an optional p-value.

    Values are not scaled for display: a drop of 5 percentage points is stored as 0.05.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    reason: str | None = None
    """Reason why `value` is None; None if there is a value."""
    unit: FigureUnit | None = None
    """Unit of this figure, if its table column contains several units; None for the column's
    unit."""

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The lower and upper end of the interval; None if an end is missing or infinite."""
        if self.low is None or self.high is None:
            return None
        return (self.low, self.high) if math.isfinite(self.low + self.high) else None

    def side(self, threshold: float = 0.0) -> int:
        """Return 1 if the interval is above the threshold, −1 if it is below, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > threshold) - int(self.high < threshold)

    def clip(self, low: float, high: float) -> Estimate:
        """Return a copy whose interval is cut off at `low` and `high`.

        If the value is undefined or not between `low` and `high`, the estimate stays unchanged.
        """
        if self.value is None or not low <= self.value <= high:
            return self
        ends = [None if x is None else min(max(x, low), high) for x in (self.low, self.high)]
        return replace(self, low=ends[0], high=ends[1])

    def __neg__(self) -> Estimate:
        """Return the estimate with the opposite sign, for example to turn a loss into a gain.

        The p-value stays the same, because it is two-sided.
        """
        value, high, low = (
            None if x is None else 0.0 - x for x in (self.value, self.low, self.high)
        )
        return replace(self, value=value, low=low, high=high)
