"""Measure requested models on benchmarks; record the results and publish them to trackers."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial

from tracker.benchmarks.base import Benchmark
from tracker.benchmarks.benchmark import choose_metric
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring import prepare
from tracker.measuring.derive import derive_record
from tracker.measuring.executors.base import open_executor
from tracker.measuring.job import Job, Options, Reporting
from tracker.measuring.progress import Progress
from tracker.schema.answers import statement
from tracker.schema.config import CellRequest, Changes
from tracker.schema.errors import ExperimentError, RequestError, TrackerError, attempt
from tracker.schema.grouping import group_by
from tracker.schema.model_parts import ModelParts
from tracker.schema.records import CellRecord
from tracker.schema.views import View
from tracker.team.publish import Publication, Publisher

log = logging.getLogger(__name__)


@dataclass
class RunOutcome:
    """Outcome of measuring models on benchmarks and publishing the results.

    Attributes:
        cells: One record per finished model and benchmark, in the order of the requests.
        failed: Error message for each failed model and benchmark, by title.
        unpublished: Reason for each result that was not published, by title.
        locations: Location of the published runs for each tracking destination.
        models_loaded: Number of times that a model was loaded.
        unwritten: Error message if the report page or the copy of the experiment file could not be
            written, else empty.
        unsaved: Error message if the recommended model could not be saved, else empty.
        damaged: Instruction for each damaged file or folder of the results folder.
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
        """Combine this outcome with the outcome of a later measurement."""
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
    """Measure each model on its benchmark and publish the results; continue after errors.

    Args:
        requests: The requests, each for one model and benchmark. Requests for the same model are
            adjacent.
        ledger: The results folder.
        publisher: Publisher of finished results to the tracking backends.
        options: Options of the measurement, such as the device.
        progress: Receiver of counts and messages.
        explicit: Whether an experiment requests these results, and not only a study or a search.

    Returns:
        The records, errors and locations of the published runs.

    Raises:
        RequestError: A requested model, layer, metric, etc. does not exist. The error is raised
            before anything is computed or written.
    """
    ledger.refuse_unwritable()
    if not explicit and any(request.clusters for request in requests):
        raise ExperimentError(
            "studies and searches do not support the setting 'cluster', because they treat "
            "documents as independent. Leave cluster out, or use tracker run"
        )
    requests = prepare.with_clusters(requests)
    lookups = [
        prepare.find_cell(request, ledger, options.trust_remote_code) for request in requests
    ]
    unfinished_cells = [cell for cell in lookups if not cell.complete]
    for cell in lookups:
        if cell.store is not None:
            choose_metric(cell.store.identity.benchmark, cell.request.metric)
            prepare.check_possible(cell.request, ModelParts(cell.store.identity.model.layers))
            cell.store.views.display_view(cell.request)  # raises if it is not readable
    finisher = _Finisher(publisher, progress, [*requests], explicit)
    if unfinished_cells:
        progress.say("checking models and benchmarks")
        prepare.check_layers(unfinished_cells)
        jobs = _build_jobs(unfinished_cells)
        executor = open_executor(options)
    unobserved: list[tuple[prepare.CellLookup, CellStore]] = []

    def end(cell: prepare.CellLookup, outcome: CellStore | Exception) -> None:
        if cell.request.observe and isinstance(outcome, CellStore):
            unobserved.append((cell, outcome))
        else:
            finisher.finish(cell, outcome)

    for cell in lookups:
        if cell.complete and cell.store is not None:
            end(cell, cell.store)
    report, records = finisher.report, finisher.records
    try:
        if unfinished_cells:
            reporting = Reporting(ledger, progress, finisher.begin, end)
            report.models_loaded = executor.measure(jobs, reporting)
        # Only now, because the executor keeps a model in memory.
        for cell, store in unobserved:
            from tracker.measuring.observing import observe_divergences

            observe = partial(observe_divergences, cell.request, store, ledger, options, progress)
            finisher.finish(cell, attempt(observe))
    except Exception:  # measured cells are published before any error is raised
        finisher.wait()
        raise
    # An interrupt does not wait for an upload: 'tracker sync' completes it.
    finisher.wait()
    cell_records = [records[request] for request in requests if request in records]
    report.cells = list({record.record_key: record for record in cell_records}.values())
    return report


