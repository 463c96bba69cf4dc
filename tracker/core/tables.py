"""Define a table as columns and rows.

`table` builds a table from columns and rows, in the record's own units (fractions, nats). For
people, `headed` and `written` scale and round it; code and trackers use `Table.plain`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Generic, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from tracker.core.estimates import Estimate, Unit
from tracker.core.formats import DASH, WRITTEN, defined, interval
from tracker.core.identities import Record, Shown

Row = TypeVar("Row")


def _kept(found: object) -> object:
    """Read a stored entry; former versions stored texts in the form of figures."""
    value = found.get("value") if isinstance(found, dict) else None
    return value if isinstance(value, str) else found


def _explained(entry: Estimate | str) -> Estimate | str:
    if isinstance(entry, Estimate) and entry.value is None and not entry.reason:
        raise ValueError("an undefined value needs a reason")
    return entry


Entry = Annotated[Estimate | Shown, BeforeValidator(_kept), AfterValidator(_explained)]
"""One figure or text of a table; an undefined figure has a reason."""


class Heading(Record):
    """The head of a table's column."""

    label: str
    unit: Unit = "text"
    name: str = Field("", exclude_if=lambda name: not name)
    """The column's name in code; the label if empty."""
    interval: bool = Field(False, exclude_if=lambda interval: not interval)
    """True if only the intervals of its figures are displayed."""


class Table(Record):
    """A table: one entry for each heading in each row."""

    title: Shown
    headings: tuple[Heading, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[Shown, ...] = ()
    """Notes that are shown below the table."""
    header: int = Field(0, exclude_if=lambda place: place == 0)
    """Index of the column that names the row."""

    def plain(self) -> tuple[tuple[str, ...], list[tuple[str | float | None, ...]]]:
        """Return the columns' names and the unrounded rows, for use in code.

        An undefined figure is None. A column without a name in code has its label. It is followed
        by `… low`, `… high` and `… reason` where its figures have intervals or reasons.
        """
        names: list[str] = []
        columns: list[Sequence[str | float | None]] = []
        for place, heading in enumerate(self.headings):
            entries = [row[place] for row in self.rows]
            figures = [Estimate(None) if isinstance(e, str) else e for e in entries]
            whole = heading.unit == "count"
            names.append(heading.name or heading.label)
            columns.append([e if isinstance(e, str) else _number(e.value, whole) for e in entries])
            for end in ("low", "high", "reason") if not heading.name else ():
                more = [getattr(figure, end) for figure in figures]
                if any(each not in (None, "") for each in more):
                    names.append(f"{heading.label} {end}")
                    columns.append(more)
        if len(set(names)) < len(names):
            raise ValueError(f"{self.title}: two columns have one name")
        return tuple(names), list(zip(*columns, strict=True))


def _number(value: float | None, whole: bool) -> float | None:
    return int(value) if whole and value is not None and value == int(value) else value


Value = Estimate | str | float | None
"""A column's value in a row; None is undefined."""


@dataclass(frozen=True)
class Column(Generic[Row]):
    """Definition of a table's column.

    Attributes:
        label: The head.
        unit: The unit of its figures.
        value: Function that returns the value of a row, in the record's own unit.
        otherwise: Reason of an undefined figure, where its row gives none.
        name: The column's name in code; empty for the label.
        interval: True if only intervals are displayed.
    """

    label: str
    unit: Unit
    value: Callable[[Row], Value]
    otherwise: str = ""
    name: str = ""
    interval: bool = False

    def entry(self, row: Row) -> Entry:
        """Return the entry of a row; values that are not finite are undefined."""
        value = self.value(row)
        if isinstance(value, str):
            return value
        found = value if isinstance(value, Estimate) else Estimate(value)
        if defined(found.value):
            return replace(found, reason=None) if found.reason else found
        odd = f"not a finite number ({found.value})" if found.value is not None else "undefined"
        return Estimate(None, reason=found.reason or self.otherwise or odd)

    def ends(self) -> tuple[Column[Row], Column[Row]]:
        """Return columns of the lower and upper ends of its intervals, for use in code."""

        def end(which: str) -> Column[Row]:
            def value(row: Row) -> Estimate | float | None:
                entry = self.entry(row)
                return None if isinstance(entry, str) else getattr(entry, which)

            return replace(self, value=value, name=f"{self.name}_{which}")

        return end("low"), end("high")


def table(
    title: str,
    columns: Iterable[Column[Row]],
    rows: Iterable[Row],
    *notes: str,
    header: int = 0,
) -> Table:
    """Build a table with an entry of each column for each row."""
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


def headed(heading: Heading) -> str:
    """Write a column's head, with the unit."""
    unit = WRITTEN[heading.unit].name
    return f"{heading.label} ({unit})" if unit else heading.label


@dataclass(frozen=True)
class EntryText:
    """An entry for display.

    Attributes:
        text: The displayed text; a dash if the figure is undefined.
        reason: Reason of an undefined figure; else empty.
        figures: The unrounded numbers behind the text, in the column's unit, separated by spaces:
            the figure, the interval's ends, or all three. Empty if the text is not rounded.
    """

    text: str
    reason: str = ""
    figures: str = ""


def written(entry: Entry, heading: Heading) -> EntryText:
    """Write an entry for people, as in `0.66 (0.41 to 0.80)`."""
    if isinstance(entry, str):
        return EntryText(entry)
    if entry.value is None:
        return EntryText(DASH, entry.reason or "")
    form = WRITTEN[entry.unit or heading.unit]
    between = interval(entry.low, entry.high, form.write)
    text = f"{form.write(entry.value)} ({between})" if between else form.write(entry.value)
    exact = [entry.value, *(entry.between or ())]
    if heading.interval:
        text, exact = between, exact[1:]
    whole = heading.unit in ("count", "times")
    figures = " ".join(str(_number(form.scaled(figure), whole)) for figure in exact)
    return EntryText(text, figures="" if figures == text else figures)
