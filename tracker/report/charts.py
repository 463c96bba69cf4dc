"""Draws cell records as plotly figures.

Every text that comes from a record is escaped: plotly reads a subset of HTML in titles, labels
and hover boxes. Backgrounds are transparent and text is grey, so that a figure is legible on
light and on dark pages.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tracker.config import Component
from tracker.records import WHOLE_LAYER, CellRecord, LayerRecord, RunIdentity
from tracker.report import wording

MATTERS = "#3d74a8"
HELPS = "#c4762f"
PROXY = "#8a8a8a"
COMPONENTS = {
    "layer": (MATTERS, "circle"),
    "attention": ("#a8558f", "square"),
    "mlp": ("#5f8a3a", "diamond"),
}
"""Colour and symbol of each component where several share a chart."""
GREY = "#808080"
FAINT = "rgba(128,128,128,0.22)"
# Fading to transparency, not to white, keeps 0 quiet on light and on dark pages.
_SCALE = [
    (0.0, "rgba(196,118,47,1)"),
    (0.499, "rgba(196,118,47,0.08)"),
    (0.501, "rgba(61,116,168,0.08)"),
    (1.0, "rgba(61,116,168,1)"),
]
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_TITLE_COLUMNS = 95
# Neighbours along the proxy axis write their labels to different sides.
_SIDES = ("top left", "bottom right", "bottom left", "top right")


def curve_title(cell: CellRecord) -> str:
    """Say what the layer curve shows.

    Args:
        cell: The cell.

    Returns:
        Plain text with the largest drop, its interval and the number of documents.
    """
    measure = wording.measure_of(cell)
    records = [r for r in cell.layers if r.span == 1]
    drops = [r.accuracy_drop for r in records if wording.defined(r.accuracy_drop)]
    if not drops:
        return f"{cell.title}: no {measure.change} is defined"
    costs, gain = ("costs", "raise") if cell.higher_is_better else ("adds", "lower")
    says = f"no removal {costs} {measure.level}"
    for top in wording.most_critical(records, 1):
        size = measure.write(max(drops))
        between = wording.interval(top.accuracy_drop_low, top.accuracy_drop_high, measure.write)
        says = f"removing {top.label()} {costs} most, {size} {measure.unit}"
        says += f" (95 % interval {between})" if between else ""
    gains = sum(1 for drop in drops if drop < 0)
    return (
        f"{cell.title}: {says}; {gains} of {len(drops)} removals {gain} {measure.level} "
        f"({cell.metric}, {cell.n:,} documents)"
    )


def scatter_title(cell: CellRecord) -> str:
    """Say what the scatter shows.

    Args:
        cell: The cell.

    Returns:
        Plain text with the Spearman correlation, its interval and its samples.
    """
    text = wording.correlation_text(wording.correlation(cell))
    change = wording.measure_of(cell).change
    return f"{cell.title}: Spearman of cosine score and {change} {text}"


def heat_title(cells: Sequence[CellRecord]) -> str:
    """Say what the heat map shows.

    Args:
        cells: Cells of one model.

    Returns:
        Plain text with the numbers of benchmarks and of negative and undefined values.
    """
    layers = wording.layers_of(WHOLE_LAYER, *cells)
    found: dict[int, list[float]] = {}
    for cell in cells:
        for layer in layers:
            value, _ = wording.relevance(cell, layer)
            if value is not None:
                found.setdefault(layer, []).append(value)
    total, count = len(layers) * len(cells), sum(len(v) for v in found.values())
    rows = "cell" if any(cell.removed for cell in cells) else "benchmark"
    size = f"{len(layers)} layers × {wording.counted(len(cells), rows)}"
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


def cell_charts(cell: CellRecord) -> dict[str, go.Figure]:
    """Draw whatever can be drawn of a cell, for the run that a tracking backend keeps of it.

    Args:
        cell: The cell.

    Returns:
        Charts by name, each with its title.
    """
    found = {}
    if curve_components(cell):
        found["accuracy_drop"] = layer_curve(cell)
    if cell.whole_layers:
        found["proxies"] = proxy_scatter(cell)
    for component in span_components(cell):
        found[f"spans_{component}"] = span_map(cell, component)
    return found


def layer_curve(cell: CellRecord) -> go.Figure:
    """Draw the accuracy drop (or loss increase) of every layer above its cosine score.

    Two panels share the layer axis, because two scales in one panel would suggest a comparison
    of heights that means nothing.

    Args:
        cell: The cell.

    Returns:
        Drops in pp, or increases in the loss's unit, with 95 % intervals (trace `accuracy drop` or
        `loss increase`; one trace a component, under its name, where there are several), and
        cosine scores (trace `cosine score`). Undefined and missing layers are gaps. Spans of
        several layers are not in it.
    """
    components = curve_components(cell)
    single = len(components) == 1
    measure = wording.measure_of(cell)
    figure = make_subplots(
        rows=2, cols=1, shared_xaxes=True, row_heights=[0.68, 0.32], vertical_spacing=0.07
    )
    axis: set[int] = set()
    for number, component in enumerate(components):
        layers, records, hover = _along_layers(cell, (component, 1))
        # Side by side, so that no interval hides another.
        aside = 0.2 * (number - (len(components) - 1) / 2)
        axis.update(layers)
        drops = [_scaled(record.accuracy_drop if record else None, measure) for record in records]
        colour, symbol = COMPONENTS[component]
        signs = [HELPS if drop is not None and drop < 0 else MATTERS for drop in drops]
        figure.add_trace(
            go.Scatter(
                name=measure.change if single else component,
                x=layers if single else [layer + aside for layer in layers],
                y=drops,
                error_y=_errors(records, measure) | ({} if single else {"color": colour}),
                mode="lines+markers",
                line={"color": FAINT if single else colour, "width": 1},
                marker={"size": 7}
                | ({"color": signs} if single else {"color": colour, "symbol": symbol}),
                hovertext=hover,
                hoverinfo="text",
                showlegend=not single,
            ),
            row=1,
            col=1,
        )
    layers, records, hover = _along_layers(cell, WHOLE_LAYER)
    figure.add_trace(
        go.Bar(
            name="cosine score",
            x=layers,
            y=[_finite(record.cosine_score if record else None) for record in records],
            marker={"color": PROXY, "line": {"width": 0}},
            width=0.6,
            hovertext=hover,
            hoverinfo="text",
            showlegend=False,
        ),
        row=2,
        col=1,
    )
    if not layers:
        figure.add_annotation(
            text="measured for whole single layers only",
            showarrow=False,
            x=0.5,
            y=0.5,
            xref="x2 domain",
            yref="y2 domain",
        )
        figure.update_yaxes(showticklabels=False, showgrid=False, row=2, col=1)
    _style(figure, curve_title(cell), 470)
    figure.update_xaxes(_layer_axis(sorted(axis)))
    figure.update_xaxes(title_text="layer (0-based)", row=2, col=1)
    figure.update_yaxes(
        title_text=f"{measure.change} ({measure.unit})", zeroline=True, row=1, col=1
    )
    figure.update_yaxes(title_text="cosine score<br>(1 − cos)", rangemode="tozero", row=2, col=1)
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"})
    return figure


def curve_components(cell: CellRecord) -> list[Component]:
    """List what the layer curve draws a line of.

    Args:
        cell: The cell.

    Returns:
        The components that are removed of one layer at a time; whole layers where there is no run.
    """
    kinds = wording.kinds(cell)
    return [component for component, span in kinds if span == 1] if kinds else ["layer"]


def _along_layers(
    cell: CellRecord, kind: wording.Kind
) -> tuple[list[int], list[LayerRecord | None], list[str]]:
    """Line up the runs of a kind: layers, records, hover boxes."""
    layers = wording.layers_of(kind, cell)
    found = wording.records_of(cell, kind)
    component, span = kind
    runs = [RunIdentity(component=component, layer=layer, span=span) for layer in layers]
    hover = [_hover(cell, run, found.get(run.layer)) for run in runs]
    return layers, [found.get(layer) for layer in layers], hover


def span_components(cell: CellRecord) -> list[Component]:
    """List what was removed in spans of several lengths, so that a span map shows something.

    Args:
        cell: The cell.

    Returns:
        The components with runs of two spans or more.
    """
    components = [component for component, _ in wording.kinds(cell)]
    return [name for name in dict.fromkeys(components) if components.count(name) > 1]


def span_title(cell: CellRecord, component: Component) -> str:
    """Say what the span map shows.

    Args:
        cell: The cell.
        component: What of the layers is removed.

    Returns:
        Plain text with the cheapest removal of every span.
    """
    measure = wording.measure_of(cell)
    what = "layers" if component == "layer" else f"layers’ {component}"
    text = f"{cell.title}: {measure.change} by first layer and number of removed {what}"
    cheapest = []
    for span in _spans(cell, component):
        found = wording.records_of(cell, (component, span)).values()
        known = [(r.accuracy_drop, r.layer, r) for r in found if wording.defined(r.accuracy_drop)]
        if known:
            drop, _, record = min(known, key=lambda item: item[:2])
            cheapest.append(f"{record.label()} ({measure.write(drop)})")
    return f"{text}; cheapest ({measure.unit}): {', '.join(cheapest)}" if cheapest else text


def span_map(cell: CellRecord, component: Component) -> go.Figure:
    """Draw the accuracy drop (or loss increase) by first layer and number of removed layers.

    Args:
        cell: The cell.
        component: What of the layers is removed.

    Returns:
        A heat map centred at 0 (trace `accuracy drop` or `loss increase`), one row a span.
        Undefined and missing values are gaps marked by crosses that say why (trace `undefined`); a
        span that is no run is blank.
    """
    measure = wording.measure_of(cell)
    spans = _spans(cell, component)
    layers = sorted({x for span in spans for x in wording.layers_of((component, span), cell)})
    values: list[list[float | None]] = []
    hovers: list[list[str]] = []
    gaps: list[tuple[int, str, str]] = []
    for span in spans:
        there, records, hover = _along_layers(cell, (component, span))
        drops = [_scaled(record.accuracy_drop if record else None, measure) for record in records]
        by_layer = dict(zip(there, zip(drops, hover, strict=True), strict=True))
        row = [by_layer.get(layer, (None, "")) for layer in layers]
        values.append([drop for drop, _ in row])
        hovers.append([text for _, text in row])
        gaps += [(x, str(span), text) for x, (drop, text) in by_layer.items() if drop is None]
    largest = max((abs(v) for row in values for v in row if v is not None), default=0) or 1
    labels = [str(span) for span in spans]
    figure = _centred_map(
        measure.change,
        (layers, labels, values, hovers),
        gaps,
        largest,
        (f"−{_short(largest)}<br>removal helps", "0<br>no change", f"{_short(largest)}"),
    )
    _style(figure, span_title(cell, component), 165 + 30 * len(spans))
    figure.update_layout(margin_b=105)
    figure.update_xaxes(_layer_axis(layers), title_text="first layer (0-based)", showgrid=False)
    figure.update_yaxes(
        autorange="reversed", showgrid=False, ticks="", type="category", title_text="layers"
    )
    return figure


def _spans(cell: CellRecord, component: Component) -> list[int]:
    return [span for name, span in wording.kinds(cell) if name == component]


def _short(value: float) -> str:
    return f"{value:.3g}"


def proxy_scatter(cell: CellRecord) -> go.Figure:
    """Draw the accuracy drop (or loss increase) of every layer against its cosine score.

    The proxy axis is logarithmic when the scores span more than a factor of ten: the outer
    layers would otherwise press all others together. Ranks are not changed by it.

    Args:
        cell: The cell.

    Returns:
        One labelled point for each layer where both are defined, in two traces: `inner layers`,
        and `outer layers` for the first two and the last two.
    """
    measure = wording.measure_of(cell)
    records = [
        r
        for r in cell.whole_layers
        if wording.defined(r.cosine_score) and wording.defined(r.accuracy_drop)
    ]
    records.sort(key=lambda record: record.layer)
    by_score = sorted(records, key=lambda record: record.cosine_score or 0)
    side = {record.layer: _SIDES[rank % 4] for rank, record in enumerate(by_score)}
    outer = {0, 1, cell.model.layers - 2, cell.model.layers - 1}
    figure = go.Figure()
    for name, symbol, group in (
        ("inner layers", "circle", [r for r in records if r.layer not in outer]),
        (
            "outer layers (first two, last two)",
            "diamond-open",
            [r for r in records if r.layer in outer],
        ),
    ):
        figure.add_trace(
            go.Scatter(
                name=name,
                x=[r.cosine_score for r in group],
                y=[_scaled(r.accuracy_drop, measure) for r in group],
                error_y={**_errors(group, measure), "color": FAINT},
                mode="markers+text",
                text=[str(r.layer) for r in group],
                textposition=[side[r.layer] for r in group],
                textfont={"size": 10, "color": GREY},
                marker={
                    "size": 8,
                    "symbol": symbol,
                    "line": {"width": 2 if symbol.endswith("open") else 0},
                    "color": [HELPS if (r.accuracy_drop or 0) < 0 else MATTERS for r in group],
                },
                hovertext=[_hover(cell, r, r) for r in group],
                hoverinfo="text",
            )
        )
    _style(figure, scatter_title(cell), 460)
    scores = [r.cosine_score or 0.0 for r in records]
    wide = bool(scores) and min(scores) > 0 and max(scores) > 10 * min(scores)
    figure.update_xaxes(
        type="log" if wide else "linear",
        tickvals=_decades(min(scores), max(scores)) if wide else None,
        title_text=f"cosine score (1 − cos{', log scale' if wide else ''})",
        zeroline=False,
    )
    figure.update_yaxes(title_text=f"{measure.change} ({measure.unit})", zeroline=True)
    figure.update_layout(legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"})
    return figure


def heat_map(cells: Sequence[CellRecord]) -> go.Figure:
    """Draw the accuracy relevance of every whole layer on every benchmark of one model.

    Args:
        cells: Cells of one model, one row each.

    Returns:
        A heat map centred at 0 (trace `accuracy relevance`). Undefined and missing values are
        gaps marked by crosses that say why (trace `undefined`).

    Raises:
        ValueError: If there is no cell, or the cells belong to several models.
    """
    if len({wording.model_key(cell) for cell in cells}) != 1:
        raise ValueError("heat_map takes the cells of exactly one model")
    layers = wording.layers_of(WHOLE_LAYER, *cells)
    labels = [
        html.escape(label).replace(" · ", "<br>", 1) for label in wording.benchmark_labels(cells)
    ]
    values: list[list[float | None]] = []
    hovers: list[list[str]] = []
    gaps: list[tuple[int, str, str]] = []
    for cell, label in zip(cells, labels, strict=True):
        by_layer = wording.records_of(cell)
        pairs = [wording.relevance(cell, layer) for layer in layers]
        values.append([value for value, _ in pairs])
        hovers.append([_hover(cell, RunIdentity(layer=x), by_layer.get(x)) for x in layers])
        gaps += [
            (layer, label, hover)
            for layer, (value, _), hover in zip(layers, pairs, hovers[-1], strict=True)
            if value is None
        ]
    figure = _centred_map(
        "accuracy relevance",
        (layers, labels, values, hovers),
        gaps,
        1,
        ("≤ −1<br>removal helps", "0<br>no change", "1<br>to chance"),
    )
    _style(figure, heat_title(cells), 165 + 40 * len(cells))
    figure.update_layout(margin_b=105)
    figure.update_xaxes(_layer_axis(layers), title_text="layer (0-based)", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticks="", type="category")
    return figure


def _centred_map(
    name: str,
    content: tuple[list[int], list[str], list[list[float | None]], list[list[str]]],
    gaps: Sequence[tuple[int, str, str]],
    largest: float,
    ticks: tuple[str, str, str],
) -> go.Figure:
    """Draw a heat map whose colours are centred at 0, with crosses that say why there is a gap."""
    layers, labels, values, hovers = content
    figure = go.Figure(
        go.Heatmap(
            name=name,
            x=layers,
            y=labels,
            z=values,
            zmin=-largest,
            zmid=0,
            zmax=largest,
            colorscale=_SCALE,
            xgap=1,
            ygap=1,
            hovertext=hovers,
            hoverinfo="text",
            hoverongaps=False,
            colorbar={
                "orientation": "h",
                "thickness": 9,
                "len": 0.75,
                "yref": "container",
                "y": 0.02,
                "yanchor": "bottom",
                "tickvals": [-largest, 0, largest],
                "ticktext": list(ticks),
                "ticklabeloverflow": "allow",
                "outlinewidth": 0,
            },
        )
    )
    figure.add_trace(
        go.Scatter(
            name="undefined",
            x=[layer for layer, _, _ in gaps],
            y=[label for _, label, _ in gaps],
            mode="markers",
            marker={"symbol": "x-thin", "size": 6, "line": {"width": 1.2, "color": GREY}},
            hovertext=[hover for _, _, hover in gaps],
            hoverinfo="text",
            showlegend=False,
        )
    )
    return figure


def _decades(low: float, high: float) -> list[float]:
    """List the round numbers 1, 2 and 5 of every decade between two positive numbers."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [float(f"{digit}e{exponent}") for exponent in exponents for digit in (1, 2, 5)]


