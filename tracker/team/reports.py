"""Write reports about collected results, and publish reports to tracking backends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from tracker.analysis.boards import part_boards
from tracker.analysis.claims import decide_claims
from tracker.analysis.comparable import named_models
from tracker.ledger.store import Ledger
from tracker.measuring.derive import derive_records
from tracker.report.dataset import write_dataset
from tracker.report.evaluations import write_evaluations
from tracker.report.export import REPORT_FORMATS, board_data, export_report, report_figures
from tracker.report.frames import document_frames
from tracker.report.page.html import render_report
from tracker.report.page.studies import exclude_search_cells
from tracker.report.wording import model_answer, rule, summary
from tracker.schema.errors import RequestError, TrackerError
from tracker.schema.records import PRIVATE_TEXTS, CellRecord, DecisionsRecord, RecordKey
from tracker.schema.text import escape_markdown, mask_secrets
from tracker.team.collect import CollectedCells
from tracker.tracking import open_backend, target
from tracker.tracking.base import Page, Target
from tracker.tracking.figures import logged_table

_MAX_CHARTS = 60
"""Maximum number of charts in a report that is published to a tracking backend."""


def write_report(ledger: Ledger) -> tuple[Path, dict[str, str]]:
    """Write the HTML report about all measured results in a results folder.

    Returns the path of the report, and a dictionary that maps each unreadable file to advice.
    """
    contents = ledger.contents()
    collected = CollectedCells(
        experiments=contents.experiments,
        failed=contents.damaged,
        findings=tuple(contents.findings),
        searched=contents.search_keys,
    )
    for record, store, view_request in derive_records(contents):
        if record.n:
            collected.cells += (record,)
            collected.origins[record.record_key] = store, view_request.view
    return _write_page(
        collected, ledger.root / "report.html", collected.derive_decisions()
    ), collected.failed


EXCHANGE_FORMATS = {"every_eval_ever": write_evaluations, "dataset": write_dataset}
"""Format for publication → function that writes it; private texts are left out by default."""


def write_collected(
    collected: CollectedCells, report_format: str, path: Path, with_private: bool = False
) -> list[Path]:
    """Write a report to `path` in the given format, and return the written files.

    `report_format` is `html`, a key of `REPORT_FORMATS` or a key of `EXCHANGE_FORMATS`. The formats
    in `EXCHANGE_FORMATS` omit private document texts, unless `with_private` is true. RequestError
    is raised for an unknown format, and WorkError if the disk is full or not writable.
    """
    if report_format == "html":
        return [_write_page(collected, path, collected.derive_decisions())]
    if report_format in EXCHANGE_FORMATS:
        write = EXCHANGE_FORMATS[report_format]
        return write(collected.cells, path, collected.read_answers, with_private)
    if report_format not in REPORT_FORMATS:
        formats = ", ".join([*REPORT_FORMATS, *EXCHANGE_FORMATS])
        raise RequestError(f"there is no format {report_format!r}; use one of: html, {formats}")
    if report_format in ("csv", "parquet"):
        return export_report(
            collected.cells,
            report_format,
            path,
            {"documents": _document_frames(collected)},
            collected.findings,
        )
    shown_cells = exclude_search_cells(collected.cells, collected.findings, collected.searched)
    return export_report(shown_cells, report_format, path, {}, collected.findings)


def _write_page(
    collected: CollectedCells, path: Path, decisions: Mapping[RecordKey, DecisionsRecord]
) -> Path:
    return render_report(
        *(collected.cells, collected.experiments, path, decisions, collected.findings),
        search_cells=collected.searched,
    )


def _document_frames(
    collected: CollectedCells, with_private: bool = True
) -> Iterator[pd.DataFrame]:
    """Yield data frames of documents whose answer an ablation changes to wrong or to right."""
    cell_decisions = ((cell, collected.read_answers(cell)) for cell in collected.cells)
    return document_frames(
        ((cell, decisions) for cell, decisions in cell_decisions if decisions), with_private
    )


def publish_report(
    collected: CollectedCells, targets: Sequence[str], results: Path, with_private: bool = False
) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """Publish a report with tables and charts to each target, as a separate run.

    Document texts are private if they come neither from the Hugging Face hub nor from a package.
    The report omits private texts unless `with_private` is true. Returns addresses by target
    (`BACKEND:PROJECT`), error messages by target, and notes about omitted texts. RequestError is
    raised for an invalid target.
    """
    decisions = collected.derive_decisions() if targets else {}
    withheld_keys = [
        key for key, record in decisions.items() if not (record.public or with_private)
    ]
    decisions |= {key: decisions[key].without_texts() for key in withheld_keys}
    notes = tuple(
        f"{cell.title}: {PRIVATE_TEXTS}"
        for cell in collected.cells
        if cell.record_key in withheld_keys
    )
    build = partial(_build_page, collected, decisions, with_private)
    return *publish_page(build, targets, results, collected.projects), notes


def publish_page(
    build: Callable[[Path], Page], targets: Sequence[str], results: Path, projects: Collection[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Publish a page to each target, as a separate run.

    `build` writes the files of the page into a folder. For a target without a project, `projects`
    must contain exactly one project. Returns addresses by target, and error messages by target.
    RequestError is raised for an invalid target.
    """
    locations: dict[str, str] = {}
    errors: dict[str, str] = {}
    for target_text, report_target in [(text, _read_target(text, projects)) for text in targets]:
        backend = open_backend(
            report_target.backend, report_target.project or "", results, report_target.server
        )
        with closing(backend), TemporaryDirectory() as folder:
            try:
                locations[mask_secrets(target_text)] = backend.add_page(build(Path(folder)))
            except TrackerError as error:
                errors[mask_secrets(target_text)] = mask_secrets(str(error))
    return locations, errors


