"""Charts across models: relevance over relative depth, and pairs of models layer by layer."""

from __future__ import annotations

import html
from collections.abc import Sequence

from tracker.analysis.layer_figures import relative_depth
from tracker.analysis.ranks.layers import LayerBoard
from tracker.analysis.ranks.pairs import Pair
from tracker.core.formats import counted, listed, named_interval, three_digits, two_digits
from tracker.report.charts import style
from tracker.report.charts.hover import estimate_hover
from tracker.report.charts.maps import centred_map, row_height, row_label, strongest


def depth_curves(boards: Sequence[LayerBoard], labels: Sequence[str]) -> style.Chart:
    """Draw the mean accuracy relevance over relative depth, a line a model; intervals if few.

    Points of layers of which nothing is shown are faint.
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
    text = f"Mean accuracy relevance over relative depth, {counted(len(boards), 'model')}"
    first = [
        f"layer {standing.layer} of {label}"
        for board, label in zip(boards, labels, strict=True)
        for standing in board.ranked
        if standing.rank.high == 1
    ]
    return f"{text}; shown to matter most: {listed(first)}" if first else text


def difference_chart(pair: Pair) -> style.Chart:
    """Draw how the drops of two models differ, layer by layer.

    Points with 95 % intervals, one trace a benchmark, where these are few; otherwise a heat map
    with a dot where a difference is shown. What is open is faint.
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
    measure = pair.measure
    text = f"{pair.one} minus {pair.other}: {measure.change} of each layer"
    total = sum(len(shared.differences) for shared in pair.comparisons)
    known = [
        (shared.differences[layer], layer, shared.benchmark)
        for shared in pair.comparisons
        for layer in sorted(shared.shown)
    ]
    if not known:
        return f"{text}; no difference is shown"
    top, layer, benchmark = max(known, key=lambda difference: abs(difference[0].value or 0.0))
    return (
        f"{text}; shown: {len(known)} of {total} differences, such as layer {layer} on "
        f"{benchmark}, {measure.write(top.value or 0.0)} {measure.unit}"
        f"{named_interval(top, measure.write)}"
    )
