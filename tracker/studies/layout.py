"""How studies lay out what they found: entries with their reasons, tables, figures in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tracker.core.estimates import Estimate
from tracker.core.findings import Line


def line(name: str, found: Sequence[Estimate]) -> Line:
    """Make a curve of figures with their intervals."""
    return Line(
        name=name,
        values=tuple(one.value for one in found),
        low=tuple(one.low for one in found),
        high=tuple(one.high for one in found),
    )


def gaps(values: Iterable[float]) -> tuple[float | None, ...]:
    """Make a chart's values of figures: what is not finite is a gap."""
    return tuple(float(value) if math.isfinite(value) else None for value in values)
