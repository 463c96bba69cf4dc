"""Render all results of a results folder as one self-contained HTML page.

The page needs no network: it contains plotly.js, all styles and all scripts. A content security
policy prevents the browser from loading any other resource. If the page is written again from the
same input, its bytes are identical.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tracker.analysis.agreement import agreements
from tracker.ledger.files import write_text
from tracker.report import tables, wording
from tracker.report.charts.style import CHART_TEMPLATE, MAX_INTERVAL_LINES
from tracker.report.frames import pack_json, pack_run_frame, pack_text
from tracker.report.leaderboard import layer_board_table, misjudged_table, part_board_table
from tracker.report.page import sections
from tracker.report.page.sections import decision_table, pack_documents
from tracker.report.page.studies import exclude_search_cells, study_sections
from tracker.schema import answers, run_table
from tracker.schema.findings import FindingRecord
from tracker.schema.formats import metric_format
from tracker.schema.kinds import REPLACEMENT_WORDS
from tracker.schema.proxies import OBSERVED, PART_PROXIES
from tracker.schema.records import CellRecord, DecisionsRecord, RecordKey
from tracker.schema.tables import Table, entry_text, heading_text
from tracker.schema.text import mask_secrets, replace_controls
from tracker.schema.text_templates import open_templates
from tracker.schema.weight_formats import FORMATS


def render_report(
    cells: Sequence[CellRecord],
    experiments: Mapping[str, str],
    path: Path,
    decisions: Mapping[RecordKey, DecisionsRecord] = {},
    findings: Sequence[FindingRecord] = (),
    search_cells: Collection[RecordKey] = (),
) -> Path:
    """Write the report page of a results folder, and return its path.

    The file is replaced atomically.

    Args:
        cells: Results of each model and benchmark, in the order of the page.
        experiments: YAML text of each experiment file by name. Passwords are masked on the page.
        path: Path of the page.
        decisions: The answers of each model on each benchmark, by the key of the results.
        findings: Results of studies: answers, tables and charts.
        search_cells: Keys of results that were measured only for searches, and have no section on
            the page.

    Returns:
        The path of the page.

    Raises:
        WorkError: The disk is full or not writable; an existing page is kept.
    """
    write_text(path, render_page(cells, experiments, decisions, findings, search_cells))
    return path


@cache
def _page_templates() -> Environment:
    """Compile the templates of the page once per process."""
    environment = open_templates("tracker.report.page", autoescape=True)
    helpers = (
        *(answers, run_table, tables, wording),
        *(agreements, decision_table, entry_text, heading_text, layer_board_table),
        *(metric_format, misjudged_table, part_board_table),
    )
    environment.globals |= {helper.__name__.split(".")[-1]: helper for helper in helpers}
    environment.globals |= {
        "few": MAX_INTERVAL_LINES,
        "replaced_by": REPLACEMENT_WORDS,
        "weight_formats": [*FORMATS],
        "proxies": (*OBSERVED, *PART_PROXIES),
    }
    return environment


def _read_inline(file_name: str) -> Markup:
    """Return the text of a style sheet or script of the page."""
    environment = _page_templates()
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, file_name)[0])


@cache
def _packed_plotly() -> str:
    """Return plotly's script in compressed form."""
    return pack_text(get_plotlyjs())


def render_page(
    cells: Sequence[CellRecord],
    experiments: Mapping[str, str],
    decisions: Mapping[RecordKey, DecisionsRecord] = {},
    findings: Sequence[FindingRecord] = (),
    search_cells: Collection[RecordKey] = (),
) -> str:
    """Return the HTML text of the page; the arguments are those of `render_report`."""
    studies = study_sections(findings, cells)
    cells = exclude_search_cells(cells, findings, search_cells)
    models = sections.model_sections(cells, decisions)
    across = sections.across_section(cells, models)
    cell_sections = [section for model in models for section in model.cells]
    ids = {section.cell.record_key: section.id for section in cell_sections}
    figures = [figure for model in models for figure in model.figures]
    figures += (across.depth, *across.pairs) if across else ()
    figures += [figure for study in studies for figure in study.figures]
    charts = {figure.id: [figure.chart.data, figure.chart.layout] for figure in figures}
    documents = {
        f"{section.id}-documents": (section.cell, section.decisions)
        for section in cell_sections
        if section.decisions
    }
    csv, parquet = pack_run_frame(cells) if cells else ("", "")
    return (
        _page_templates()
        .get_template("report.html.j2")
        .render(
            style=_read_inline("report.css"),
            script=_read_inline("report.js"),
            plotly=_packed_plotly() if figures else "",
            charts=pack_json({"template": CHART_TEMPLATE, "figures": charts}),
            documents=pack_documents(documents),
            csv=csv,
            parquet=parquet,
            overview_links=[ids[cell.record_key] for cell in cells],
            models=models,
            across=across,
            studies=studies,
            cells=cells,
            experiments={
                replace_controls(name): mask_secrets(replace_controls(text))
                for name, text in experiments.items()
            },
        )
    )


def render_comparison(sentences: Sequence[str], table: Table, details: Sequence[Table]) -> str:
    """Return the HTML text of a comparison of models; all texts are escaped.

    Args:
        sentences: The main results.
        table: Table of all differences.
        details: Tables of lost documents.

    Returns:
        The page.
    """
    template, style = _page_templates().get_template("comparison.html.j2"), "report.css"
    texts = {"sentences": sentences, "style": _read_inline(style)}
    return template.render(table=table, details=details, **texts)
