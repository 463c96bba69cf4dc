"""Charts as plotly figures: making them checks every property that they use."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from tracker.config import Component
from tracker.records import CellRecord
from tracker.report import charts, charts_maps, style

curve_title, scatter_title = charts.curve_title, charts.scatter_title
heat_title, span_title = charts_maps.heat_title, charts_maps.span_title
curve_components, span_components = charts.curve_components, charts_maps.span_components
HELPS, MATTERS = style.HELPS, style.MATTERS


def layer_curve(cell: CellRecord) -> go.Figure:
    return charts.layer_curve(cell).figure()


def proxy_scatter(cell: CellRecord) -> go.Figure:
    return charts.proxy_scatter(cell).figure()


def heat_map(cells: Sequence[CellRecord]) -> go.Figure:
    return charts_maps.heat_map(cells).figure()


def span_map(cell: CellRecord, component: Component) -> go.Figure:
    return charts_maps.span_map(cell, component).figure()
