"""Draw the first chart of a page: the cost of each layer, above its cosine score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tracker.analysis.boards import LayerBoard
from tracker.analysis.claims import Claims, name_benchmarks
from tracker.core.estimates import Estimate
from tracker.core.formats import count_text, is_finite, two_digits, write_figure
from tracker.report.charts import style
from tracker.report.charts.style import estimate_hover
from tracker.report.wording import WORDS
from tracker.stats.support import average

_PANELS = {2: ([0.38, 1.0], [], [0.0, 0.29]), 3: ([0.6, 1.0], [0.26, 0.52], [0.0, 0.18])}
"""Vertical ranges of the costs, log-probabilities and cosine scores, by number of panels."""


def headline_chart(board: LayerBoard, label: str) -> style.Chart:
    """Draw the accuracy relevance of each layer as bars, above bars of its cosine score.

    The upper panel shows the mean accuracy relevance with its interval, the lower panel the mean
    cosine score. Layers without a significant effect are pale. If no layer has a significant
    effect, a middle panel shows the fall of the right answer's log-probability. Numbers mark the
    layers that matter but are not among the layers with the highest cosine scores.
    """
    claims = board.claims
    layers = [standing.layer for standing in board.by_depth]
    costs = [standing.relevance for standing in board.by_depth]
    scores = [style.scale_value(standing.cosine_score) for standing in board.by_depth]
    falls = {} if claims.costly else _logprob_falls(claims)
    shows_falls = any(fall.value is not None for fall in falls.values())
    colours = style.sign_colours(-1 if layer in claims.helpful else 1 for layer in layers)
    is_shown = [layer in {*claims.costly, *claims.helpful} for layer in layers]
    n_benchmarks = count_text(len(board.cells), "benchmark")
    name = "accuracy relevance"
    cost_hovers = [
        estimate_hover(
            f"layer {layer} · mean over {n_benchmarks} · {claims.word(layer)}",
            *(name, cost, two_digits),
        )
        for layer, cost in zip(layers, costs, strict=True)
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
    top, middle, bottom = _PANELS[3 if shows_falls else 2]
    axes: dict[str, Any] = {
        "yaxis": {"domain": top, "zeroline": True, "title": {"text": "measured cost"}},
        "yaxis2": {"domain": bottom, "zeroline": True, "title": {"text": "cosine score"}},
    }
    if shows_falls:
        fall_bars, axis = _draw_falls(claims, falls, layers)
        data.append(fall_bars)
        axes["yaxis3"] = axis | {"domain": middle}
    shape = {"type": "rect", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    shape |= {"fillcolor": style.FAINT_GREY, "line": {"width": 0}}
    note = {"xref": "x", "yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False}
    note |= {"font": {"color": style.GREY, "size": 13}}
    chart = style.build_chart(
        _headline_title(board, label),
        data,
        520 if shows_falls else 380,
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
    return replace(chart, explanation=WORDS.render("headline", board, shows_falls))


def join_neighbours(layers: Sequence[int]) -> list[tuple[float, str]]:
    """Combine the number labels of layers that are at most two apart, so that labels fit.

    Args:
        layers: Numbers of the layers to mark.

    Returns:
        The position on the layer axis and the text of each label.
    """
    numbers = np.sort(layers)
    groups = np.split(numbers, np.flatnonzero(np.diff(numbers) > 2) + 1) if layers else []
    return [((group[0] + group[-1]) / 2, ", ".join(map(str, group))) for group in groups]


def _logprob_falls(claims: Claims) -> dict[int, Estimate]:
    """Return layer → mean fall of the right answer's log-probability, with joint intervals."""
    falls = [claims.gold[cell.key] for cell in claims.cells]
    return {
        layer: average([by_layer[layer] for by_layer in falls if layer in by_layer])
        for layer in claims.layers
    }


def _draw_falls(
    claims: Claims, falls: Mapping[int, Estimate], layers: Sequence[int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Build the bars and the axis of log-probability falls, on a signed square-root scale."""
    estimates = [falls.get(layer, Estimate(None)) for layer in layers]
    sizes = [abs(fall.value) for fall in falls.values() if is_finite(fall.value)]
    step = 10 ** math.floor(math.log10(max(sizes, default=0.0) or 1.0))
    ticks = [-step, 0, step, 3 * step, 10 * step]
    name = "fall of the right answer’s log-probability"
    n_benchmarks = count_text(len(claims.cells), "benchmark")
    hovers = [
        estimate_hover(
            f"layer {layer} · mean over {n_benchmarks}", f"{name}, nats", estimate, two_digits
        )
        for layer, estimate in zip(layers, estimates, strict=True)
    ]
    opacities = style.opacities(layer in claims.falling for layer in layers)
    bars = style.estimate_trace(
        *("bar", name, layers, list(map(_scale_estimate, estimates)), hovers),
        yaxis="y3",
        marker={"color": style.COST_COLOUR, "opacity": opacities},
    )
    return bars, {
        "title": {"text": "log-prob. lost"},
        "zeroline": True,
        "tickvals": [_signed_root(tick) for tick in ticks],
        "ticktext": [f"{tick:g}".replace("-", "−") for tick in ticks],
    }


def _scale_estimate(estimate: Estimate) -> Estimate:
    value, low, high = map(_signed_root, (estimate.value, estimate.low, estimate.high))
    return Estimate(value, low, high)


def _signed_root(value: float | None) -> float | None:
    return None if value is None else math.copysign(math.sqrt(abs(value)), value)


def _headline_title(board: LayerBoard, label: str) -> str:
    """Return the title of the headline chart as one line of plain text."""
    n_cells = len(board.cells)
    where = count_text(n_cells, "benchmark") if n_cells > 2 else name_benchmarks(board.cells)
    return f"{label}: measured cost of removing each layer, and its cosine score, on {where}"
