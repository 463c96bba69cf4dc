"""Write and publish reports over collected cells."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from tracker.analysis.boards import part_boards
from tracker.analysis.claims import claims
from tracker.analysis.comparable import named_models
from tracker.analysis.decisions import decisions
from tracker.core.decision_records import PRIVATE, DecisionsRecord
from tracker.core.errors import RequestError, TrackerError
from tracker.core.records import CellRecord, Place
from tracker.core.text import as_markdown, masked
from tracker.ledger.store import Ledger
from tracker.measuring.derive import every_record
from tracker.report.export import FORMATS, board_data, export, figures
from tracker.report.frames import document_frames
from tracker.report.page.html import render_report
from tracker.report.page.studies import standing_alone
from tracker.report.wording import model_answer, rule, summary
from tracker.team.collect import Collected
from tracker.tracking import open_backend, target
from tracker.tracking.base import Page, Target
from tracker.tracking.figures import logged

_CHARTS = 60
"""Maximum number of charts of a report in a tracking backend."""


def write_report(ledger: Ledger) -> tuple[Path, dict[str, str]]:
    """Write the report page of a results folder, over the cells with measured documents.

    Returns its path, and files of the folder that cannot be shown → what to do.
    """
    contents = ledger.contents()
    collected = Collected(
        experiments=contents.experiments,
        failed=contents.damaged,
        findings=tuple(contents.findings),
        searched=contents.searched,
    )
    for record, store, asked in every_record(contents):
        if record.n:
            collected.cells += (record,)
            collected.origins[record.place] = store, asked.view
    return _page(collected, ledger.root / "report.html", collected.decisions()), collected.failed


def write(collected: Collected, form: str, path: Path) -> list[Path]:
    """Write a report to a file or a folder; `form` is `html` or a key of `FORMATS`.

    RequestError is raised for an unknown form, WorkError if the disk is full or not writable.
    """
    if form == "html":
        return [_page(collected, path, collected.decisions())]
    if form not in FORMATS:
        raise RequestError(f"there is no format {form!r}; use one of: html, {', '.join(FORMATS)}")
    if form in ("csv", "parquet"):
        return export(
            collected.cells, form, path, {"documents": _documents(collected)}, collected.findings
        )
    alone = standing_alone(collected.cells, collected.findings, collected.searched)
    return export(alone, form, path, {}, collected.findings)


def _page(collected: Collected, path: Path, decided: Mapping[Place, DecisionsRecord]) -> Path:
    return render_report(
        *(collected.cells, collected.experiments, path, decided, collected.findings),
        searches=collected.searched,
    )


def _documents(collected: Collected, private: bool = True) -> Iterator[pd.DataFrame]:
    """Yield data frames of documents that runs lose or win, with `private` texts or without."""
    origins = ((cell, collected.origins.get(cell.place)) for cell in collected.cells)
    decided = ((cell, decisions(*origin)) for cell, origin in origins if origin)
    return document_frames(((cell, each) for cell, each in decided if each), private)


def publish(
    collected: Collected, targets: Sequence[str], results: Path, private: bool = False
) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """Publish the page with tables and charts as a run of its own in each `BACKEND:PROJECT`.

    With `private`, texts of documents that are not from the hub or a package are included.
    Returns target → location, target → error, and messages about texts. RequestError is raised for
    an invalid target.
    """
    decided = collected.decisions() if targets else {}
    withheld = [key for key, record in decided.items() if not (record.public or private)]
    decided |= {key: decided[key].without_texts() for key in withheld}
    notes = tuple(f"{cell.title}: {PRIVATE}" for cell in collected.cells if cell.place in withheld)
    locations: dict[str, str] = {}
    failed: dict[str, str] = {}
    for text, to in [(text, _target(text, collected.projects)) for text in targets]:
        backend = open_backend(to.backend, to.project or "", results, to.server)
        with closing(backend), TemporaryDirectory() as folder:
            try:
                page = _published_page(collected, decided, private, Path(folder))
                locations[masked(text)] = backend.add_page(page)
            except TrackerError as error:
                failed[masked(text)] = masked(str(error))
    return locations, failed, notes


def _published_page(
    collected: Collected, decided: Mapping[Place, DecisionsRecord], private: bool, folder: Path
) -> Page:
    """Write a report's files to a folder, and build its tables, charts and summary."""
    more = {"documents": _documents(collected, private)}
    page = _page(collected, folder / "report.html", decided)
    files = [page, *export(collected.cells, "parquet", folder, more, collected.findings)]
    alone = standing_alone(collected.cells, collected.findings, collected.searched)
    return Page(
        files=files,
        tables={name: logged(made) for name, made in board_data(collected.cells).items()},
        cells=collected.cells,
        text=f"{summary(alone)}\n\n{board_text(collected.cells)}",
        charts=dict(list(figures(alone, collected.findings).items())[:_CHARTS]),
    )


def board_text(cells: Sequence[CellRecord]) -> str:
    """Write the answer for each model, and how to read the leaderboards, in Markdown."""
    answers = (
        f"**{as_markdown(model)}**: "
        + as_markdown(model_answer(claims(group), part_boards(group), group))
        for model, group in named_models(cells).items()
    )
    return "\n\n".join((*answers, rule("layers"), rule("models"), rule("intervals")))


def _target(text: str, projects: Collection[str]) -> Target:
    """Read a target; the default project is that of the results."""
    to = target(text, "reports")
    if to.project is None and len(projects) != 1:
        several = f", and the results are of {', '.join(sorted(projects))}" if projects else ""
        raise RequestError(
            f"{masked(text)!r} names no project{several}; write {masked(text)}:PROJECT"
        )
    return replace(to, project=to.project or next(iter(projects)))
