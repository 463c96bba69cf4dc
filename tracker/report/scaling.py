"""The curves of `tracker bench --scaling`, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from tracker.report.charts.style import HELPS, MATTERS


class Timed(Protocol):
    """Seconds against a size."""

    @property
    def size(self) -> str:
        """What grows."""

    @property
    def sizes(self) -> Sequence[int]:
        """How much of it."""

    @property
    def engine(self) -> Sequence[float]:
        """Seconds of the engine."""

    @property
    def loop(self) -> Sequence[float]:
        """Seconds of the lm-eval loop."""


def draw(title: str, curves: Sequence[Timed], path: Path) -> None:
    """Draw the curves into an HTML page that needs no network."""
    figure = make_subplots(
        cols=len(curves), subplot_titles=[f"time against {curve.size}" for curve in curves]
    )
    for column, curve in enumerate(curves, start=1):
        for name, seconds, colour in (
            ("engine", curve.engine, MATTERS),
            ("lm-eval loop, extrapolated", curve.loop, HELPS),
        ):
            line = go.Scatter(
                x=list(curve.sizes),
                y=list(seconds),
                name=name,
                legendgroup=name,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": colour},
            )
            figure.add_trace(line, row=1, col=column)
        figure.update_xaxes(title_text=curve.size, rangemode="tozero", row=1, col=column)
    figure.update_yaxes(title_text="seconds", rangemode="tozero")
    figure.update_layout(title_text=title, template="plotly_white", legend={"orientation": "h"})
    figure.write_html(path, include_plotlyjs=True)