class _Finisher:
    """Object that records and publishes results when measurements finish."""

    def __init__(
        self, publisher: Publisher, progress: Progress, requests: list[CellRequest], explicit: bool
    ) -> None:
        self.report = RunOutcome()
        self.records: dict[CellRequest, CellRecord] = {}
        self._publishing: deque[tuple[str, Future[Publication]]] = deque()
        self._publisher = publisher
        self._progress = progress
        self._is_single = len(requests) == 1
        self._explicit = explicit
        self._smaller = find_smaller_requests(requests)
        self._shared_names: set[str] = set()

    def begin(self, cell: prepare.CellLookup, store: CellStore) -> None:
        """Announce to the tracking backends that a measurement begins."""
        request, views = cell.request, store.views
        names = views.display_view(request, request in self._smaller).supersedes
        view = views.view_of(request).model_copy(update={"supersedes": names})
        self._publisher.live.begin(request, store, view)

    def finish(self, cell: prepare.CellLookup, outcome: CellStore | Exception) -> None:
        """Record and publish the results of a finished measurement, or report its error."""
        request, title, report = cell.request, cell.request.title, self.report
        has_failed, is_named = isinstance(outcome, Exception), request in self._smaller
        live_runs = self._publisher.live.end(request, "failed" if has_failed else "finished")
        try:
            if isinstance(outcome, Exception):
                raise outcome
            views, project = outcome.views, self._publisher.project
            shown_view = views.add_request(request, project, is_named, self._explicit)
            view = views.view_of(request)
            if views.view_name(view) == views.view_name(shown_view):
                view = shown_view.model_copy(update={"runs": view.runs})
            # A backend shows all requested runs of the cell, not only those of this request.
            shown_record = derive_record(outcome, shown_view)
            record = derive_record(outcome, view)
            note = "" if is_named else _view_note(view, shown_view, views.related_views(view))
        except Exception as error:  # whatever breaks one cell, the others go on
            if isinstance(error, RequestError) and self._is_single:
                raise
            log.debug("%s failed", title, exc_info=True)
            is_expected = isinstance(error, TrackerError)
            report.failed[title] = str(error) if is_expected else f"{type(error).__name__}: {error}"
            self._progress.say(f"{title} failed: {report.failed[title]}")
            return
        self.records[request] = record
        if record.answer is not None:
            self._progress.say(f"{title}: {statement(record.answer)}")
        if note:
            self._progress.say(f"{title}: {note}")
        own_name, first_name = cell.source.name, record.model.name
        if own_name != first_name and own_name not in self._shared_names:
            self._shared_names.add(own_name)
            self._progress.say(
                f"{own_name} and {first_name} have the same weights; the results of both models "
                f"are shown as {first_name}"
            )
        self._publishing.append((title, self._publisher.begin(outcome, shown_record, live_runs)))
        while self._publishing and self._publishing[0][1].done():
            self._report_oldest_upload()

    def wait(self) -> None:
        """Wait until all measured results have been published."""
        while self._publishing:
            self._report_oldest_upload()

    def _report_oldest_upload(self) -> None:
        """Wait until the oldest upload has ended, and report its result."""
        title, future = self._publishing.popleft()
        outcome = future.result()
        self.report.locations.update(outcome.locations)
        for note in outcome.notes:
            self._progress.say(f"{title}: {note}")
        if outcome.error:
            self.report.unpublished[title] = outcome.error
            self._progress.say(f"{title} is measured but not published: {outcome.error}")


def find_smaller_requests(requests: Collection[CellRequest]) -> set[CellRequest]:
    """Find requests for fewer documents than another request for the same model and benchmark.

    Reports show the results of both requests.
    """
    candidates = [request for request in requests if not request.until]

    def group_key(request: CellRequest) -> object:
        documents = request.documents.model_copy(update={"limit": None, "sample": None})
        template = replace(request, documents=documents, changes=Changes())
        return template, request.documents.sample is None

    groups = group_by(candidates, group_key).values()
    largest = ((group, max(request.documents.size for request in group)) for group in groups)
    return {request for group, n in largest for request in group if request.documents.size < n}


def _view_note(view: View, shown_view: View, related_views: Sequence[View]) -> str:
    """Return a note if reports show more documents or runs than requested; else "".

    A view is a selection of runs and documents. `view` is the requested view; `shown_view` is the
    view in reports. `related_views` are earlier requests for the same model and benchmark.
    """
    if view.until is None and shown_view.size > view.size:
        key, count = ("limit", view.limit) if view.seed is None else ("sample", view.sample)
        size = shown_view.limit or shown_view.sample
        return (
            f"reports show earlier results on {size or 'all'} documents, not the results on "
            f"{count} documents. To show both, set {key}: {{values: [{count}, {size or 'null'}]}}"
        )
    others = [other for other in related_views if other.until is None and not shown_view.until]
    texts = [other.request_text for other in others if other.beside != shown_view.beside]
    if not texts:
        return ""
    return f"reports also show the results of earlier requests: {'; '.join(texts)}"


def _build_jobs(cells: Sequence[prepare.CellLookup]) -> list[Job]:
    """Open the benchmarks of all requests, and group the requests into jobs.

    A job is a group of requests that are measured together. Requests form one job if only their
    changed layers are different and no request has a stopping rule.
    """

    def group_key(pair: tuple[prepare.CellLookup, Benchmark]) -> object:
        request = pair[0].request
        if request.until is not None:  # a race ends with its own question
            return request
        # A failed fit must not fail other interventions.
        return request.model, request.benchmark, request.documents, request.changes.interventions

    benchmarks = prepare.open_benchmarks(cell.request for cell in cells)
    groups = group_by(zip(cells, benchmarks, strict=True), group_key).values()
    return [Job(tuple(cell for cell, _ in group), group[-1][1]) for group in groups]
