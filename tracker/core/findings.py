"""What a study found, as data that any page, terminal or file can set: answers, tables, charts.

Values are in the record's own units (fractions, nats); who shows them scales and rounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from tracker.core.estimates import Estimate, Unit
from tracker.core.identities import Record, Shown
from tracker.core.records import Place
from tracker.core.tables import Table

SEARCH = "search"
"""The study of a finding of `tracker prune`."""


class Line(Record):
    """One curve: as many figures as the chart has places; None is a gap."""

    name: Shown
    values: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    """Both ends of the intervals; empty without any."""

    @classmethod
    def of(cls, name: str, figures: Iterable[Estimate | None], band: bool = True) -> Line:
        """Make a curve of figures, with a band of their intervals; what is None is a gap."""
        found = [figure or Estimate(None) for figure in figures]
        return cls(
            name=name,
            values=tuple(one.value for one in found),
            low=tuple(one.low for one in found) if band else (),
            high=tuple(one.high for one in found) if band else (),
        )


def gaps(values: Iterable[float]) -> tuple[float | None, ...]:
    """Make a chart's values of figures: what is not finite is a gap."""
    return tuple(float(value) if math.isfinite(value) else None for value in values)


class _Chart(Record):
    title: Shown
    x: str
    """What the places or columns are."""
    y: str
    unit: Unit


class LineChart(_Chart):
    """Curves over common places, such as layers or numbers of documents."""

    kind: Literal["lines"] = "lines"
    places: tuple[float, ...]
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False


class MapChart(_Chart):
    """A value for each row and column, coloured around 0; None is a gap."""

    kind: Literal["map"] = "map"
    name: str
    """What the values are."""
    columns: tuple[int, ...]
    rows: tuple[Shown, ...]
    values: tuple[tuple[float | None, ...], ...]
    hovers: tuple[tuple[Shown, ...], ...] = ()
    """What is said of each value, intervals and reasons included; empty for the value alone."""
    shown: tuple[tuple[bool, ...], ...] = Field((), exclude_if=lambda rows: not rows)
    """Which values are shown to be other than 0; all others are open. Empty where nobody asked."""
    shown_by: str = Field("", exclude_if=lambda text: not text)
    """What is shown, and with which confidence."""


FoundChart = LineChart | MapChart


class FindingRecord(Record):
    """What one study says of one experiment."""

    study: str
    experiment: Shown
    """The file's name."""
    command: str = Field("", exclude_if=lambda text: not text)
    """What finds it again, but for the file; empty for `tracker study STUDY`."""
    beside: str = Field("", exclude_if=lambda text: not text)
    """What tells it from another answer of the study about the file, which stands beside it."""
    question: str
    answers: tuple[Shown, ...]
    """Sentences, the most important one first."""
    tables: tuple[Table, ...] = ()
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
        beside = f"--{self.beside}" if self.beside else ""
        return f"{self.study}--{self.experiment.removesuffix('.yaml')}{beside}"
