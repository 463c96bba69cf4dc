"""Draw the first chart of the page: the relevance and the cosine score of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tracker.analysis.boards import LayerBoard
from tracker.analysis.claims import Claims, name_benchmarks
from tracker.report.charts import style
from tracker.report.charts.style import estimate_hover
from tracker.report.wording import WORDS
from tracker.schema.formats import count_text, points, two_digits, write_figure

_PANELS = {2: ([0.38, 1.0], [], [0.0, 0.29]), 3: ([0.6, 1.0], [0.26, 0.52], [0.0, 0.18])}
"""Vertical ranges of the costs, choice probabilities and cosine scores, by number of panels."""


def headline_chart(board: LayerBoard, label: str) -> style.Chart:
    """Draw two bars for each layer: accuracy relevance (top panel), cosine score (bottom panel).

    If the benchmarks are multiple choice, a middle panel shows how much the probability of the
    right option falls without each layer. Bars without a significant effect are drawn in a pale
    colour. Important layers without a high cosine score are marked with their numbers.
    """
    claims = board.claims
    layers = [standing.layer for standing in board.by_depth]
    costs = [standing.relevance for standing in board.by_depth]
    scores = [style.scale_value(standing.cosine_score) for standing in board.by_depth]
    colours = style.sign_colours(-1 if layer in claims.helpful else 1 for layer in layers)
    is_shown = [layer in {*claims.costly, *claims.helpful} for layer in layers]
    n_benchmarks = count_text(len(board.cells), "benchmark")
    name = "accuracy relevance"
    cost_hovers = [
        estimate_hover(
            f"layer {layer}, mean over {n_benchmarks}: {verdict}",
            *(name, cost, two_digits),
        )
        for layer, verdict, cost in zip(layers, map(claims.word, layers), costs, strict=True)
    ]
    score_hovers = [
        f"layer {layer}<br>cosine score "
        + ("undefined" if score is None else write_figure("proxy", score))
        for layer, score in zip(layers, scores, strict=True)
    ]
    cost_marker = {"color": colours, "opacity": style.opacities(is_shown)}
    score_style = {"yaxis": "y2", "marker": {"color": style.PROXY_COLOUR}}
    data = [
        style.estimate_trace("bar", name, layers, costs, cost_hovers, marker=cost_marker),
        style.build_trace("bar", "cosine score", layers, scores, score_hovers, **score_style),
    ]
    top, middle, bottom = _PANELS[3 if claims.choices else 2]
    axes: dict[str, Any] = {
        "yaxis": {"domain": top, "zeroline": True, "title": {"text": "measured cost"}},
        "yaxis2": {"domain": bottom, "zeroline": True, "title": {"text": "cosine score"}},
    }
    if claims.choices:
        choice_bars, axis = _probability_bars(claims)
        data.append(choice_bars)
        axes["yaxis3"] = axis | {"domain": middle}
    shape = {"type": "rect", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    shape |= {"fillcolor": style.FAINT_GREY, "line": {"width": 0}}
    note = {"xref": "x", "yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False}
    note |= {"font": {"color": style.GREY, "size": 13}}
    chart = style.build_chart(
        _headline_title(board, label),
        data,
        520 if claims.choices else 380,
        xaxis=style.layer_axis(layers) | {"anchor": "y2"},
        **axes,
        showlegend=False,
        bargap=0.25,
        shapes=[shape | {"x0": layer - 0.5, "x1": layer + 0.5} for layer in claims.missed],
        annotations=[
            note | {"x": position, "text": f"<b>{text}</b>"}
            for position, text in join_neighbours(claims.missed)
        ],
        margin={"t": 46 if claims.missed else 34},
    )
    return replace(chart, explanation=WORDS.render("headline", board))


def join_neighbours(layers: Sequence[int]) -> list[tuple[float, str]]:
    """Join the labels of marked layers that are at most two layers apart, e.g. `3, 5`.

    Args:
        layers: Numbers of the layers to mark.

    Returns:
        The position on the layer axis and the text of each label.
    """
    numbers = np.sort(layers)
    groups = np.split(numbers, np.flatnonzero(np.diff(numbers) > 2) + 1) if layers else []
    return [((group[0] + group[-1]) / 2, ", ".join(map(str, group))) for group in groups]


def _probability_bars(claims: Claims) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build a bar for each removed layer: how much the probability of the right option falls.

    The function returns the bars as a plotly trace, and the settings of their axis.
    """
    layers = sorted(claims.choices)
    drops = [claims.choices[layer] for layer in layers]
    name = "drop of choice probability"
    n_benchmarks = count_text(len(claims.cells), "benchmark")
    hovers = [
        estimate_hover(f"layer {layer} · mean over {n_benchmarks}", f"{name}, pp", drop, points)
        for layer, drop in zip(layers, drops, strict=True)
    ]
    marker = {
        "color": style.sign_colours(drop.side() for drop in drops),
        "opacity": style.opacities(drop.side() != 0 for drop in drops),
    }
    axis: dict[str, Any] = {"yaxis": "y3", "marker": marker}
    bars = style.estimate_trace("bar", name, layers, drops, hovers, 100, **axis)
    return bars, {"title": {"text": "p(right) lost, pp"}, "zeroline": True}


def _headline_title(board: LayerBoard, label: str) -> str:
    """Return the title of the headline chart as one line of plain text."""
    n_cells = len(board.cells)
    where = count_text(n_cells, "benchmark") if n_cells > 2 else name_benchmarks(board.cells)
    return f"{label}: cost of removing each layer (measured on {where}), and cosine score"
