"""Handing finished cells to the tracking backends, and remembering which has what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tracker.errors import TrackingError
from tracker.ledger.store import CellStore, Ledger
from tracker.provenance import content_hash
from tracker.records import CellRecord
from tracker.runner.derive import record_of
from tracker.tracking import destination, known_backend, open_backend
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
        names: The backends.
        project: The backends' project.
        results: The results folder.

    Attributes:
        names: The backends.
        project: The backends' project.

    Raises:
        RequestError: There is no such backend.
    """

    def __init__(self, names: Sequence[str], project: str, results: Path) -> None:
        for name in names:
            known_backend(name)
        self.names = tuple(names)
        self.project = project
        self._results = results
        self._open: dict[str, Backend] = {}

    def publish(
        self, store: CellStore, record: CellRecord, trust_receipts: bool = True
    ) -> dict[str, str]:
        """Publish a cell.

        Args:
            store: The cell on disk.
            record: What to publish.
            trust_receipts: Whether a backend is left alone when the ledger holds its receipt for
                the same content; otherwise it is asked what it has.

        Returns:
            Backend → where the runs can be seen.

        Raises:
            TrackingError: A backend does not have the cell; the others were still tried.
        """
        places, errors = {}, []
        for name in self.names:
            receipt = store.receipt(self._receipt(name, record))
            digest = content_digest(record)
            if trust_receipts and receipt.get("digest") == digest:
                places[name] = receipt["location"]
                continue
            try:
                if name not in self._open:
                    self._open[name] = open_backend(name, self.project, self._results)
                places[name] = self._open[name].publish(record, _artifacts(store)).location
            except TrackingError as error:
                errors.append(str(error))
                continue
            # The destination is named after publishing: the first publish makes the database.
            store.add_receipt(self._receipt(name, record), digest, places[name])
        if errors:
            raise TrackingError("; ".join(errors))
        return places

    def _receipt(self, name: str, record: CellRecord) -> str:
        """Name the receipt of one view at one backend."""
        place = destination(name, self.project, self._results)
        return content_hash([place, record.removed]) if record.removed else place

    def close(self) -> None:
        """Release the backends."""
        for backend in self._open.values():
            backend.close()


def _artifacts(store: CellStore) -> list[Path]:
    """The files that a backend keeps with a cell: what it depends on, and the outcomes."""
    return [store.folder / "cell.json", *sorted((store.folder / "shards").glob("*.parquet"))]


def sync(ledger: Ledger, project: str | None, names: Sequence[str]) -> Synced:
    """Publish every view of a cell that a backend lacks, asking the backends themselves.

    Args:
        ledger: The results folder.
        project: The backends' project; None = the one that each cell was measured for.
        names: The backends.

    Returns:
        What was published and what was not.
    """
    synced = Synced()
    publishers: dict[str, Publisher] = {}
    views = [(store, asked) for store in ledger.cells() for asked in store.asked()]
    for store, asked in views:
        name = project or asked.project
        publisher = publishers.setdefault(name, Publisher(names, name, ledger.root))
        record = record_of(store, asked.request)
        try:
            places = publisher.publish(store, record, trust_receipts=False)
        except TrackingError as error:
            synced.failed[record.title] = str(error)
        else:
            synced.published.append(record.title)
            synced.locations.update(places)
    for publisher in publishers.values():
        publisher.close()
    return synced