def _finite(value: float | None) -> float | None:
    return value if wording.defined(value) else None


def _scaled(figure: float | None, measure: wording.Measure) -> float | None:
    return measure.scale * figure if wording.defined(figure) else None


def _errors(records: Sequence[LayerRecord | None], measure: wording.Measure) -> dict[str, Any]:
    """Reach from each drop to both ends of its interval; nothing where undefined."""
    up: list[float | None] = []
    down: list[float | None] = []
    for record in records:
        drop = _scaled(record.accuracy_drop, measure) if record else None
        low = _scaled(record.accuracy_drop_low, measure) if record else None
        high = _scaled(record.accuracy_drop_high, measure) if record else None
        up.append(None if drop is None or high is None else high - drop)
        down.append(None if drop is None or low is None else drop - low)
    return {
        "type": "data",
        "symmetric": False,
        "array": up,
        "arrayminus": down,
        "width": 0,
        "thickness": 1.2,
        "color": GREY,
    }


def _hover(cell: CellRecord, run: RunIdentity, record: LayerRecord | None) -> str:
    """Say everything about one run in a hover box; escaped."""
    head = f"<b>{run.label()}</b> · {html.escape(cell.benchmark.name)}"
    if cell.removed:
        head += f"<br>{_wrap(cell.beneath)}"
    if record is None:
        return f"{head}<br>{wording.absence(cell, run)}"
    measure = wording.measure_of(cell)
    drop, relevance = record.accuracy_drop, wording.relevance_of(cell, record)
    lines = [head]
    if drop is None:
        lines.append(
            f"{measure.change} undefined: "
            + _wrap(wording.reason_of(cell, "accuracy_drop", record))
        )
    else:
        between = wording.interval(
            record.accuracy_drop_low, record.accuracy_drop_high, measure.write
        )
        lines.append(
            f"{measure.change} {measure.write(drop)} {measure.unit}"
            + (f" (95 % interval {between})" if between else "")
        )
    if record.mcnemar_p is not None:
        lines.append(f"McNemar p {wording.p_value(record.mcnemar_p)} (unadjusted)")
    if relevance[0] is None:
        lines.append(f"accuracy relevance undefined: {_wrap(relevance[1])}")
    else:
        lines.append(f"accuracy relevance {wording.fixed(relevance[0], 3)}")
    if record.cosine_score is None:
        lines.append(
            f"cosine score undefined: {_wrap(wording.reason_of(cell, 'cosine_score', record))}"
        )
    else:
        lines.append(f"cosine score {wording.fixed(record.cosine_score, 4)}")
    lines.append(f"{record.n:,} documents")
    return "<br>".join(lines)