def _build_page(
    collected: CollectedCells,
    decisions: Mapping[RecordKey, DecisionsRecord],
    with_private: bool,
    folder: Path,
) -> Page:
    """Write the files of a report to `folder`, and build the page to publish.

    The returned page contains the paths of the files, and tables, charts and a summary.
    """
    extra_frames = {"documents": _document_frames(collected, with_private)}
    page = _write_page(collected, folder / "report.html", decisions)
    files = [
        page,
        *export_report(collected.cells, "parquet", folder, extra_frames, collected.findings),
    ]
    shown_cells = exclude_search_cells(collected.cells, collected.findings, collected.searched)
    return Page(
        files=files,
        tables={name: logged_table(table) for name, table in board_data(collected.cells).items()},
        cells=collected.cells,
        text=f"{summary(shown_cells)}\n\n{board_text(collected.cells)}",
        charts=dict(list(report_figures(shown_cells, collected.findings).items())[:_MAX_CHARTS]),
    )


def board_text(cells: Sequence[CellRecord]) -> str:
    """Write the main result of each model and the rules of the leaderboards as Markdown."""
    answers = (
        f"**{escape_markdown(model)}**: "
        + escape_markdown(
            model_answer(decide_claims(model_cells), part_boards(model_cells), model_cells)
        )
        for model, model_cells in named_models(cells).items()
    )
    return "\n\n".join((*answers, rule("layers"), rule("models"), rule("intervals")))


def _read_target(text: str, projects: Collection[str]) -> Target:
    """Parse a target; without a project in `text`, use the only project in `projects`.

    RequestError is raised if a project is needed and `projects` does not contain exactly one.
    """
    report_target = target(text, "reports")
    if report_target.project is None and len(projects) != 1:
        projects_text = ""
        if projects:
            projects_text = (
                f", and the results belong to several projects: {', '.join(sorted(projects))}"
            )
        raise RequestError(
            f"{mask_secrets(text)!r} does not name a project{projects_text}; write "
            f"{mask_secrets(text)}:PROJECT"
        )
    return replace(report_target, project=report_target.project or next(iter(projects)))
