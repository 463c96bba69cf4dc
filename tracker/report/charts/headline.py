"""Draw the first chart of a page: the cost of each layer, above its cosine score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tracker.analysis.boards import LayerBoard
from tracker.analysis.claims import Claims, name_benchmarks
from tracker.core.estimates import Estimate
from tracker.core.formats import counted, defined, two_digits, write
from tracker.report.charts import style
from tracker.report.charts.style import estimate_hover
from tracker.report.wording import WORDS
from tracker.stats.support import mean

_PANELS = {2: ([0.38, 1.0], [], [0.0, 0.29]), 3: ([0.6, 1.0], [0.26, 0.52], [0.0, 0.18])}
"""Vertical ranges of the costs, log-probabilities and cosine scores, by number of panels."""


def headline(board: LayerBoard, label: str) -> style.Chart:
    """Draw the real cost of every layer above the cosine score of the same layer.

    Bars of the mean accuracy relevance with its interval are above bars of the mean cosine score.
    Open layers are faint. If no layer is shown to matter, a panel between them shows the fall of
    the right answer's log-probability. Numbers mark the layers that a choice by cosine score is
    shown to miss.
    """
    found = board.claims
    layers = [standing.layer for standing in board.by_depth]
    costs = [standing.relevance for standing in board.by_depth]
    scores = [style.finite(standing.cosine_score) for standing in board.by_depth]
    over = counted(len(board.cells), "benchmark")
    what = "accuracy relevance"
    noisy = not found.costly and any(drop.value is not None for drop in _falls(found).values())
    shown = {*found.costly, *found.helpful}
    colours = [style.HELPS if layer in found.helpful else style.MATTERS for layer in layers]
    above, between, below = _PANELS[3 if noisy else 2]
    data = [
        style.trace(
            "bar",
            what,
            layers,
            [style.finite(cost.value) for cost in costs],
            [
                estimate_hover(
                    f"layer {layer} · mean over {over} · {found.word(layer)}",
                    *(what, cost, two_digits, ""),
                )
                for layer, cost in zip(layers, costs, strict=True)
            ],
            error_y=style.errors(costs),
            marker={"color": colours, "opacity": style.strength(la in shown for la in layers)},
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
    axes: dict[str, Any] = {
        "yaxis": {"domain": above, "zeroline": True, "title": {"text": "what it really costs"}},
        "yaxis2": {"domain": below, "zeroline": True, "title": {"text": "cosine score"}},
    }
    if noisy:
        falls, axis = _falls_trace(found, layers)
        data.append(falls)
        axes["yaxis3"] = axis | {"domain": between}
    shade = {"type": "rect", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "layer": "below"}
    shade |= {"fillcolor": style.FAINT, "line": {"width": 0}}
    note = {"xref": "x", "yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False}
    note |= {"font": {"color": style.GREY, "size": 13}}
    drawn = style.chart(
        _title(board, label),
        data,
        520 if noisy else 380,
        xaxis=style.layer_axis(layers) | {"anchor": "y2"},
        **axes,
        showlegend=False,
        bargap=0.25,
        shapes=[shade | {"x0": layer - 0.5, "x1": layer + 0.5} for layer in found.missed],
        annotations=[
            note | {"x": middle, "text": f"<b>{numbers}</b>"}
            for middle, numbers in near_together(found.missed)
        ],
        margin={"t": 46 if found.missed else 34},
    )
    return replace(drawn, explains=WORDS.one("headline", board, noisy))


def near_together(layers: Sequence[int]) -> list[tuple[float, str]]:
    """Join the numbers of neighbouring layers, because on a phone a number is two layers wide.

    Args:
        layers: The marked layers.

    Returns:
        The position of each note, and its text.
    """
    ordered = np.sort(layers)
    groups = np.split(ordered, np.flatnonzero(np.diff(ordered) > 2) + 1) if layers else []
    return [((near[0] + near[-1]) / 2, ", ".join(map(str, near))) for near in groups]


def _falls(found: Claims) -> dict[int, Estimate]:
    """Return layer → mean fall of the right answer's log-probability, simultaneous over layers."""
    return {
        layer: mean([found.gold[c.key][layer] for c in found.cells if layer in found.gold[c.key]])
        for layer in found.layers
    }


def _falls_trace(found: Claims, layers: Sequence[int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw these falls on a scale of square roots, on which small and large ones can be seen."""
    falls = _falls(found)
    rooted = [_rooted(falls.get(layer, Estimate(None))) for layer in layers]
    most = max((abs(fall.value) for fall in falls.values() if defined(fall.value)), default=1.0)
    step = 10 ** math.floor(math.log10(most or 1.0))
    ticks = [-step, 0, step, 3 * step, 10 * step]
    strong = style.strength(layer in found.falling for layer in layers)
    drawn = style.trace(
        "bar",
        "fall of the right answer’s log-probability",
        layers,
        [style.finite(fall.value) for fall in rooted],
        [
            estimate_hover(
                f"layer {layer} · mean over {counted(len(found.cells), 'benchmark')}",
                "fall of the right answer’s log-probability, nats",
                *(falls.get(layer, Estimate(None)), two_digits, ""),
            )
            for layer in layers
        ],
        yaxis="y3",
        error_y=style.errors(rooted),
        marker={"color": style.MATTERS, "opacity": strong},
    )
    return drawn, {
        "title": {"text": "log-prob. lost"},
        "zeroline": True,
        "tickvals": [_root(tick) for tick in ticks],
        "ticktext": [f"{tick:g}".replace("-", "−") for tick in ticks],
    }


def _rooted(figure: Estimate) -> Estimate:
    return Estimate(_root(figure.value), _root(figure.low), _root(figure.high))


def _root(value: float | None) -> float | None:
    return None if value is None else math.copysign(math.sqrt(abs(value)), value)


def _title(board: LayerBoard, label: str) -> str:
    """Return a title of the chart in a line of plain text."""
    many = len(board.cells) > 2
    where = counted(len(board.cells), "benchmark") if many else name_benchmarks(board.cells)
    return f"{label}: what each layer really costs, and its cosine score, on {where}"
