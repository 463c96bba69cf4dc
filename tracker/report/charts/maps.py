"""Heat maps: layers × benchmarks, and spans × layers."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from tracker.core import formats
from tracker.core.kinds import Component
from tracker.core.records import WHOLE_LAYER, CellRecord, Kind, RunIdentity, layers_of
from tracker.report import wording
from tracker.report.charts.hover import along_layers, run_hover
from tracker.report.charts.style import GREY, Chart, chart, finite, layer_axis

# Fading to transparency, not to white, keeps 0 quiet on light and on dark pages.
_SCALE = [
    [0.0, "rgba(196,118,47,1)"],
    [0.499, "rgba(196,118,47,0.08)"],
    [0.501, "rgba(61,116,168,0.08)"],
    [1.0, "rgba(61,116,168,1)"],
]
_CROSS = {"symbol": "x-thin", "size": 6, "line": {"width": 1.2, "color": GREY}}
_DOT = {"size": 6, "color": "#fdfdfc", "line": {"width": 1.2, "color": "#1f2328"}}
ROWS = {"autorange": "reversed", "showgrid": False, "ticks": "", "type": "category"}
"""The axis of a map's rows."""
COLOUR_BAR = {
    "orientation": "h",
    "thickness": 9,
    "len": 0.75,
    "yref": "container",
    "y": 0.02,
    "yanchor": "bottom",
    "ticklabeloverflow": "allow",
    "outlinewidth": 0,
}


def heat_title(cells: Sequence[CellRecord]) -> str:
    """Say in plain text how many benchmarks and negative and undefined values the heat map has."""
    layers = layers_of(WHOLE_LAYER, *cells)
    found: dict[int, list[float]] = {}
    for cell in cells:
        for layer in layers:
            value, _ = cell.relevance(layer)
            if value is not None:
                found.setdefault(layer, []).append(value)
    total, count = len(layers) * len(cells), sum(len(v) for v in found.values())
    rows = "cell" if any(cell.removed for cell in cells) else "benchmark"
    size = f"{len(layers)} layers × {formats.counted(len(cells), rows)}"
    text = f"{cells[0].model.name}: accuracy relevance, {size}"
    if found:
        means = {layer: sum(values) / len(values) for layer, values in found.items()}
        top = max(means, key=lambda layer: (means[layer], -layer))
        negative = sum(1 for values in found.values() for value in values if value < 0)
        text += (
            f"; layer {top} matters most (mean {means[top]:.2f}); "
            f"removal helps in {negative} of {count}"
        )
    return text + (f"; {total - count} undefined" if total > count else "")


def heat_map(cells: Sequence[CellRecord]) -> Chart:
    """Draw the accuracy relevance of every whole layer on every benchmark of one model.

    A row a cell, centred at 0 (trace `accuracy relevance`). Undefined and missing values are gaps
    marked by crosses that say why (trace `undefined`). ValueError if there is no cell, or cells
    belong to several models.
    """
    if len({cell.model.key for cell in cells}) != 1:
        raise ValueError("heat_map takes benchmarks of exactly one model")
    layers = layers_of(WHOLE_LAYER, *cells)
    labels = [
        html.escape(label).replace(" · ", "<br>", 1) for label in wording.benchmark_labels(cells)
    ]
    values: list[list[float | None]] = []
    hovers: list[list[str]] = []
    gaps: list[tuple[int, str, str]] = []
    for cell, label in zip(cells, labels, strict=True):
        by_layer = cell.runs_of()
        pairs = [cell.relevance(layer) for layer in layers]
        values.append([value for value, _ in pairs])
        hovers.append([run_hover(cell, RunIdentity(layer=x), by_layer.get(x)) for x in layers])
        gaps += [
            (layer, label, hover)
            for layer, (value, _), hover in zip(layers, pairs, hovers[-1], strict=True)
            if value is None
        ]
    return chart(
        heat_title(cells),
        centred_map(
            "accuracy relevance",
            (layers, labels, values, hovers),
            {"undefined": gaps},
            1,
            ("≤ −1<br>removal helps", "0<br>no change", "1<br>to chance"),
        ),
        165 + 40 * len(cells),
        margin={"b": 105},
        xaxis=layer_axis(layers),
        yaxis=ROWS,
    )


def span_components(cell: CellRecord) -> list[Component]:
    """List the components removed in two spans or more, so that a span map shows something."""
    components = [kind.component for kind in cell.kinds if kind.intervention == "remove"]
    return [name for name in dict.fromkeys(components) if components.count(name) > 1]


