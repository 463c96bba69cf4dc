"""Draw charts with layers on the x-axis for one model, and charts that compare models."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tracker.analysis.agreement import ModelPair, cosine_ranks, find_misjudged
from tracker.analysis.boards import LayerBoard, layer_relevance, relative_depth, undefined_reason
from tracker.analysis.claims import run_verdicts
from tracker.analysis.comparable import benchmark_labels
from tracker.report.charts import style
from tracker.report.charts.maps import centred_map, largest_magnitude, row_height, row_label
from tracker.report.charts.style import estimate_hover
from tracker.report.wording import WORDS
from tracker.schema.changes import WHOLE_LAYER
from tracker.schema.estimates import Estimate
from tracker.schema.formats import count_text, is_finite, three_digits, two_digits, write_figure
from tracker.schema.proxies import OBSERVED, Proxy
from tracker.schema.records import CellRecord, first_layers


def rank_chart(board: LayerBoard, label: str) -> style.Chart | None:
    """Draw each layer's rank by relevance against its rank by cosine score.

    Each layer is one point with a confidence interval. The diagonal of the chart marks equal ranks.
    A point is pale if its confidence interval includes the diagonal. The function returns None if
    no layer has a rank by relevance and a rank by cosine score.
    """
    cosine = cosine_ranks(board)
    standings = [standing for standing in board.ranked if standing.layer in cosine]
    if not standings:
        return None
    misjudged = {entry.standing.layer for entry in find_misjudged(board)}
    n_ranks = len(board.ranked)
    ends = [0.5, n_ranks + 0.5]
    data: list[dict[str, Any]] = [
        {"type": "scatter", "name": "equal ranks", "x": ends, "y": ends, "mode": "lines"}
        | {"line": {"color": style.GREY, "width": 1, "dash": "dot"}}
        | {"hoverinfo": "skip", "showlegend": False}
    ]
    for name, opacity, colour in (
        ("open", style.OPEN_OPACITY, style.FAINT_GREY),
        ("different rank", 1.0, style.GREY),
    ):
        group = [row for row in standings if (row.layer in misjudged) == (opacity == 1)]
        hovers = [
            estimate_hover(
                f"layer {row.layer}",
                *("rank by mean relevance", row.rank, "{:.0f}".format),
                f"rank by cosine score {cosine[row.layer]}",
            )
            for row in group
        ]
        data.append(
            style.estimate_trace(
                *("scatter", name, [cosine[row.layer] for row in group]),
                [row.rank for row in group],
                hovers,
                bars={"color": colour},
                text=[str(row.layer) for row in group],
                textposition="middle right",
                marker={"size": 8, "color": style.COST_COLOUR, "opacity": opacity},
                cliponaxis=False,
                **style.LABELLED_POINTS,
            )
        )
    axis: dict[str, Any] = {"showgrid": False, "zeroline": False, "tickangle": 0}
    axis["tickvals"] = [1, *(range(2, n_ranks + 1) if n_ranks <= 12 else range(5, n_ranks + 1, 5))]
    x_title, y_title = "rank by cosine score (1 = highest)", "rank by relevance (1 = largest)"
    return style.build_chart(
        _rank_title(label, len(misjudged), len(standings)),
        data,
        460,
        xaxis=axis | {"range": [0.5, ends[1] + 1], "title": {"text": x_title}},
        yaxis=axis | {"range": ends[::-1], "title": {"text": y_title}},
    )


def _rank_title(label: str, n_misjudged: int, n_layers: int) -> str:
    if not n_misjudged:
        return f"{label}: ranks by relevance and by cosine score do not differ significantly"
    layers_text = f"{n_misjudged} of {count_text(n_layers, 'layer')}"
    return f"{label}: ranks by relevance and by cosine score differ significantly for {layers_text}"


_FIRST_PANEL_TOP = 0.96
"""Vertical position of the top of the first panel, below the panel's title."""
_THICK_LINE = {"color": style.COST_COLOUR, "width": 2.5}


