"""The look that all charts share, and the small parts that several of them are made of.

A chart is plotly's own JSON, not a `go.Figure`: plotly checks every property of a figure, which is
most of the time that a page of many cells takes. Tests make the figures, so they do the checking.
Backgrounds are transparent and text is grey, so that a chart is legible on light and dark pages.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from tracker.core.answers import interval_name
from tracker.core.changes import Change
from tracker.core.estimates import Estimate, Unit
from tracker.core.formats import defined, measure_of, named_interval, p_value, write
from tracker.core.kinds import KINDS
from tracker.core.proxies import OF_EXPERTS
from tracker.core.records import CellRecord, RunRecord

MATTERS = KINDS["layer"].colour
HELPS = "#c4762f"
PROXY = "#8a8a8a"
GREY = "#808080"
FAINT = "rgba(128,128,128,0.22)"
OPEN = 0.32
"""Opacity of values without a verdict."""
LINES = ("#128f80", "#b04c9a", "#6f8f1f", "#7a63c9", "#c0456a", "#4f9a52", "#8f6a55")
"""Colours of lines: mid-tones, legible on white and on black.

None is close to the blue and the orange that mark removals that cost or help.
"""
_DASHES = ("solid", "dash", "dot")
FEW = 3
"""Maximum number of lines that remain distinguishable with their intervals."""
MANY = 20
"""With more lines than this, a legend would be larger than its chart; hover boxes name them."""
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_TITLE_COLUMNS = 95
_SIDES = {
    "top right": (1, 1), "bottom right": (1, -1), "top left": (-1, 1), "bottom left": (-1, -1),
    "middle right": (1, 0), "middle left": (-1, 0), "top center": (0, 1), "bottom center": (0, -1),
}  # fmt: skip
_Box = tuple[float, float, float, float]
"""Left, right, bottom, top."""
_MARK, _LABEL, _AWAY = (0.008, 0.022), (0.013, 0.03), (0.0125, 0.032)
"""Width and height of a mark, of a label of two digits, and how far apart they are, of a chart of
1000 by 360 pixels."""
_AXIS = {
    "gridcolor": FAINT,
    "linecolor": GREY,
    "zerolinecolor": GREY,
    "zerolinewidth": 1,
    "automargin": True,
    "title": {"standoff": 8},
    "showline": False,
}
TEMPLATE: dict[str, Any] = {
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
        "xaxis": {**_AXIS, "ticks": "outside", "tickcolor": GREY, "ticklen": 4},
        "yaxis": _AXIS,
    }
}
"""Template of all charts; a page contains it once."""


@dataclass(frozen=True)
class Chart:
    """A chart as plotly's JSON.

    Attributes:
        title: Title in plain text; a page sets it as a caption, which can wrap.
        data: The traces.
        layout: Axes, height and other differences from the template.
        explains: Explanation in plain text below the title.
    """

    title: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    explains: str = ""

    def figure(self) -> go.Figure:
        """Build a figure for use alone, with its title inside and its legend at the bottom.

        If something is drawn faintly, a line below the title explains that.
        """
        lines = [html.escape(line) for line in textwrap.wrap(self.title, _TITLE_COLUMNS)]
        if any(map(_is_faint, self.data)):
            lines.append('<span style="font-size: 11px">faint: open, it may be chance</span>')
        named = sum(map(_is_named, self.data))
        figure = go.Figure(self.data, self.layout)
        return figure.update_layout(
            template=TEMPLATE,
            # A legend of several rows above the chart would grow into the title.
            legend={"y": 0, "yref": "container", "yanchor": "bottom"},
            height=self.layout["height"] + 20 * len(lines) + 12 * named,
            title={
                "text": "<br>".join(lines),
                "font": {"size": 14},
                "x": 0,
                "xref": "paper",
                "xanchor": "left",
            },
            margin_t=40 + 20 * len(lines),
        )


def chart(title: str, data: list[dict[str, Any]], height: int, **layout: Any) -> Chart:
    """Build a chart, `height` in pixels; `layout` holds differences from the template."""
    # Reserve room above the axes for a legend and, under a pointer, the buttons.
    margin = {"l": 60, "r": 16, "t": 34, "b": 50} | layout.pop("margin", {})
    return Chart(title, data, {"height": height, "margin": margin, **layout})


def trace(
    kind: str, name: str, x: Sequence[Any], y: Sequence[Any], hover: Sequence[Any], **look: Any
) -> dict[str, Any]:
    """Build a trace with hover boxes; `kind` is plotly's `type`, `look` further properties."""
    content = {"type": kind, "name": name, "x": x, "y": y, "hovertext": hover}
    return content | {"hoverinfo": "text"} | look


