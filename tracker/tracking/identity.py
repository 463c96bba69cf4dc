"""Compute the names and digests of runs, equal on every machine and for every backend."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tracker.core.changes import Change
from tracker.core.identities import Record
from tracker.core.records import INTACT_VIEW, CellRecord

DIGITS = 10
"""Significant digits of published figures in digests."""


def run_key(cell: CellRecord, ablation: str, view_name: str | None = None) -> str:
    """Return the key of a run, which is equal on every machine and at all times.

    The key contains the view, since removed layers, metric and documents distinguish runs of the
    same ablation. For example, removing layer 5 from the intact model and from a model without
    layer 4 are different runs.

    Args:
        cell: The cell of the run.
        ablation: An ablation's name, or `cell` for the cell's own run.
        view_name: The name of a former view of the cell; None for its current view.

    Returns:
        The cell's key, its view unless that is `INTACT_VIEW`, and the ablation.
    """
    view_name = view_name or cell.view
    key = cell.key if view_name == INTACT_VIEW else f"{cell.key}/{view_name}"
    return f"{key}/{ablation}"


def run_name(cell: CellRecord, change: Change) -> str:
    """Return a run's name for lists: `layer 03 · arc_easy · SmolLM2-135M`.

    Layer numbers are padded with zeros, so that names sort as numbers do.
    """
    without = f" without {', '.join(map(str, cell.removed))}" if cell.removed else ""
    return _join_name(f"{change.label(max(2, len(str(cell.model.layers - 1))))}{without}", cell)


def start_label(cell: CellRecord) -> str:
    """Return the label of a cell's starting model: `intact`, or `without 3, 17`."""
    return f"without {', '.join(map(str, cell.removed))}" if cell.removed else "intact"


def intact_name(cell: CellRecord) -> str:
    """Return the name of the run for a cell's starting model: `intact · arc_easy`.

    The starting model is intact, or lacks the layers that are removed in every run. Cells of the
    second kind, which searches create, have no other run of the intact model.
    """
    return _join_name(start_label(cell), cell)


def cell_run_name(cell: CellRecord) -> str:
    """Return the name of a cell's run; the benchmark comes first, since lists cut long names."""
    return f"{cell.title.removeprefix(f'{cell.model.name} · ')} · {cell.model.name}"


def group_name(cell: CellRecord) -> str:
    """Return the name of the group that holds a cell's runs, equal on every machine."""
    # Only parts that views of one order share, so that a growing view stays in its group.
    words = (cell.heading, cell.sampling_text, cell.apart, cell.key[:8])
    return " · ".join(filter(None, words))


def filter_words(cell: CellRecord) -> tuple[str, ...]:
    """Return the tags by which users filter the runs of a cell."""
    return (cell.model.name, cell.benchmark.name, *(("stopped",) if cell.is_stopped else ()))


def _join_name(label: str, cell: CellRecord) -> str:
    """Join a label with the names of the cell's benchmark and model."""
    sample = "" if cell.sample_seed is None else f"sample {cell.sample_seed}"
    parts = (cell.benchmark.title, cell.other_metric, sample, cell.beside)
    return " · ".join(filter(None, (label, *parts, cell.model.name, cell.apart)))


def baseline_record(cell: CellRecord) -> CellRecord:
    """Return a copy of a cell's record without the fields that depend on its runs."""
    updates: dict[str, object] = {"runs": (), "missing": (), "correlations": (), "provenance": {}}
    updates |= dict.fromkeys(("compared", "compared_unsteady"), 0) | {"reasons": {}}
    costs = ("compared_difference", "seconds", "peak_bytes", "measured")
    return cell.model_copy(update=updates | dict.fromkeys((*costs, *cell.NOTES.values())))


def content_digest(record: Record, *additions: str) -> str:
    """Compute a digest of published content, which shows whether a run has changed.

    Figures are rounded to `DIGITS` digits, since the last digits depend on the processor.

    Args:
        record: The record.
        *additions: All other data that the published run depends on.

    Returns:
        SHA-256 of the canonical JSON, in hexadecimal.
    """
    content = [_round_floats(record.model_dump(mode="json")), *additions]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _round_floats(value: object) -> object:
    """Round all floats in nested values."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _round_floats(element) for name, element in value.items()}
    return [_round_floats(element) for element in value] if isinstance(value, list) else value


def kept_name(file: Path) -> str:
    """Return an attached file's name without percent signs, which MLflow would decode."""
    return file.name.replace("%", "=")


def files_digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 of files' names and contents in hexadecimal, regardless of order."""
    lines = sorted(f"{kept_name(f)} {hashlib.sha256(f.read_bytes()).hexdigest()}" for f in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
