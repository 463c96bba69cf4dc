"""Format numbers, intervals and p-values for display."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeGuard

from tracker.schema.estimates import Estimate, FigureUnit
from tracker.schema.identities import CHOICE_PROBABILITIES, CHOICE_PROBABILITY, BenchmarkIdentity

DASH = "–"
MINUS = "−"
_LOSS_UNITS = {"bits_per_byte": "bits per byte", "ratio": "nats a token"}
"""Aggregation of a loss over documents → the unit of the loss."""


def fixed_point(value: float, digits: int) -> str:
    """Format a number with fixed decimals and a typographic minus sign, such as `−0.25`."""
    return f"{value:z.{digits}f}".replace("-", MINUS)


def two_digits(value: float) -> str:
    """Format a number with two decimals, the format of all correlations."""
    return fixed_point(value, 2)


def three_digits(value: float) -> str:
    """Format a number with three significant digits, such as `0.123`.

    Numbers of 1000 or more are formatted as integers.
    """
    text = f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"
    return text.replace("-", MINUS)


def points(fraction: float) -> str:
    """Format a fraction as percentage points, without the unit: 0.113 becomes `11.3`."""
    return fixed_point(100 * fraction, 1)


def p_value(p: float) -> str:
    """Format a p-value with three decimals (`0.012`), or as `3e−5` if it is below 0.001."""
    if not 0 < p < 0.001:
        return f"{p:.3f}"
    digit, exponent = f"{p:.0e}".split("e")
    return f"{digit}e{MINUS}{abs(int(exponent))}"


def is_finite(value: float | None) -> TypeGuard[float]:
    """Return whether a value is a finite number, and not None."""
    return value is not None and math.isfinite(value)


def interval_text(low: float | None, high: float | None, write: Callable[[float], str]) -> str:
    """Format an interval, such as `1.2 to 4.0`; empty if an end is not a finite number."""
    return f"{write(low)} to {write(high)}" if is_finite(low) and is_finite(high) else ""


@dataclass(frozen=True)
class UnitFormat:
    """The display format of values in one unit.

    Attributes:
        write: Function that formats a stored value, without the unit's name.
        scale: Factor that converts a stored value to this unit, such as 100 for percent.
        name: The unit's name in the header of a table column; empty for none.
    """

    write: Callable[[float], str]
    scale: float = 1
    name: str = ""

    def scaled(self, figure: float) -> float:
        """Convert a stored value to this unit without rounding it."""
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
    """Format a stored value in a unit, without the unit's name."""
    return UNIT_FORMATS[unit].write(figure)


def figure_text(
    figure: Estimate, write: Callable[[float], str] = two_digits, unit: str = ""
) -> str:
    """Format an estimate with its unit and interval, such as `0.66 (0.41 to 0.80)`.

    An undefined value is formatted as a dash.
    """
    if not is_finite(figure.value):
        return DASH
    bounds = interval_text(figure.low, figure.high, write)
    return f"{write(figure.value)}{unit}{f' ({bounds})' if bounds else ''}"


def nats_text(figure: Estimate) -> str:
    """Format an estimate in nats, such as `0.12 nats (0.05 to 0.19)`.

    An undefined value is formatted as a dash.
    """
    return figure_text(figure, three_digits, " nats")


NO_SCORE = "a document has no finite score"
"""Default reason for an undefined accuracy or loss."""


def level_text(level: Estimate, unit: str) -> str:
    """Format an accuracy or a loss with its interval, such as `41.7 % (31.1 to 53.1)`.

    If the accuracy or loss is undefined, the text is `undefined` with the reason in parentheses.
    """
    if not is_finite(level.value):
        return f"undefined ({level.reason or NO_SCORE})"
    form = UNIT_FORMATS["percent" if unit == "%" else "score"]
    return figure_text(level, form.write, f" {unit}" if unit else "")


def named_interval(
    figure: Estimate, write: Callable[[float], str], name: str = "95 % interval"
) -> str:
    """Format an estimate's interval with its name, such as ` (95 % interval 1.2 to 4.0)`.

    Args:
        figure: The estimate with the interval.
        write: Function that formats the lower and the upper end.
        name: The name of the interval.

    Returns:
        The interval with a leading space; empty if the estimate has no interval.
    """
    bounds = interval_text(figure.low, figure.high, write)
    return f" ({name} {bounds})" if bounds else ""


def round_count(number: int) -> str:
    """Round a count to two significant digits and format it, such as `1,200`."""
    return f"{round(number, 2 - len(str(number))):,}"