def span_title(cell: CellRecord, component: Component) -> str:
    """Say in plain text which removal of every span is the cheapest."""
    measure = formats.measure_of(cell)
    what = "layers" if component == "layer" else f"layers’ {component}"
    text = f"{cell.title}: {measure.change} by first layer and number of removed {what}"
    cheapest = []
    for span in _spans(cell, component):
        found = cell.runs_of(Kind(component, span)).values()
        known = [(r.accuracy_drop, r.layer, r) for r in found if formats.defined(r.accuracy_drop)]
        if known:
            drop, _, record = min(known, key=lambda item: item[:2])
            cheapest.append(f"{record.label()} ({measure.write(drop)})")
    return f"{text}; cheapest ({measure.unit}): {', '.join(cheapest)}" if cheapest else text


def span_map(cell: CellRecord, component: Component) -> Chart:
    """Draw the accuracy drop (or loss increase) by first layer and number of removed layers.

    A row a span, centred at 0 (trace `accuracy drop` or `loss increase`). Undefined and missing
    values are gaps marked by crosses that say why (trace `undefined`); a span that is no run is
    blank.
    """
    measure = formats.measure_of(cell)
    spans = _spans(cell, component)
    layers = sorted({x for span in spans for x in layers_of(Kind(component, span), cell)})
    values: list[list[float | None]] = []
    hovers: list[list[str]] = []
    gaps: list[tuple[int, str, str]] = []
    for span in spans:
        there, records, hover = along_layers(cell, Kind(component, span))
        drops = [finite(r.accuracy_drop, measure.scale) if r else None for r in records]
        by_layer = dict(zip(there, zip(drops, hover, strict=True), strict=True))
        row = [by_layer.get(layer, (None, "")) for layer in layers]
        values.append([drop for drop, _ in row])
        hovers.append([text for _, text in row])
        gaps += [(x, str(span), text) for x, (drop, text) in by_layer.items() if drop is None]
    largest = max((abs(v) for row in values for v in row if v is not None), default=0) or 1
    most = formats.three_digits(largest)
    labels = [str(span) for span in spans]
    return chart(
        span_title(cell, component),
        centred_map(
            measure.change,
            (layers, labels, values, hovers),
            {"undefined": gaps},
            largest,
            (f"−{most}<br>removal helps", "0<br>no change", most),
        ),
        165 + 30 * len(spans),
        margin={"b": 105},
        xaxis=layer_axis(layers, "first layer (0-based)"),
        yaxis=ROWS | {"title": {"text": "layers"}},
    )


def _spans(cell: CellRecord, component: Component) -> list[int]:
    return [
        kind.span
        for kind in cell.kinds
        if kind.component == component and kind.intervention == "remove"
    ]


def centred_map(
    name: str,
    content: tuple[
        Sequence[int | str], list[str], Sequence[Sequence[float | None]], list[list[str]]
    ],
    marks: Mapping[str, Sequence[tuple[int, str, str]]],
    largest: float,
    ticks: tuple[str, str, str],
) -> list[dict[str, Any]]:
    """Draw a heat map whose colours are centred at 0, with marks on it.

    Args:
        name: What is mapped; the trace's name.
        content: Columns, row labels (plotly's markup), values and hover boxes.
        marks: Trace name → layer, row label and hover box of each mark: crosses where the name is
            `undefined`, dots otherwise.
        largest: The value of the strongest colour.
        ticks: What stands below the colours of -largest, 0 and largest.

    Returns:
        The traces.
    """
    layers, labels, values, hovers = content
    return [
        {
            "type": "heatmap",
            "name": name,
            "x": layers,
            "y": labels,
            "z": values,
            "zmin": -largest,
            "zmid": 0,
            "zmax": largest,
            "colorscale": _SCALE,
            "xgap": 1,
            "ygap": 1,
            "hovertext": hovers,
            "hoverinfo": "text",
            "hoverongaps": False,
            "colorbar": {
                **COLOUR_BAR,
                "tickvals": [-largest, 0, largest],
                "ticktext": list(ticks),
            },
        },
        *(
            {
                "type": "scatter",
                "name": mark,
                "x": [layer for layer, _, _ in places],
                "y": [label for _, label, _ in places],
                "mode": "markers",
                "marker": _CROSS if mark == "undefined" else _DOT,
                "hovertext": [hover for _, _, hover in places],
                "hoverinfo": "text",
                "showlegend": False,
            }
            for mark, places in marks.items()
        ),
    ]
