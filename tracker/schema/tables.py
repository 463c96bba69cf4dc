"""Define tables and their columns.

Values are stored as fractions or nats. The functions `heading_text` and `entry_text` scale and
round values for display. `Table.plain` returns unrounded values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Generic, TypeVar

from pydantic import AfterValidator, Field

from tracker.schema.estimates import Estimate, FigureUnit
from tracker.schema.formats import DASH, UNIT_FORMATS, interval_text, is_finite
from tracker.schema.identities import Record, SafeText

RowType = TypeVar("RowType")


def _check_reason(entry: Estimate | str) -> Estimate | str:
    if isinstance(entry, Estimate) and entry.value is None and not entry.reason:
        raise ValueError("an undefined value must have a reason")
    return entry


Entry = Annotated[Estimate | SafeText, AfterValidator(_check_reason)]
"""An entry of a table: an estimate or a text. An undefined estimate has a reason."""


class Heading(Record):
    """The header of a table's column."""

    label: str
    unit: FigureUnit = "text"
    name: str = Field("", exclude_if=lambda name: not name)
    """The column's name in code. If it is empty, the label is used in code."""
    interval: bool = Field(False, exclude_if=lambda interval: not interval)
    """True if the column displays only the intervals of its estimates."""


class Table(Record):
    """A table with headings and rows; each row has one entry for each heading."""

    title: SafeText
    headings: tuple[Heading, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[SafeText, ...] = ()
    """Notes that are shown below the table."""
    header: int = Field(0, exclude_if=lambda index: index == 0)
    """Index of the column that names the row."""

    def plain(self) -> tuple[tuple[str, ...], list[tuple[str | float | None, ...]]]:
        """Return the column names and the rows with unrounded values, for use in code.

        Undefined values are None. A column without a `name` is named by its label. After this
        column come columns of its interval ends and of its reasons for undefined values.
        """
        names: list[str] = []
        columns: list[Sequence[str | float | None]] = []
        # Columns with a name in code have their own columns of bounds and reasons.
        for position, heading in enumerate(self.headings):
            entries = [row[position] for row in self.rows]
            figures = [Estimate(None) if isinstance(e, str) else e for e in entries]
            is_count = heading.unit == "count"
            names.append(heading.name or heading.label)
            columns.append(
                [e if isinstance(e, str) else _number(e.value, is_count) for e in entries]
            )
            for end in ("low", "high", "reason") if not heading.name else ():
                bounds = [getattr(figure, end) for figure in figures]
                if any(bound not in (None, "") for bound in bounds):
                    names.append(f"{heading.label} {end}")
                    columns.append(bounds)
        if len(set(names)) < len(names):
            raise ValueError(f"{self.title}: two columns have the same name")
        return tuple(names), list(zip(*columns, strict=True))


def _number(value: float | None, is_count: bool) -> float | None:
    return int(value) if is_count and value is not None and value == int(value) else value


ColumnValue = Estimate | str | float | None
"""A column's value in a row; None means an undefined value."""


@dataclass(frozen=True)
class Column(Generic[RowType]):
    """Definition of a table column, with a function that computes the value of each row.

    Attributes:
        label: The label in the column's header.
        unit: The unit of the column's values.
        value: Function that returns the value for a row, as a fraction or in nats.
        default_reason: Default reason for an undefined value, or function that returns it.
        name: The column's name in code; if it is empty, code uses the label.
        interval: True if the column shows only the intervals of its values.
    """

    label: str
    unit: FigureUnit
    value: Callable[[RowType], ColumnValue]
    default_reason: str | Callable[[RowType], str] = ""
    name: str = ""
    interval: bool = False

    def entry(self, row: RowType) -> Entry:
        """Return the table entry for a row; infinite and NaN values become undefined."""
        value = self.value(row)
        if isinstance(value, str):
            return value
        estimate = value if isinstance(value, Estimate) else Estimate(value)
        if is_finite(estimate.value):
            return replace(estimate, reason=None) if estimate.reason else estimate
        default = "undefined"
        if estimate.value is not None:
            default = f"not a finite number ({estimate.value})"
        reason = self.default_reason
        reason = reason if isinstance(reason, str) else reason(row)
        return Estimate(None, reason=estimate.reason or reason or default)

    def bound_columns(self) -> tuple[Column[RowType], Column[RowType]]:
        """Build two columns: the lower and the upper ends of this column's intervals."""

        def end(bound: str) -> Column[RowType]:
            def value(row: RowType) -> Estimate | float | None:
                entry = self.entry(row)
                return None if isinstance(entry, str) else getattr(entry, bound)

            return replace(self, value=value, name=f"{self.name}_{bound}")

        return end("low"), end("high")


def build_table(
    title: str,
    columns: Iterable[Column[RowType]],
    rows: Iterable[RowType],
    *notes: str,
    header: int = 0,
) -> Table:
    """Build a table with one row of entries for each object in `rows`.

    Args:
        title: Title of the table.
        columns: Definitions of the columns, which compute the entries.
        rows: The objects from which the entries are computed.
        *notes: Notes that are shown below the table.
        header: Index of the column that names the row.

    Returns:
        The table.
    """
    columns = tuple(columns)
    return Table(
        title=title,
        headings=tuple(
            Heading(label=c.label, unit=c.unit, name=c.name, interval=c.interval) for c in columns
        ),
        rows=tuple(tuple(column.entry(row) for column in columns) for row in rows),
        notes=notes,
        header=header,
    )


def heading_text(heading: Heading) -> str:
    """Return the header of a column, with the unit."""
    unit = UNIT_FORMATS[heading.unit].name
    return f"{heading.label} ({unit})" if unit else heading.label


@dataclass(frozen=True)
class EntryText:
    """Text that a table displays for an entry, with the unrounded numbers.

    Attributes:
        text: The displayed text; a dash for an undefined value.
        reason: Reason for an undefined value; else empty.
        figures: The unrounded value and interval ends in the column's unit, separated by spaces.
            The text is empty if the displayed number is not rounded.
    """

    text: str
    reason: str = ""
    figures: str = ""


def entry_text(entry: Entry, heading: Heading) -> EntryText:
    """Format a table entry for display, such as `0.66 (0.41 to 0.80)`."""
    if isinstance(entry, str):
        return EntryText(entry)
    if entry.value is None:
        return EntryText(DASH, entry.reason or "")
    form = UNIT_FORMATS[entry.unit or heading.unit]
    bounds = interval_text(entry.low, entry.high, form.write)
    text = f"{form.write(entry.value)} ({bounds})" if bounds else form.write(entry.value)
    exact_figures = [entry.value, *(entry.bounds or ())]
    if heading.interval:
        text, exact_figures = bounds, exact_figures[1:]
    is_count = heading.unit in ("count", "times")
    figures = " ".join(str(_number(form.scaled(figure), is_count)) for figure in exact_figures)
    return EntryText(text, figures="" if figures == text else figures)
