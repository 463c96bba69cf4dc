"""Charts of one cell: what every removal costs, and the cosine score beside it."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from tracker.core import formats
from tracker.core.answers import interval_name
from tracker.core.kinds import KINDS
from tracker.core.proxies import PROXIES
from tracker.core.records import WHOLE_LAYER, CellRecord, Kind
from tracker.report import wording
from tracker.report.charts.hover import along_layers, run_hover
from tracker.report.charts.maps import span_components, span_map
from tracker.report.charts.style import (
    FAINT,
    GREY,
    HELPS,
    MATTERS,
    PROXY,
    Chart,
    chart,
    errors,
    finite,
    layer_axis,
    value_axis,
)

# Neighbours along the proxy axis write their labels to different sides.
_SIDES = ("top left", "bottom right", "bottom left", "top right")


def curve_title(cell: CellRecord) -> str:
    """Say in plain text the largest drop of the layer curve, its interval, and the documents."""
    measure = formats.measure_of(cell)
    records = [r for r in cell.runs if r.span == 1]
    drops = [r.accuracy_drop for r in records if formats.defined(r.accuracy_drop)]
    if not drops:
        return f"{cell.title}: no {measure.change} is defined"
    costs, gain = ("costs", "raise") if cell.higher_is_better else ("adds", "lower")
    # A layer that something else stands in for is not removed.
    only = all(record.intervention == "remove" for record in records)
    removing, removal = ("removing ", "removal") if only else ("", "run")
    says = f"no {removal} {costs} {measure.level}"
    for top in wording.most_critical(records, 1):
        size = measure.write(max(drops))
        between = formats.interval(top.accuracy_drop_low, top.accuracy_drop_high, measure.write)
        says = f"{removing}{top.label()} {costs} most, {size} {measure.unit}"
        says += f" ({interval_name(cell)} {between})" if between else ""
    gains = sum(1 for drop in drops if drop < 0)
    return (
        f"{cell.title}: {says}; {gains} of {len(drops)} {removal}s {gain} {measure.level} "
        f"({cell.metric}, {cell.counted} documents)"
    )


def scatter_title(cell: CellRecord) -> str:
    """Say in plain text the scatter's three correlations, their intervals and their samples."""
    change = formats.measure_of(cell).change
    text = wording.correlation_text(wording.correlation(cell))
    inner = wording.correlation(cell, "inner")
    without = "without the two outer layers at each end"
    others = [f"{without} {wording.short_correlation(inner)}"] if inner else []
    others += [
        f"{name} {wording.short_correlation(found)}"
        for name, coefficient in (("Kendall tau-b", "kendall"), ("Pearson", "pearson"))
        if (found := wording.correlation(cell, coefficient=coefficient))
    ]
    says = f"{cell.title}: Spearman of cosine score and {change} {text}"
    return f"{says}; {', '.join(others)}" if others else says


def cell_charts(cell: CellRecord) -> dict[str, go.Figure]:
    """Draw whatever can be drawn of a cell, by name, for its run on a tracking backend."""
    found = {}
    if curve_kinds(cell):
        found["accuracy_drop"] = layer_curve(cell).figure()
    if cell.whole_layers:
        found["proxies"] = proxy_scatter(cell).figure()
    for component in span_components(cell):
        found[f"spans_{component}"] = span_map(cell, component).figure()
    return found


