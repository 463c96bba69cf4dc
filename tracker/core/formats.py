"""Format numbers, intervals and p-values for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeGuard

from tracker.core.estimates import Estimate, FigureUnit
from tracker.core.records import CellRecord

DASH = "–"
MINUS = "−"
_LOSS_UNITS = {"bits_per_byte": "bits per byte", "ratio": "nats a token"}
"""Aggregation of a loss over documents → the unit of the loss."""


def fixed_point(value: float, digits: int) -> str:
    """Format with fixed decimals, a true minus sign and no negative zero, such as `−0.25`."""
    return f"{value:z.{digits}f}".replace("-", MINUS)


def two_digits(value: float) -> str:
    """Round to two digits after the decimal point, as every correlation is written."""
    return fixed_point(value, 2)


def three_digits(value: float) -> str:
    """Round to three significant digits, thousands to whole ones, such as `0.123` or `1,083`."""
    text = f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return text.replace("-", MINUS)


def points(fraction: float) -> str:
    """Write a fraction as percentage points without the unit: 0.113 is `11.3`."""
    return fixed_point(100 * fraction, 1)


def p_value(p: float) -> str:
    """Write a p-value: three decimals, or one significant digit below 0.001, such as `3e−5`."""
    if not 0 < p < 0.001:
        return f"{p:.3f}"
    digit, exponent = f"{p:.0e}".split("e")
    return f"{digit}e{MINUS}{abs(int(exponent))}"


def is_finite(value: float | None) -> TypeGuard[float]:
    """Check that a value is defined: not None, NaN or infinite."""
    return value is not None and math.isfinite(value)


def interval_text(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    """Write an interval, such as `1.2 to 4.0`; empty if an end is undefined."""
    return f"{write(low)} to {write(high)}" if is_finite(low) and is_finite(high) else ""


@dataclass(frozen=True)
class UnitFormat:
    """Format of a unit.

    Attributes:
        write: Function that formats a record's figure, without the unit's name.
        scale: Factor by which a record's figure is multiplied.
        name: The unit's name in a column's head; empty for none.
    """

    write: Callable[[float], str]
    scale: float = 1
    name: str = ""

    def scaled(self, figure: float) -> float:
        """Return a record's figure in this unit, unrounded."""
        # The 16th digit of a product is rounding: 100 × 0.07 is 7.000000000000001.
        return figure if self.scale == 1 else float(f"{self.scale * figure:.15g}")


UNIT_FORMATS: Mapping[FigureUnit, UnitFormat] = {
    "text": UnitFormat(str),
    "count": UnitFormat("{:,.0f}".format),
    "rank": UnitFormat("{:g}".format),
    "points": UnitFormat(points, 100, "pp"),
    "percent": UnitFormat(points, 100, "%"),
    "score": UnitFormat(partial(fixed_point, digits=3)),
    "coefficient": UnitFormat(two_digits),
    "relevance": UnitFormat(two_digits),
    "proxy": UnitFormat(partial(fixed_point, digits=3)),
    "metric": UnitFormat(partial(fixed_point, digits=4)),
    "p": UnitFormat(p_value),
    "nats": UnitFormat(partial(fixed_point, digits=3), name="nats"),
    "times": UnitFormat(three_digits),
}
"""Unit → its format."""


def write_figure(unit: FigureUnit, figure: float) -> str:
    """Write a record's figure, without the unit's name."""
    return UNIT_FORMATS[unit].write(figure)


def figure_text(
    figure: Estimate, write: Callable[[float], str] = two_digits, unit: str = ""
) -> str:
    """Write a figure with its unit and interval, such as `0.66 (0.41 to 0.80)`.

    An undefined figure is written as a dash.
    """
    if not is_finite(figure.value):
        return DASH
    bounds = interval_text(figure.low, figure.high, write)
    return f"{write(figure.value)}{unit}{f' ({bounds})' if bounds else ''}"


