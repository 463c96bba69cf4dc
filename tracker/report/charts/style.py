"""Define the style of all charts, and build their traces, axes and hover boxes.

Charts are stored as plotly's JSON, because creating a `go.Figure` is slow. Charts are legible on
light and dark pages.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import plotly.graph_objects as go

from tracker.schema.answers import interval_name
from tracker.schema.changes import Change
from tracker.schema.estimates import Estimate
from tracker.schema.formats import is_finite, metric_format, named_interval, p_value, write_figure
from tracker.schema.kinds import KIND_STYLES
from tracker.schema.proxies import PART_PROXIES
from tracker.schema.records import CellRecord, RunRecord

COST_COLOUR = KIND_STYLES["layer"].colour
HELP_COLOUR = "#c4762f"
PROXY_COLOUR = "#8a8a8a"
GREY = "#808080"
FAINT_GREY = "rgba(128,128,128,0.22)"
LABELLED_POINTS: dict[str, Any] = {
    "mode": "markers+text",
    "textfont": {"size": 10, "color": GREY},
    # A legend would show the colour of the first point, although points differ in colour.
    "showlegend": False,
}
OPEN_OPACITY = 0.32
"""Opacity of values without a verdict."""
LINE_COLOURS = ("#128f80", "#b04c9a", "#6f8f1f", "#7a63c9", "#c0456a", "#4f9a52", "#8f6a55")
"""Colours of lines: mid-tones, legible on white and on black.

