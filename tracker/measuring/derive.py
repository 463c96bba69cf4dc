"""From the ledger to records."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tracker.errors import TrackerError
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Contents
from tracker.ledger.tables import cell_record
from tracker.provenance import content_hash, file_hash
from tracker.records import CellRecord, View


def record_of(store: CellStore, view: View) -> CellRecord:
    """Derive the record of a cell's view, or recall it where nothing has changed since."""
    state = content_hash(
        [
            _code(),
            view.model_dump(mode="json"),
            store.identity.model_dump(mode="json"),
            store.proofs(),
        ]
    )
    record = store.derived(state, store.views.name_of(view))
    if record is None:
        record = cell_record(store, view, _aggregate)
        if record.n:
            store.keep(state, record)
    return record


@cache
def _code() -> str:
    """Hash the code that turns outcomes into records: another formula is another record."""
    here = Path(__file__).parents[1]
    names = ("ablations.py", "config.py", "provenance.py", "records.py")
    folders = (*(here / "ledger").glob("*.py"), *(here / "metrics").glob("*.py"))
    return file_hash([*(here / name for name in names), *folders])


def _aggregate(how: str, values: Sequence[float | str]) -> float | None:
    """Aggregate a metric as lm-eval does, loading lm-eval only for what is not a mean."""
    if how == "mean":
        return sum(float(value) for value in values) / len(values)
    from tracker.benchmarks.tasks import aggregate

    return aggregate(how, values)


def all_records(contents: Contents) -> list[CellRecord]:
    """Derive the records of every cell, one for each view that was asked of it.

    What cannot be read joins `contents.damaged`.
    """
    records = []
    for store, asked in contents.views:
        try:
            records.append(record_of(store, asked.view))
        except TrackerError as error:
            contents.damaged[str(store.folder)] = str(error)
    return records
