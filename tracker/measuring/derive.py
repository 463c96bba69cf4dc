"""Compute and store records of cells, and results of stopping rules (`until`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from tracker.analysis.decisions import decisions_record, derive_decisions
from tracker.analysis.records import cell_record
from tracker.analysis.stopping import CellRace
from tracker.ledger.cells import CellStore
from tracker.ledger.shards import divergence_files
from tracker.ledger.store import Contents
from tracker.ledger.views import RequestedView
from tracker.schema.errors import TrackerError
from tracker.schema.provenance import content_hash, file_hash
from tracker.schema.records import AnswerRecord, CellRecord, DecisionsRecord
from tracker.schema.views import View


def derive_record(store: CellStore, view: View) -> CellRecord:
    """Read the stored record of a view, or compute the record if no valid one is stored.

    A view is a selection of the cell's runs and documents.
    """
    extra = (*store.texts.file_names(), file_hash(divergence_files(store.folder)))
    state, name = _state_hash(store, view, *extra), store.views.view_name(view)
    record = store.read_derived(state, name, CellRecord)
    if record is None:
        record = cell_record(store, view, _aggregate, derive_answer(store, view))
        if record.n:
            store.write_derived(state, name, record)
    return record.model_copy(update={name: getattr(view, name) for name in _NOT_DERIVED})


DERIVED_BY = ("schema", "ledger", "stats", "analysis")
"""Names of the packages whose code turns outcomes into records."""
_NOT_DERIVED = ("beside", "explicit", "supersedes")
"""Fields that a record copies from its view; they affect no figure of the record."""


def derive_answer(store: CellStore, view: View) -> AnswerRecord | None:
    """Read the stored result of a stopping rule, or compute the result if no valid one is stored.

    Returns None if the view has no stopping rule (setting `until`). Raises ExperimentError or
    WorkError if the result cannot be computed.
    """
    if view.until is None:
        return None
    # Other runs of the view do not affect the answer.
    question_view = view.model_copy(update={"runs": view.until.runs})
    state, name = _state_hash(store, question_view), store.views.view_name(view)
    record = store.read_derived(state, name, AnswerRecord)
    if record is None:
        record = CellRace(store, question_view).record()
        store.write_derived(state, name, record)
    return record


def read_decisions(store: CellStore, view: View) -> DecisionsRecord | None:
    """Return which answers change under each ablation; None if no document is measured."""
    state, name = _state_hash(store, view, *store.texts.file_names()), store.views.view_name(view)
    record = store.read_derived(state, name, DecisionsRecord)
    if record is None and (view_decisions := derive_decisions(store, view)) is not None:
        record = decisions_record(view_decisions)
        store.write_derived(state, name, record)
    return record


def _state_hash(store: CellStore, view: View, *extra: str) -> str:
    """Return a hash of all data and code from which a view's records are computed."""
    view_content = view.model_dump(mode="json", exclude={*_NOT_DERIVED, "named"})
    cell = store.identity.model_dump(mode="json")
    return content_hash([_code_hash(), view_content, cell, store.shard_digests(), *extra])


@cache
def _code_hash() -> str:
    """Return a hash of the source code that computes records."""
    package = Path(__file__).parents[1]
    return file_hash(path for name in DERIVED_BY for path in (package / name).rglob("*.py"))


def _aggregate(how: str, values: Sequence[float | str]) -> float | None:
    """Aggregate the values of documents as lm-eval does.

    `how` is the name of the aggregation, such as `mean`. Returns None if lm-eval has no aggregation
    of this name.
    """
    if how == "mean":
        return sum(float(value) for value in values) / len(values)
    from tracker.benchmarks.tasks import aggregate

    return aggregate(how, values)


def list_records(contents: Contents) -> list[CellRecord]:
    """List one record (computed figures) for each requested view of each cell.

    Cells that cannot be read are added to `contents.damaged`.
    """
    return [record for record, _, _ in derive_records(contents)]


def derive_records(contents: Contents) -> Iterator[tuple[CellRecord, CellStore, RequestedView]]:
    """Yield (record, cell, requested view) for each requested view of each cell."""
    for store, requested_view in contents.views:
        try:
            yield derive_record(store, requested_view.view), store, requested_view
        except TrackerError as error:
            contents.damaged[str(store.folder)] = str(error)
        contents.damaged.update(store.damaged_shards())
