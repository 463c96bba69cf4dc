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
from tracker.records import CellRecord
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
    curve: _Chart
    scatter: _Chart
    layers: tables.Table
    correlations: tables.Table
    provenance: tables.Table
    tasks: tables.Table


@dataclass(frozen=True)
class _ModelSection:
    """One model's heat map and cells."""

    id: str
    cells: tuple[_CellSection, ...]
    heat_map: _Chart
    relevance: tables.Table


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
    ids = {section.cell.key: section.id for model in models for section in model.cells}
    return environment.get_template("report.html.j2").render(
        style=Markup(loader.get_source(environment, "report.css")[0]),
        plotly_js=Markup(get_plotlyjs()) if cells else Markup(""),
        summary=wording.summary(cells),
        overview=tables.overview_table(cells),
        overview_links=[ids[cell.key] for cell in cells],
        models=models,
        experiments=experiments,
        heading=models[0].cells[0].cell.model.name if len(models) == 1 else "",
    )


def _model_section(cells: Sequence[CellRecord], number: int) -> _ModelSection:
    name = f"model-{number}"
    labels = wording.benchmark_labels(cells)
    return _ModelSection(
        id=name,
        cells=tuple(
            _cell_section(cell, label, f"{name}-cell-{index}")
            for index, (cell, label) in enumerate(zip(cells, labels, strict=True), 1)
        ),
        heat_map=_chart(
            charts.heat_map(cells),
            f"{name}-heat-map",
            charts.heat_title(cells),
            cells[0].model.name,
        ),
        relevance=tables.relevance_table(cells),
    )


def _cell_section(cell: CellRecord, label: str, name: str) -> _CellSection:
    return _CellSection(
        id=name,
        label=label,
        cell=cell,
        measure=wording.measure_of(cell),
        sentence=wording.sentence(cell),
        warnings=wording.warnings(cell),
        curve=_chart(
            charts.layer_curve(cell), f"{name}-curve", charts.curve_title(cell), cell.title
        ),
        scatter=_chart(
            charts.proxy_scatter(cell), f"{name}-scatter", charts.scatter_title(cell), cell.title
        ),
        layers=tables.layer_table(cell),
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
