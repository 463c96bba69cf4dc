"""Publish cells to tracking backends, and record which backend has what."""

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

from tracker.analysis.comparable import row_labels
from tracker.core.changes import Change
from tracker.core.decision_records import PRIVATE
from tracker.core.errors import TrackerError, TrackingError, WorkError
from tracker.core.formats import counted
from tracker.core.provenance import content_hash
from tracker.core.records import INTACT_VIEW, CellRecord
from tracker.core.text import masked
from tracker.ledger.cells import CellStore, measured_last
from tracker.ledger.store import Ledger
from tracker.ledger.texts import is_texts
from tracker.measuring.derive import decisions_of, every_record, record_of
from tracker.report.charts.cells import cell_charts
from tracker.report.wording import cell_answer
from tracker.team.live import Live
from tracker.tracking import (
    default_targets,
    destination,
    file_of,
    in_sweep,
    open_backend,
    open_live_run,
    open_trial,
    places_of,
    remember,
    service,
    sweep_backend,
    target,
    title_of,
)
from tracker.tracking.base import (
    Backend,
    Ending,
    LiveRun,
    Published,
    Target,
    sync_command,
    when_mended,
)
from tracker.tracking.figures import LoggedTable, logged_documents
from tracker.tracking.identity import content_digest
from tracker.tracking.runs import Which, one_by_one

_PATIENCE = 60.0
"""Seconds that publishing a cell waits for its live run to end."""
log = logging.getLogger(__name__)
TEXTS_PUBLIC = "texts of documents are published with it, as of all data of the hub or a package"
TEXTS_ASKED = "texts of documents are published with it, as --publish-documents says"


@dataclass
class Publication:
    """Result of publishing a cell.

    Attributes:
        places: Place → location of the runs.
        done: Place → what was published there.
        failed: Reasons why other places do not have it; empty if all do.
        notes: Further remarks.
    """

    places: dict[str, str] = field(default_factory=dict)
    done: dict[str, Published] = field(default_factory=dict)
    failed: str = ""
    notes: list[str] = field(default_factory=list)