def relevance_curves(board: LayerBoard, label: str) -> style.Chart:
    """Draw the accuracy relevance of layers, with a line for each benchmark and the mean.

    If there are several benchmarks, only the line of their mean has intervals. Points without a
    significant effect are drawn in a pale colour.
    """
    cells, claims = board.cells, board.claims
    layers = [standing.layer for standing in board.by_depth]
    is_single = len(cells) == 1
    data = []
    for number, (cell, name) in enumerate(zip(cells, benchmark_labels(cells), strict=True)):
        estimates = [layer_relevance(cell, layer) for layer in layers]
        runs, verdicts = cell.runs_of_kind(), run_verdicts(cell, cell.whole_layers)
        shown = [la in runs and verdicts[runs[la].change] != "open" for la in layers]
        look: dict[str, Any] = {"line": _THICK_LINE, "showlegend": False}
        if not is_single:  # lines of benchmarks are less prominent than their mean
            look = {"line": style.line_style(number), "opacity": 0.7, "bars": None}
            look["showlegend"] = len(cells) <= style.MAX_LEGEND_LINES
        look["marker"] = {"size": 5, "opacity": style.opacities(shown)}
        samples = [cell.documents_text] * len(layers)
        data.append(_relevance_trace(name, layers, estimates, samples, **look))
    if not is_single:
        means = [standing.relevance for standing in board.by_depth]
        samples = [count_text(standing.benchmarks, "benchmark") for standing in board.by_depth]
        opacities = style.opacities(layer in {*claims.costly, *claims.helpful} for layer in layers)
        look = {"line": _THICK_LINE, "marker": {"size": 8, "opacity": opacities}}
        data.append(_relevance_trace("mean", layers, means, samples, showlegend=True, **look))
    chart = style.build_chart(
        relevance_title(board, label),
        data,
        420,
        xaxis=style.layer_axis(layers),
        yaxis={"title": {"text": "accuracy relevance (share lost)"}, "zeroline": True},
    )
    return replace(chart, explanation=WORDS.render("relevance_curves", board))


def _relevance_trace(
    name: str,
    layers: Sequence[int],
    estimates: Sequence[Estimate],
    samples: Sequence[str],
    **look: Any,
) -> dict[str, Any]:
    """Build a line that shows the accuracy relevance of each layer.

    `samples` are texts for the hover boxes, with each point's number of documents or benchmarks.
    `look` sets further properties of the line.
    """
    hovers = [
        estimate_hover(f"layer {layer} · {name}", "accuracy relevance", value, two_digits, sample)
        for layer, value, sample in zip(layers, estimates, samples, strict=True)
    ]
    look["mode"] = "lines+markers"
    return style.estimate_trace("scatter", html.escape(name), layers, estimates, hovers, **look)


def relevance_title(board: LayerBoard, label: str) -> str:
    """Return the title of `relevance_curves`, with the most important layer."""
    title = f"{label}: accuracy relevance over depth, {count_text(len(board.cells), 'benchmark')}"
    top_layers = [standing.layer for standing in board.ranked if standing.rank.high == 1]
    return f"{title}; layer {top_layers[0]} matters most" if top_layers else title


