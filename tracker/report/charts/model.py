"""Charts of one model over its depth: accuracy relevance, and the proxies."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from tracker.core.estimates import Estimate
from tracker.core.formats import counted, defined, two_digits, write
from tracker.core.proxies import OBSERVED, Proxy
from tracker.core.records import WHOLE_LAYER, CellRecord, layers_of
from tracker.report.charts import style
from tracker.report.charts.hover import estimate_hover
from tracker.report.layer_figures import layer_relevance, why_undefined
from tracker.report.leaderboard.layers import LayerBoard
from tracker.report.wording import benchmark_labels

_TOP = 0.96
"""Where the first panel ends: its title stands above it."""


def relevance_curves(board: LayerBoard, label: str) -> style.Chart:
    """Draw the accuracy relevance of every layer, a line for each benchmark and their mean.

    Benchmarks have intervals where they are few, and the trace `mean` has one where they are
    several.
    """
    cells = board.cells
    layers = [standing.layer for standing in board.by_depth]
    few = len(cells) <= style.FEW
    data = []
    for number, (cell, name) in enumerate(zip(cells, benchmark_labels(cells), strict=True)):
        aside = 0.12 * (number - (len(cells) - 1) / 2) if few else 0
        figures = [layer_relevance(cell, layer) for layer in layers]
        drawn = _relevance(name, layers, figures, [cell.documents] * len(layers), aside)
        # Many lines step back behind their mean.
        drawn |= {"line": style.line(number), "marker": {"size": 4}, "opacity": 1 if few else 0.55}
        drawn["showlegend"] = 1 < len(cells) <= style.MANY
        if few:
            drawn["error_y"] = style.errors(
                figures, thickness=0.8, color=style.line(number)["color"]
            )
        data.append(drawn)
    if len(cells) > 1:
        means = [standing.relevance for standing in board.by_depth]
        samples = [counted(standing.benchmarks, "benchmark") for standing in board.by_depth]
        drawn = _relevance("mean", layers, means, samples)
        drawn |= {"line": {"color": style.MATTERS, "width": 3}, "marker": {"size": 6}}
        drawn["error_y"] = style.errors(means, thickness=2, color=style.MATTERS)
        data.append(drawn | {"showlegend": True})
    return style.chart(
        relevance_title(board, label),
        data,
        420,
        xaxis=style.layer_axis(layers),
        yaxis={"title": {"text": "accuracy relevance (share lost)"}, "zeroline": True},
    )


def _relevance(
    name: str,
    layers: Sequence[int],
    figures: Sequence[Estimate],
    samples: Sequence[str],
    aside: float = 0,
) -> dict[str, Any]:
    """Draw the relevance of layers, `aside` of their places, with what each rests on."""
    hover = [
        estimate_hover(f"layer {layer} · {name}", "accuracy relevance", figure, two_digits, of)
        for layer, figure, of in zip(layers, figures, samples, strict=True)
    ]
    places = [layer + aside for layer in layers]
    values = [style.finite(figure.value) for figure in figures]
    return style.trace("scatter", html.escape(name), places, values, hover, mode="lines+markers")


def relevance_title(board: LayerBoard, label: str) -> str:
    """Say in plain text what is drawn, and which layer is shown to matter most."""
    text = f"{label}: accuracy relevance over depth, {counted(len(board.cells), 'benchmark')}"
    first = [standing.layer for standing in board.ranked if standing.worst_rank == 1]
    return f"{text}; layer {first[0]} matters most" if first else text


def proxy_curves(cells: Sequence[CellRecord], label: str) -> style.Chart:
    """Draw every proxy over depth: a panel each with one layer axis, a line a benchmark.

    Undefined and missing layers are gaps.
    """
    labels = benchmark_labels(cells)
    layers = layers_of(WHOLE_LAYER, *cells)
    data: list[dict[str, Any]] = []
    axes: dict[str, dict[str, Any]] = {}
    heads = []
    gap = 0.225 / len(OBSERVED)
    step = (_TOP + gap) / len(OBSERVED)
    head = {"showarrow": False, "xref": "paper", "x": 0, "xanchor": "left"}
    head |= {"y": 1, "yanchor": "bottom"}
    for place, proxy in enumerate(OBSERVED):
        panel = str(place + 1) if place else ""
        drawn: list[float | None] = []
        for number, (cell, name) in enumerate(zip(cells, labels, strict=True)):
            values, hover = _proxy(cell, proxy, name, layers)
            drawn += values
            curve = style.trace(
                "scatter", html.escape(name), layers, values, hover, yaxis=f"y{panel}"
            )
            curve |= {"mode": "lines+markers", "line": style.line(number), "marker": {"size": 4}}
            curve |= {"legendgroup": str(number)}
            curve["showlegend"] = not place and 1 < len(cells) <= style.MANY
            data.append(curve)
        top = _TOP - place * step
        axis = style.value_axis(proxy.heading, drawn) | {"domain": [max(top - step + gap, 0), top]}
        # Its title stands above its panel, where a phone has room for it.
        heads.append(head | {"text": axis.pop("title")["text"], "yref": f"y{panel} domain"})
        axes[f"yaxis{panel}"] = axis
    return style.chart(
        proxy_title(cells, label),
        data,
        200 * len(OBSERVED),
        xaxis=style.layer_axis(layers) | {"anchor": f"y{len(OBSERVED)}"},
        **axes,
        annotations=heads,
        legend={"tracegroupgap": 0, "y": 1.04},
    )


def proxy_title(cells: Sequence[CellRecord], label: str) -> str:
    """Say in plain text what is drawn."""
    text = f"{label}: the proxies over depth, {counted(len(cells), 'benchmark')}"
    scored = any(defined(run.cosine_score) for cell in cells for run in cell.whole_layers)
    return text if scored else f"{text}; no cosine score is defined"


def _proxy(
    cell: CellRecord, proxy: Proxy, name: str, layers: Sequence[int]
) -> tuple[list[float | None], list[str]]:
    """Line up one proxy over the layers, with hover boxes."""
    records = cell.runs_of()
    values: list[float | None] = []
    hover = []
    for layer in layers:
        value = style.finite(records[layer].figure(proxy.name)) if layer in records else None
        undefined = f"undefined: {style.wrap(why_undefined(cell, layer, proxy.name))}"
        says = undefined if value is None else write("proxy", value)
        values.append(value)
        hover.append(
            f"<b>{style.wrap(f'layer {layer} · {name}')}</b><br>{proxy.heading} {says}"
            f"<br>{cell.tokens:,} tokens"
        )
    return values, hover