def _wrap(text: str, columns: int = 48) -> str:
    return "<br>".join(html.escape(line) for line in textwrap.wrap(text, columns))


def _layer_axis(layers: Sequence[int]) -> dict[str, Any]:
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
    }


def _style(figure: go.Figure, title: str, height: int) -> None:
    lines = textwrap.wrap(title, _TITLE_COLUMNS)
    figure.update_layout(
        # An empty template: plotly's default one is 6 KB in every figure.
        template=go.layout.Template(),
        title={
            "text": "<br>".join(html.escape(line) for line in lines),
            "font": {"size": 14},
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
        },
        height=height,
        margin={"l": 60, "r": 16, "t": 40 + 20 * len(lines), "b": 50},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": _FONT, "size": 12, "color": GREY},
        modebar={"bgcolor": "rgba(0,0,0,0)"},
        hoverlabel={
            "bgcolor": "#23272e",
            "bordercolor": "#23272e",
            "font": {"color": "#f2f2f2", "size": 12, "family": _FONT},
            "align": "left",
        },
    )
    axis = {
        "gridcolor": FAINT,
        "linecolor": GREY,
        "zerolinecolor": GREY,
        "zerolinewidth": 1,
        "automargin": True,
        "title_standoff": 8,
    }
    figure.update_xaxes(
        {**axis, "showline": False, "ticks": "outside", "tickcolor": GREY, "ticklen": 4}
    )
    figure.update_yaxes({**axis, "showline": False})
