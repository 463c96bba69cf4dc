"""Writing and publishing reports and leaderboards over collected cells."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import pandas as pd

from tracker.core.decision_records import PRIVATE, DecisionsRecord
from tracker.core.errors import RequestError, TrackerError
from tracker.core.records import CellRecord, Place
from tracker.core.text import masked
from tracker.ledger.decisions import decisions
from tracker.ledger.store import Ledger
from tracker.measuring.derive import every_record
from tracker.report.export import FORMATS, export, figures
from tracker.report.frames import document_frames
from tracker.report.page.html import render_report
from tracker.report.page.studies import standing_alone
from tracker.report.wording import summary
from tracker.team.collect import Collected, merged
from tracker.team.leaderboard import board_tables, board_text, publish_board
from tracker.tracking import open_backend, target
from tracker.tracking.base import Page, Pages, Target

_CHARTS = 60
"""A page of a tracking backend with more charts than this is not looked at."""


def write_report(ledger: Ledger) -> tuple[Path, dict[str, str]]:
    """Write the page of a results folder, over the cells with a measured document.

    With its path comes what of the folder it cannot show → what to do.
    """
    contents = ledger.contents()
    found = Collected(
        experiments=contents.experiments,
        failed=contents.damaged,
        findings=tuple(contents.findings),
        searched=contents.searched,
    )
    for record, store, asked in every_record(contents):
        if record.n:
            found.cells += (record,)
            found.origins[record.place] = store, asked.view
    return _page(found, ledger.root / "report.html", found.decisions()), found.failed


def write(found: Collected, form: str, path: Path) -> list[Path]:
    """Write a report to a file or a folder, as its form asks: `html`, or a key of `FORMATS`.

    RequestError if there is no such form, WorkError if the disk is full or refuses.
    """
    if form == "html":
        return [_page(found, path, found.decisions())]
    if form not in FORMATS:
        raise RequestError(f"there is no format {form!r}; use one of: html, {', '.join(FORMATS)}")
    if form in ("csv", "parquet"):
        return export(found.cells, form, path, {"documents": _documents(found)}, found.findings)
    alone = standing_alone(found.cells, found.findings, found.searched)
    return export(alone, form, path, {}, found.findings)


def _page(found: Collected, path: Path, decided: Mapping[Place, DecisionsRecord]) -> Path:
    return render_report(
        *(found.cells, found.experiments, path, decided, found.findings), searches=found.searched
    )


def _documents(found: Collected, private: bool = True) -> Iterator[pd.DataFrame]:
    """Yield every document that a run loses or wins; `private` texts are not public."""
    origins = ((cell, found.origins.get(cell.place)) for cell in found.cells)
    decided = ((cell, decisions(*origin)) for cell, origin in origins if origin)
    return document_frames(((cell, each) for cell, each in decided if each), private)


def publish(
    found: Collected, targets: Sequence[str], results: Path, private: bool = False
) -> tuple[dict[str, str], dict[str, str], tuple[str, ...]]:
    """Publish the page, with tables and charts, as a run of its own in each `BACKEND:PROJECT`.

    `private` says whether texts of documents go with it that are not of the hub or a package.
    Target → where to look; target → why not; and what is said of texts. RequestError if a target
    is none.
    """
    decided = found.decisions() if targets else {}
    kept = [place for place, each in decided.items() if not (each.public or private)]
    decided |= {place: decided[place].without_texts() for place in kept}
    notes = tuple(f"{cell.title}: {PRIVATE}" for cell in found.cells if cell.place in kept)
    locations: dict[str, str] = {}
    failed: dict[str, str] = {}
    for text, to in [(text, _target(text, found.projects)) for text in targets]:
        with TemporaryDirectory() as folder, _pages(text, to, results, failed) as backend:
            path = Path(folder) / "report.html"
            page = _page(found, path, decided)
            more = {"documents": _documents(found, private)}
            files = [page, *export(found.cells, "parquet", Path(folder), more, found.findings)]
            alone = standing_alone(found.cells, found.findings, found.searched)
            charts = dict(list(figures(alone, found.findings).items())[:_CHARTS])
            says = f"{summary(alone)}\n\n{board_text(found.cells)}"
            tables = board_tables(found.cells)
            report = Page("report", files, tables, found.cells, says, charts)
            locations[masked(text)] = backend.add_page(report)
    return locations, failed, notes


def join_boards(
    found: Collected, targets: Sequence[str], results: Path
) -> tuple[list[CellRecord], dict[str, str], dict[str, str]]:
    """Add cells to the leaderboards of tracking projects, each as `BACKEND` or `BACKEND:PROJECT`.

    Returned are these cells and all others on those leaderboards, which are records without
    outcomes: none is put together from several; target → where to look, for those that have
    changed; and target → why not. RequestError if a target is none.
    """
    locations: dict[str, str] = {}
    failed: dict[str, str] = {}
    every = list(found.cells)
    for text, to in [(text, _target(text, found.projects)) for text in targets]:
        with _pages(text, to, results, failed) as backend:
            board, locations[masked(text)] = publish_board(backend, found.cells)
            every += board.cells
    return merged(every), {text: place for text, place in locations.items() if place}, failed


def _target(text: str, projects: Collection[str]) -> Target:
    """Read a target; without a project it is the one that the results were measured for."""
    to = target(text, "reports and leaderboards")
    if to.project is None and len(projects) != 1:
        several = f", and the results are of {', '.join(sorted(projects))}" if projects else ""
        raise RequestError(
            f"{masked(text)!r} names no project{several}; write {masked(text)}:PROJECT"
        )
    return replace(to, project=to.project or next(iter(projects)))


@contextmanager
def _pages(text: str, to: Target, results: Path, failed: dict[str, str]) -> Iterator[Pages]:
    """Open the pages of a target; what goes wrong meanwhile is in `failed`, and nothing else."""
    backend = open_backend(to.backend, to.project or "", results, to.server)
    with closing(cast(Pages, backend)) as pages:
        try:
            yield pages
        except TrackerError as error:
            failed[masked(text)] = masked(str(error))
