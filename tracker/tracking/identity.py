"""Which run it is, and whether it has changed: the same on every machine, for every backend."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tracker.core.changes import Change
from tracker.core.identities import Record
from tracker.core.records import INTACT_VIEW, CellRecord

DIGITS = 10
"""Significant digits by which a published figure is another one."""


def run_key(cell: CellRecord, ablation: str, view: str | None = None) -> str:
    """Name a run the same way on every machine and every day.

    Layers 4 and 5 removed together are another run than layer 5 removed where 4 is gone already,
    accuracy is another figure than normalised accuracy, and so is that on documents drawn at random
    than that on the first ones: so the name holds the view, too.

    Args:
        cell: The cell that the run belongs to.
        ablation: An ablation's name, or `cell` for the cell's own run.
        view: The name of another view of the cell, which it had before.

    Returns:
        The cell's key, its view unless that is `INTACT_VIEW`, and the ablation.
    """
    view = view or cell.view
    key = cell.key if view == INTACT_VIEW else f"{cell.key}/{view}"
    return f"{key}/{ablation}"


def run_name(cell: CellRecord, layer: Change) -> str:
    """Name a run where people read lists of them: `layer 03 · arc_easy · SmolLM2-135M`.

    The zeros make names sort as numbers do.
    """
    beneath = f" without {', '.join(map(str, cell.removed))}" if cell.removed else ""
    return _name(f"{layer.label(max(2, len(str(cell.model.layers - 1))))}{beneath}", cell)


def first_label(cell: CellRecord) -> str:
    """Say what of the model a cell's runs begin with: `intact`, or `without 3, 17`."""
    return f"without {', '.join(map(str, cell.removed))}" if cell.removed else "intact"


def intact_name(cell: CellRecord) -> str:
    """Name the run of the model that a cell's runs begin with, beside them: `intact · arc_easy`.

    That model is intact, or lacks the layers that are removed in every run: such cells, as searches
    make them, have no run of the intact model besides.
    """
    return _name(first_label(cell), cell)


def cell_name(cell: CellRecord) -> str:
    """Name the run of a cell, the benchmark first: lists cut long names."""
    return f"{cell.title.removeprefix(f'{cell.model.name} · ')} · {cell.model.name}"


def group_name(cell: CellRecord) -> str:
    """Name what holds the runs of a cell together, alike on every machine."""
    # What views of one order have in common, so that a view which grows stays in its group.
    words = (cell.heading, cell.drawn, cell.apart, cell.key[:8])
    return " · ".join(filter(None, words))


def filter_words(cell: CellRecord) -> tuple[str, ...]:
    """Give the words by which people pick the runs of a cell from others."""
    return (cell.model.name, cell.benchmark.name, *(("stopped",) if cell.is_stopped else ()))


def _name(what: str, cell: CellRecord) -> str:
    drawn = "" if cell.sample_seed is None else f"sample {cell.sample_seed}"
    which = (cell.benchmark.title, cell.other_metric, drawn, cell.beside)
    return " · ".join(filter(None, (what, *which, cell.model.name, cell.apart)))


def intact_part(cell: CellRecord) -> CellRecord:
    """Leave of a cell what is known without its runs: more runs do not change it."""
    without: dict[str, object] = {"runs": (), "missing": (), "correlations": (), "provenance": {}}
    without |= dict.fromkeys(("compared", "compared_unsteady"), 0) | {"reasons": {}}
    costs = ("compared_difference", "seconds", "peak_bytes", "measured")
    return cell.model_copy(update=without | dict.fromkeys((*costs, *cell.NOTES.values())))


def content_digest(record: Record, *also: str) -> str:
    """Digest what would be published, to tell an unchanged run from a changed one.

    Figures count to `DIGITS` digits, since the last ones are the processor's own.

    Args:
        record: The record.
        *also: Whatever else the published run depends on.

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
    """Name an attached file as MLflow can find it again: it reads a percent sign as a code."""
    return file.name.replace("%", "=")


def files_digest(files: Iterable[Path]) -> str:
    """Digest files by name and content, in whatever order: SHA-256 in hexadecimal."""
    lines = sorted(f"{kept_name(f)} {hashlib.sha256(f.read_bytes()).hexdigest()}" for f in files)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