def proxy_curves(cells: Sequence[CellRecord], label: str) -> style.Chart:
    """Draw each proxy (e.g. cosine score) in its own panel, with a line for each benchmark.

    The panels share the layer axis. Undefined and missing values appear as gaps in the lines.
    """
    labels = benchmark_labels(cells)
    layers = first_layers(WHOLE_LAYER, *cells)
    data: list[dict[str, Any]] = []
    axes: dict[str, dict[str, Any]] = {}
    headings = []
    gap = 0.225 / len(OBSERVED)
    step = (_FIRST_PANEL_TOP + gap) / len(OBSERVED)
    heading = {"showarrow": False, "xref": "paper", "x": 0, "xanchor": "left"}
    heading |= {"y": 1, "yanchor": "bottom"}
    for index, proxy in enumerate(OBSERVED):
        yaxis = f"y{index + 1 if index else ''}"
        panel: list[float | None] = []
        for number, (cell, name) in enumerate(zip(cells, labels, strict=True)):
            values, hovers = _proxy_values(cell, proxy, name, layers)
            panel += values
            look: dict[str, Any] = {"mode": "lines+markers", "marker": {"size": 4}, "yaxis": yaxis}
            look |= {"line": style.line_style(number), "legendgroup": str(number)}
            look["showlegend"] = not index and 1 < len(cells) <= style.MAX_LEGEND_LINES
            title = html.escape(name)
            data.append(style.build_trace("scatter", title, layers, values, hovers, **look))
        top = _FIRST_PANEL_TOP - index * step
        axis = style.value_axis(proxy.heading, panel)
        axis["domain"] = [max(top - step + gap, 0), top]
        # The title is above its panel, where a phone has room for it.
        headings.append(heading | {"text": axis.pop("title")["text"], "yref": f"{yaxis} domain"})
        axes[yaxis.replace("y", "yaxis")] = axis
    return style.build_chart(
        proxy_title(cells, label),
        data,
        200 * len(OBSERVED),
        xaxis=style.layer_axis(layers) | {"anchor": f"y{len(OBSERVED)}"},
        **axes,
        annotations=headings,
        legend={"tracegroupgap": 0, "y": 1.04},
    )


def proxy_title(cells: Sequence[CellRecord], label: str) -> str:
    """Return the title of the chart of proxies as plain text."""
    title = f"{label}: values of the proxies by layer, {count_text(len(cells), 'benchmark')}"
    has_score = any(is_finite(run.cosine_score) for cell in cells for run in cell.whole_layers)
    return title if has_score else f"{title}; no cosine score is defined"


def _proxy_values(
    cell: CellRecord, proxy: Proxy, name: str, layers: Sequence[int]
) -> tuple[list[float | None], list[str]]:
    """Return the values of one proxy for each layer, and their hover boxes."""
    records = cell.runs_of_kind()
    values: list[float | None] = []
    hovers = []
    for layer in layers:
        value = style.scale_value(records[layer].figure(proxy.name)) if layer in records else None
        reason = f"undefined: {style.wrap_text(undefined_reason(cell, layer, proxy.name))}"
        text = reason if value is None else write_figure("proxy", value)
        values.append(value)
        hovers.append(
            f"<b>{style.wrap_text(f'layer {layer} · {name}')}</b><br>{proxy.heading} {text}"
            f"<br>{cell.tokens:,} tokens"
        )
    return values, hovers


def depth_curves(boards: Sequence[LayerBoard], labels: Sequence[str]) -> style.Chart:
    """Draw the accuracy relevance over relative depth (0 to 1), with a line for each model.

    Lines have intervals if there are at most three models. Points without a significant effect are
    drawn in a pale colour.
    """
    data = []
    has_intervals = len(boards) <= style.MAX_INTERVAL_LINES
    for number, (board, label) in enumerate(zip(boards, labels, strict=True)):
        line, n_layers = style.line_style(number), board.model.layers
        hovers = [
            estimate_hover(
                f"layer {standing.layer} of {n_layers} · {label}",
                *("mean accuracy relevance", standing.relevance, two_digits),
                count_text(standing.benchmarks, "benchmark"),
            )
            for standing in board.by_depth
        ]
        # Side by side, so that no interval hides another.
        offset = 0.004 * (number - (len(boards) - 1) / 2) if has_intervals else 0.0
        depths = [relative_depth(row.layer, n_layers) + offset for row in board.by_depth]
        shown = {*board.claims.costly, *board.claims.helpful}
        opacities = style.opacities(standing.layer in shown for standing in board.by_depth)
        data.append(
            style.estimate_trace(
                *("scatter", html.escape(label), depths),
                [standing.relevance for standing in board.by_depth],
                hovers,
                bars={"thickness": 1, "color": line["color"]} if has_intervals else None,
                mode="lines+markers",
                line=line,
                marker={"size": 6, "opacity": opacities},
                showlegend=len(boards) <= style.MAX_LEGEND_LINES,
            )
        )
    axis = {"title": {"text": "relative depth (0 = first layer, 1 = last)"}, "showgrid": False}
    return style.build_chart(
        _depth_title(boards, labels),
        data,
        430,
        xaxis=axis | {"range": [-0.02, 1.02], "zeroline": False},
        yaxis={"title": {"text": "mean accuracy relevance (share lost)"}, "zeroline": True},
    )