@dataclass
class Synced:
    """Result of a sync.

    Attributes:
        published: Titles of the cells that all their places now have.
        failed: Cell title → reason why a place does not have it.
        locations: Place → location of the runs.
        places: Place → what was published there, one entry per cell.
        notes: Further remarks.
    """

    published: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    locations: dict[str, str] = field(default_factory=dict)
    places: dict[str, list[Published]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Parts:
    """Files and tables that are published with a cell's record.

    Attributes:
        files: The files from which the record is derived.
        tables: Additional tables by name.
        texts: Names of the files with texts of documents.
        note: Message about the texts; empty if there are none.
    """

    files: list[Path]
    tables: dict[str, LoggedTable]
    texts: tuple[str, ...]
    note: str


_Job = tuple[Future[Publication], Callable[[], Publication]]


class Publisher:
    """Publishes cells to some backends, each opened when it is first needed.

    `track` holds the backends as `BACKEND` or `BACKEND:PROJECT`; `project` is the default project.
    Other places of earlier publishing are updated too, unless `track` is empty, `others` is False,
    or this is a sweep's trial. In a sweep, `trial` is W&B's run of the cell. Public texts of
    documents are always published, others with `texts`. `which` selects the cell's runs that are
    published as runs of their own. RequestError is raised for an unknown backend.
    """

    def __init__(
        self,
        track: Sequence[str],
        project: str,
        results: Path,
        texts: bool = False,
        trial: Trial | None = None,
        others: bool | None = None,
        which: Which = "auto",
    ) -> None:
        self._which = which
        self.project = project
        self._others = (bool(track) if others is None else others) and not in_sweep()
        self._away: dict[Target, str] = {}
        self._texts = texts
        self._said: set[str] = set()
        self._targets = list(dict.fromkeys(map(target, track)))
        self._results = results
        self._open: dict[Target, Backend] = {}
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread: Thread | None = None
        live_runs: list[LiveRun] = [trial] if trial is not None and trial.joins else []
        is_shown = bool(live_runs)
        for to in self._targets:
            known = service(to.backend)
            if "live runs" in known.can and not (is_shown and known.sweep_variable):
                live_runs.append(open_live_run(*self._there(to)))
        self.live = Live(tuple(live_runs))

    def begin(
        self, store: CellStore, record: CellRecord, after: Event | None = None
    ) -> Future[Publication]:
        """Publish a cell in a background thread, after those begun before.

        The thread waits for `after`, up to a time limit. In a W&B trial, publishing ends before
        this returns, since the trial's run must end last. The future never raises.
        """
        # The record's files, listed before more of the cell is measured.
        files = _files(store, record)

        def job() -> Publication:
            if after is not None:
                after.wait(_PATIENCE)
            return self._publish(store, record, files, True)

        future: Future[Publication] = Future()
        if in_sweep():
            future.set_result(job())
            return future
        if self._thread is None:
            # A daemon, so that Ctrl-C need not wait for an upload.
            self._thread = Thread(target=self._work, name="tracker-publisher", daemon=True)
            self._thread.start()
        self._jobs.put((future, job))
        return future

    def _work(self) -> None:
        while job := self._jobs.get():
            future, publish = job
            future.set_result(publish())

    def publish(self, store: CellStore, record: CellRecord) -> Publication:
        """Publish a cell after querying the backends for what they have."""
        return self._publish(store, record, _files(store, record), False)

    def _parts(self, store: CellStore, record: CellRecord, files: Sequence[Path]) -> _Parts:
        """Select the files, tables and message that are published with a record."""
        decided = None
        with suppress(OSError, ValueError):  # a view that was never requested
            view = store.views.read(store.views.path(record.view).read_bytes()).view
            decided = decisions_of(store, view)
        texts, note = [path for path in files if is_texts(path)], ""
        if texts:
            public = all(text.public for text in store.texts.read().values())
            note = TEXTS_PUBLIC if public else TEXTS_ASKED if self._texts else PRIVATE
        if note == PRIVATE:
            texts, decided = [], decided and decided.without_texts()
        tables = {} if decided is None else {"documents": logged_documents(decided)}
        kept = [path for path in files if not is_texts(path) or path in texts]
        return _Parts(kept, tables, tuple(path.name for path in texts), note)

    def _publish(
        self, store: CellStore, record: CellRecord, files: Sequence[Path], trust_receipts: bool
    ) -> Publication:
        """Publish a view, and the view that has replaced it in the meantime, if any."""
        publication = self._publish_record(store, record, files, trust_receipts)
        if (view := store.views.superseding(record.view)) is None:
            return publication
        record = record_of(store, view)
        return self._publish_record(store, record, _files(store, record), False)

    def _publish_record(
        self, store: CellStore, record: CellRecord, files: Sequence[Path], trust_receipts: bool
    ) -> Publication:
        """Publish a record; a failing place does not affect the others."""
        record = _told_apart(store, record)
        outcome, errors = Publication(), []
        apart = len(one_by_one(record, self._which))
        if self._targets and not in_sweep() and apart < len(record.runs):
            rest = counted(len(record.runs) - apart, "run")
            outcome.notes.append(f"{rest} are one with their table; --runs all makes one of each")
        asked = {service(to.backend).place_of(to, self.project): to for to in self._targets}
        parts: _Parts | None = None
        charts, answer = None, ""
        for place in [*asked, *self._left(store, record, asked)]:
            title = title_of(place)
            try:
                if trust_receipts and place in self._away:
                    raise TrackingError(self._away[place])
                to = asked.get(place) or service(place.backend).target_of(place, self._results)
                parts = parts or self._parts(store, record, files)
                digest = content_digest(record, *parts.texts, *record.supersedes)
                receipt = store.receipt(self._receipt(to, record.view))
                if trust_receipts and receipt.get("record") == digest:
                    outcome.places[title] = receipt["location"]
                    continue
                if charts is None:
                    charts, answer = cell_charts(record), cell_answer(record)
                if to not in self._open:
                    self._open[to] = open_backend(*self._there(to))
                backend = self._open[to]
                more = (charts, parts.tables, self._which, answer)
                published = backend.publish(record, parts.files, *more)
                outcome.places[title] = published.location
                outcome.done[title] = published
                outcome.notes += published.notes
                if parts.note and parts.note not in self._said:
                    self._said.add(parts.note)
                    outcome.notes.append(parts.note)
                whole = replace(place, project=published.project or place.project)
                kept = {"place": remember(whole, self._results), "view": record.view}
                kept |= {"record": digest, "location": published.location}
                # Named after publishing: the first publish makes the database.
                store.add_receipt(self._receipt(to, record.view), **kept)
            except (Exception, SystemExit) as error:
                log.debug("%s: %s failed", record.title, title, exc_info=True)
                if place in asked:
                    errors.append(self._why(error, _typed(asked[place])))
                    self._owe(store, record, asked[place], place)
                else:
                    why = self._why(error, title)
                    self._away[place] = why
                    errors.append(
                        f"{title}, where it was published before: {why}\nTo leave that place as it "
                        f"is from now on, delete {file_of(place, self._results)}"
                    )
        outcome.failed = "\n".join(errors)
        return outcome

    def _left(
        self, store: CellStore, record: CellRecord, asked: Mapping[Target, Target]
    ) -> list[Target]:
        """List the places of earlier publishing that are not among the current ones."""
        if not self._others:
            return []
        known = places_of(store, record, self._results)
        # W&B completes a project's name; the receipt knows it.
        views = (record.view, *record.supersedes)
        receipts = [store.receipt(self._receipt(to, v)) for to in asked.values() for v in views]
        same = {receipt.get("place") for receipt in receipts}
        return [place for name, place in known.items() if name not in same and place not in asked]

    def _owe(self, store: CellStore, record: CellRecord, to: Target, place: Target) -> None:
        """Record that a place should have a view, and does not have it yet."""
        with suppress(OSError, WorkError):
            name = self._receipt(to, record.view)
            if not store.receipt(name).get("place"):
                kept = {"place": remember(place, self._results), "view": record.view}
                store.add_receipt(name, record="", location="", **kept)

    def _why(self, error: BaseException, to: str) -> str:
        known = isinstance(error, TrackerError)
        said = str(error) if known else masked(f"{type(error).__name__}: {error}")
        if "tracker sync" in said:
            return said
        again = masked(sync_command(self._results.absolute(), to))
        return f"{said}\n{when_mended(again)}"

    def _there(self, to: Target) -> tuple[str, str, Path, str | None]:
        """Return the arguments that open a target: backend, project, results folder, server."""
        return to.backend, to.project or self.project, self._results, to.server

    def _receipt(self, to: Target, view: str) -> str:
        """Return the name of the receipt of one view at one backend."""
        place = destination(*self._there(to))
        return place if view == INTACT_VIEW else content_hash([place, view])

    def close(self) -> None:
        """Release the backends, and cancel publishing that has not started."""
        with suppress(Empty):
            while True:
                self._jobs.get_nowait()
        self._jobs.put(None)
        self.live.close()
        for backend in self._open.values():
            backend.close()


class Trial(LiveRun):
    """The run that a W&B agent opened for this process, if there is one and W&B is tracked.

    It is joined only when there is something to show, so that an unreachable server never stops a
    measurement. `run` is the change that the trial requests.
    """

    def __init__(self, track: Sequence[str], results: Path, run: Change) -> None:
        agent = sweep_backend()
        self.joins = agent is not None and any(target(text).backend == agent for text in track)
        self._run = run
        self._trial = open_trial(results)
        self._busy = Lock()

    @override
    def begin(self, cell: CellRecord) -> None:
        with self._busy:
            self._trial.begin(cell, self._run)

    @override
    def update(self, key: str, figures: Mapping[str, float], step: int) -> None:
        with self._busy:
            self._trial.update(figures)

    @override
    def end(self, key: str, status: Ending) -> None:
        pass  # `log` or `leave` does

    @override
    def close(self) -> None:
        pass  # `log` or `leave` does

    def log(self, cell: CellRecord, more: Mapping[str, float] = {}) -> None:
        """Log the run that the trial requested, with additional figures, and end it.

        TrackingError is raised if W&B refused or could not be reached.
        """
        if self.joins:
            wanted = self._run
            run = next(run for run in cell.runs if run.change == wanted)
            self._done("log", cell, run, dict(more))

    def leave(self, note: str, status: Ending = "finished") -> None:
        """End the run without a measurement, with a note; `status` is its state in the sweep.

        TrackingError is raised if W&B refused or could not be reached.
        """
        if self.joins:
            self._done("end", note, status)

    def fail(self, error: BaseException) -> None:
        """End the run with an error as its note; errors of W&B itself are ignored."""
        status: Ending = "failed" if isinstance(error, Exception) else "killed"
        with suppress(TrackingError):
            self.leave(str(error) or type(error).__name__, status)

    def _done(self, method: str, *arguments: object) -> None:
        if self._busy.acquire(timeout=_PATIENCE):
            self._busy.release()
        else:
            self._trial.close()  # it does not respond: another process ends the run
        with closing(self._trial), self._busy:
            getattr(self._trial, method)(*arguments)


def _told_apart(store: CellStore, record: CellRecord) -> CellRecord:
    """Distinguish a record from others of its folder with the same name in a list of runs."""
    alike = [record]
    for one in store.siblings():
        if one.views.path(record.view).exists():
            about = {name: getattr(one.identity, name) for name in ("key", "model", "benchmark")}
            about["measured"] = measured_last(one.abouts()) or None
            alike.append(record.model_copy(update=about))
    model, more = row_labels(alike, documents=False)[0]
    words = (model.removeprefix(record.model.name).removeprefix(" · "), more)
    return record.model_copy(update={"apart": " · ".join(filter(None, words))})


def _files(store: CellStore, record: CellRecord) -> list[Path]:
    """List the files from which a record and its tables are derived."""
    view = store.views.path(record.view)
    return [store.folder / "cell.json", view, *store.shards(), *store.texts.files()]


def sync(
    ledger: Ledger, to: Sequence[str] | None, texts: bool = False, which: Which = "auto"
) -> Synced:
    """Publish every view that a place lacks, after querying the backends.

    Each of `to` is `BACKEND` or `BACKEND:PROJECT`; the default project is that of the measurement.
    None = every place of earlier publishing, and the default backend if there is none or if the
    environment names a server. `texts` and `which` are as for a `Publisher`.
    """
    ledger.create()
    contents = ledger.contents()
    named = any(service(target(text).backend).server() for text in default_targets())
    begun = [f"not published yet: {cell.folder}: {why}" for cell, why in contents.unfinished]
    synced = Synced(failed=contents.damaged, notes=begun)
    publishers: dict[tuple[str, bool], Publisher] = {}
    for record, store, asked in every_record(contents):
        anew = to is not None or named or not places_of(store, record, ledger.root)
        targets = (default_targets() if to is None else to) if anew else ()
        publisher = publishers.get((asked.project, anew))
        if publisher is None:
            publisher = Publisher(
                targets, asked.project, ledger.root, texts, others=to is None, which=which
            )
            publishers[asked.project, anew] = publisher
        outcome = publisher.publish(store, record)
        synced.locations.update(outcome.places)
        for place, done in outcome.done.items():
            synced.places.setdefault(place, []).append(done)
        synced.notes += [f"{record.title}: {note}" for note in outcome.notes]
        if outcome.failed:
            synced.failed[record.title] = outcome.failed
        else:
            synced.published.append(record.title)
    for publisher in publishers.values():
        publisher.close()
    return synced


def _typed(to: Target) -> str:
    """Return a target in the form in which users type it."""
    server = f"{to.server}/" if to.server else ""
    return f"{to.backend}:{server}{to.project}" if to.project else to.backend
