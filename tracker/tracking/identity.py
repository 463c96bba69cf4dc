"""Compute names, keys and digests of runs, independently of the machine and the backend."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tracker.schema.changes import Change
from tracker.schema.identities import Record
from tracker.schema.records import INTACT_VIEW, CellRecord

DIGITS = 10
"""Significant digits of published figures in digests."""


def run_key(cell: CellRecord, ablation: str, view_name: str | None = None) -> str:
    """Return the key that identifies a run, independently of the machine and the time.

    The key includes the view: the selected documents, the metric, and the layers that are removed
    in all runs. An ablation therefore has one run for each view.

    Args:
        cell: The record of the cell (model and benchmark) to which the run belongs.
        ablation: Name of an ablation, or `cell` for the summary run of the cell.
        view_name: Name of a replaced view; None for the current view.

    Returns:
        Cell key, view name (left out for `INTACT_VIEW`) and ablation, separated by `/`.
    """
    view_name = view_name or cell.view
    key = cell.key if view_name == INTACT_VIEW else f"{cell.key}/{view_name}"
    return f"{key}/{ablation}"


def run_name(cell: CellRecord, change: Change) -> str:
    """Return the display name of an ablation's run: `layer 03 · arc_easy · SmolLM2-135M`.

    Layer numbers in the name are padded with zeros.
    """
    without = f" without {', '.join(map(str, cell.removed))}" if cell.removed else ""
    return _join_name(f"{change.label(max(2, len(str(cell.model.layers - 1))))}{without}", cell)


def start_label(cell: CellRecord) -> str:
    """Return the label of the unablated model: `intact`, or `without 3, 17`."""
    return f"without {', '.join(map(str, cell.removed))}" if cell.removed else "intact"


def intact_name(cell: CellRecord) -> str:
    """Return the display name of the unablated model's run: `intact · arc_easy`.

    If every run of the benchmark removes certain layers, the unablated model lacks them too.
    """
    return _join_name(start_label(cell), cell)


def cell_run_name(cell: CellRecord) -> str:
    """Return the display name of a summary run, which begins with the benchmark's name."""
    return f"{cell.title.removeprefix(f'{cell.model.name} · ')} · {cell.model.name}"


def group_name(cell: CellRecord) -> str:
    """Return the name under which a backend groups all runs of a model and benchmark."""
    # Only parts that views of one order share, so that a growing view stays in its group.
    words = (cell.heading, cell.sampling_text, cell.apart, cell.key[:8])
    return " · ".join(filter(None, words))


def filter_words(cell: CellRecord) -> tuple[str, ...]:
    """Return words, such as the model's name, by which users can filter runs in a backend."""
    return (cell.model.name, cell.benchmark.name, *(("stopped",) if cell.is_stopped else ()))


def _join_name(label: str, cell: CellRecord) -> str:
    """Build a display name from a label and the names of benchmark and model."""
    sample = "" if cell.sample_seed is None else f"sample {cell.sample_seed}"
    parts = (cell.benchmark.title, cell.other_metric, sample, cell.beside)
    return " · ".join(filter(None, (label, *parts, cell.model.name, cell.apart)))


def baseline_record(cell: CellRecord) -> CellRecord:
    """Return a copy of the record with only the fields about the intact model."""
    updates: dict[str, object] = {"runs": (), "missing": (), "correlations": (), "provenance": {}}
    updates |= dict.fromkeys(("compared", "compared_unsteady"), 0) | {"reasons": {}}
    costs = ("compared_difference", "seconds", "peak_bytes", "measured")
    return cell.model_copy(update=updates | dict.fromkeys((*costs, *cell.NOTES.values())))


def content_digest(record: Record, *additions: str) -> str:
    """Compute a digest of a run's content.

    A published run with another digest needs an update. Numbers are rounded to `DIGITS` digits,
    because the last digits depend on the processor.

    Args:
        record: The record.
        *additions: All other data from which the published run is built.

    Returns:
        SHA-256 of the canonical JSON, in hexadecimal.
    """
    content = [_round_floats(record.model_dump(mode="json")), *additions]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _round_floats(value: object) -> object:
    """Round all floating-point numbers in nested lists and dictionaries."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _round_floats(element) for name, element in value.items()}
    return [_round_floats(element) for element in value] if isinstance(value, list) else value


def kept_name(file: Path) -> str:
    """Return the name under which a file is uploaded; `%` is replaced, since MLflow decodes it."""
    return file.name.replace("%", "=")


def files_digest(files: Iterable[Path]) -> str:
    """Return a SHA-256 digest of the names and contents of files.

    The digest does not depend on the order of the files.
    """
    lines = sorted(f"{kept_name(f)} {hashlib.sha256(f.read_bytes()).hexdigest()}" for f in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
