"""The picture that a page opens with: what each layer costs, above what the cosine score says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tracker.core.formats import counted, two_digits, write
from tracker.report.charts import style
from tracker.report.charts.hover import estimate_hover
from tracker.report.leaderboard.layers import LayerBoard
from tracker.report.leaderboard.proxies import misjudged
from tracker.report.wording import benchmark_labels

MARKED = 3
"""So many layers, on which the two disagree most, carry their number."""


def headline(board: LayerBoard, label: str) -> style.Chart:
    """Draw the real cost of every layer above the cosine score of the same layer.

    Bars of the mean accuracy relevance with its interval stand above bars of the mean cosine score;
    the layers on which the two disagree most are marked by number.
    """
    standings = board.by_depth
    layers = [standing.layer for standing in standings]
    costs = [standing.relevance for standing in standings]
    scores = [style.finite(standing.cosine_score) for standing in standings]
    over = counted(len(board.cells), "benchmark")
    marked = marked_layers(board)
    values = [style.finite(cost.value) for cost in costs]
    what = "accuracy relevance"
    data = [
        style.trace(
            "bar",
            what,
            layers,
            values,
            [
                estimate_hover(f"layer {layer} · mean over {over}", what, cost, two_digits, "")
                for layer, cost in zip(layers, costs, strict=True)
            ],
            error_y=style.errors(costs),
            marker={"color": style.sign_colours(values)},
        ),
        style.trace(
            "bar",
            "cosine score",
            layers,
            scores,
            [
                f"layer {layer}<br>cosine score "
                + ("undefined" if score is None else write("proxy", score))
                for layer, score in zip(layers, scores, strict=True)
            ],
            yaxis="y2",
            marker={"color": style.PROXY},
        ),
    ]
    shade = {"type": "rect", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    shade |= {"fillcolor": style.FAINT, "line": {"width": 0}}
    note = {"xref": "x", "yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False}
    note |= {"font": {"color": style.GREY, "size": 13}}
    drawn = style.chart(
        _title(board, label),
        data,
        380,
        xaxis=style.layer_axis(layers) | {"anchor": "y2"},
        yaxis={"domain": [0.38, 1], "zeroline": True, "title": {"text": "what it really costs"}},
        yaxis2={"domain": [0, 0.29], "title": {"text": "cosine score"}, "zeroline": True},
        showlegend=False,
        bargap=0.25,
        shapes=[shade | {"x0": layer - 0.5, "x1": layer + 0.5} for layer in marked],
        annotations=[
            note | {"x": middle, "text": f"<b>{numbers}</b>"}
            for middle, numbers in near_together(marked)
        ],
        margin={"t": 26},
    )
    return replace(drawn, explains=_explains(board))


def marked_layers(board: LayerBoard) -> list[int]:
    """Find the layers on which the cosine score is furthest from the truth, by ranks."""
    return [wrong.standing.layer for wrong in misjudged(board)[:MARKED]]


def near_together(layers: Sequence[int]) -> list[tuple[float, str]]:
    """Gather the numbers of neighbours: on a phone, a number is as wide as two layers.

    Args:
        layers: The marked layers.

    Returns:
        Where each note stands, and what it says.
    """
    groups: list[list[int]] = []
    for layer in sorted(layers):
        if groups and layer - groups[-1][-1] <= 2:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return [((near[0] + near[-1]) / 2, ", ".join(map(str, near))) for near in groups]


def _explains(board: LayerBoard) -> str:
    """Say how the picture is read."""
    intervals = (
        "with 95 % intervals"
        if any(one.relevance.low is not None for one in board.layers)
        else "without intervals, because that of the intact model's accuracy reaches down to "
        "guessing"
    )
    return (
        "Above: the share of the accuracy above pure guessing that is lost without the layer "
        f"(below 0: the model does better), {intervals}. Below: the cheap score that often stands "
        "in for it. Shaded: where the two disagree most."
    )


def _title(board: LayerBoard, label: str) -> str:
    """Say in a line of plain text what the picture shows."""
    where = ", ".join(benchmark_labels(board.cells)) if len(board.cells) <= 2 else ""
    where = where or counted(len(board.cells), "benchmark")
    text = f"{label}: what each layer really costs, above what the cosine score says, on {where}"
    marked = sorted(marked_layers(board))
    if not marked:
        return text
    plural = "s" if len(marked) > 1 else ""
    return f"{text}; furthest apart: layer{plural} {', '.join(map(str, marked))}"
