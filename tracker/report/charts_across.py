"""Charts across models: relevance over relative depth, and pairs of models layer by layer."""

from __future__ import annotations

import html
from collections.abc import Sequence

from tracker.metrics.accuracy import Estimate
from tracker.report.hover import estimate_hover
from tracker.report.layers import relative_depth
from tracker.report.leaderboard import LayerBoard
from tracker.report.pairs import Pair
from tracker.report.style import MANY, Chart, chart, errors, finite, layer_axis, line
from tracker.report.wording import counted, defined, interval, two_digits

_FEW = 3
"""So many lines can carry their intervals and still be told apart."""


def depth_curves(boards: Sequence[LayerBoard], labels: Sequence[str]) -> Chart:
    """Draw the mean accuracy relevance over relative depth, a line for each model.

    Args:
        boards: The leaderboards of the models' layers.
        labels: The models' names.

    Returns:
        One trace for each model under its name, with intervals where there are few.
    """
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


def difference_curves(pair: Pair) -> Chart:
    """Draw how the drops of two models differ, a line for each benchmark.

    Args:
        pair: The models and their common benchmarks.

    Returns:
        One trace for each benchmark under its label, with 95 % intervals.
    """
    measure = pair.measure
    layers = sorted({layer for one in pair.comparisons for layer in one.differences})
    count = len(pair.comparisons)
    width = min(0.6, 0.12 * count)
    data = []
    for number, one in enumerate(pair.comparisons):
        found = [one.differences.get(layer, Estimate(None)) for layer in layers]
        # Side by side, so that no interval hides another.
        aside = width * (number / (count - 1) - 0.5) if count > 1 else 0.0
        colour = line(number)["color"]
        data.append(
            {
                "type": "scatter",
                "name": html.escape(one.benchmark),
                "x": [layer + aside for layer in layers],
                "y": [finite(estimate.value, measure.scale) for estimate in found],
                "error_y": errors(found, measure.scale, thickness=0.8, color=colour),
                "mode": "markers",
                "marker": {"size": 6, "color": colour},
                "showlegend": 1 < count <= MANY,
                "hovertext": [
                    estimate_hover(
                        f"layer {layer} · {one.benchmark}",
                        f"difference in {measure.unit}",
                        estimate,
                        measure.write,
                        f"{counted(one.n, 'document')} each",
                    )
                    for layer, estimate in zip(layers, found, strict=True)
                ],
                "hoverinfo": "text",
            }
        )
    return chart(
        difference_title(pair),
        data,
        380,
        xaxis=layer_axis(layers),
        yaxis={
            "title": {"text": f"difference of {measure.change}s ({measure.unit})"},
            "zeroline": True,
        },
    )


def difference_title(pair: Pair) -> str:
    """Say what the differences show.

    Args:
        pair: The models and their common benchmarks.

    Returns:
        Plain text with the largest difference and how many are surely not 0.
    """
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
    sure = sum(
        1
        for one, _, _ in found
        if one.low is not None and one.high is not None and (one.low > 0 or one.high < 0)
    )
    return (
        f"{text}; they differ most in layer {layer} on {benchmark}, "
        f"{measure.write(top.value or 0.0)} {measure.unit}"
        + (f" (95 % interval {between})" if between else "")
        + f"; {sure} of {len(found)} intervals exclude 0"
    )
