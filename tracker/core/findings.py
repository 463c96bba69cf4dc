"""What a study found, as data that any page, terminal or file can set: answers, tables, charts.

Values are in the record's own units (fractions, nats); who shows them scales and rounds. A value
that is undefined is `None` with its reason.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tracker.core.identities import Record, Shown
from tracker.core.records import Place

Unit = Literal["text", "count", "points", "percent", "score", "coefficient", "p", "nats", "times"]
"""How a figure is written: `points` and `percent` are fractions that people read as percentage
points and per cent; `score` has three digits, `coefficient` two, `times` two significant ones."""


class Entry(Record):
    """One figure or text of a table, with its interval where it has one."""

    value: float | Shown | None = None
    low: float | None = None
    high: float | None = None
    reason: Shown = ""
    """Why the value is undefined; empty where it is defined."""

    @model_validator(mode="after")
    def _is_said(self) -> Entry:
        if self.value is None and not self.reason:
            raise ValueError("an undefined value needs a reason")
        return self


class Heading(Record):
    """The head of a table's column."""

    label: str
    unit: Unit = "text"


class FoundTable(Record):
    """A table: one entry for each heading in each row."""

    title: Shown
    headings: tuple[Heading, ...]
    rows: tuple[tuple[Entry, ...], ...]
    notes: tuple[Shown, ...] = ()


class Line(Record):
    """One curve: as many figures as the chart has places; None is a gap."""

    name: Shown
    values: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    """Both ends of the intervals; empty without any."""


class LineChart(Record):
    """Curves over common places, such as layers or numbers of documents."""

    kind: Literal["lines"] = "lines"
    title: Shown
    x: str
    """What the places are."""
    y: str
    unit: Unit
    places: tuple[float, ...]
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False


class MapChart(Record):
    """A value for each row and column, coloured around 0; None is a gap."""

    kind: Literal["map"] = "map"
    title: Shown
    x: str
    y: str
    name: str
    """What the values are."""
    unit: Unit
    columns: tuple[int, ...]
    rows: tuple[Shown, ...]
    values: tuple[tuple[float | None, ...], ...]
    hovers: tuple[tuple[Shown, ...], ...] = ()
    """What is said of each value, intervals and reasons included; empty for the value alone."""


FoundChart = LineChart | MapChart


class FindingRecord(Record):
    """What one study says of one experiment."""

    study: str
    experiment: Shown
    """The file's name."""
    command: str = Field("", exclude_if=lambda text: not text)
    """What finds it again, but for the file; empty for `tracker study STUDY`."""
    question: str
    answers: tuple[Shown, ...]
    """Sentences, the most important one first."""
    tables: tuple[FoundTable, ...] = ()
    charts: tuple[FoundChart, ...] = Field(default=())
    lacking: tuple[Shown, ...] = ()
    """What could not be said, and how to get it."""
    assumptions: tuple[Shown, ...] = ()
    """What the statistics rest on, each with its source."""
    rests_on: tuple[Place, ...] = ()
    """The cells, their views, and how many documents of each."""

    @property
    def again(self) -> str:
        """What to type for today's answer."""
        return f"{self.command or f'tracker study {self.study}'} {self.experiment}"

    @property
    def name(self) -> str:
        """What tells it from other findings of a results folder."""
        return f"{self.study}--{self.experiment.removesuffix('.yaml')}"