def time_text(seconds: float) -> str:
    """Format a duration with a suitable unit, such as `90 s`, `15 min` or `2.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


MAX_TIES = 0.02
"""Largest fraction of ties within rounding with which a decision about a model is possible."""


def ties_text(n_ties: int, n_documents: int, is_half: bool) -> str:
    """Format the number of ties (documents that rounding errors can decide).

    A document is a tie if rounding errors can change whether the answer is right.

    Args:
        n_ties: Number of documents that are ties.
        n_documents: Number of measured documents.
        is_half: Whether the model computes in half precision.

    Returns:
        A clause with the number of ties. Advice follows if the model computes in half precision and
        the fraction of ties is above `MAX_TIES`.

    Examples:
        >>> ties_text(1, 100, is_half=True)
        '1 document is a tie within rounding; --dtype float32 removes such ties'
    """
    verb = "is a tie" if n_ties == 1 else "are ties"
    clause = f"{count_text(n_ties, 'document')} {verb} within rounding"
    if not is_half:
        return clause
    clause += "; --dtype float32 removes such ties"
    if n_ties <= MAX_TIES * n_documents:
        return clause
    return (
        f"{clause}. Too many documents ({points(n_ties / n_documents)} % of {n_documents:,}) are "
        "ties, so nothing can be decided. Repeat the command with --dtype float32"
    )


def count_text(number: int, noun: str) -> str:
    """Format a number with a noun in singular or plural, such as `1 layer` or `1,200 searches`."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


# What is measured


@dataclass(frozen=True)
class MetricFormat:
    """Names, units and number formats for displaying a metric and its changes.

    Attributes:
        level: The name of the metric, such as `accuracy`.
        change: The name of a change of the metric, such as `accuracy drop`. A positive change means
            that the model is worse.
        level_unit: The unit of the metric, such as `%`.
        unit: The unit of a change of the metric, such as `pp`.
        level_form: The number format of the metric.
        form: The number format of a change of the metric.
    """

    level: str
    change: str
    level_unit: str
    unit: str
    level_form: FigureUnit
    form: FigureUnit

    @property
    def scale(self) -> float:
        """The factor by which a stored value is multiplied for display."""
        return UNIT_FORMATS[self.form].scale

    def write(self, figure: float) -> str:
        """Format a stored value of the metric or of its change, without the unit."""
        return UNIT_FORMATS[self.form].write(figure)

    def amount(self, change: Estimate) -> str:
        """Format a change with its unit and interval.

        If the change is undefined, the text gives the reason.
        """
        if change.value is None:
            return f"an undefined amount ({change.reason or NO_SCORE})"
        return figure_text(change, self.write, f" {self.unit}")

    def column_head(self, label: str) -> str:
        """Return the header of a table column, with the unit if the metric is a loss."""
        return label if UNIT_FORMATS[self.form].name else f"{label} ({self.unit})"


_TRACE_LEVELS = {
    "answer_kept": "answer retention",
    "answer_kept_right": "right-answer retention",
    "answer_kept_wrong": "wrong-answer retention",
    "answer_probability": "answer probability",
    "tokens_kept": "token retention",
    "prefix_kept": "prefix retention",
}
"""Metric of a benchmark `traces:TASK` → its name in reports."""
ACCURACY_FORMAT = MetricFormat("accuracy", "accuracy drop", "%", "pp", "percent", "points")


class MetricRecord(Protocol):
    """Protocol of stored results that report one metric: of ablation runs or of a search."""

    @property
    def metric(self) -> str:
        """Name of the metric."""

    @property
    def higher_is_better(self) -> bool:
        """True if higher values of the metric are better."""

    @property
    def benchmark(self) -> BenchmarkIdentity:
        """The benchmark on which the metric was measured."""


def level_estimate(record: MetricRecord, level: Estimate) -> Estimate:
    """Return an estimate of a record's metric (accuracy or loss) with its unit.

    The interval of an accuracy is limited to 0 to 100 %.
    """
    form = metric_format(record).level_form
    return replace(level.clip(0.0, 1.0) if form == "percent" else level, unit=form)


def metric_format(record: MetricRecord) -> MetricFormat:
    """Return the display format of a record's metric."""
    if record.metric in CHOICE_PROBABILITIES:
        is_plain = record.metric == CHOICE_PROBABILITY
        level = f"{'' if is_plain else 'normalised '}choice probability"
        return replace(ACCURACY_FORMAT, level=level, change=f"{level} drop")
    if level := _TRACE_LEVELS.get(record.metric.partition(",")[0], ""):
        return replace(ACCURACY_FORMAT, level=level, change=f"{level} drop")
    if record.higher_is_better:
        return ACCURACY_FORMAT
    aggregation = record.benchmark.tasks[0].metrics.get(record.metric, "")
    unit = _LOSS_UNITS.get(aggregation, record.metric)
    return MetricFormat("loss", "loss increase", unit, unit, "score", "score")


# Layers and reasons


def join_words(words: Sequence[str], joint: str = "and") -> str:
    """Join words with commas and a final conjunction, such as `a, b and c`."""
    *first_words, last_word = words or [""]
    return f"{', '.join(first_words)} {joint} {last_word}" if first_words else last_word


def layer_list(layers: Sequence[int], total: int) -> str:
    """Format layer numbers for a sentence: `layer 3`, `layers 3, 5`, or `all 30 layers`."""
    if len(layers) == total and total > 1:
        return f"all {total} layers"
    return f"layer{'s' if len(layers) != 1 else ''} {', '.join(map(str, layers))}"
