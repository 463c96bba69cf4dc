"""Charts as plotly figures: making them checks every property that they use."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from tracker.report.charts import cells as cell_charts
from tracker.report.charts import maps, style
from tracker.schema.records import CellRecord

curve_title, scatter_title = cell_charts.curve_title, cell_charts.scatter_title
heat_title, map_title = maps.heat_map_title, maps.map_title
curve_kinds, mapped = cell_charts.curve_kinds, maps.find_map_kinds
HELPS, MATTERS = style.HELP_COLOUR, style.COST_COLOUR


def layer_curve(cell: CellRecord) -> go.Figure:
    return cell_charts.layer_curve(cell).to_figure()


def proxy_scatter(cell: CellRecord) -> go.Figure:
    return cell_charts.proxy_scatter(cell).to_figure()


def map_values(figure: go.Figure) -> list[list[float | None]]:
    """Return the values of a map, of both strong and faint cells."""
    rows = zip(*(trace.z for trace in figure.data if trace.type == "heatmap"), strict=True)
    return [
        [faint if strong is None else strong for strong, faint in zip(*pair, strict=True)]
        for pair in rows
    ]


def heat_map(cells: Sequence[CellRecord]) -> go.Figure:
    return maps.heat_map(cells).to_figure()


def kind_map(cell: CellRecord, name: str) -> go.Figure:
    return maps.kind_map(cell, maps.find_map_kinds(cell)[name]).to_figure()
