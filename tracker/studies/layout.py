"""How studies lay out what they found: entries with their reasons, tables, figures in sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from tracker.core.estimates import Estimate
from tracker.core.findings import Line
from tracker.core.formats import interval, two_digits


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


def ends(low: float | None, high: float | None, write: Callable[[float], str] = two_digits) -> str:
    """Write an interval behind a figure, such as ` (0.41 to 0.80)`; nothing without one."""
    between = interval(low, high, write)
    return f" ({between})" if between else ""


def written(found: Estimate, write: Callable[[float], str] = two_digits, unit: str = "") -> str:
    """Write a defined figure with its unit, and its interval, such as `0.66 (0.41 to 0.80)`."""
    assert found.value is not None
    return f"{write(found.value)}{unit}{ends(found.low, found.high, write)}"
