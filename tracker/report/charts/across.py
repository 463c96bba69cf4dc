"""Charts across models: relevance over relative depth, and pairs of models layer by layer."""

from __future__ import annotations

import html
from collections.abc import Sequence

from tracker.core.estimates import Estimate
from tracker.core.formats import counted, defined, interval, three_digits, two_digits
from tracker.report.charts.hover import estimate_hover
from tracker.report.charts.maps import ROWS, centred_map
from tracker.report.charts.style import MANY, Chart, chart, errors, finite, layer_axis, line
from tracker.report.layer_figures import relative_depth
from tracker.report.leaderboard.layers import LayerBoard
from tracker.report.leaderboard.pairs import Pair

_FEW = 3
"""So many lines can carry their intervals and still be told apart."""


def depth_curves(boards: Sequence[LayerBoard], labels: Sequence[str]) -> Chart:
    """Draw the mean accuracy relevance over relative depth, a line a model; intervals if few."""
    data = []
    for number, (board, label) in enumerate(zip(boards, labels, strict=True)):
        standings = sorted(board.layers, key=lambda standing: standing.layer)
        means = [standing.relevance for standing in standings]
        trace = {
            "type": "scatter",
            "name": html.escape(label),
            "x": [relative_depth(standing.layer, board.model.layers) for standing in standings],
            "y": [finite(found.value) for found in means],
            "mode": "lines+markers",
            "line": line(number),
            "marker": {"size": 5},
            "showlegend": len(boards) <= MANY,
            "hovertext": [
                estimate_hover(
                    f"layer {standing.layer} of {board.model.layers} · {label}",
                    "mean accuracy relevance",
                    standing.relevance,
                    two_digits,
                    counted(standing.benchmarks, "benchmark"),
                )
                for standing in standings
            ],
            "hoverinfo": "text",
        }
        if len(boards) <= _FEW:
            trace["error_y"] = errors(means, thickness=0.8, color=line(number)["color"])
        data.append(trace)
    return chart(
        _depth_title(boards, labels),
        data,
        430,
        xaxis={
            "range": [-0.02, 1.02],
            "title": {"text": "relative depth (0 = first layer, 1 = last)"},
            "showgrid": False,
            "zeroline": False,
        },
        yaxis={"title": {"text": "mean accuracy relevance (share lost)"}, "zeroline": True},
    )


def _depth_title(boards: Sequence[LayerBoard], labels: Sequence[str]) -> str:
    text = f"Mean accuracy relevance over relative depth, {counted(len(boards), 'model')}"
    tops = [
        (one.relevance.value, label, one.layer)
        for board, label in zip(boards, labels, strict=True)
        for one in board.layers[:1]
        if one.rank is not None and defined(one.relevance.value)
    ]
    if not tops:
        return f"{text}; none is defined"
    value, label, layer = max(tops, key=lambda top: top[0])
    return f"{text}; the peak is layer {layer} of {label} ({two_digits(value)})"


def difference_chart(pair: Pair) -> Chart:
    """Draw how the drops of two models differ, layer by layer.

    Points with 95 % intervals, one trace a benchmark, where these are few; otherwise a heat map
    with a dot where the interval excludes 0.
    """
    layers = sorted({layer for one in pair.comparisons for layer in one.differences})
    nothing = Estimate(None, reason="not measured in both models")
    found = [[one.differences.get(x, nothing) for x in layers] for one in pair.comparisons]
    hovers = [
        [
            estimate_hover(
                f"layer {layer} · {one.benchmark}",
                f"difference in {pair.measure.unit}",
                estimate,
                pair.measure.write,
                f"{counted(one.n, 'document')} each",
            )
            for layer, estimate in zip(layers, row, strict=True)
        ]
        for one, row in zip(pair.comparisons, found, strict=True)
    ]
    if len(pair.comparisons) <= _FEW:
        return _points(pair, layers, found, hovers)
    return _map(pair, layers, found, hovers)


def _points(
    pair: Pair, layers: list[int], found: list[list[Estimate]], hovers: list[list[str]]
) -> Chart:
    measure, count = pair.measure, len(pair.comparisons)
    data = []
    for number, (one, row, hover) in enumerate(zip(pair.comparisons, found, hovers, strict=True)):
        colour = line(number)["color"]
        # Side by side, so that no interval hides another.
        aside = 0.18 * (number - (count - 1) / 2)
        data.append(
            {
                "type": "scatter",
                "name": html.escape(one.benchmark),
                "x": [layer + aside for layer in layers],
                "y": [finite(estimate.value, measure.scale) for estimate in row],
                "error_y": errors(row, measure.scale, color=colour),
                "mode": "markers",
                "marker": {"size": 6, "color": colour},
                "showlegend": count > 1,
                "hovertext": hover,
                "hoverinfo": "text",
            }
        )
    title = f"difference of {measure.change}s ({measure.unit})"
    return chart(
        difference_title(pair),
        data,
        380,
        xaxis=layer_axis(layers),
        yaxis={"title": {"text": title}, "zeroline": True},
    )


def _map(
    pair: Pair, layers: list[int], found: list[list[Estimate]], hovers: list[list[str]]
) -> Chart:
    measure = pair.measure
    labels = [html.escape(one.benchmark).replace(" · ", "<br>", 1) for one in pair.comparisons]
    values = [[finite(estimate.value, measure.scale) for estimate in row] for row in found]
    marks: dict[str, list[tuple[int, str, str]]] = {"undefined": [], "interval excludes 0": []}
    for label, row, hover in zip(labels, found, hovers, strict=True):
        for layer, estimate, text in zip(layers, row, hover, strict=True):
            if not defined(estimate.value):
                marks["undefined"].append((layer, label, text))
            elif _sure(estimate):
                marks["interval excludes 0"].append((layer, label, text))
    largest = max((abs(v) for row in values for v in row if v is not None), default=0) or 1
    ticks = (
        f"−{three_digits(largest)} {measure.unit}<br>more to the second",
        "0<br>alike",
        f"{three_digits(largest)} {measure.unit}<br>more to the first",
    )
    return chart(
        difference_title(pair),
        centred_map(
            f"difference of {measure.change}s",
            (layers, labels, values, hovers),
            marks,
            largest,
            ticks,
        ),
        165 + 34 * len(labels),
        margin={"b": 105},
        xaxis=layer_axis(layers),
        yaxis=ROWS,
    )


def _sure(difference: Estimate) -> bool:
    """Whether the interval excludes 0."""
    low, high = difference.low, difference.high
    return low is not None and high is not None and (low > 0 or high < 0)


def difference_title(pair: Pair) -> str:
    """Name the largest difference, and how many are surely not 0, in plain text."""
    measure = pair.measure
    text = f"{pair.one} minus {pair.other}: {measure.change} of each layer"
    found = [
        (estimate, layer, one.benchmark)
        for one in pair.comparisons
        for layer, estimate in one.differences.items()
        if defined(estimate.value)
    ]
    if not found:
        return f"{text}; no difference is defined"
    top, layer, benchmark = max(found, key=lambda item: abs(item[0].value or 0.0))
    between = interval(top.low, top.high, measure.write)
    sure = sum(_sure(one) for one, _, _ in found)
    return (
        f"{text}; they differ most in layer {layer} on {benchmark}, "
        f"{measure.write(top.value or 0.0)} {measure.unit}"
        + (f" (95 % interval {between})" if between else "")
        + f"; {sure} of {len(found)} intervals exclude 0"
    )
