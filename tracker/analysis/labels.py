"""Labels that tell models and cells apart."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.analysis.editions import edition_labels
from tracker.core.formats import counted
from tracker.core.grouping import grouped
from tracker.core.identities import ModelIdentity
from tracker.core.records import CellRecord


def model_labels(models: Sequence[ModelIdentity]) -> list[str]:
    """Name models so that no two names are equal.

    Args:
        models: The models.

    Returns:
        Their names, with the dtype, revision, weights or source where these tell them apart.
    """
    return _distinct_labels(
        [model.name for model in models],
        [
            (
                model.dtype,
                f"revision {model.revision[:8]}" if model.revision else "",
                f"weights {model.fingerprint[:8]}",
                model.source,
            )
            for model in models
        ],
    )


def benchmark_labels(cells: Sequence[CellRecord]) -> list[str]:
    """Name the benchmark of each cell of one model, so that no two names are equal.

    Args:
        cells: Cells of one model.

    Returns:
        For example `arc_easy · 0-shot`, with the metric, the edition of its task, the documents,
        the data, the seed, other settings, the cell's key or the number of runs where these tell
        them apart.
    """
    return _distinct_labels(
        [
            f"{cell.benchmark.title} · {cell.benchmark.num_fewshot}-shot"
            + (" · chat" if cell.benchmark.apply_chat_template else "")
            + (f" · {cell.beneath}" if cell.removed else "")
            + (" · stopped at an answer" if cell.is_stopped else "")
            for cell in cells
        ],
        [
            (cell.metric, edition, cell.documents, *_details(cell))
            for cell, edition in zip(cells, edition_labels(cells), strict=True)
        ],
    )


def row_labels(cells: Sequence[CellRecord], documents: bool = True) -> list[tuple[str, str]]:
    """Label rows apart that show model, benchmark, shots, metric and what lies beneath.

    Args:
        cells: The cell of each row.
        documents: Whether the rows show how many documents there are, too.

    Returns:
        The name of each row's model, and what else tells it from rows that read the same: mostly
        nothing.
    """
    models = {cell.model.key: cell.model for cell in cells}
    names = dict(zip(models, model_labels(list(models.values())), strict=True))
    rows = [
        " · ".join(
            (
                *(names[cell.model.key], cell.benchmark.title, str(cell.benchmark.num_fewshot)),
                *(cell.metric, cell.beneath, cell.drawn, cell.counted if documents else ""),
            )
        )
        for cell in cells
    ]
    distinct = _distinct_labels(
        rows,
        [
            ("chat" * cell.benchmark.apply_chat_template, edition, cell.beside, *_details(cell))
            for cell, edition in zip(cells, edition_labels(cells), strict=True)
        ],
    )
    extra = (
        now.removeprefix(row).removeprefix(" · ") for row, now in zip(rows, distinct, strict=True)
    )
    return [(names[cell.model.key], more) for cell, more in zip(cells, extra, strict=True)]


def _details(cell: CellRecord) -> tuple[str, ...]:
    """Return details in which cells of one model may differ, the plainest first."""
    return (
        cell.benchmark.data,
        "" if cell.benchmark.seed is None else f"seed {cell.benchmark.seed}",
        cell.benchmark.said,
        cell.key[:8],
        counted(len(cell.runs), "run"),
    )


def _distinct_labels(labels: Sequence[str], details: Sequence[tuple[str, ...]]) -> list[str]:
    """Add to equal labels the details in which their bearers differ, until all are told apart."""
    distinct = list(labels)
    for words in zip(*details, strict=True):
        rows = list(zip(distinct, words, strict=True))
        alike = grouped(rows, lambda row: row[0])
        distinct = [
            f"{label} · {word}" if word and len({*alike[label]}) > 1 else label
            for label, word in rows
        ]
    return distinct
