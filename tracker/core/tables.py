"""A table, the one shape of it everywhere: columns, each with where its entries come from.

A table is made of rows by `table`, and holds the record's own units (fractions, nats). Who shows it
to people takes `headed` and `written`, which scale and round; code and trackers take `Table.plain`.
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
    """Read what is kept of an entry; earlier ones kept texts as figures are."""
    value = found.get("value") if isinstance(found, dict) else None
    return value if isinstance(value, str) else found


def _explained(entry: Estimate | str) -> Estimate | str:
    if isinstance(entry, Estimate) and entry.value is None and not entry.reason:
        raise ValueError("an undefined value needs a reason")
    return entry


Entry = Annotated[Estimate | Shown, BeforeValidator(_kept), AfterValidator(_explained)]
"""One figure or text of a table; a figure that is undefined says why."""


class Heading(Record):
    """The head of a table's column."""

    label: str
    unit: Unit = "text"
    name: str = Field("", exclude_if=lambda name: not name)
    """What code calls the column; the label where empty."""
    interval: bool = Field(False, exclude_if=lambda interval: not interval)
    """Whether people are shown its figures' intervals alone."""


class Table(Record):
    """A table: one entry for each heading in each row."""

    title: Shown
    headings: tuple[Heading, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[Shown, ...] = ()
    """What must be said below it."""
    header: int = Field(0, exclude_if=lambda place: place == 0)
    """The column that names the row."""

    def plain(self) -> tuple[tuple[str, ...], list[tuple[str | float | None, ...]]]:
        """Lay it out for code, unrounded: the columns' names, and the rows.

        An undefined figure is None. Where a column has no name for code, its label stands for it,
        its intervals follow as `… low` and `… high`, and why it is undefined as `… reason`.
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
"""What a column finds in a row; None is undefined."""


@dataclass(frozen=True)
class Column(Generic[Row]):
    """What stands in a table's column.

    Attributes:
        label: The head.
        unit: How its figures are written.
        value: Finds the entry of a row, in the record's own unit.
        otherwise: Why a figure is undefined, where its row does not say.
        name: What code calls it; empty where that is the label.
        interval: Whether people are shown intervals alone.
    """

    label: str
    unit: Unit
    value: Callable[[Row], Value]
    otherwise: str = ""
    name: str = ""
    interval: bool = False

    def entry(self, row: Row) -> Entry:
        """Make the entry of a row; what is not finite is undefined."""
        value = self.value(row)
        if isinstance(value, str):
            return value
        found = value if isinstance(value, Estimate) else Estimate(value)
        if defined(found.value):
            return replace(found, reason=None) if found.reason else found
        odd = f"not a finite number ({found.value})" if found.value is not None else "undefined"
        return Estimate(None, reason=found.reason or self.otherwise or odd)

    def ends(self) -> tuple[Column[Row], Column[Row]]:
        """Make columns for code of both ends of its intervals."""

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
    """Make a table: an entry of each column for each row."""
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
    """An entry as people read it.

    Attributes:
        text: What is read; a dash where the figure is undefined.
        reason: Why it is; empty where it is not.
        figures: What the text rounds, in the column's unit: the figure, both ends of the interval,
            or all three, apart by spaces; empty where nothing is rounded.
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
