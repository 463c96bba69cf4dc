"""Find, check, measure, record and publish cells."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from tracker.benchmarks.benchmark import chosen_metric
from tracker.core.answers import statement
from tracker.core.config import CellRequest, Changes
from tracker.core.errors import RequestError, TrackerError
from tracker.core.grouping import grouped
from tracker.core.model_parts import ModelParts
from tracker.core.records import CellRecord
from tracker.core.views import View
from tracker.executors.base import open_executor
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring.derive import record_of
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.prepare import CellLookup, check_layers, check_range, look_up, opened
from tracker.measuring.progress import Progress
from tracker.team.publish import Publication, Publisher

log = logging.getLogger(__name__)


@dataclass
class RunOutcome:
    """Outcome of measuring and publishing cells.

    Attributes:
        cells: The finished cells' records, in the order of the request.
        failed: Cell title → error.
        unpublished: Cell title → reason why a backend does not have it.
        locations: Place → location of the runs.
        models_loaded: Number of times that a model was loaded.
        unwritten: Reason why the report page or the experiment's copy could not be written; empty
            if they were.
        unsaved: Reason why the recommended model could not be saved; empty if it was.
        damaged: Everything else in the results folder that cannot be shown → what to do.
    """

    cells: list[CellRecord] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unpublished: dict[str, str] = field(default_factory=dict)
    locations: dict[str, str] = field(default_factory=dict)
    models_loaded: int = 0
    unwritten: str = ""
    unsaved: str = ""
    damaged: dict[str, str] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """The exit code: 0 = all done, 1 = some of the work failed."""
        return int(bool(self.failed or self.unpublished or self.unwritten or self.unsaved))

    def joined(self, later: RunOutcome) -> RunOutcome:
        """Return the combined outcome of these cells and of later ones."""
        return RunOutcome(
            cells=[*self.cells, *later.cells],
            failed=self.failed | later.failed,
            unpublished=self.unpublished | later.unpublished,
            locations=self.locations | later.locations,
            models_loaded=self.models_loaded + later.models_loaded,
        )


def run_cells(
    requests: Sequence[CellRequest],
    ledger: Ledger,
    publisher: Publisher,
    options: Options,
    progress: Progress,
    explicit: bool = False,
) -> RunOutcome:
    """Measure and publish cells; a failed one does not stop the others.

    Args:
        requests: The cells, equal models next to each other.
        ledger: The results folder.
        publisher: Publishes finished cells to the tracking backends.
        options: The options of the run.
        progress: Receives counts and messages.
        explicit: True if a run requests them, and not only a study or a search.

    Returns:
        The outcome.

    Raises:
        RequestError: A part of a request does not exist or does not fit; nothing was computed or
            written.
    """
    ledger.refuse_unwritable()
    lookups = [look_up(request, ledger, options.trust_remote_code) for request in requests]
    todo = [cell for cell in lookups if not cell.complete]
    for cell in lookups:
        if cell.store is not None:
            chosen_metric(cell.store.identity.benchmark, cell.request.metric)
            check_range(cell.request, ModelParts(cell.store.identity.model.layers))
            cell.store.views.shown_in(cell.request)  # raises if it is not readable
    finisher = _Finisher(publisher, progress, [*requests], explicit)
    if todo:
        progress.say("checking models and benchmarks")
        check_layers(todo)
        jobs = _jobs(todo)
        executor = open_executor(options)
    for cell in lookups:
        if cell.complete and cell.store is not None:
            finisher.done(cell, cell.store)
    report, records = finisher.report, finisher.records
    try:
        if todo:
            to = Reporting(ledger, progress, finisher.begun, finisher.done)
            report.models_loaded = executor.measure(jobs, to)
    except Exception:  # measured cells are published before any error is raised
        finisher.wait()
        raise
    # An interrupt does not wait for an upload: 'tracker sync' completes it.
    finisher.wait()
    found = [records[request] for request in requests if request in records]
    report.cells = list({record.place: record for record in found}.values())
    return report


class _Finisher:
    """Records and publishes cells as they finish, in any order."""

    def __init__(
        self, publisher: Publisher, progress: Progress, requests: list[CellRequest], explicit: bool
    ) -> None:
        self.report = RunOutcome()
        self.records: dict[CellRequest, CellRecord] = {}
        self._publishing: deque[tuple[str, Future[Publication]]] = deque()
        self._publisher = publisher
        self._progress = progress
        self._alone = len(requests) == 1
        self._explicit = explicit
        self._named = named_beside(requests)
        self._shared: set[str] = set()

    def begun(self, cell: CellLookup, store: CellStore) -> None:
        """Show a cell while it is measured."""
        named = cell.request in self._named
        shown = store.views.shown_in(cell.request, named)
        view = store.views.of(cell.request).model_copy(update={"supersedes": shown.supersedes})
        self._publisher.live.begin(cell.request, store, view)

    def done(self, cell: CellLookup, outcome: CellStore | Exception) -> None:
        """Record and publish a finished cell, or report its error."""
        request, title, report = cell.request, cell.request.title, self.report
        failed, named = isinstance(outcome, Exception), request in self._named
        left = self._publisher.live.end(request, "failed" if failed else "finished")
        try:
            if isinstance(outcome, Exception):
                raise outcome
            shown = outcome.views.ask(request, self._publisher.project, named, self._explicit)
            view = outcome.views.of(request)
            if outcome.views.name_of(view) == outcome.views.name_of(shown):
                view = shown.model_copy(update={"runs": view.runs})
            # A backend shows all requested runs of the cell, not only those of this request.
            whole = record_of(outcome, shown)
            record = record_of(outcome, view)
            note = "" if named else _shown_otherwise(view, shown, outcome.views.known(request))
        except Exception as error:  # whatever breaks one cell, the others go on
            if isinstance(error, RequestError) and self._alone:
                raise
            log.debug("%s failed", title, exc_info=True)
            known = isinstance(error, TrackerError)
            report.failed[title] = str(error) if known else f"{type(error).__name__}: {error}"
            self._progress.say(f"{title} failed: {report.failed[title]}")
            return
        self.records[request] = record
        if record.answer is not None:
            self._progress.say(f"{title}: {statement(record.answer)}")
        if note:
            self._progress.say(f"{title}: {note}")
        mine, first = cell.source.name, record.model.name
        if mine != first and mine not in self._shared:
            self._shared.add(mine)
            self._progress.say(
                f"{mine} has the weights of {first}, which is measured here already: they share "
                "their results, under that name"
            )
        self._publishing.append((title, self._publisher.begin(outcome, whole, left)))
        while self._publishing and self._publishing[0][1].done():
            self._take()

    def wait(self) -> None:
        """Wait until publishing of all measured cells has ended."""
        while self._publishing:
            self._take()

    def _take(self) -> None:
        """Report the result of publishing the next cell."""
        title, future = self._publishing.popleft()
        outcome = future.result()
        self.report.locations.update(outcome.places)
        for note in outcome.notes:
            self._progress.say(f"{title}: {note}")
        if outcome.failed:
            self.report.unpublished[title] = outcome.failed
            self._progress.say(f"{title} is measured but not published: {outcome.failed}")


def named_beside(requests: Collection[CellRequest]) -> set[CellRequest]:
    """Find the requests for which another one differs only in having more documents.

    Both are shown, since both numbers were requested.
    """
    sizes = {each: each.documents.size for each in requests if not each.until}

    def alike(request: CellRequest) -> object:
        documents = request.documents.model_copy(update={"limit": None, "sample": None})
        same = replace(request, documents=documents, changes=Changes())
        return same, request.documents.sample is None

    groups = ((same, max(map(sizes.__getitem__, same))) for same in grouped(sizes, alike).values())
    return {request for same, most in groups for request in same if sizes[request] < most}


def _shown_otherwise(asked: View, shown: View, known: Sequence[View]) -> str:
    """Return a note if a request is shown otherwise than requested; else an empty text."""
    if asked.until is None and shown.size > asked.size:
        key, count = ("limit", asked.limit) if asked.seed is None else ("sample", asked.sample)
        all_of = shown.limit or shown.sample
        return (
            f"{all_of or 'all'} documents are known of these runs, and stay shown; to show {count} "
            f"beside them, list both: {key}: {{values: [{count}, {all_of or 'null'}]}}"
        )
    several = [] if shown.until else [view for view in known if view.until is None]
    others = [view.documents_asked for view in several if view.beside != shown.beside]
    return f"shown beside what was asked for before: {'; '.join(others)}" if others else ""


def _jobs(todo: Sequence[CellLookup]) -> list[Job]:
    """Open all benchmarks before anything is measured, and group cells into jobs.

    Cells that differ only in their changed layers become one job.
    """
    jobs: dict[object, Job] = {}
    benchmarks = opened(cell.request for cell in todo)
    for cell, benchmark in zip(todo, benchmarks, strict=True):
        request = cell.request
        # A race ends with its own question; a failed fit must not fail other interventions.
        alike: object = request
        if request.until is None:
            done = request.changes.interventions
            alike = (request.model, request.benchmark, request.documents, done)
        others = jobs[alike].cells if alike in jobs else ()
        jobs[alike] = Job((*others, cell), benchmark)
    return list(jobs.values())
