"""Tables and charts of studies: declared by the labelled fields of their figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from operator import attrgetter
from typing import Any, Literal

from tracker.core.estimates import Estimate, Unit
from tracker.core.findings import Line, LineChart
from tracker.core.formats import ACCURACY, Measure, defined
from tracker.core.tables import Column, Table, Value, table

LabelUnit = Unit | Literal["change", "level"]
"""The unit of a field; `change` is that of the loss, `level` that of the lost quantity."""


@dataclass(frozen=True)
class Label:
    """The head of a field's column; see `labelled`."""

    label: str | Mapping[str, str]
    unit: LabelUnit
    otherwise: str

    def columns(self, value: Callable[[Any], Any], measure: Measure) -> Iterator[Column[Any]]:
        """Yield the columns of a field: one, or one for each key of a dictionary."""
        unit = measure.form if self.unit == "change" else self.unit
        unit = measure.level_form if unit == "level" else unit
        if isinstance(self.label, str):
            label = self.label.format(change=measure.change, level=measure.level)
            yield Column(label, unit, value, self.otherwise)
            return
        for key, label in self.label.items():
            entry = partial(_entry, value, key)
            yield Column(label, unit, entry, self.otherwise, key)


def _entry(value: Callable[[Any], Any], key: str, row: Any) -> Value:
    entry: Value = value(row)[key]
    return entry


def labelled(label: str | Mapping[str, str], unit: LabelUnit = "text", otherwise: str = "") -> Any:
    """Declare a field that is a column of its figures' table.

    Args:
        label: Head of the column. `{change}` is replaced by the name of the loss, and `{level}` by
            that of the lost quantity. A dictionary has a column for each head, by the name of the
            column in code.
        unit: Unit of the values.
        otherwise: Reason of an undefined value that has none of its own.

    Returns:
        The field of a dataclass.
    """
    return field(metadata={"column": Label(label, unit, otherwise)})


def figure_table(
    kind: type[Any], title: str, rows: Iterable[Any], *notes: str, measure: Measure = ACCURACY
) -> Table:
    """Build the table of figures, with a column for each labelled field of their dataclass.

    Args:
        kind: The dataclass.
        title: Title of the table.
        rows: The figures, one for each row.
        *notes: Notes below the table.
        measure: Measured quantity, for labels and units that depend on it.

    Returns:
        The table.
    """
    labels = {item.name: item.metadata.get("column") for item in fields(kind)}
    columns = [
        column
        for name, label in labels.items()
        if label is not None
        for column in label.columns(attrgetter(name), measure)
    ]
    return table(title, columns, rows, *notes)


def rank_estimate(ranks: tuple[int, int]) -> Estimate:
    """Return the best rank with the interval from best to worst, for a column of intervals."""
    return Estimate(ranks[0], *ranks)


def line_chart(
    title: str,
    axes: tuple[str, str],
    unit: Unit,
    positions: Iterable[float],
    lines: Mapping[str, Iterable[Estimate | float | None]],
    **logarithmic: bool,
) -> LineChart:
    """Build a chart of named lines; undefined values are gaps.

    Args:
        title: Title of the chart.
        axes: Names of the horizontal and the vertical axis.
        unit: Unit of the figures.
        positions: Positions on the horizontal axis.
        lines: Values at these positions, by the name of their line; intervals are drawn.
        **logarithmic: `log_x` or `log_y`.

    Returns:
        The chart.
    """
    drawn = []
    for name, figures in lines.items():
        estimates = [f if isinstance(f, Estimate) else Estimate(f) for f in figures]
        finite = [estimate if defined(estimate.value) else None for estimate in estimates]
        band = any(estimate.low is not None for estimate in estimates)
        drawn.append(Line.of(name, finite, band))
    return LineChart(
        title=title,
        x=axes[0],
        y=axes[1],
        unit=unit,
        places=tuple(positions),
        lines=tuple(drawn),
        **logarithmic,
    )