No colour is close to the blue and the orange that mark removals that cost or help.
"""
_LINE_DASHES = ("solid", "dash", "dot")
MAX_INTERVAL_LINES = 3
"""Maximum number of lines that remain distinguishable with their intervals."""
MAX_LEGEND_LINES = 20
"""Maximum number of lines with a legend; if there are more, only hover boxes name the lines."""
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_TITLE_WIDTH = 95
_LABEL_SIDES = {
    "top right": (1, 1), "bottom right": (1, -1), "top left": (-1, 1), "bottom left": (-1, -1),
    "middle right": (1, 0), "middle left": (-1, 0), "top center": (0, 1), "bottom center": (0, -1),
}  # fmt: skip
_Box = tuple[float, float, float, float]
"""Box as its left, right, bottom and top edge."""
_MARK_SIZE, _LABEL_SIZE, _LABEL_OFFSET = (0.008, 0.022), (0.013, 0.03), (0.0125, 0.032)
"""Width and height of a mark, of a two-digit label, and of the distance between the two, as
fractions of a chart of 1000 by 360 pixels."""
_AXIS_LAYOUT = {
    "gridcolor": FAINT_GREY,
    "linecolor": GREY,
    "zerolinecolor": GREY,
    "zerolinewidth": 1,
    "automargin": True,
    "title": {"standoff": 8},
    "showline": False,
}
CHART_TEMPLATE: dict[str, Any] = {
    "layout": {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": _FONT, "size": 12, "color": GREY},
        "modebar": {"bgcolor": "rgba(0,0,0,0)"},
        "hoverlabel": {
            "bgcolor": "#23272e",
            "bordercolor": "#23272e",
            "font": {"color": "#f2f2f2", "size": 12, "family": _FONT},
            "align": "left",
        },
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {**_AXIS_LAYOUT, "ticks": "outside", "tickcolor": GREY, "ticklen": 4},
        "yaxis": _AXIS_LAYOUT,
    }
}
"""Template of all charts; a page contains it once."""


@dataclass(frozen=True)
class Chart:
    """Chart as JSON that plotly reads.

    Attributes:
        title: Title in plain text.
        data: The traces as plotly's JSON.
        layout: Axes, height and other settings that differ from the chart template.
        explanation: Explanation in plain text below the title.
    """

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    explanation: str = ""

    def to_figure(self) -> go.Figure:
        """Build a self-contained figure, with the title inside and the legend at the bottom.

        If the chart has pale colours, a line below the title explains that they mark values that
        are not significant.
        """
        lines = [html.escape(line) for line in textwrap.wrap(self.title, _TITLE_WIDTH)]
        if any(map(_is_pale, self.data)):
            lines.append('<span style="font-size: 11px">pale: not significant</span>')
        n_named = sum(map(_is_named, self.data))
        figure = go.Figure(self.data, self.layout)
        return figure.update_layout(
            template=CHART_TEMPLATE,
            # A legend of several rows above the chart would grow into the title.
            legend={"y": 0, "yref": "container", "yanchor": "bottom"},
            height=self.layout["height"] + 20 * len(lines) + 12 * n_named,
            title={"text": "<br>".join(lines), "font": {"size": 14}, "x": 0, "xref": "paper"},
            margin_t=40 + 20 * len(lines),
        )


def build_chart(title: str, data: list[dict[str, Any]], height: int, **layout: Any) -> Chart:
    """Build a chart of `height` pixels; `layout` overrides settings of the chart template."""
    # Reserve room above the axes for a legend and for plotly's buttons.
    margin = {"l": 60, "r": 16, "t": 34, "b": 50} | layout.pop("margin", {})
    return Chart(title, data, {"height": height, "margin": margin, **layout})


def build_trace(
    kind: str, name: str, x: Sequence[Any], y: Sequence[Any], hovers: Sequence[Any], **more: Any
) -> dict[str, Any]:
    """Build a plotly trace with hover boxes.

    `kind` is plotly's trace type, such as `scatter`, and `more` sets further properties.
    """
    content = {"type": kind, "name": name, "x": x, "y": y, "hovertext": hovers}
    return content | {"hoverinfo": "text"} | more


def estimate_trace(
    kind: str,
    name: str,
    x: Sequence[Any],
    estimates: Sequence[Estimate],
    hovers: Sequence[Any],
    scale: float = 1,
    bars: Mapping[str, Any] | None = MappingProxyType({}),
    **more: Any,
) -> dict[str, Any]:
    """Build a plotly trace of estimates, multiplied by `scale`, with error bars.

    `bars` overrides properties of the error bars, which are thin and grey by default. If `bars` is
    None, no intervals are drawn.
    """
    values = [scale_value(estimate.value, scale) for estimate in estimates]
    if bars is not None:
        more["error_y"] = error_bars(estimates, scale, **bars)
    return build_trace(kind, name, x, values, hovers, **more)


def _is_named(trace: dict[str, Any]) -> bool:
    """Return whether a trace is in the legend."""
    return bool(trace.get("showlegend", trace.get("type") == "scatter"))


def _is_pale(trace: dict[str, Any]) -> bool:
    """Return whether a trace draws some values in a pale colour."""
    marks = [trace.get("opacity"), trace.get("marker", {}).get("opacity")]
    return any(OPEN_OPACITY in (mark if isinstance(mark, list) else [mark]) for mark in marks)


def line_style(number: int) -> dict[str, Any]:
    """Return a distinct style (plotly's `line`) for each line number, starting at 0."""
    dash, colour = divmod(number, len(LINE_COLOURS))
    dash_name = _LINE_DASHES[dash % len(_LINE_DASHES)]
    return {"color": LINE_COLOURS[colour], "width": 1.4, "dash": dash_name}


def layer_axis(layers: Sequence[int], title: str = "layer (0-based)") -> dict[str, Any]:
    """Build a layer axis with ticks at whole layers."""
    start, end = (layers[0], layers[-1]) if layers else (0, 1)
    n_layers = end - start + 1
    return {
        "range": [start - 0.7, end + 0.7],
        "tick0": 0,
        "dtick": 1 if n_layers <= 12 else 5 if n_layers <= 50 else 10,
        "minor": {"tick0": 0, "dtick": 1, "ticks": "outside", "ticklen": 2, "tickcolor": GREY},
        "tickangle": 0,
        "zeroline": False,
        "showgrid": False,
        "title": {"text": title},
    }


def value_axis(title: str, values: Sequence[float | None]) -> dict[str, Any]:
    """Build an axis that is logarithmic if positive values span more than a factor of ten."""
    numbers = [value for value in values if value is not None]
    if numbers and 0 < 10 * min(numbers) < max(numbers):
        return log_axis(f"{title}, log scale", numbers)
    return {"title": {"text": title}, "zeroline": False}


def log_axis(title: str, values: Sequence[float | None]) -> dict[str, Any]:
    """Build a logarithmic axis with tick labels such as 20 and 50."""
    logs = [math.log10(value) for value in values if value is not None and value > 0] or [0.0]
    exponents = range(math.floor(min(logs)), math.ceil(max(logs)) + 1)
    ticks = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    return {"type": "log", "tickvals": ticks, "title": {"text": title}, "zeroline": False}


def relative_positions(values: Sequence[float], span: Sequence[float] = ()) -> list[float]:
    """Shift and scale values, so that the smallest of `span` becomes 0 and the largest becomes 1.

    If `span` is empty, `values` themselves are used instead.
    """
    low, high = min(span or values, default=0.0), max(span or values, default=1.0)
    return [(value - low) / ((high - low) or 1.0) for value in values]


def label_sides(points: Sequence[tuple[float, float]]) -> list[str]:
    """Choose the side of each point for its label, so that labels overlap little.

    Args:
        points: Positions of the points; both coordinates are fractions (0 to 1) of the chart's
            size.

    Returns:
        Plotly's `textposition` for each point.
    """
    taken = [_label_box(x, y, _MARK_SIZE) for x, y in points]
    sides = []
    for x, y in points:
        boxes = {
            name: _label_box(x + dx * _LABEL_OFFSET[0], y + dy * _LABEL_OFFSET[1], _LABEL_SIZE)
            for name, (dx, dy) in _LABEL_SIDES.items()
        }
        side = min(boxes, key=lambda name: sum(_overlap_area(boxes[name], box) for box in taken))
        taken.append(boxes[side])
        sides.append(side)
    return sides


def _label_box(x: float, y: float, size: tuple[float, float]) -> _Box:
    return x - size[0] / 2, x + size[0] / 2, y - size[1] / 2, y + size[1] / 2


def _overlap_area(box: _Box, other_box: _Box) -> float:
    width = min(box[1], other_box[1]) - max(box[0], other_box[0])
    height = min(box[3], other_box[3]) - max(box[2], other_box[2])
    return max(0.0, width) * max(0.0, height)


def scale_value(value: float | None, scale: float = 1) -> float | None:
    """Multiply a value by `scale`; return None (a gap) if the value is undefined."""
    return scale * value if is_finite(value) else None


def sign_colours(values: Iterable[float | None]) -> list[str]:
    """Return the colour of each drop.

    Negative drops (the removal helps) have one colour, and all other drops have another colour.
    """
    return [HELP_COLOUR if value is not None and value < 0 else COST_COLOUR for value in values]


def opacities(flags: Iterable[bool]) -> list[float]:
    """Return an opacity for each flag: 1 if true (significant), else `OPEN_OPACITY`."""
    return [1.0 if is_shown else OPEN_OPACITY for is_shown in flags]


def error_bars(estimates: Sequence[Estimate], scale: float = 1, **more: Any) -> dict[str, Any]:
    """Return error bars from each value to both ends of its interval (plotly's `error_y`).

    `more` overrides properties of the bars, which are thin and grey by default.
    """

    def distance(start: float | None, end: float | None) -> float | None:
        low, high = scale_value(start, scale), scale_value(end, scale)
        return None if low is None or high is None else high - low

    return {
        "type": "data",
        "symmetric": False,
        "array": [distance(estimate.value, estimate.high) for estimate in estimates],
        "arrayminus": [distance(estimate.low, estimate.value) for estimate in estimates],
        **{"width": 0, "thickness": 1.2, "color": GREY},
        **more,
    }


def wrap_text(text: str, columns: int = 48) -> str:
    """Wrap a plain text and escape it for plotly, which reads a subset of HTML."""
    return "<br>".join(html.escape(part) for part in textwrap.wrap(text, columns))


def run_hover(cell: CellRecord, run: Change, record: RunRecord | None) -> str:
    """Write the text of one run's hover box; `record` is None if the run is not measured."""
    heading = f"<b>{run.label()}</b> · {html.escape(cell.benchmark.title)}"
    if cell.removed:
        heading += f"<br>{wrap_text(cell.removed_text)}"
    if record is None:
        return f"{heading}<br>{cell.absence_reason(run)}"
    measure = metric_format(cell)
    drop = record.drop.value
    if drop is None:
        text = f"undefined: {wrap_text(cell.reason_of('accuracy_drop', record))}"
    else:
        interval = named_interval(record.drop, measure.write, interval_name(cell))
        text = f"{measure.write(drop)} {measure.unit}{interval}"
    lines = [heading, f"{measure.change} {text}"]
    if record.drop.p_value is not None:
        lines.append(f"McNemar p {p_value(record.drop.p_value)} (unadjusted)")
    parts = (p for p in PART_PROXIES if p.component == run.component or record.proxies.get(p.name))
    proxies = [proxy.name for proxy in parts] if run.has_taylor else ["cosine_score"]
    for field in ("accuracy_relevance", *proxies):
        value = record.figure(field)
        text = f"undefined: {wrap_text(cell.reason_of(field, record))}"
        if value is not None:
            text = write_figure("proxy" if field in proxies else "relevance", value)
        lines.append(f"{field.replace('_', ' ')} {text}")
    lines.append(" ".join(filter(None, (f"{record.n:,} documents", cell.sampling_text))))
    return "<br>".join(lines)


def estimate_hover(
    heading: str, name: str, estimate: Estimate, write: Callable[[float], str], sample: str = ""
) -> str:
    """Return the text of a hover box for a value and its interval.

    `heading` is the first line of the box. `sample` is the last line, such as the number of
    documents. `name` is the name of the value, and `write` formats a number as text.
    """
    if not is_finite(estimate.value):
        text = f"undefined: {wrap_text(estimate.reason or 'not measured')}"
    else:
        text = f"{write(estimate.value)}{named_interval(estimate, write) or ' (no interval)'}"
    return f"<b>{wrap_text(heading)}</b><br>{name} {text}<br>{html.escape(sample)}"


def align_runs(
    cell: CellRecord, kind: Change, layers: Sequence[int]
) -> tuple[list[RunRecord | None], list[str]]:
    """Return the records and hover boxes of one kind of ablation, for each of `layers`.

    The record of a run that is not measured is None.
    """
    by_layer = cell.runs_of_kind(kind)
    records = [by_layer.get(layer) for layer in layers]
    runs = zip(map(kind.at_layer, layers), records, strict=True)
    return records, [run_hover(cell, run, record) for run, record in runs]
