"""Charts of one model over its depth: accuracy relevance, and the proxies."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from tracker.core.estimates import Estimate
from tracker.core.formats import counted, defined, interval, two_digits, write
from tracker.core.proxies import OBSERVED, Proxy
from tracker.core.records import WHOLE_LAYER, CellRecord, layers_of
from tracker.report.charts.hover import estimate_hover
from tracker.report.charts.style import (
    MANY,
    MATTERS,
    Chart,
    chart,
    errors,
    finite,
    layer_axis,
    line,
    value_axis,
    wrap,
)
from tracker.report.layer_figures import layer_relevance, why_undefined
from tracker.report.leaderboard.layers import LayerBoard
from tracker.report.wording import benchmark_labels

_FEW = 3
"""So many lines can carry their intervals and still be told apart."""
_TOP = 0.96
"""Where the first panel ends: its title stands above it."""


def relevance_curves(board: LayerBoard, label: str) -> Chart:
    """Draw the accuracy relevance of every layer, a line for each benchmark and their mean.

    Benchmarks have intervals where they are few, and the trace `mean` has one where they are
    several.
    """
    cells = board.cells
    labels = benchmark_labels(cells)
    layers = sorted(standing.layer for standing in board.layers)
    data = []
    for number, (cell, name) in enumerate(zip(cells, labels, strict=True)):
        found = [layer_relevance(cell, layer) for layer in layers]
        aside = 0.12 * (number - (len(cells) - 1) / 2) if len(cells) <= _FEW else 0
        data.append(
            _trace(
                name,
                [layer + aside for layer in layers],
                found,
                [
                    estimate_hover(
                        f"layer {layer} · {name}",
                        "accuracy relevance",
                        estimate,
                        two_digits,
                        cell.documents,
                    )
                    for layer, estimate in zip(layers, found, strict=True)
                ],
            )
            | {"line": line(number), "marker": {"size": 4}, "showlegend": 1 < len(cells) <= MANY}
        )
        # Many lines step back behind their mean.
        data[-1]["opacity"] = 1 if len(cells) <= _FEW else 0.55
        if len(cells) <= _FEW:
            data[-1]["error_y"] = errors(found, thickness=0.8, color=line(number)["color"])
    if len(cells) > 1:
        by_layer = {standing.layer: standing for standing in board.layers}
        means = [by_layer[layer].relevance for layer in layers]
        data.append(
            _trace(
                "mean",
                layers,
                means,
                [
                    estimate_hover(
                        f"layer {layer} · mean",
                        "accuracy relevance",
                        estimate,
                        two_digits,
                        counted(by_layer[layer].benchmarks, "benchmark"),
                    )
                    for layer, estimate in zip(layers, means, strict=True)
                ],
            )
            | {
                "line": {"color": MATTERS, "width": 3},
                "marker": {"size": 6},
                "error_y": errors(means, thickness=2, color=MATTERS),
                "showlegend": True,
            }
        )
    return chart(
        relevance_title(board, label),
        data,
        420,
        xaxis=layer_axis(layers),
        yaxis={"title": {"text": "accuracy relevance (share lost)"}, "zeroline": True},
    )


def relevance_title(board: LayerBoard, label: str) -> str:
    """Say in plain text which layer matters most."""
    text = f"{label}: accuracy relevance over depth, {counted(len(board.cells), 'benchmark')}"
    top = next((one for one in board.layers if one.rank is not None), None)
    if top is None or not defined(top.relevance.value):
        return text
    between = interval(top.relevance.low, top.relevance.high, two_digits)
    mean = "mean " if len(board.cells) > 1 else ""
    return f"{text}; layer {top.layer} matters most ({mean}{two_digits(top.relevance.value)}" + (
        f", 95 % interval {between})" if between else ", no interval)"
    )


def proxy_curves(cells: Sequence[CellRecord], label: str) -> Chart:
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
    for panel, proxy in enumerate(OBSERVED, 1):
        drawn: list[float | None] = []
        for number, (cell, name) in enumerate(zip(cells, labels, strict=True)):
            values, hover = _proxy(cell, proxy, name, layers)
            drawn += values
            data.append(
                {
                    "type": "scatter",
                    "name": html.escape(name),
                    "legendgroup": str(number),
                    "showlegend": panel == 1 and 1 < len(cells) <= MANY,
                    "x": layers,
                    "y": values,
                    "yaxis": f"y{panel}" if panel > 1 else "y",
                    "mode": "lines+markers",
                    "line": line(number),
                    "marker": {"size": 4},
                    "hovertext": hover,
                    "hoverinfo": "text",
                }
            )
        top = _TOP - (panel - 1) * step
        domain = [max(top - step + gap, 0), top]
        axis = value_axis(proxy.heading, drawn) | {"domain": domain}
        # Above its panel, where a phone has room for it.
        heads.append(_head(axis.pop("title")["text"], panel))
        axes[f"yaxis{panel}" if panel > 1 else "yaxis"] = axis
    along = layer_axis(layers) | {"anchor": f"y{len(OBSERVED)}"}
    return chart(
        proxy_title(cells, label),
        data,
        200 * len(OBSERVED),
        xaxis=along,
        **axes,
        annotations=heads,
        legend={"tracegroupgap": 0, "y": 1.04},
    )


def _head(text: str, panel: int) -> dict[str, Any]:
    """Write the title of a panel's axis above it."""
    return {
        "text": text,
        "showarrow": False,
        "xref": "paper",
        "x": 0,
        "xanchor": "left",
        "yref": f"y{panel if panel > 1 else ''} domain",
        "y": 1,
        "yanchor": "bottom",
    }


def proxy_title(cells: Sequence[CellRecord], label: str) -> str:
    """Say in plain text which layer has the highest cosine score."""
    text = f"{label}: the proxies over depth, {counted(len(cells), 'benchmark')}"
    scores: dict[int, list[float]] = {}
    for cell in cells:
        for run in cell.whole_layers:
            if defined(run.cosine_score):
                scores.setdefault(run.layer, []).append(run.cosine_score)
    if not scores:
        return f"{text}; no cosine score is defined"
    means = {layer: sum(found) / len(found) for layer, found in scores.items()}
    top = max(means, key=lambda layer: (means[layer], -layer))
    return f"{text}; the cosine score is highest in layer {top} (mean {write('proxy', means[top])})"


def _trace(
    name: str, x: Sequence[float], found: Sequence[Estimate], hover: list[str]
) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": html.escape(name),
        "x": list(x),
        "y": [finite(estimate.value) for estimate in found],
        "mode": "lines+markers",
        "hovertext": hover,
        "hoverinfo": "text",
    }


def _proxy(
    cell: CellRecord, proxy: Proxy, name: str, layers: Sequence[int]
) -> tuple[list[float | None], list[str]]:
    """Line up one proxy over the layers, with hover boxes."""
    records = cell.runs_of()
    values: list[float | None] = []
    hover = []
    for layer in layers:
        record = records.get(layer)
        value = finite(record.figure(proxy.name)) if record else None
        says = (
            f"undefined: {wrap(why_undefined(cell, layer, proxy.name))}"
            if value is None
            else write("proxy", value)
        )
        values.append(value)
        hover.append(
            f"<b>{wrap(f'layer {layer} · {name}')}</b><br>{proxy.heading} {says}"
            f"<br>{cell.tokens:,} tokens"
        )
    return values, hover
