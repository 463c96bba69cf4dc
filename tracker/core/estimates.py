"""A figure with its uncertainty, the one shape of it everywhere."""

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
"""What a figure is, which says how it is written; `WRITTEN` of `core/formats.py` says how."""


@dataclass(frozen=True)
class Estimate:
    """A figure, its 95 % interval, and its p-value where a test belongs to it.

    It is in the record's own units: fractions, nats.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    reason: str | None = None
    """Why `value` is None; None whenever there is a value."""
    unit: Unit | None = None
    """How it is written, where a column holds figures of several units; else its column says."""

    @property
    def between(self) -> tuple[float, float] | None:
        """Both ends of the interval; None where one of them is undefined."""
        if self.low is None or self.high is None:
            return None
        return (self.low, self.high) if math.isfinite(self.low + self.high) else None

    def side(self, of: float = 0.0) -> int:
        """Return the side of a value on which the interval is: 1 above, −1 below, else 0."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > of) - int(self.high < of)

    def __neg__(self) -> Estimate:
        """The same turned round: what is lost as what is gained."""
        value, high, low = (None if x is None else -x for x in (self.value, self.low, self.high))
        return Estimate(value, low, high, reason=self.reason)
