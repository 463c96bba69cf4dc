"""Gathering the cells of several results folders and tracking projects."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tracker.errors import RequestError, TrackerError
from tracker.ledger.store import Ledger
from tracker.records import CellRecord
from tracker.runner.derive import all_records
from tracker.runner.progress import Progress
from tracker.runner.pull import pull
from tracker.tracking import Target, target


@dataclass(frozen=True)
class Collected:
    """Cells from several sources.

    Attributes:
        cells: The records, each (cell, view, number of documents) once.
        experiments: The experiment files that the results folders keep: name → exact text.
        failed: Source, or a cell of it → why it is not among the cells.
    """

    cells: tuple[CellRecord, ...]
    experiments: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def collect(sources: Sequence[str], progress: Progress) -> Collected:
    """Gather cells.

    Args:
        sources: Results folders, `mlflow:URI/EXPERIMENT`, `mlflow:EXPERIMENT` (at
            `MLFLOW_TRACKING_URI`) or `wandb:ENTITY/PROJECT`.
        progress: Told what is downloaded.

    Returns:
        The cells; a source, or a cell of it, that cannot be read does not keep the others away.

    Raises:
        RequestError: A source is no source.
    """
    opened = {source: _opened(source) for source in sources}
    cells: list[CellRecord] = []
    experiments: dict[str, str] = {}
    failed: dict[str, str] = {}
    for source, place in opened.items():
        try:
            if isinstance(place, Target):
                there, lacking = pull(place, source, progress)
                cells += there
                failed |= lacking
                continue
            cells += [record for record in all_records(place) if record.n]
            for name, text in place.experiments():
                if experiments.setdefault(name, text) != text:
                    experiments[f"{name} ({source})"] = text
        except TrackerError as error:
            failed[source] = str(error)
    return Collected(tuple(merged(cells)), experiments, failed)


def merged(cells: Iterable[CellRecord]) -> list[CellRecord]:
    """Keep one record of each (cell, view, number of documents).

    What is there twice is equal, because equal keys mean equal outcomes; runs that only one of two
    holds join those of the other. A cell that is still growing gives way to a complete one.

    Args:
        cells: Records from any number of sources.

    Returns:
        The records, in the order in which each was met first.
    """
    found: dict[tuple[str, tuple[int, ...], int], CellRecord] = {}
    for cell in cells:
        known = found.get(cell.place)
        found[cell.place] = cell if known is None else _joined(known, cell)
    complete = {(c.key, c.removed) for c in found.values() if c.is_complete}
    return [c for c in found.values() if c.is_complete or (c.key, c.removed) not in complete]


def _joined(one: CellRecord, other: CellRecord) -> CellRecord:
    if len(other.layers) > len(one.layers):
        one, other = other, one
    runs = {run.order: run for run in other.layers} | {run.order: run for run in one.layers}
    missing = {run.order: run for run in (*one.missing, *other.missing) if run.order not in runs}
    return one.model_copy(
        update={
            "layers": tuple(runs[at] for at in sorted(runs)),
            "missing": tuple(missing[at] for at in sorted(missing)),
            "correlations": one.correlations or other.correlations,
        }
    )


def _opened(source: str) -> Ledger | Target:
    """Refuse what is no source before anything is downloaded."""
    path = Path(source)
    if ":" not in source or path.exists():
        return Ledger.existing(path)
    to = target(source)
    if to.backend == "mlflow" and not to.server and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise RequestError(
            f"{source!r} does not say on which server; write mlflow:URI/EXPERIMENT, or set "
            "MLFLOW_TRACKING_URI"
        )
    if to.backend == "wandb" and "/" not in (to.project or "") and "WANDB_ENTITY" not in os.environ:
        raise RequestError(f"{source!r} names no entity; write wandb:ENTITY/PROJECT")
    return to