def layer_curve(cell: CellRecord) -> Chart:
    """Draw the accuracy drop (or loss increase) of every layer above its cosine score.

    Two panels share the layer axis, because two scales in one panel would suggest a comparison of
    heights that means nothing. Drops are in pp, increases in the loss's unit, with 95 % intervals
    (trace `accuracy drop` or `loss increase`; one trace a kind, under its name, where there
    are several); cosine scores are the trace `cosine score`. Undefined and missing layers are gaps;
    spans of several layers are not in it.
    """
    kinds = curve_kinds(cell)
    single = len(kinds) == 1
    measure = formats.measure_of(cell)
    data: list[dict[str, Any]] = []
    axis: set[int] = set()
    for number, kind in enumerate(kinds):
        layers, records, hover = along_layers(cell, kind)
        # Side by side, so that no interval hides another.
        aside = min(0.2, 0.8 / len(kinds)) * (number - (len(kinds) - 1) / 2)
        axis.update(layers)
        drops = [finite(r.accuracy_drop, measure.scale) if r else None for r in records]
        look = KINDS[kind.word]
        signs = [HELPS if drop is not None and drop < 0 else MATTERS for drop in drops]
        figures = [record.drop if record else None for record in records]
        data.append(
            {
                "type": "scatter",
                "name": measure.change if single else kind.word,
                "x": layers if single else [layer + aside for layer in layers],
                "y": drops,
                "error_y": errors(figures, measure.scale)
                | ({} if single else {"color": look.colour}),
                "mode": "lines+markers",
                "line": {"color": FAINT if single else look.colour, "width": 1},
                "marker": {"size": 7}
                | ({"color": signs} if single else {"color": look.colour, "symbol": look.mark}),
                "hovertext": hover,
                "hoverinfo": "text",
                "showlegend": not single,
            }
        )
    layers, records, hover = along_layers(cell, WHOLE_LAYER)
    data.append(
        {
            "type": "bar",
            "name": "cosine score",
            "x": layers,
            "y": [finite(record.cosine_score) if record else None for record in records],
            "xaxis": "x2",
            "yaxis": "y2",
            "marker": {"color": PROXY, "line": {"width": 0}},
            "width": 0.6,
            "hovertext": hover,
            "hoverinfo": "text",
            "showlegend": False,
        }
    )
    nothing = {
        "text": "measured for whole single layers only",
        "showarrow": False,
        "x": 0.5,
        "y": 0.5,
        "xref": "x2 domain",
        "yref": "y2 domain",
    }
    along = layer_axis(sorted(axis))
    return chart(
        curve_title(cell),
        data,
        470,
        xaxis=along | {"title": {}, "anchor": "y", "matches": "x2", "showticklabels": False},
        xaxis2=along | {"anchor": "y2"},
        yaxis={
            "domain": [0.39, 1],
            "title": {"text": f"{measure.change} ({measure.unit})"},
            "zeroline": True,
        },
        yaxis2={
            "domain": [0, 0.3],
            "anchor": "x2",
            "title": {"text": "cosine score<br>(1 − cos)"},
            "rangemode": "tozero",
            "showticklabels": bool(layers),
            "showgrid": bool(layers),
        },
        annotations=[] if layers else [nothing],
    )


def curve_kinds(cell: CellRecord) -> list[Kind]:
    """List the kinds of which the layer curve draws single layers; whole ones without runs."""
    return [kind for kind in cell.kinds if kind.span == 1] if cell.kinds else [WHOLE_LAYER]


def proxy_scatter(cell: CellRecord) -> Chart:
    """Draw the accuracy drop (or loss increase) of every layer against its cosine score.

    One labelled point for each layer where both are defined, in two traces: `inner layers`, and
    `outer layers` for the first two and the last two.
    """
    measure = formats.measure_of(cell)
    records = [
        r
        for r in cell.whole_layers
        if formats.defined(r.cosine_score) and formats.defined(r.accuracy_drop)
    ]
    records.sort(key=lambda record: record.layer)
    by_score = sorted(records, key=lambda record: record.cosine_score or 0)
    side = {record.layer: _SIDES[rank % 4] for rank, record in enumerate(by_score)}
    outer = {0, 1, cell.model.layers - 2, cell.model.layers - 1}
    data = [
        {
            "type": "scatter",
            "name": name,
            "x": [r.cosine_score for r in group],
            "y": [finite(r.accuracy_drop, measure.scale) for r in group],
            "error_y": errors([r.drop for r in group], measure.scale, color=FAINT),
            "mode": "markers+text",
            "text": [str(r.layer) for r in group],
            "textposition": [side[r.layer] for r in group],
            "textfont": {"size": 10, "color": GREY},
            "marker": {
                "size": 8,
                "symbol": symbol,
                "line": {"width": 2 if symbol.endswith("open") else 0},
                "color": [HELPS if (r.accuracy_drop or 0) < 0 else MATTERS for r in group],
            },
            "hovertext": [run_hover(cell, r, r) for r in group],
            "hoverinfo": "text",
        }
        for name, symbol, group in (
            ("inner layers", "circle", [r for r in records if r.layer not in outer]),
            (
                "outer layers (first two, last two)",
                "diamond-open",
                [r for r in records if r.layer in outer],
            ),
        )
    ]
    return chart(
        scatter_title(cell),
        data,
        460,
        xaxis=value_axis(PROXIES["cosine_score"].heading, [r.cosine_score for r in records]),
        yaxis={"title": {"text": f"{measure.change} ({measure.unit})"}, "zeroline": True},
    )