def _is_named(trace: dict[str, Any]) -> bool:
    """Return whether a trace has an entry in the legend; by default only scatter traces do."""
    return bool(trace.get("showlegend", trace.get("type") == "scatter"))


def _is_faint(trace: dict[str, Any]) -> bool:
    """Return whether some of a trace is drawn as open."""
    strengths = [trace.get("opacity"), trace.get("marker", {}).get("opacity")]
    return any(OPEN in (each if isinstance(each, list) else [each]) for each in strengths)


def line(number: int) -> dict[str, Any]:
    """Return a distinct style of the line with this number (from 0), as plotly's `line`."""
    turn, colour = divmod(number, len(LINES))
    return {"color": LINES[colour], "width": 1.4, "dash": _DASHES[turn % len(_DASHES)]}


def layer_axis(layers: Sequence[int], title: str = "layer (0-based)") -> dict[str, Any]:
    """Tick whole layers only, few enough to be read on a phone."""
    first, last = (layers[0], layers[-1]) if layers else (0, 1)
    count = last - first + 1
    return {
        "range": [first - 0.7, last + 0.7],
        "tick0": 0,
        "dtick": 1 if count <= 12 else 5 if count <= 50 else 10,
        "minor": {"tick0": 0, "dtick": 1, "ticks": "outside", "ticklen": 2, "tickcolor": GREY},
        "tickangle": 0,
        "zeroline": False,
        "showgrid": False,
        "title": {"text": title},
    }


def value_axis(title: str, values: Sequence[float | None]) -> dict[str, Any]:
    """Build an axis that is logarithmic if positive values span more than a factor of ten.

    A few large values would otherwise compress all others. Ranks are unaffected.
    """
    found = [value for value in values if value is not None]
    wide = bool(found) and min(found) > 0 and max(found) > 10 * min(found)
    if not wide:
        return {"title": {"text": title}, "zeroline": False}
    return log_axis(f"{title}, log scale", found)


def log_axis(title: str, values: Sequence[float | None]) -> dict[str, Any]:
    """Build a logarithmic axis with whole numbers at its ticks, where plotly has digits alone."""
    found = [value for value in values if value is not None and value > 0] or [1.0]
    exponents = range(math.floor(math.log10(min(found))), math.ceil(math.log10(max(found))) + 1)
    ticks = [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]
    return {"type": "log", "tickvals": ticks, "title": {"text": title}, "zeroline": False}


def shares(values: Sequence[float], span: Sequence[float] = ()) -> list[float]:
    """Place values between the least (0) and the most (1) of them, or of a span."""
    low, high = min(span or values, default=0.0), max(span or values, default=1.0)
    return [(value - low) / ((high - low) or 1.0) for value in values]


def label_sides(points: Sequence[tuple[float, float]]) -> list[str]:
    """Choose the side of each point for its label, so that labels overlap little.

    Args:
        points: Positions, both coordinates from 0 to 1, in a chart of usual size.

    Returns:
        Plotly's `textposition` of each.
    """
    taken = [_box(x, y, _MARK) for x, y in points]
    found = []
    for x, y in points:
        boxes = {
            name: _box(x + right * _AWAY[0], y + up * _AWAY[1], _LABEL)
            for name, (right, up) in _SIDES.items()
        }
        best = min(boxes, key=lambda name: sum(_overlap(boxes[name], one) for one in taken))
        taken.append(boxes[best])
        found.append(best)
    return found


def _box(x: float, y: float, size: tuple[float, float]) -> _Box:
    return x - size[0] / 2, x + size[0] / 2, y - size[1] / 2, y + size[1] / 2


