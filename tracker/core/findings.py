"""Define the results of a study: answers, tables and charts.

Values are in the record's own units (fractions, nats); display code scales and rounds them.
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
"""The name of the study in findings of `tracker prune`."""


class Line(Record):
    """One curve, with a figure for each position of the chart; None is a gap."""

    name: Shown
    values: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    """Both ends of the intervals; empty without any."""

    @classmethod
    def of(cls, name: str, figures: Iterable[Estimate | None], band: bool = True) -> Line:
        """Build a curve from figures, with a band of their intervals; None is a gap."""
        found = [figure or Estimate(None) for figure in figures]
        return cls(
            name=name,
            values=tuple(one.value for one in found),
            low=tuple(one.low for one in found) if band else (),
            high=tuple(one.high for one in found) if band else (),
        )


def gaps(values: Iterable[float]) -> tuple[float | None, ...]:
    """Convert figures to a chart's values: those that are not finite become gaps."""
    return tuple(float(value) if math.isfinite(value) else None for value in values)


class _Chart(Record):
    title: Shown
    x: str
    """The label of the positions or columns."""
    y: str
    unit: Unit


class LineChart(_Chart):
    """Curves over common positions, such as layers or numbers of documents."""

    kind: Literal["lines"] = "lines"
    places: tuple[float, ...]
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False


class MapChart(_Chart):
    """A value for each row and column, coloured around 0; None is a gap."""

    kind: Literal["map"] = "map"
    name: str
    """The name of the values."""
    columns: tuple[int, ...]
    rows: tuple[Shown, ...]
    values: tuple[tuple[float | None, ...], ...]
    hovers: tuple[tuple[Shown, ...], ...] = ()
    """The hover text of each value, with intervals and reasons; empty for the value alone."""
    shown: tuple[tuple[bool, ...], ...] = Field((), exclude_if=lambda rows: not rows)
    """True for values that provably differ from 0; all others are open. Empty if not tested."""
    shown_by: str = Field("", exclude_if=lambda text: not text)
    """The statement behind `shown`, with its confidence."""


FoundChart = LineChart | MapChart


class FindingRecord(Record):
    """Result of one study of one experiment."""

    study: str
    experiment: Shown
    """The experiment file's name."""
    command: str = Field("", exclude_if=lambda text: not text)
    """The command that computes it, without the file; empty for `tracker study STUDY`."""
    beside: str = Field("", exclude_if=lambda text: not text)
    """Suffix that distinguishes several findings of one study and file."""
    question: str
    answers: tuple[Shown, ...]
    """Sentences, the most important one first."""
    tables: tuple[Table, ...] = ()
    charts: tuple[FoundChart, ...] = Field(default=())
    lacking: tuple[Shown, ...] = ()
    """Statements that could not be made, and how to obtain them."""
    assumptions: tuple[Shown, ...] = ()
    """The assumptions of the statistics, each with its source."""
    rests_on: tuple[Place, ...] = ()
    """The cells, their views, and the number of documents of each."""

    @property
    def again(self) -> str:
        """The command that computes it again."""
        return f"{self.command or f'tracker study {self.study}'} {self.experiment}"

    @property
    def name(self) -> str:
        """The unique name among the findings of a results folder."""
        beside = f"--{self.beside}" if self.beside else ""
        return f"{self.study}--{self.experiment.removesuffix('.yaml')}{beside}"