def nats_text(figure: Estimate) -> str:
    """Write nats with their interval, such as `0.12 nats (0.05 to 0.19)`; a dash if undefined."""
    return figure_text(figure, three_digits, " nats")


NO_SCORE = "a document has no finite score"
"""Default reason for an undefined level without a reason of its own."""


def level_text(level: Estimate, unit: str) -> str:
    """Write a level with its interval and unit, such as `41.7 % (31.1 to 53.1)`.

    The unit is `%` for an accuracy, else that of the loss. An undefined level is written as its
    reason.
    """
    if not is_finite(level.value):
        return f"undefined ({level.reason or NO_SCORE})"
    form = UNIT_FORMATS["percent" if unit == "%" else "score"]
    return figure_text(level, form.write, f" {unit}" if unit else "")


def named_interval(
    figure: Estimate, write: Callable[[float], str], name: str = "95 % interval"
) -> str:
    """Write an interval with its name behind a figure, such as ` (95 % interval 1.2 to 4.0)`.

    Args:
        figure: The figure.
        write: Function that formats both ends.
        name: The name of the interval.

    Returns:
        The interval, with a space before it; empty where there is none.
    """
    bounds = interval_text(figure.low, figure.high, write)
    return f" ({name} {bounds})" if bounds else ""


def round_count(number: int) -> str:
    """Round a number of things to two digits, such as `1,200`."""
    return f"{round(number, 2 - len(str(number))):,}"


def count_text(number: int, noun: str) -> str:
    """Write a number with its noun, such as `1 layer` or `1,200 searches`."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


# What is measured


@dataclass(frozen=True)
class MetricFormat:
    """Names and formats of a cell's metric for display.

    Attributes:
        level: The name of the metric.
        change: The name of its change by a removal; positive if the removed part mattered.
        level_unit: The name of the level's unit.
        unit: The name of the change's unit.
        level_form: The format of the level.
        form: The format of the change.
    """

    level: str
    change: str
    level_unit: str
    unit: str
    level_form: FigureUnit
    form: FigureUnit

    @property
    def scale(self) -> float:
        """The factor by which a record's figure is multiplied."""
        return UNIT_FORMATS[self.form].scale

    def write(self, figure: float) -> str:
        """Write a level or a change of the record, without the unit."""
        return UNIT_FORMATS[self.form].write(figure)

    def amount(self, change: Estimate) -> str:
        """Write a change with its unit and interval, or the reason why it is undefined."""
        if change.value is None:
            return f"an undefined amount ({change.reason})"
        return figure_text(change, self.write, f" {self.unit}")

    def column_head(self, label: str) -> str:
        """Return the head of a column of levels or changes; a loss's unit is part of its label."""
        return label if UNIT_FORMATS[self.form].name else f"{label} ({self.unit})"


ACCURACY_FORMAT = MetricFormat("accuracy", "accuracy drop", "%", "pp", "percent", "points")


def metric_format(cell: CellRecord) -> MetricFormat:
    """Choose names and formats for a cell: accuracy in percentage points, or a loss in its unit."""
    if cell.higher_is_better:
        return ACCURACY_FORMAT
    aggregation = cell.benchmark.tasks[0].metrics.get(cell.metric, "")
    unit = _LOSS_UNITS.get(aggregation, cell.metric)
    return MetricFormat("loss", "loss increase", unit, unit, "score", "score")


# Layers and reasons


def join_words(words: Sequence[str], joint: str = "and") -> str:
    """Join words into an enumeration: `a, b and c`."""
    *first_words, last_word = words or [""]
    return f"{', '.join(first_words)} {joint} {last_word}" if first_words else last_word


def layer_list(layers: Sequence[int], total: int) -> str:
    """Name layers in a sentence: `layer 3`, `layers 3, 5`, `all 30 layers` where 30 is `total`."""
    if len(layers) == total and total > 1:
        return f"all {total} layers"
    return f"layer{'s' if len(layers) != 1 else ''} {', '.join(map(str, layers))}"
