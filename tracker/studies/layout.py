"""How studies lay out what they found: entries with their reasons, tables, figures in sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from tracker.core.findings import Entry, FoundTable, Heading, Line, Unit
from tracker.report.formats import defined, interval, two_digits
from tracker.stats.accuracy import Estimate
from tracker.stats.correlation import Correlation

Row = tuple[Entry | float | str, ...]
"""A table's row: entries, and plain values that are defined and have no interval."""


def entry(
    value: float | None,
    reason: str | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Entry:
    """Make an entry of a figure, or of the reason why it is None or not finite."""
    if not defined(value):
        return Entry(reason=reason or "undefined")
    return Entry(value=value, low=low, high=high)


def estimated(found: Estimate | Correlation | None, reason: str | None = None) -> Entry:
    """Make an entry with its interval; `reason` where what was found has none of its own."""
    if found is None:
        return entry(None, reason)
    return entry(found.value, found.reason or reason, found.low, found.high)


def table(
    title: str,
    headings: Iterable[tuple[str, Unit]],
    rows: Iterable[Row],
    notes: Sequence[str] = (),
) -> FoundTable:
    """Make a table; each heading is a label and its column's unit.

    ValueError where two columns have one name, of which a data frame would keep one.
    """
    heads = tuple(Heading(label=label, unit=unit) for label, unit in headings)
    if len({head.label for head in heads}) < len(heads):
        raise ValueError(f"{title}: two columns have one name")
    return FoundTable(
        title=title,
        headings=heads,
        rows=tuple(
            tuple(one if isinstance(one, Entry) else Entry(value=one) for one in row)
            for row in rows
        ),
        notes=tuple(notes),
    )


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


def written(
    found: Estimate | Correlation, write: Callable[[float], str] = two_digits, unit: str = ""
) -> str:
    """Write a defined figure with its unit, and its interval, such as `0.66 (0.41 to 0.80)`."""
    assert found.value is not None
    return f"{write(found.value)}{unit}{ends(found.low, found.high, write)}"
