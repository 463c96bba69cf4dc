"""Renders a results folder's cells as one self-contained HTML page.

The page needs no network: plotly.js is inlined once, styles and scripts stand in the file, and a
content security policy forbids everything else. The same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tracker.ledger.files import write_text
from tracker.records import WHOLE_LAYER, CellRecord, view_name
from tracker.report import charts, tables, wording

# Only buttons that work without a network.
_BUTTONS = [["toImage", "zoom2d", "resetScale2d"]]


@dataclass(frozen=True)
class _Chart:
    """A figure as markup; its title is set by the page, where it can wrap."""

    id: str
    title: str
    markup: Markup


@dataclass(frozen=True)
class _CellSection:
    """Everything that the page shows of one cell."""

    id: str
    label: str
    cell: CellRecord
    measure: wording.Measure
    sentence: str
    warnings: tuple[str, ...]
    curve: _Chart | None
    curve_lines: int
    scatter: _Chart | None
    span_maps: tuple[_Chart, ...]
    layers: tables.Table
    layers_heading: str
    correlations: tables.Table
    provenance: tables.Table
    tasks: tables.Table


@dataclass(frozen=True)
class _ModelSection:
    """One model's cells and heat map, which is None where no whole layer is removed."""

    id: str
    cells: tuple[_CellSection, ...]
    heat_map: _Chart | None
    relevance: tables.Table | None


def render_report(cells: Sequence[CellRecord], experiments: Mapping[str, str], path: Path) -> Path:
    """Write the report page of a results folder.

    The file appears at once or not at all: it is written beside its place and then renamed.

    Args:
        cells: The cells to show, in this order.
        experiments: The user's experiment files: file name -> exact YAML text.
        path: Where the page goes; its folder is made if it is missing.

    Returns:
        The path of the page.

    Raises:
        WorkError: The disk is full or refuses; a page that was there stays.
    """
    write_text(path, render_page(cells, experiments))
    return path


def render_page(cells: Sequence[CellRecord], experiments: Mapping[str, str]) -> str:
    """Render the report page of a results folder.

    Args:
        cells: The cells to show, in this order.
        experiments: The user's experiment files: file name -> exact YAML text.

    Returns:
        The HTML text.
    """
    loader = PackageLoader("tracker.report")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    groups: dict[tuple[str, str, str], list[CellRecord]] = {}
    for cell in cells:
        groups.setdefault(wording.model_key(cell), []).append(cell)
    models = tuple(_model_section(group, number) for number, group in enumerate(groups.values(), 1))
    ids = {_place(section.cell): section.id for model in models for section in model.cells}
    return environment.get_template("report.html.j2").render(
        style=Markup(loader.get_source(environment, "report.css")[0]),
        plotly_js=Markup(get_plotlyjs()) if cells else Markup(""),
        summary=wording.summary(cells),
        overview=tables.overview_table(cells),
        overview_links=[ids[_place(cell)] for cell in cells],
        models=models,
        experiments=experiments,
        heading=models[0].cells[0].cell.model.name if len(models) == 1 else "",
    )


def _place(cell: CellRecord) -> tuple[str, str]:
    return (cell.key, view_name(cell.removed))


def _model_section(cells: Sequence[CellRecord], number: int) -> _ModelSection:
    name = f"model-{number}"
    labels = wording.benchmark_labels(cells)
    mapped = [cell for cell in cells if _has_whole_layers(cell)]
    return _ModelSection(
        id=name,
        cells=tuple(
            _cell_section(cell, label, f"{name}-cell-{index}")
            for index, (cell, label) in enumerate(zip(cells, labels, strict=True), 1)
        ),
        heat_map=_chart(
            charts.heat_map(mapped),
            f"{name}-heat-map",
            charts.heat_title(mapped),
            cells[0].model.name,
        )
        if mapped
        else None,
        relevance=tables.relevance_table(mapped) if mapped else None,
    )


def _has_whole_layers(cell: CellRecord) -> bool:
    """Whether whole single layers are among what is removed; a cell without any run has a place."""
    found = wording.kinds(cell)
    return WHOLE_LAYER in found or not found


def _cell_section(cell: CellRecord, label: str, name: str) -> _CellSection:
    only_layers = tables.run_columns(cell).only_layers
    lines = charts.curve_components(cell)
    return _CellSection(
        id=name,
        label=label,
        cell=cell,
        measure=wording.measure_of(cell),
        sentence=wording.sentence(cell),
        warnings=wording.warnings(cell),
        curve=_chart(
            charts.layer_curve(cell), f"{name}-curve", charts.curve_title(cell), cell.title
        )
        if lines
        else None,
        curve_lines=len(lines),
        scatter=_chart(
            charts.proxy_scatter(cell), f"{name}-scatter", charts.scatter_title(cell), cell.title
        )
        if _has_whole_layers(cell)
        else None,
        span_maps=tuple(
            _chart(
                charts.span_map(cell, component),
                f"{name}-spans-{component}",
                charts.span_title(cell, component),
                cell.title,
            )
            for component in charts.span_components(cell)
        ),
        layers=tables.layer_table(cell),
        layers_heading="Layers" if only_layers else "Runs",
        correlations=tables.correlation_table(cell),
        provenance=tables.provenance_table(cell),
        tasks=tables.task_table(cell),
    )


def _chart(figure: go.Figure, name: str, title: str, subject: str) -> _Chart:
    # The heading above the chart names its subject already.
    says = title.removeprefix(f"{subject}: ")
    # plotly cannot wrap a title to the width of the window; the page's caption can.
    top = (
        34
        if any(trace.showlegend is not False for trace in figure.select_traces("scatter"))
        else 12
    )
    # Without a drag mode, a finger on a chart scrolls the page.
    figure.update_layout(title=None, margin_t=top, dragmode=False)
    markup = figure.to_html(
        config={
            "responsive": True,
            "displaylogo": False,
            "modeBarButtons": _BUTTONS,
            "toImageButtonOptions": {"format": "svg", "filename": name},
        },
        full_html=False,
        include_plotlyjs=False,
        include_mathjax=False,
        default_height=f"{figure.layout.height}px",
        div_id=name,
    )
    return _Chart(name, says[:1].upper() + says[1:], Markup(markup))
