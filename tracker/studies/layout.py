"""Build tables of studies from dataclasses with labelled fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from operator import attrgetter
from typing import Any, Literal

from tracker.schema.estimates import Estimate, FigureUnit
from tracker.schema.formats import ACCURACY_FORMAT, MetricFormat
from tracker.schema.tables import Column, ColumnValue, Table, build_table

LabelUnit = FigureUnit | Literal["change", "level"]
"""The unit of a field; `change` is the unit of the loss, `level` that of the lost quantity."""


@dataclass(frozen=True)
class ColumnLabel:
    """Heading and unit of the table column that shows a dataclass field; see `labelled`."""

    label: str | Mapping[str, str]
    unit: LabelUnit
    reason: str

    def columns(self, value: Callable[[Any], Any], measure: MetricFormat) -> Iterator[Column[Any]]:
        """Yield the table columns of a dataclass field.

        `value` reads the field of a row, and `measure` gives the names for `label`. If `label` is a
        dictionary, each key gets a column.
        """
        unit = measure.form if self.unit == "change" else self.unit
        unit = measure.level_form if unit == "level" else unit
        if isinstance(self.label, str):
            label = self.label.format(change=measure.change, level=measure.level)
            yield Column(label, unit, value, self.reason)
            return
        for key, label in self.label.items():
            yield Column(label, unit, partial(_read_entry, value, key), self.reason, key)


def _read_entry(value: Callable[[Any], Any], key: str, row: Any) -> ColumnValue:
    entry: ColumnValue = value(row)[key]
    return entry


def labelled(label: str | Mapping[str, str], unit: LabelUnit = "text", reason: str = "") -> Any:
    """Return a dataclass field that `figure_table` shows as a table column.

    Args:
        label: Heading of the column. `{change}` becomes the name of the drop (e.g. accuracy drop),
            and `{level}` the name of the metric (e.g. accuracy). If the field is a dictionary,
            `label` maps its keys to column headings.
        unit: Unit of the values.
        reason: Default explanation that the table shows for an undefined value.

    Returns:
        The dataclass field, with the label in its metadata.
    """
    return field(metadata={"column": ColumnLabel(label, unit, reason)})


def figure_table(
    kind: type[Any],
    title: str,
    rows: Iterable[Any],
    *notes: str,
    measure: MetricFormat = ACCURACY_FORMAT,
) -> Table:
    """Build a table with a row for each dataclass instance, and columns for its `labelled` fields.

    Args:
        kind: The dataclass of the rows.
        title: Title of the table.
        rows: Instances of the dataclass, one for each row.
        *notes: Notes below the table.
        measure: Metric (e.g. accuracy) from which headings and units are derived.

    Returns:
        The table.
    """
    columns: list[Column[Any]] = []
    for item in fields(kind):
        if label := item.metadata.get("column"):
            columns += label.columns(attrgetter(item.name), measure)
    return build_table(title, columns, rows, *notes)


def rank_estimate(ranks: tuple[int, int]) -> Estimate:
    """Convert a range of possible ranks (best rank, worst rank) to an estimate.

    The value of the estimate is the best rank, and its interval is the range.
    """
    return Estimate(ranks[0], *ranks)
