"""Derive records and answers from the ledger."""

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
    """Derive the record of a cell's view, or read a stored one if nothing has changed."""
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
"""Fields that a record copies from its view, and that affect no figure."""


def answer_of(store: CellStore, view: View) -> AnswerRecord | None:
    """Derive the answer to a view's question, or read a stored one, as `record_of`.

    Returns None if the view has no question. Raises ExperimentError or WorkError if there can be no
    answer.
    """
    if view.until is None:
        return None
    # Other runs of the view do not affect the answer.
    alone = view.model_copy(update={"runs": view.until.runs})
    state, name = _state(store, alone), store.views.name_of(view)
    record = store.derived(state, name, AnswerRecord)
    if record is None:
        record = CellRace(store, alone).record()
        store.keep(state, name, record)
    return record


def decisions_of(store: CellStore, view: View) -> DecisionsRecord | None:
    """Derive the documents that a view's runs lose and win, or read them, as `record_of`.

    Returns None if no document is measured yet.
    """
    state, name = _state(store, view, *store.texts.names()), store.views.name_of(view)
    record = store.derived(state, name, DecisionsRecord)
    if record is None and (found := decisions(store, view)) is not None:
        record = decisions_record(found)
        store.keep(state, name, record)
    return record


def _state(store: CellStore, view: View, *also: str) -> str:
    """Hash everything that a view's records are derived from."""
    asked = view.model_dump(mode="json", exclude={*_NOT_DERIVED, "named"})
    cell = store.identity.model_dump(mode="json")
    return content_hash([_code(), asked, cell, store.proofs(), *also])


@cache
def _code() -> str:
    """Hash the code that derives records, so that changed formulas give new records."""
    here = Path(__file__).parents[1]
    return file_hash(path for name in DERIVED_BY for path in (here / name).rglob("*.py"))


def _aggregate(how: str, values: Sequence[float | str]) -> float | None:
    """Aggregate a metric as lm-eval does, loading lm-eval only if it is not a mean."""
    if how == "mean":
        return sum(float(value) for value in values) / len(values)
    from tracker.benchmarks.tasks import aggregate

    return aggregate(how, values)


def all_records(contents: Contents) -> list[CellRecord]:
    """Derive the records of every cell, one for each requested view.

    Cells that cannot be read are added to `contents.damaged`.
    """
    return [record for record, _, _ in every_record(contents)]


def every_record(contents: Contents) -> Iterator[tuple[CellRecord, CellStore, RequestedView]]:
    """Yield the records of `all_records`, each with its cell and view."""
    for store, asked in contents.views:
        try:
            yield record_of(store, asked.view), store, asked
        except TrackerError as error:
            contents.damaged[str(store.folder)] = str(error)
        contents.damaged.update(store.damage())