def _depth_title(boards: Sequence[LayerBoard], labels: Sequence[str]) -> str:
    top_layers = [
        f"layer {standing.layer} of {label}"
        for board, label in zip(boards, labels, strict=True)
        for standing in board.ranked
        if standing.rank.high == 1
    ]
    return WORDS.render("depth_title", len(boards), top_layers)


def difference_chart(pair: ModelPair) -> style.Chart:
    """Draw the difference between two models in the accuracy drop of each layer.

    For up to three benchmarks, the chart shows points with 95 % intervals; for more, a heat map.
    Differences that are not significant are drawn in a pale colour.
    """
    measure, layers = pair.measure, pair.layers
    rows = [[shared.difference(layer) for layer in layers] for shared in pair.comparisons]
    hovers = [
        [
            estimate_hover(
                f"layer {layer} · {shared.benchmark}",
                *(f"difference in {measure.unit}", estimate, measure.write),
                f"{count_text(shared.n, 'document')} each",
            )
            for layer, estimate in zip(layers, row, strict=True)
        ]
        for shared, row in zip(pair.comparisons, rows, strict=True)
    ]
    shown = [[layer in shared.shown for layer in layers] for shared in pair.comparisons]
    title = f"difference of {measure.change}s"
    if len(rows) > style.MAX_INTERVAL_LINES:
        values = [[style.scale_value(cell.value, measure.scale) for cell in row] for row in rows]
        largest = largest_magnitude(values)
        limit = f"{three_digits(largest)} {measure.unit}"
        labels = [row_label(shared.benchmark) for shared in pair.comparisons]
        return centred_map(
            difference_title(pair),
            title,
            columns=layers,
            rows=labels,
            values=values,
            hovers=hovers,
            shown_mask=shown,
            ticks=(
                f"−{limit}<br>larger in 2nd model",
                "0<br>equal",
                f"{limit}<br>larger in 1st model",
            ),
            largest=largest,
            height=165 + row_height(labels) * len(labels),
            xaxis=style.layer_axis(layers),
        )
    data = []
    for number, shared in enumerate(pair.comparisons):
        colour = style.line_style(number)["color"]
        # Side by side, so that no interval hides another.
        offset = 0.18 * (number - (len(rows) - 1) / 2)
        opacities = style.opacities(shown[number])
        data.append(
            style.estimate_trace(
                *("scatter", html.escape(shared.benchmark), [layer + offset for layer in layers]),
                *(rows[number], hovers[number], measure.scale),
                bars={"color": colour},
                mode="markers",
                marker={"size": 7, "color": colour, "opacity": opacities},
                showlegend=len(rows) > 1,
            )
        )
    return style.build_chart(
        difference_title(pair),
        data,
        380,
        xaxis=style.layer_axis(layers),
        yaxis={"title": {"text": f"{title} ({measure.unit})"}, "zeroline": True},
    )


def difference_title(pair: ModelPair) -> str:
    """Return the title of `difference_chart`, with the largest significant difference."""
    total = sum(len(shared.differences) for shared in pair.comparisons)
    shown = [
        (shared.differences[layer], layer, shared.benchmark)
        for shared in pair.comparisons
        for layer in sorted(shared.shown)
    ]
    largest = max(shown, key=lambda entry: abs(entry[0].value or 0.0), default=None)
    return WORDS.render("difference_title", pair, len(shown), total, largest)