def _overlap(one: _Box, other: _Box) -> float:
    wide = min(one[1], other[1]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[2], other[2])
    return max(0.0, wide) * max(0.0, high)


def finite(value: float | None, scale: float = 1) -> float | None:
    """Scale a value; None (a gap) if it is undefined."""
    return scale * value if defined(value) else None


def sign_colours(figures: Iterable[float | None]) -> list[str]:
    """Colour figures by whether removal helps (below 0) or costs."""
    return [HELPS if figure is not None and figure < 0 else MATTERS for figure in figures]


def strength(shown: Iterable[bool]) -> list[float]:
    """Return the opacity of values: full with a verdict, faint without."""
    return [1.0 if it_is else OPEN for it_is in shown]


def errors(figures: Sequence[Estimate | None], scale: float = 1, **look: Any) -> dict[str, Any]:
    """Return error bars from each value to both ends of its interval (plotly's `error_y`).

    `look` holds differences from a thin grey line, which a page draws in the colour of its text.
    """

    def reach(start: float | None, end: float | None) -> float | None:
        first, last = finite(start, scale), finite(end, scale)
        return None if first is None or last is None else last - first

    known = [figure or Estimate(None) for figure in figures]
    return {
        "type": "data",
        "symmetric": False,
        "array": [reach(figure.value, figure.high) for figure in known],
        "arrayminus": [reach(figure.low, figure.value) for figure in known],
        "width": 0,
        "thickness": 1.2,
        "color": GREY,
        **look,
    }


def wrap(text: str, columns: int = 48) -> str:
    """Escape a plain text for plotly, which reads a subset of HTML, and wrap it."""
    return "<br>".join(html.escape(part) for part in textwrap.wrap(text, columns))


def run_hover(cell: CellRecord, run: Change, record: RunRecord | None) -> str:
    """Write the hover box of one run; `record` is None where nothing was measured."""
    head = f"<b>{run.label()}</b> · {html.escape(cell.benchmark.title)}"
    if cell.removed:
        head += f"<br>{wrap(cell.beneath)}"
    if record is None:
        return f"{head}<br>{cell.absence(run)}"
    measure = measure_of(cell)
    drop = record.drop.value
    if drop is None:
        change = f"undefined: {wrap(cell.reason_of('accuracy_drop', record))}"
    else:
        between = named_interval(record.drop, measure.write, interval_name(cell))
        change = f"{measure.write(drop)} {measure.unit}{between}"
    lines = [head, f"{measure.change} {change}"]
    if record.drop.p_value is not None:
        lines.append(f"McNemar p {p_value(record.drop.p_value)} (unadjusted)")
    of_expert = run.component == "expert"
    proxies = [proxy.name for proxy in OF_EXPERTS] if of_expert else ["cosine_score"]
    units: dict[str, Unit] = {"accuracy_relevance": "relevance", **dict.fromkeys(proxies, "proxy")}
    for field, unit in units.items():
        value = record.figure(field)
        why = f"undefined: {wrap(cell.reason_of(field, record))}"
        lines.append(f"{field.replace('_', ' ')} {why if value is None else write(unit, value)}")
    lines.append(" ".join(filter(None, (f"{record.n:,} documents", cell.drawn))))
    return "<br>".join(lines)


def estimate_hover(
    head: str, what: str, found: Estimate, write: Callable[[float], str], samples: str
) -> str:
    """Write the hover box of one figure; `head` names its subject."""
    if not defined(found.value):
        says = f"{what} undefined: {wrap(found.reason or 'not measured')}"
    else:
        says = f"{what} {write(found.value)}{named_interval(found, write) or ' (no interval)'}"
    return f"<b>{wrap(head)}</b><br>{says}<br>{html.escape(samples)}"


def along_layers(
    cell: CellRecord, kind: Change, layers: Sequence[int]
) -> tuple[list[RunRecord | None], list[str]]:
    """Line up the runs of a kind over layers: records (None where not measured), hover boxes."""
    measured = cell.runs_of(kind)
    runs = [kind.at(layer) for layer in layers]
    hovers = [run_hover(cell, run, measured.get(run.layer)) for run in runs]
    return [measured.get(layer) for layer in layers], hovers
