"""How figures are written for people: numbers, intervals, p-values, and the unit of a change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from tracker.core.records import CellRecord

DASH = "–"
MINUS = "−"
_LOSS_UNITS = {"bits_per_byte": "bits per byte", "ratio": "nats a token"}
"""The unit of a loss, by its aggregation."""


def fixed(value: float, digits: int) -> str:
    """Round to some digits, with a true minus sign and no negative zero, such as `−0.25`."""
    return f"{value:z.{digits}f}".replace("-", MINUS)


def two_digits(value: float) -> str:
    """Round to two digits after the decimal point, as every correlation is written."""
    return fixed(value, 2)


def three_digits(value: float) -> str:
    """Round to three significant digits, thousands to whole ones, such as `0.123` or `1,083`."""
    written = f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return written.replace("-", MINUS)


def points(fraction: float) -> str:
    """Write a fraction as percentage points without the unit: 0.113 is `11.3`."""
    return fixed(100 * fraction, 1)


def p_value(p: float) -> str:
    """Write a p-value: three decimals, or one significant digit below 0.001, such as `3e−5`."""
    if not 0 < p < 0.001:
        return f"{p:.3f}"
    digit, exponent = f"{p:.0e}".split("e")
    return f"{digit}e{MINUS}{abs(int(exponent))}"


def defined(value: float | None) -> TypeGuard[float]:
    """Say whether a value can be shown: not None, NaN or infinite."""
    return value is not None and math.isfinite(value)


def interval(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    """Write an interval, such as `1.2 to 4.0`; nothing when an end is undefined."""
    return f"{write(low)} to {write(high)}" if defined(low) and defined(high) else ""


def counted(number: int, noun: str) -> str:
    """Write a number of things, such as `1 layer` or `1,200 searches`; `noun` is one of them."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


# What is measured


@dataclass(frozen=True)
class Measure:
    """What a cell's metric is called in front of people, and how it is written.

    Attributes:
        level: What the metric is.
        change: What a removal does to it, positive where what was removed mattered.
        level_unit: The unit of the level.
        unit: The unit of the change.
        scale: By what a record's figure is multiplied.
        digits: Digits after the decimal point.
    """

    level: str
    change: str
    level_unit: str
    unit: str
    scale: float
    digits: int

    def write(self, figure: float) -> str:
        """Write a level or a change of the record, without the unit."""
        return fixed(self.scale * figure, self.digits)


_ACCURACY = Measure("accuracy", "accuracy drop", "%", "pp", 100, 1)


def measure_of(cell: CellRecord) -> Measure:
    """Say what a cell measures: accuracy in percentage points, or a loss in its own unit."""
    if cell.higher_is_better:
        return _ACCURACY
    how = cell.benchmark.tasks[0].metrics.get(cell.metric, "")
    unit = _LOSS_UNITS.get(how, cell.metric)
    return Measure("loss", "loss increase", unit, unit, 1, 3)


# Layers and reasons


def layer_list(layers: Sequence[int], total: int) -> str:
    """Name layers in a sentence: `layer 3`, `layers 3, 5`, `all 30 layers` where 30 is `total`."""
    if len(layers) == total and total > 1:
        return f"all {total} layers"
    return f"layer{'s' if len(layers) != 1 else ''} {', '.join(map(str, layers))}"
