"""Render a results folder's cells as one self-contained HTML page.

The page needs no network: it contains plotly.js once, compressed, all styles and all scripts. A
content security policy forbids everything else. Charts are drawn when they come into view. The same
input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from tracker.analysis.agreement import agreements
from tracker.core import answers, run_table
from tracker.core.decision_records import DecisionsRecord
from tracker.core.findings import FindingRecord
from tracker.core.formats import measure_of
from tracker.core.kinds import REPLACED_BY
from tracker.core.proxies import OBSERVED, OF_EXPERTS
from tracker.core.records import CellRecord, Place
from tracker.core.tables import headed, written
from tracker.core.text import harmless, masked
from tracker.core.weight_formats import FORMATS
from tracker.ledger.files import write_text
from tracker.report import tables, wording
from tracker.report.charts.style import FEW, TEMPLATE
from tracker.report.frames import layer_files, packed, packed_json
from tracker.report.leaderboard import layer_board_table, misjudged_table, part_board_table
from tracker.report.page import sections
from tracker.report.page.sections import decision_table, packed_documents
from tracker.report.page.studies import standing_alone, study_sections
from tracker.report.texts import templates_of


def render_report(
    cells: Sequence[CellRecord],
    experiments: Mapping[str, str],
    path: Path,
    decided: Mapping[Place, DecisionsRecord] = {},
    findings: Sequence[FindingRecord] = (),
    searches: Collection[Place] = (),
) -> Path:
    """Write the report page of a results folder, and return its path.

    The file is replaced atomically: it is written next to its path and then renamed.

    Args:
        cells: The cells, in this order.
        experiments: The experiment files: name → YAML text, whose passwords are not shown.
        path: Path of the page.
        decided: Key of a cell → decisions of its runs document by document, if known.
        findings: Findings of studies.
        searches: Cells in which searches took their steps, besides those of findings.

    Returns:
        The path.

    Raises:
        WorkError: The disk is full or not writable; an existing page is kept.
    """
    write_text(path, render_page(cells, experiments, decided, findings, searches))
    return path


@cache
def _templates() -> Environment:
    """Compile the templates once for all pages of a process."""
    environment = templates_of("tracker.report.page", autoescape=True)
    modules = (answers, run_table, tables, wording)
    functions = (
        decision_table,
        headed,
        layer_board_table,
        measure_of,
        misjudged_table,
        part_board_table,
        written,
    )
    every = (*modules, *functions, agreements)
    environment.globals |= {each.__name__.split(".")[-1]: each for each in every}
    environment.globals |= {"few": FEW, "replaced_by": REPLACED_BY, "weight_formats": [*FORMATS]}
    environment.globals |= {"proxies": (*OBSERVED, *OF_EXPERTS)}
    return environment


@cache
def _plotly() -> str:
    """Return plotly's script, compressed to two fifths of its size."""
    return packed(get_plotlyjs())


def render_page(
    cells: Sequence[CellRecord],
    experiments: Mapping[str, str],
    decided: Mapping[Place, DecisionsRecord] = {},
    findings: Sequence[FindingRecord] = (),
    searches: Collection[Place] = (),
) -> str:
    """Render the HTML of cells in this order, as `render_report` writes it."""
    environment = _templates()

    def inlined(name: str) -> Markup:
        assert environment.loader is not None
        return Markup(environment.loader.get_source(environment, name)[0])

    studies = study_sections(findings, cells)
    cells = standing_alone(cells, findings, searches)
    models = sections.model_sections(cells, decided)
    across = sections.across_section(cells, models)
    ids = {s.cell.place: s.id for model in models for s in model.cells}
    figures = [figure for model in models for figure in model.figures]
    figures += (across.depth, *across.pairs) if across else ()
    figures += [figure for study in studies for figure in study.figures]
    csv, parquet = layer_files(cells) if cells else ("", "")
    return environment.get_template("report.html.j2").render(
        style=inlined("report.css"),
        script=inlined("report.js"),
        plotly=_plotly() if figures else "",
        charts=packed_json(
            {
                "template": TEMPLATE,
                "figures": {one.id: [one.chart.data, one.chart.layout] for one in figures},
            }
        ),
        documents=packed_documents(
            {
                f"{one.id}-documents": (one.cell, one.decisions)
                for model in models
                for one in model.cells
                if one.decisions
            }
        ),
        csv=csv,
        parquet=parquet,
        overview_links=[ids[cell.place] for cell in cells],
        models=models,
        across=across,
        studies=studies,
        cells=cells,
        experiments={harmless(name): masked(harmless(text)) for name, text in experiments.items()},
    )
