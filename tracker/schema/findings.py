"""Define the stored result of a study (an analysis): its sentences, tables and charts.

Values in tables and charts are stored as fractions or nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import Field

from tracker.schema.estimates import Estimate, FigureUnit
from tracker.schema.formats import is_finite
from tracker.schema.identities import Record, SafeText
from tracker.schema.records import RecordKey
from tracker.schema.tables import Table

SEARCH_STUDY = "search"
"""The name of the study in findings of `tracker prune`."""


class Line(Record):
    """One curve of a chart; a value of None leaves a gap in the curve."""

    name: SafeText
    values: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    """Upper ends of the intervals. `low` contains the lower ends. Both are empty without
    intervals."""


def chart_values(values: Iterable[float]) -> tuple[float | None, ...]:
    """Convert values for a chart; infinite and NaN values become None."""
    return tuple(float(value) if math.isfinite(value) else None for value in values)


class _Chart(Record):
    title: SafeText
    x: str
    """The label of the positions or columns."""
    y: str
    unit: FigureUnit


class LineChart(_Chart):
    """Chart of several curves over common positions, such as layers or numbers of documents."""

    kind: Literal["lines"] = "lines"
    places: tuple[float, ...]
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False


def line_chart(
    title: str,
    axes: tuple[str, str],
    unit: FigureUnit,
    positions: Iterable[float],
    lines: Mapping[str, Iterable[Estimate | float | None]],
    **logarithmic: bool,
) -> LineChart:
    """Build a chart with one line for each name; undefined values are gaps in the line.

    Args:
        title: Title of the chart.
        axes: Names of the horizontal and the vertical axis.
        unit: Unit of the vertical axis.
        positions: Positions on the horizontal axis.
        lines: Name of a line → value at each position. The intervals of estimates are drawn as a
            band.
        **logarithmic: `log_x=True` or `log_y=True` makes an axis logarithmic.

    Returns:
        The chart.
    """
    chart_lines = []
    for name, values in lines.items():
        figures = [value if isinstance(value, Estimate) else Estimate(value) for value in values]
        figures = [f if is_finite(f.value) else Estimate(None) for f in figures]
        has_band = any(figure.low is not None for figure in figures)
        chart_lines.append(
            Line(
                name=name,
                values=tuple(figure.value for figure in figures),
                low=tuple(figure.low for figure in figures) if has_band else (),
                high=tuple(figure.high for figure in figures) if has_band else (),
            )
        )
    return LineChart(
        title=title,
        x=axes[0],
        y=axes[1],
        unit=unit,
        places=tuple(positions),
        lines=tuple(chart_lines),
        **logarithmic,
    )


class MapChart(_Chart):
    """Heat map whose colours show the distance of values from 0; None is an empty cell."""

    kind: Literal["map"] = "map"
    name: str
    """The name of the values."""
    columns: tuple[int, ...]
    rows: tuple[SafeText, ...]
    values: tuple[tuple[float | None, ...], ...]
    hovers: tuple[tuple[SafeText, ...], ...] = ()
    """The hover text of each value, with its interval or reason; empty to show only the value."""
    shown: tuple[tuple[bool, ...], ...] = Field((), exclude_if=lambda rows: not rows)
    """True for each value that differs significantly from 0. Empty if no test was made."""
    shown_by: str = Field("", exclude_if=lambda text: not text)
    """The statement that `shown` makes about a value, with its confidence."""


StudyChart = LineChart | MapChart


class FindingRecord(Record):
    """The stored result of one study (an analysis) of an experiment."""

    study: str
    experiment: SafeText
    """The experiment file's name."""
    command: str = Field("", exclude_if=lambda text: not text)
    """The command that computes the finding, without the file; empty for `tracker study STUDY`."""
    beside: str = Field("", exclude_if=lambda text: not text)
    """Suffix of the name that distinguishes several findings of one study and file."""
    question: str
    answers: tuple[SafeText, ...]
    """Sentences, the most important one first."""
    tables: tuple[Table, ...] = ()
    charts: tuple[StudyChart, ...] = Field(default=())
    lacking: tuple[SafeText, ...] = ()
    """Statements that could not be made, each with the measurements that it needs."""
    assumptions: tuple[SafeText, ...] = ()
    """The assumptions of the statistics, each with its source."""
    rests_on: tuple[RecordKey, ...] = ()
    """The cells from which the finding is computed: key, view and number of documents of each."""

    @property
    def command_line(self) -> str:
        """The command that recomputes this result, such as `tracker study STUDY FILE`."""
        return f"{self.command or f'tracker study {self.study}'} {self.experiment}"

    @property
    def name(self) -> str:
        """The unique name in a results folder, such as `STUDY--EXPERIMENT`.

        If the field `beside` is not empty, the name ends in `--` and its text.
        """
        suffix = f"--{self.beside}" if self.beside else ""
        return f"{self.study}--{self.experiment.removesuffix('.yaml')}{suffix}"
