"""From the ledger to records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from tracker.analysis.decisions import decisions, decisions_record
from tracker.analysis.records import cell_record
from tracker.analysis.stopping import CellRace
from tracker.core.decision_records import DecisionsRecord
from tracker.core.errors import TrackerError
from tracker.core.provenance import content_hash, file_hash
from tracker.core.records import AnswerRecord, CellRecord
from tracker.core.views import View
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Contents
from tracker.ledger.views import RequestedView


def record_of(store: CellStore, view: View) -> CellRecord:
    """Derive the record of a cell's view, or recall it where nothing has changed since."""
    state, name = _state(store, view, *store.texts.names()), store.views.name_of(view)
    record = store.derived(state, name, CellRecord)
    if record is None:
        record = cell_record(store, view, _aggregate, answer_of(store, view))
        if record.n:
            store.keep(state, name, record)
    return record.model_copy(update={name: getattr(view, name) for name in _NOT_DERIVED})


DERIVED_BY = ("core", "ledger", "stats", "analysis")
"""The packages whose code turns outcomes into records."""
_NOT_DERIVED = ("beside", "explicit", "supersedes")
"""What a record says of its view that no figure follows from."""


def answer_of(store: CellStore, view: View) -> AnswerRecord | None:
    """Say what a cell answers to a view's question, or recall it, as `record_of`.

    None where the view has no question. ExperimentError or WorkError where it has no answer.
    """
    if view.until is None:
        return None
    # What else was asked of the view changes nothing.
    alone = view.model_copy(update={"runs": view.until.runs})
    state, name = _state(store, alone), store.views.name_of(view)
    record = store.derived(state, name, AnswerRecord)
    if record is None:
        record = CellRace(store, alone).record()
        store.keep(state, name, record)
    return record


def decisions_of(store: CellStore, view: View) -> DecisionsRecord | None:
    """Derive what a view's runs decide document by document, or recall it, as `record_of`.

    None where no document is measured yet.
    """
    state, name = _state(store, view, *store.texts.names()), store.views.name_of(view)
    record = store.derived(state, name, DecisionsRecord)
    if record is None and (found := decisions(store, view)) is not None:
        record = decisions_record(found)
        store.keep(state, name, record)
    return record


def _state(store: CellStore, view: View, *also: str) -> str:
    """Hash all that a view's records follow from."""
    asked = view.model_dump(mode="json", exclude={*_NOT_DERIVED, "named"})
    cell = store.identity.model_dump(mode="json")
    return content_hash([_code(), asked, cell, store.proofs(), *also])


@cache
def _code() -> str:
    """Hash the code that turns outcomes into records: another formula is another record."""
    here = Path(__file__).parents[1]
    return file_hash(path for name in DERIVED_BY for path in (here / name).rglob("*.py"))


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
    return [record for record, _, _ in every_record(contents)]


def every_record(contents: Contents) -> Iterator[tuple[CellRecord, CellStore, RequestedView]]:
    """Derive records as `all_records`, each with the view that it was derived from."""
    for store, asked in contents.views:
        try:
            yield record_of(store, asked.view), store, asked
        except TrackerError as error:
            contents.damaged[str(store.folder)] = str(error)
        contents.damaged.update(store.damage())
