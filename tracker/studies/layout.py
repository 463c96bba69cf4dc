"""How studies lay out what they found: entries with their reasons, tables, figures in sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from tracker.core.estimates import Estimate, Unit
from tracker.core.findings import Line
from tracker.core.formats import interval, two_digits
from tracker.core.tables import Column, Table, estimate
from tracker.core.tables import table as of_columns

Row = tuple[Estimate | float | str, ...]
"""A table's row: entries, and plain values that are defined and have no interval."""


entry = estimate


def estimated(found: Estimate | None, reason: str | None = None) -> Estimate:
    """Make an entry with its interval; `reason` where what was found has none of its own."""
    if found is None:
        return entry(None, reason)
    return entry(found.value, found.reason or reason, found.low, found.high)


def table(
    title: str,
    headings: Iterable[tuple[str, Unit]],
    rows: Iterable[Row],
    notes: Sequence[str] = (),
) -> Table:
    """Make a table; each heading is a label and its column's unit."""

    def column(place: int, label: str, unit: Unit) -> Column[Row]:
        return Column(label, unit, lambda row: row[place])

    columns = [column(place, *heading) for place, heading in enumerate(headings)]
    return of_columns(title, columns, rows, notes)


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
