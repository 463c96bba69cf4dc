"""Handing finished cells to the tracking backends, and remembering which has what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tracker.config import CellRequest
from tracker.errors import TrackingError
from tracker.ledger.store import CellStore, Ledger
from tracker.provenance import content_hash
from tracker.records import INTACT_VIEW, CellRecord
from tracker.report.charts.cells import cell_charts
from tracker.runner.derive import record_of
from tracker.tracking import (
    Target,
    destination,
    end_trial,
    in_sweep,
    log_trial,
    open_backend,
    target,
)
from tracker.tracking.base import Backend, content_digest


@dataclass
class Synced:
    """What a sync did.

    Attributes:
        published: Titles of the cells that the backends now have.
        failed: Cell title → why a backend does not have it.
        locations: Backend → where the runs can be seen.
    """

    published: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    locations: dict[str, str] = field(default_factory=dict)


class Publisher:
    """Publishes cells to some backends, each opened when it is first needed.

    Args:
        track: The backends, each as `BACKEND` or `BACKEND:PROJECT`.
        project: The project of those that name none.
        results: The results folder.

    Attributes:
        project: The project of those that name none.

    Raises:
        RequestError: There is no such backend.
    """

    def __init__(self, track: Sequence[str], project: str, results: Path) -> None:
        self.project = project
        self._targets = [target(text) for text in dict.fromkeys(track)]
        self._results = results
        self._open: dict[Target, Backend] = {}

    def publish(
        self, store: CellStore, record: CellRecord, trust_receipts: bool = True
    ) -> tuple[dict[str, str], str]:
        """Publish a cell; what one backend refuses does not keep the others from it.

        Args:
            store: The cell on disk.
            record: What to publish.
            trust_receipts: Whether a backend is left alone when the ledger holds its receipt for
                the same content; otherwise it is asked what it has.

        Returns:
            Backend → where the runs can be seen, and why others do not have them; empty when all
            do.
        """
        places, errors = {}, []
        digest = content_digest(record)
        for to in self._targets:
            receipt = store.receipt(self._receipt(to, record))
            if trust_receipts and receipt.get("digest") == digest:
                places[to.backend] = receipt["location"]
                continue
            try:
                published = self._backend(to).publish(
                    record, _artifacts(store, record), cell_charts(record)
                )
            except TrackingError as error:
                errors.append(str(error))
                continue
            places[to.backend] = published.location
            # The destination is named after publishing: the first publish makes the database.
            store.add_receipt(self._receipt(to, record), digest, published.location)
        return places, "\n".join(errors)

    def _backend(self, to: Target) -> Backend:
        if to not in self._open:
            project = to.project or self.project
            self._open[to] = open_backend(to.backend, project, self._results, to.server)
        return self._open[to]

    def _receipt(self, to: Target, record: CellRecord) -> str:
        """Name the receipt of one view at one backend."""
        place = destination(to.backend, to.project or self.project, self._results, to.server)
        return place if record.view == INTACT_VIEW else content_hash([place, record.view])

    def close(self) -> None:
        """Release the backends."""
        for backend in self._open.values():
            backend.close()


class Trial:
    """The run that a W&B agent opened for this process, where it did and W&B is tracked.

    It is joined when there is something to log: a server that is away never stops a measurement.

    Args:
        track: The backends.
        results: The results folder.
    """

    def __init__(self, track: Sequence[str], results: Path) -> None:
        self._joins = in_sweep() and any(target(text).backend == "wandb" for text in track)
        self._results = results

    def log(self, cell: CellRecord, request: CellRequest) -> None:
        """Log the run that was asked for, and end.

        Args:
            cell: The record.
            request: What the trial asked for: one layer, component and span.

        Raises:
            TrackingError: W&B refused or could not be reached.
        """
        if self._joins:
            wanted = (request.components[0], request.spans[0], request.layers[0])
            run = next(run for run in cell.layers if (*run.kind, run.layer) == wanted)
            log_trial(cell, run, self._results)

    def end(self, note: str, failed: bool = False) -> None:
        """End without a measurement.

        Args:
            note: Why there is none.
            failed: Whether the sweep shows the run as failed.

        Raises:
            TrackingError: W&B refused or could not be reached.
        """
        if self._joins:
            end_trial(note, failed, self._results)


def _artifacts(store: CellStore, record: CellRecord) -> list[Path]:
    """The files that a backend keeps with a cell: all that the record follows from."""
    return [store.folder / "cell.json", store.view_path(record.view), *store.shards()]


def sync(ledger: Ledger, to: Sequence[str]) -> Synced:
    """Publish every view of a cell that a backend lacks, asking the backends themselves.

    Args:
        ledger: The results folder.
        to: The backends, each as `BACKEND` or `BACKEND:PROJECT`; without a project, cells go to
            the one that they were measured for.

    Returns:
        What was published and what was not.
    """
    ledger.create()
    synced = Synced()
    publishers: dict[str, Publisher] = {}
    views = [(store, asked) for store in ledger.cells() for asked in store.asked()]
    for store, asked in views:
        project = asked.project
        publisher = publishers.setdefault(project, Publisher(to, project, ledger.root))
        record = record_of(store, asked.view)
        places, failed = publisher.publish(store, record, trust_receipts=False)
        synced.locations.update(places)
        if failed:
            synced.failed[record.title] = failed
        else:
            synced.published.append(record.title)
    for publisher in publishers.values():
        publisher.close()
    return synced
