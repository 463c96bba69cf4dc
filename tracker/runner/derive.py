"""From the ledger to what people see: records, and the report page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tracker.config import CellRequest
from tracker.ledger.store import CellStore, Ledger
from tracker.ledger.tables import cell_record
from tracker.records import CellRecord


def record_of(store: CellStore, request: CellRequest) -> CellRecord:
    """Derive a cell's record from the ledger.

    Args:
        store: The cell.
        request: Which documents, runs and metric.

    Returns:
        The record.
    """
    metric = request.metric or store.identity.benchmark.primary_metric
    return cell_record(store, request, metric, _aggregate)


def _aggregate(how: str, values: Sequence[float | str]) -> float | None:
    """Aggregate a metric as lm-eval does, loading lm-eval only for what is not a mean."""
    if how == "mean":
        return sum(float(value) for value in values) / len(values)
    from tracker.benchmarks.tasks import aggregate

    return aggregate(how, values)


def all_records(ledger: Ledger) -> list[CellRecord]:
    """Derive the records of every cell, one for each view that was asked of it.

    Args:
        ledger: The results folder.

    Returns:
        The records of the cells that were asked for.
    """
    return [record_of(store, asked.request) for store in ledger.cells() for asked in store.asked()]


def write_report(ledger: Ledger) -> tuple[list[CellRecord], Path]:
    """Write the report page of a results folder.

    Args:
        ledger: The results folder.

    Returns:
        The cells that it shows: those with at least one measured document; and its path.
    """
    from tracker.report.html import render_report

    records = [record for record in all_records(ledger) if record.n]
    path = render_report(records, dict(ledger.experiments()), ledger.root / "report.html")
    return records, path
