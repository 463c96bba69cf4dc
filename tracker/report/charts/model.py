"""Charts of one model over depth, and of several models."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tracker.analysis.agreement import Pair, cosine_ranks, misjudged
from tracker.analysis.boards import LayerBoard, layer_relevance, relative_depth, why_undefined
from tracker.analysis.claims import shown_runs
from tracker.analysis.comparable import benchmark_labels
from tracker.core.changes import WHOLE_LAYER
from tracker.core.estimates import Estimate
from tracker.core.formats import counted, defined, three_digits, two_digits, write
from tracker.core.proxies import OBSERVED, Proxy
from tracker.core.records import CellRecord, layers_of
from tracker.report.charts import style
from tracker.report.charts.maps import centred_map, row_height, row_label, strongest
from tracker.report.charts.style import estimate_hover
from tracker.report.wording import WORDS


def rank_chart(board: LayerBoard, label: str) -> style.Chart | None:
    """Draw the possible ranks of each layer against its rank by cosine score.

    One labelled point with its interval for each layer, 1 = matters most on both axes. Points whose
    interval misses the diagonal (trace `stands elsewhere`) are strong, all others (trace `open`)
    are faint. On the diagonal (trace `equal ranks`) the cosine score is right. None if no layer has
    both ranks.
    """
    proxy = cosine_ranks(board)
    standings = [standing for standing in board.ranked if standing.layer in proxy]
    if not standings:
        return None
    wrong = {found.standing.layer for found in misjudged(board)}
    ends = [0.5, len(board.ranked) + 0.5]
    data: list[dict[str, Any]] = [
        {"type": "scatter", "name": "equal ranks", "x": ends, "y": ends, "mode": "lines"}
        | {"line": {"color": style.GREY, "width": 1, "dash": "dot"}}
        | {"hoverinfo": "skip", "showlegend": False}
    ]
    for name, opacity, colour in (
        ("open", style.OPEN, style.FAINT),
        ("stands elsewhere", 1.0, style.GREY),
    ):
        mine = [one for one in standings if (one.layer in wrong) == (opacity == 1)]
        ranks = [one.rank for one in mine]
        hovers = [
            estimate_hover(
                f"layer {one.layer}",
                "rank by mean relevance",
                rank,
                "{:.0f}".format,
                f"rank by cosine score {proxy[one.layer]}",
            )
            for one, rank in zip(mine, ranks, strict=True)
        ]
        data.append(
            style.trace(
                "scatter",
                name,
                [proxy[one.layer] for one in mine],
                [rank.value for rank in ranks],
                hovers,
                error_y=style.errors(ranks, color=colour),
                mode="markers+text",
                text=[str(one.layer) for one in mine],
                textposition="middle right",
                textfont={"size": 10, "color": style.GREY},
                marker={"size": 8, "color": style.MATTERS, "opacity": opacity},
                cliponaxis=False,
                showlegend=False,
            )
        )
    axis: dict[str, Any] = {"showgrid": False, "zeroline": False, "tickangle": 0}
    few = len(board.ranked) <= 12
    axis["tickvals"] = [1, *range(2 if few else 5, len(board.ranked) + 1, 1 if few else 5)]
    return style.chart(
        _title(label, len(wrong), len(standings)),
        data,
        460,
        xaxis=axis
        | {"range": [0.5, ends[1] + 1], "title": {"text": "rank by cosine score (1 = highest)"}},
        yaxis=axis | {"range": ends[::-1], "title": {"text": "rank by relevance (1 = largest)"}},
    )


def _title(label: str, wrong: int, total: int) -> str:
    if not wrong:
        return f"{label}: for no layer can we show that its true rank differs from its cosine rank"
    of = f"{wrong} of {counted(total, 'layer')}"
    return f"{label}: for {of} we can show that the true rank differs from the cosine rank"


_TOP = 0.96
"""Top of the first panel, below its title."""
_THICK = {"color": style.MATTERS, "width": 2.5}


def relevance_curves(board: LayerBoard, label: str) -> style.Chart:
    """Draw the accuracy relevance of every layer, a line for each benchmark and their mean.

    Only the trace `mean`, or a single benchmark, has intervals, because those of several lines
    would overlap. Open points are faint.
    """
    cells, found = board.cells, board.claims
    layers = [standing.layer for standing in board.by_depth]
    alone = len(cells) == 1
    data = []
    for number, (cell, name) in enumerate(zip(cells, benchmark_labels(cells), strict=True)):
        figures = [layer_relevance(cell, layer) for layer in layers]
        runs, shown = cell.runs_of(), shown_runs(cell, cell.whole_layers)
        strong = style.strength(la in runs and shown[runs[la].change] != "open" for la in layers)
        drawn = _relevance(name, layers, figures, [cell.documents] * len(layers))
        drawn["marker"] = {"size": 5, "opacity": strong}
        if alone:
            drawn |= {"line": _THICK, "error_y": style.errors(figures), "showlegend": False}
        else:  # they step back behind their mean
            drawn |= {"line": style.line(number), "opacity": 0.7}
            drawn["showlegend"] = len(cells) <= style.MANY
        data.append(drawn)
    if not alone:
        means = [standing.relevance for standing in board.by_depth]
        samples = [counted(standing.benchmarks, "benchmark") for standing in board.by_depth]
        drawn = _relevance("mean", layers, means, samples)
        strong = style.strength(layer in {*found.costly, *found.helpful} for layer in layers)
        drawn |= {"line": _THICK, "marker": {"size": 8, "opacity": strong}}
        data.append(drawn | {"error_y": style.errors(means), "showlegend": True})
    made = style.chart(
        relevance_title(board, label),
        data,
        420,
        xaxis=style.layer_axis(layers),
        yaxis={"title": {"text": "accuracy relevance (share lost)"}, "zeroline": True},
    )
    return replace(made, explains=WORDS.one("relevance_curves", board))


def _relevance(
    name: str, layers: Sequence[int], figures: Sequence[Estimate], samples: Sequence[str]
) -> dict[str, Any]:
    """Draw the relevance of layers; hover boxes name the sample of each value."""
    hover = [
        estimate_hover(f"layer {layer} · {name}", "accuracy relevance", figure, two_digits, of)
        for layer, figure, of in zip(layers, figures, samples, strict=True)
    ]
    values = [style.finite(figure.value) for figure in figures]
    return style.trace("scatter", html.escape(name), layers, values, hover, mode="lines+markers")


def relevance_title(board: LayerBoard, label: str) -> str:
    """Return a title of the chart: its benchmarks, and the layer shown to matter most."""
    text = f"{label}: accuracy relevance over depth, {counted(len(board.cells), 'benchmark')}"
    first = [standing.layer for standing in board.ranked if standing.rank.high == 1]
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
        # The title is above its panel, where a phone has room for it.
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
    """Return a title of the chart of proxies in plain text."""
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


def depth_curves(boards: Sequence[LayerBoard], labels: Sequence[str]) -> style.Chart:
    """Draw the mean accuracy relevance over relative depth, a line a model; intervals if few.

    Points of open layers are faint.
    """
    data = []
    few = len(boards) <= style.FEW
    for number, (board, label) in enumerate(zip(boards, labels, strict=True)):
        standings, look, found = board.by_depth, style.line(number), board.claims
        means = [standing.relevance for standing in standings]
        hover = [
            estimate_hover(
                f"layer {standing.layer} of {board.model.layers} · {label}",
                "mean accuracy relevance",
                standing.relevance,
                two_digits,
                counted(standing.benchmarks, "benchmark"),
            )
            for standing in standings
        ]
        # Side by side, so that no interval hides another.
        aside = 0.004 * (number - (len(boards) - 1) / 2) if few else 0.0
        depths = [
            relative_depth(standing.layer, board.model.layers) + aside for standing in standings
        ]
        values = [style.finite(mean.value) for mean in means]
        drawn = style.trace(
            "scatter", html.escape(label), depths, values, hover, mode="lines+markers"
        )
        shown = {*found.costly, *found.helpful}
        strong = style.strength(standing.layer in shown for standing in standings)
        drawn |= {"line": look, "marker": {"size": 6, "opacity": strong}}
        drawn["showlegend"] = len(boards) <= style.MANY
        if few:
            drawn["error_y"] = style.errors(means, thickness=1, color=look["color"])
        data.append(drawn)
    depth = "relative depth (0 = first layer, 1 = last)"
    return style.chart(
        _depth_title(boards, labels),
        data,
        430,
        xaxis={
            "range": [-0.02, 1.02],
            "title": {"text": depth},
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={"title": {"text": "mean accuracy relevance (share lost)"}, "zeroline": True},
    )


def _depth_title(boards: Sequence[LayerBoard], labels: Sequence[str]) -> str:
    first = [
        f"layer {standing.layer} of {label}"
        for board, label in zip(boards, labels, strict=True)
        for standing in board.ranked
        if standing.rank.high == 1
    ]
    return WORDS.one("depth_title", len(boards), first)


def difference_chart(pair: Pair) -> style.Chart:
    """Draw the differences of the drops of two models, layer by layer.

    Points with 95 % intervals, one trace for each benchmark, if there are few benchmarks. Otherwise
    a heat map with a dot where a difference is shown. Open differences are faint.
    """
    measure, layers = pair.measure, pair.layers
    rows = [[shared.difference(layer) for layer in layers] for shared in pair.comparisons]
    hovers = [
        [
            estimate_hover(
                f"layer {layer} · {shared.benchmark}",
                f"difference in {measure.unit}",
                estimate,
                measure.write,
                f"{counted(shared.n, 'document')} each",
            )
            for layer, estimate in zip(layers, row, strict=True)
        ]
        for shared, row in zip(pair.comparisons, rows, strict=True)
    ]
    values = [[style.finite(estimate.value, measure.scale) for estimate in row] for row in rows]
    title = f"difference of {measure.change}s"
    if len(rows) > style.FEW:
        largest = strongest(values)
        most = f"{three_digits(largest)} {measure.unit}"
        labels = [row_label(shared.benchmark) for shared in pair.comparisons]
        return centred_map(
            difference_title(pair),
            title,
            columns=layers,
            rows=labels,
            values=values,
            hovers=hovers,
            shown=[[layer in shared.shown for layer in layers] for shared in pair.comparisons],
            ticks=(f"−{most}<br>more to the second", "0<br>alike", f"{most}<br>more to the first"),
            largest=largest,
            height=165 + row_height(labels) * len(labels),
            xaxis=style.layer_axis(layers),
        )
    data = []
    for number, (shared, row) in enumerate(zip(pair.comparisons, rows, strict=True)):
        colour = style.line(number)["color"]
        # Side by side, so that no interval hides another.
        aside = 0.18 * (number - (len(rows) - 1) / 2)
        places = [layer + aside for layer in layers]
        name = html.escape(shared.benchmark)
        drawn = style.trace("scatter", name, places, values[number], hovers[number], mode="markers")
        strong = style.strength(layer in shared.shown for layer in layers)
        drawn |= {"marker": {"size": 7, "color": colour, "opacity": strong}}
        drawn |= {"showlegend": len(rows) > 1}
        drawn["error_y"] = style.errors(row, measure.scale, color=colour)
        data.append(drawn)
    return style.chart(
        difference_title(pair),
        data,
        380,
        xaxis=style.layer_axis(layers),
        yaxis={"title": {"text": f"{title} ({measure.unit})"}, "zeroline": True},
    )


def difference_title(pair: Pair) -> str:
    """Name the largest difference of those that are shown, and count them, in plain text."""
    total = sum(len(shared.differences) for shared in pair.comparisons)
    known = [
        (shared.differences[layer], layer, shared.benchmark)
        for shared in pair.comparisons
        for layer in sorted(shared.shown)
    ]
    top = max(known, key=lambda difference: abs(difference[0].value or 0.0), default=None)
    return WORDS.one("difference_title", pair, len(known), total, top)
