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


def run_key(cell: CellRecord, ablation: str, view: str | None = None) -> str:
    """Return the key of a run, which is equal on every machine and at all times.

    The key contains the view, since removed layers, metric and documents distinguish runs of one
    ablation: removing layers 4 and 5 together is another run than removing layer 5 where every run
    lacks layer 4.

    Args:
        cell: The cell of the run.
        ablation: An ablation's name, or `cell` for the cell's own run.
        view: The name of a former view of the cell; None for its current view.

    Returns:
        The cell's key, its view unless that is `INTACT_VIEW`, and the ablation.
    """
    view = view or cell.view
    key = cell.key if view == INTACT_VIEW else f"{cell.key}/{view}"
    return f"{key}/{ablation}"


def run_name(cell: CellRecord, layer: Change) -> str:
    """Return a run's name for lists: `layer 03 · arc_easy · SmolLM2-135M`.

    Layer numbers are padded with zeros, so that names sort as numbers do.
    """
    beneath = f" without {', '.join(map(str, cell.removed))}" if cell.removed else ""
    return _name(f"{layer.label(max(2, len(str(cell.model.layers - 1))))}{beneath}", cell)


def first_label(cell: CellRecord) -> str:
    """Return the label of the model that a cell's runs start from: `intact`, `without 3, 17`."""
    return f"without {', '.join(map(str, cell.removed))}" if cell.removed else "intact"


def intact_name(cell: CellRecord) -> str:
    """Return the run name of the model that a cell's runs start from: `intact · arc_easy`.

    That model is intact, or lacks the layers that are removed in every run. Such cells, which
    searches create, have no other run of the intact model.
    """
    return _name(first_label(cell), cell)


def cell_name(cell: CellRecord) -> str:
    """Return the name of a cell's run, with the benchmark first since lists cut long names."""
    return f"{cell.title.removeprefix(f'{cell.model.name} · ')} · {cell.model.name}"


def group_name(cell: CellRecord) -> str:
    """Return the name of the group of a cell's runs, equal on every machine."""
    # Only parts that views of one order share, so that a growing view stays in its group.
    words = (cell.heading, cell.drawn, cell.apart, cell.key[:8])
    return " · ".join(filter(None, words))


def filter_words(cell: CellRecord) -> tuple[str, ...]:
    """Return the tags by which users filter the runs of a cell."""
    return (cell.model.name, cell.benchmark.name, *(("stopped",) if cell.is_stopped else ()))


def _name(what: str, cell: CellRecord) -> str:
    drawn = "" if cell.sample_seed is None else f"sample {cell.sample_seed}"
    which = (cell.benchmark.title, cell.other_metric, drawn, cell.beside)
    return " · ".join(filter(None, (what, *which, cell.model.name, cell.apart)))


def intact_part(cell: CellRecord) -> CellRecord:
    """Return a cell's record without everything that depends on its runs."""
    without: dict[str, object] = {"runs": (), "missing": (), "correlations": (), "provenance": {}}
    without |= dict.fromkeys(("compared", "compared_unsteady"), 0) | {"reasons": {}}
    costs = ("compared_difference", "seconds", "peak_bytes", "measured")
    return cell.model_copy(update=without | dict.fromkeys((*costs, *cell.NOTES.values())))


def content_digest(record: Record, *also: str) -> str:
    """Compute a digest of published content, which shows whether a run has changed.

    Figures are rounded to `DIGITS` digits, since the last ones depend on the processor.

    Args:
        record: The record.
        *also: Everything else that the published run depends on.

    Returns:
        SHA-256 of the canonical JSON, in hexadecimal.
    """
    content = [_rounded(record.model_dump(mode="json")), *also]
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _rounded(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def kept_name(file: Path) -> str:
    """Return an attached file's name without percent signs, which MLflow decodes."""
    return file.name.replace("%", "=")


def files_digest(files: Iterable[Path]) -> str:
    """Return the SHA-256 of files' names and contents in hexadecimal, in any order."""
    lines = sorted(f"{kept_name(f)} {hashlib.sha256(f.read_bytes()).hexdigest()}" for f in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
