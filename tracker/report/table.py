"""The parts of a display table: rounded for people, exact for the download."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from tracker.core.records import NO_REASON
from tracker.report.formats import DASH, defined, interval
from tracker.stats.accuracy import Estimate


@dataclass(frozen=True)
class Value:
    """One table cell as people read it; a dash carries the reason why it is undefined.

    Attributes:
        text: What is read.
        reason: Why the value is undefined; empty where it is not.
        exact: The figure behind the text, in the column's unit, where the text is rounded.
        ends: Both ends of the interval in the text, likewise.
    """

    text: str
    reason: str = ""
    exact: float | None = None
    ends: tuple[float, float] | None = None

    @property
    def figures(self) -> str:
        """What the text rounds: the figure, both ends, or all three, apart by spaces."""
        if self.exact is None and self.ends is None:
            return ""
        exact = () if self.exact is None else (self.exact,)
        found = " ".join(map(str, (*exact, *(self.ends or ()))))
        return "" if found == self.text else found


@dataclass(frozen=True)
class Column:
    """One table column: its header with the unit, and whether it holds numbers."""

    label: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """A table ready to be set, one value for each column in each row.

    Attributes:
        caption: What it shows.
        notes: What must be said below it.
        header: The column that names the row.
        sorted_by: The column that the rows ascend by; None where their order is another.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]
    notes: tuple[str, ...] = ()
    header: int = 0
    sorted_by: int | None = None


def texts(*labels: str) -> tuple[Column, ...]:
    """Head columns of words."""
    return tuple(Column(label, numeric=False) for label in labels)


def numbers(*labels: str) -> tuple[Column, ...]:
    """Head columns of figures."""
    return tuple(Column(label) for label in labels)


def shown(
    number: float | None, write: Callable[[float], str], reason: str, scale: float = 1
) -> Value:
    """Show a figure times `scale`, the column's unit, or a dash and why it is undefined."""
    if number is None:
        return Value(DASH, reason)
    if not math.isfinite(number):
        return Value(DASH, f"not a finite number ({number})")
    return Value(write(number), exact=_scaled(number, scale))


def between(
    low: float | None,
    high: float | None,
    write: Callable[[float], str],
    reason: str,
    scale: float = 1,
) -> Value:
    """Show an interval times `scale`, the column's unit, or a dash and why it is undefined."""
    if not defined(low) or not defined(high):
        return Value(DASH, reason)
    return Value(interval(low, high, write), ends=(_scaled(low, scale), _scaled(high, scale)))


def worded(text: str, reason: str) -> Value:
    """Show a text, or a dash and why there is none."""
    return Value(text) if text else Value(DASH, reason)


def with_interval(
    value: Value,
    low: float | None,
    high: float | None,
    write: Callable[[float], str],
    scale: float = 1,
) -> Value:
    """Put an interval behind a figure where both are defined, as in `0.66 (0.41 to 0.80)`.

    `scale` makes the record's unit the column's.
    """
    ends = between(low, high, write, "", scale)
    if ends.ends is None or value.reason:
        return value
    return replace(value, text=f"{value.text} ({ends.text})", ends=ends.ends)


def estimated(found: Estimate, write: Callable[[float], str], scale: float = 1) -> Value:
    """Show a figure with its interval; `scale` makes its unit the column's."""
    value = shown(found.value, write, found.reason or NO_REASON, scale)
    return with_interval(value, found.low, found.high, write, scale)


def _scaled(number: float, scale: float) -> float:
    # The 16th digit of a product is rounding: 100 × 0.07 is 7.000000000000001.
    return number if scale == 1 else float(f"{scale * number:.15g}")
