"""Publish results to tracking backends, and store which results each backend already has."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread

from typing_extensions import override

from tracker import tracking
from tracker.analysis.comparable import row_labels
from tracker.ledger.cells import CellStore, last_measured
from tracker.ledger.store import Ledger
from tracker.ledger.texts import is_text_file
from tracker.measuring.derive import derive_record, derive_records, read_decisions
from tracker.report.charts.cells import cell_charts
from tracker.report.wording import cell_answer
from tracker.schema.changes import Change
from tracker.schema.errors import TrackerError, TrackingError, WorkError
from tracker.schema.formats import count_text
from tracker.schema.provenance import content_hash
from tracker.schema.records import INTACT_VIEW, PRIVATE_TEXTS, CellRecord
from tracker.schema.text import mask_secrets
from tracker.team.live import LiveUpdater
from tracker.tracking import target as parse_target
from tracker.tracking.base import (
    Backend,
    LiveRun,
    Published,
    RunStatus,
    Target,
    retry_advice,
    sync_command,
)
from tracker.tracking.figures import LoggedTable, logged_documents
from tracker.tracking.identity import content_digest
from tracker.tracking.runs import RunSelection, individual_runs

_LIVE_TIMEOUT = 60.0
"""Maximum number of seconds that publishing waits for the end of a cell's live run."""
log = logging.getLogger(__name__)
PUBLIC_TEXTS_NOTE = "document texts from the hub or from a package are published too"
REQUESTED_TEXTS_NOTE = "document texts are published too, because --publish-documents is set"


@dataclass
class Publication:
    """Result of publishing one model and benchmark to several tracking projects.

    Attributes:
        locations: Project of a backend, as `BACKEND:PROJECT` → address of the published runs.
        published: Project of a backend → numbers of created, updated and unchanged runs.
        error: Text with a message for each project to which publishing failed; empty if none
            failed.
        notes: Further remarks for the user.
    """

    locations: dict[str, str] = field(default_factory=dict)
    published: dict[str, Published] = field(default_factory=dict)
    error: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass
class SyncResult:
    """Result of publishing everything in a results folder that the tracking backends lack.

    Attributes:
        published: Titles of the cells that were published without any error.
        failed: Title of a cell → reason why publishing the cell failed.
        locations: Project of a backend, as `BACKEND:PROJECT` → address of the published runs.
        places: Project of a backend → one entry for each cell, with the numbers of created, updated
            and unchanged runs.
        notes: Further remarks for the user.
    """

    published: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    locations: dict[str, str] = field(default_factory=dict)
    places: dict[str, list[Published]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Attachments:
    """Files and tables that are published together with the results of a model and benchmark.

    Attributes:
        files: Files to publish: outcomes and, if allowed, document texts.
        tables: Name → additional table, such as `documents`.
        texts: Names of the files that contain texts of documents.
        note: Message that tells the user whether document texts are published; empty if the cell
            has no texts.
    """

    files: list[Path]
    tables: dict[str, LoggedTable]
    texts: tuple[str, ...]
    note: str


_Job = tuple[Future[Publication], Callable[[], Publication]]


class Publisher:
    """Publisher of results to tracking backends, which opens each backend on first use.

    `track` lists backends as `BACKEND` or `BACKEND:PROJECT`; `project` is the default project. If
    `update_others` is true, other projects with earlier versions of the results are also
    updated. By default, `update_others` is true unless `track` is empty. In a sweep, `trial` is the
    W&B run of the trial, and other projects are not updated. Document texts from
    public sources are always published. Other document texts are published only if `publish_texts`
    is true. `run_selection` selects the ablations that become separate runs in the backend.
    RequestError is raised for an unknown backend.
    """

    def __init__(
        self,
        track: Sequence[str],
        project: str,
        results: Path,
        publish_texts: bool = False,
        trial: Trial | None = None,
        update_others: bool | None = None,
        run_selection: RunSelection = "auto",
    ) -> None:
        self._run_selection = run_selection
        self.project = project
        others = bool(track) if update_others is None else update_others
        self._update_others = others and not tracking.in_sweep()
        self._unreachable: dict[Target, str] = {}
        self._publish_texts = publish_texts
        self._shown_notes: set[str] = set()
        self._targets = list(dict.fromkeys(map(parse_target, track)))
        self._results = results
        self._backends: dict[Target, Backend] = {}
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread: Thread | None = None
        live_runs: list[LiveRun] = [trial] if trial is not None and trial.is_tracked else []
        is_shown = bool(live_runs)
        for target in self._targets:
            backend = tracking.service(target.backend)
            if "live runs" in backend.can and not (is_shown and backend.sweep_variable):
                live_runs.append(tracking.open_live_run(*self._backend_arguments(target)))
        self.live = LiveUpdater(tuple(live_runs))

    def begin(
        self, store: CellStore, record: CellRecord, ended: Event | None = None
    ) -> Future[Publication]:
        """Publish results in a background thread, after the results of earlier calls.

        The thread first waits (at most 60 seconds) for `ended`, the end of the live runs. In a
        trial of a W&B sweep, the results are published before the method returns. The future never
        raises an exception.
        """
        # The record's files, listed before more of the cell is measured.
        files = _record_files(store, record)

        def publish_cell() -> Publication:
            if ended is not None:
                ended.wait(_LIVE_TIMEOUT)
            return self._publish(store, record, files, True)

        future: Future[Publication] = Future()
        if tracking.in_sweep():
            future.set_result(publish_cell())
            return future
        if self._thread is None:
            # A daemon, so that Ctrl-C need not wait for an upload.
            self._thread = Thread(target=self._run_jobs, name="tracker-publisher", daemon=True)
            self._thread.start()
        self._jobs.put((future, publish_cell))
        return future

    def _run_jobs(self) -> None:
        while job := self._jobs.get():
            future, publish = job
            future.set_result(publish())

    def publish(self, store: CellStore, record: CellRecord) -> Publication:
        """Publish results to all projects, even to those that already have the results."""
        return self._publish(store, record, _record_files(store, record), False)

    def _build_attachments(
        self, store: CellStore, record: CellRecord, files: Sequence[Path]
    ) -> _Attachments:
        """Choose files and tables to publish, with a note whether document texts are included."""
        decisions = None
        with suppress(OSError, ValueError):  # a view that was never requested
            view = store.views.read(store.views.path(record.view).read_bytes()).view
            decisions = read_decisions(store, view)
        texts, note = [path for path in files if is_text_file(path)], ""
        if texts:
            is_public = all(text.public for text in store.texts.read().values())
            note = REQUESTED_TEXTS_NOTE if self._publish_texts else PRIVATE_TEXTS
            note = PUBLIC_TEXTS_NOTE if is_public else note
        if note == PRIVATE_TEXTS:
            texts, decisions = [], decisions and decisions.without_texts()
        tables = {} if decisions is None else {"documents": logged_documents(decisions)}
        published_paths = [path for path in files if not is_text_file(path) or path in texts]
        return _Attachments(published_paths, tables, tuple(path.name for path in texts), note)

    def _publish(
        self, store: CellStore, record: CellRecord, files: Sequence[Path], trust_receipts: bool
    ) -> Publication:
        """Publish the results in `record` to all projects.

        A receipt is a stored note about a publication to a project. With `trust_receipts`, a
        project is skipped if its receipt names the results. If a larger measurement has replaced
        `record` in reports, the results of the larger measurement are published too.
        """
        publication = self._publish_record(store, record, files, trust_receipts)
        if (view := store.views.superseding_view(record.view)) is None:
            return publication
        record = derive_record(store, view)
        return self._publish_record(store, record, _record_files(store, record), False)

    def _publish_record(
        self, store: CellStore, record: CellRecord, files: Sequence[Path], trust_receipts: bool
    ) -> Publication:
        """Publish results to each project; continue with the other projects after a failure."""
        record = _distinguish_record(store, record)
        outcome, errors = Publication(), []
        n_joined = len(record.runs) - len(individual_runs(record, self._run_selection))
        if self._targets and not tracking.in_sweep() and n_joined:
            ablations = count_text(n_joined, "ablation")
            note = f"one run lists {ablations} in a table; for separate runs, add --runs all"
            outcome.notes.append(note)
        targets = {
            tracking.service(target.backend).full_address(target, self.project): target
            for target in self._targets
        }
        attachments: _Attachments | None = None
        charts, answer = None, ""
        for address in [*targets, *self._earlier_targets(store, record, targets)]:
            title = tracking.typed_address(address)
            try:
                if trust_receipts and address in self._unreachable:
                    raise TrackingError(self._unreachable[address])
                target = targets.get(address)
                target = target or tracking.service(address.backend).reachable_target(
                    address, self._results
                )
                attachments = attachments or self._build_attachments(store, record, files)
                digest = content_digest(record, *attachments.texts, *record.supersedes)
                receipt = store.receipt(self._receipt_name(target, record.view))
                if trust_receipts and receipt.get("record") == digest:
                    outcome.locations[title] = receipt["location"]
                    continue
                if charts is None:
                    charts, answer = cell_charts(record), cell_answer(record)
                if target not in self._backends:
                    self._backends[target] = tracking.open_backend(*self._backend_arguments(target))
                backend = self._backends[target]
                extras = (charts, attachments.tables, self._run_selection, answer)
                published = backend.publish(record, attachments.files, *extras)
                outcome.locations[title] = published.location
                outcome.published[title] = published
                outcome.notes += published.notes
                if attachments.note and attachments.note not in self._shown_notes:
                    self._shown_notes.add(attachments.note)
                    outcome.notes.append(attachments.note)
                actual_address = replace(address, project=published.project or address.project)
                address_text = tracking.write_address(actual_address, self._results)
                fields = {"place": address_text, "view": record.view}
                fields |= {"record": digest, "location": published.location}
                # Named after publishing: the first publish makes the database.
                store.add_receipt(self._receipt_name(target, record.view), **fields)
            except (Exception, SystemExit) as error:
                log.debug("%s: %s failed", record.title, title, exc_info=True)
                if address in targets:
                    target = targets[address]
                    errors.append(self._failure_message(error, _target_text(target)))
                    self._record_pending(store, record, target, address)
                else:
                    message = self._failure_message(error, title)
                    self._unreachable[address] = message
                    file = tracking.address_file(address, self._results)
                    errors.append(
                        f"{title} contains earlier results and could not be updated: {message}\n"
                        f"To stop updating this project, delete {file}"
                    )
        outcome.error = "\n".join(errors)
        return outcome

    def _earlier_targets(
        self, store: CellStore, record: CellRecord, targets: Mapping[Target, Target]
    ) -> list[Target]:
        """List the projects outside `targets` that have earlier versions of the results.

        The list is empty if `update_others` is false.
        """
        if not self._update_others:
            return []
        earlier = tracking.published_targets(store, record, self._results)
        # W&B completes a project's name; the receipt knows it.
        views = (record.view, *record.supersedes)
        names = [self._receipt_name(target, v) for target in targets.values() for v in views]
        current = {store.receipt(name).get("place") for name in names}
        return [a for name, a in earlier.items() if name not in current and a not in targets]

    def _record_pending(
        self, store: CellStore, record: CellRecord, target: Target, address: Target
    ) -> None:
        """Write a note in the results folder that results must still be published to a project.

        `target` is the project as the user typed it, and `address` is the full address.
        """
        with suppress(OSError, WorkError):
            name = self._receipt_name(target, record.view)
            if not store.receipt(name).get("place"):
                address_text = tracking.write_address(address, self._results)
                fields = {"record": "", "location": "", "place": address_text}
                store.add_receipt(name, view=record.view, **fields)

    def _failure_message(self, error: BaseException, target_text: str) -> str:
        is_expected = isinstance(error, TrackerError)
        message = str(error) if is_expected else mask_secrets(f"{type(error).__name__}: {error}")
        if "tracker sync" in message:
            return message
        command = mask_secrets(sync_command(self._results.absolute(), target_text))
        return f"{message}\n{retry_advice(command)}"

    def _backend_arguments(self, target: Target) -> tuple[str, str, Path, str | None]:
        """Return the arguments of `open_backend`: backend, project, results folder, server."""
        return target.backend, target.project or self.project, self._results, target.server

    def _receipt_name(self, target: Target, view: str) -> str:
        """Return the name of the receipt, the stored note about publishing `view` to `target`."""
        name = tracking.destination_hash(*self._backend_arguments(target))
        return name if view == INTACT_VIEW else content_hash([name, view])

    def close(self) -> None:
        """Close the backends, and cancel publications that have not started."""
        with suppress(Empty):
            while True:
                self._jobs.get_nowait()
        self._jobs.put(None)
        self.live.close()
        for backend in self._backends.values():
            backend.close()


class Trial(LiveRun):
    """The W&B run of a sweep's trial.

    No run is written outside a sweep, or if `track` does not contain W&B. W&B is contacted only
    when there are results to show. The trial measures the change `run`, e.g. a removed layer.
    """

    def __init__(self, track: Sequence[str], results: Path, run: Change) -> None:
        agent = tracking.sweep_backend()
        self.is_tracked = agent is not None and any(
            parse_target(text).backend == agent for text in track
        )
        self._run = run
        self._trial = tracking.open_trial(results)
        self._lock = Lock()

    @override
    def begin(self, cell: CellRecord) -> None:
        with self._lock:
            self._trial.begin(cell, self._run)

    @override
    def update(self, key: str, figures: Mapping[str, float], step: int) -> None:
        with self._lock:
            self._trial.update(figures)

    @override
    def end(self, key: str, status: RunStatus) -> None:
        pass  # `log` or `end_unmeasured` does

    @override
    def close(self) -> None:
        pass  # `log` or `end_unmeasured` does

    def log(self, cell: CellRecord, extra_figures: Mapping[str, float] = {}) -> None:
        """Log the results of the trial with additional metrics, and end the W&B run.

        TrackingError is raised if W&B refuses the results or cannot be reached.
        """
        if self.is_tracked:
            change = self._run
            run = next(run for run in cell.runs if run.change == change)
            self._end_run("log", cell, run, dict(extra_figures))

    def end_unmeasured(self, note: str, status: RunStatus = "finished") -> None:
        """End the W&B run without results; set the run's note, and its status in the sweep.

        TrackingError is raised if W&B refuses the update or cannot be reached.
        """
        if self.is_tracked:
            self._end_run("end", note, status)

    def fail(self, error: BaseException) -> None:
        """End the W&B run as failed or killed, with the error as note; ignore errors of W&B."""
        status: RunStatus = "failed" if isinstance(error, Exception) else "killed"
        with suppress(TrackingError):
            self.end_unmeasured(str(error) or type(error).__name__, status)

    def _end_run(self, method: str, *arguments: object) -> None:
        if self._lock.acquire(timeout=_LIVE_TIMEOUT):
            self._lock.release()
        else:
            self._trial.close()  # it does not respond: another process ends the run
        with closing(self._trial), self._lock:
            getattr(self._trial, method)(*arguments)


def _distinguish_record(store: CellStore, record: CellRecord) -> CellRecord:
    """Return a copy of the record with a suffix that makes its display name unique.

    The field `apart` contains the suffix. The suffix is empty if no other results in the folder
    have the same name.
    """
    records = [record]
    for sibling in store.siblings():
        if sibling.views.path(record.view).exists():
            identity = sibling.identity
            fields = {name: getattr(identity, name) for name in ("key", "model", "benchmark")}
            fields["measured"] = last_measured(sibling.all_metadata()) or None
            records.append(record.model_copy(update=fields))
    model, details = row_labels(records, documents=False)[0]
    parts = (model.removeprefix(record.model.name).removeprefix(" · "), details)
    return record.model_copy(update={"apart": " · ".join(filter(None, parts))})


def _record_files(store: CellStore, record: CellRecord) -> list[Path]:
    """List the files from which published results and tables are computed."""
    view = store.views.path(record.view)
    return [store.folder / "cell.json", view, *store.shards(), *store.texts.files()]


def sync_ledger(
    ledger: Ledger,
    addresses: Sequence[str] | None,
    publish_texts: bool = False,
    run_selection: RunSelection = "auto",
) -> SyncResult:
    """Publish those results of a results folder that the tracking backends lack.

    Each entry of `addresses` is `BACKEND` or `BACKEND:PROJECT`; the default project is that of the
    experiment file. If `addresses` is None, published results are updated in the projects that have
    them. Other results are published to the default backend. If the environment names a server of
    the default backend, all results are published to this server too. `publish_texts` and
    `run_selection` have the same meaning as in `Publisher`.
    """
    ledger.create()
    contents = ledger.contents()
    has_server = any(
        tracking.service(parse_target(text).backend).server() for text in tracking.default_targets()
    )
    notes = [f"not published yet: {cell.folder}: {advice}" for cell, advice in contents.unfinished]
    synced = SyncResult(failed=contents.damaged, notes=notes)
    publishers: dict[tuple[str, bool], Publisher] = {}
    targets = tracking.default_targets() if addresses is None else addresses
    has_own_targets = addresses is not None or has_server
    for record, store, request in derive_records(contents):
        has_targets = has_own_targets or not tracking.published_targets(store, record, ledger.root)
        key = request.project, has_targets
        if key not in publishers:
            publishers[key] = Publisher(
                targets if has_targets else (),
                request.project,
                ledger.root,
                publish_texts,
                update_others=addresses is None,
                run_selection=run_selection,
            )
        publisher = publishers[key]
        outcome = publisher.publish(store, record)
        synced.locations.update(outcome.locations)
        for title, published in outcome.published.items():
            synced.places.setdefault(title, []).append(published)
        synced.notes += [f"{record.title}: {note}" for note in outcome.notes]
        if outcome.error:
            synced.failed[record.title] = outcome.error
        else:
            synced.published.append(record.title)
    for publisher in publishers.values():
        publisher.close()
    return synced


def _target_text(target: Target) -> str:
    """Format a target as users type it on the command line: `BACKEND:SERVER/PROJECT`."""
    server = f"{target.server}/" if target.server else ""
    return f"{target.backend}:{server}{target.project}" if target.project else target.backend
