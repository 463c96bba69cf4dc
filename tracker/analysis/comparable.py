"""Label models, cells and editions of tasks uniquely, and select cells to rank together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from operator import attrgetter

from tracker.core.formats import counted
from tracker.core.grouping import grouped
from tracker.core.identities import ModelIdentity
from tracker.core.provenance import content_hash
from tracker.core.records import CellRecord, RunRecord

_OF_TASKS = {"tasks", "found_by"}


def editions_of(cells: Iterable[CellRecord]) -> list[list[list[CellRecord]]]:
    """Group cells by their request, and each group by the edition of its tasks.

    A request is a model and a benchmark with its data and settings. The editions of a group are
    sorted by the date of their last measurement; editions without a date come first.
    """
    asked: dict[str, dict[str, list[CellRecord]]] = {}
    for cell in cells:
        benchmark = cell.benchmark.model_dump(mode="json", exclude=_OF_TASKS)
        tasks = [[task.name, task.version, task.fingerprint] for task in cell.benchmark.tasks]
        group = asked.setdefault(content_hash([*cell.model.key, benchmark]), {})
        group.setdefault(content_hash(tasks), []).append(cell)
    return [sorted(group.values(), key=_last) for group in asked.values()]


def _last(edition: Iterable[CellRecord]) -> str:
    return max(cell.measured or "" for cell in edition)


def edition_labels(cells: Sequence[CellRecord]) -> list[str]:
    """Label the edition of each cell's benchmark; empty where there is one.

    For example `measured 2026-11-28 (1a2b3c4d)`, with the time where several are of one day.
    """
    found: dict[int, str] = {}
    for editions in editions_of(cells):
        if len(editions) < 2:
            continue
        days = [_last(edition)[:10] for edition in editions]
        for edition, day in zip(editions, days, strict=True):
            said = day
            if days.count(day) > 1 and day:
                said = datetime.fromisoformat(_last(edition)).strftime("%Y-%m-%d %H:%M:%S UTC")
            for cell in edition:
                key = cell.key[:8]
                found[id(cell)] = f"measured {said} ({key})" if said else f"key {key}"
    return [found.get(id(cell), "") for cell in cells]


def outdated(cells: Iterable[CellRecord]) -> dict[int, CellRecord]:
    """Find the cells of which a later edition was measured: the cell's `id` → one of the latest."""
    return {
        id(cell): editions[-1][0]
        for editions in editions_of(cells)
        for edition in editions[:-1]
        for cell in edition
        if _last(edition) < _last(editions[-1])
    }


def model_labels(models: Sequence[ModelIdentity]) -> list[str]:
    """Name models so that no two names are equal.

    Args:
        models: The models.

    Returns:
        Their names, with the dtype, revision, weights or source where these differ.
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
        For example `arc_easy · 0-shot`. The metric, the edition of its task, the documents, the
        data, the seed, other settings, the cell's key or the number of runs follow if they differ.
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
    """Label rows of model, benchmark, shots, metric and removed layers, without equal labels.

    Args:
        cells: The cell of each row.
        documents: Whether the rows also show the number of documents.

    Returns:
        The name of each row's model, and the details that distinguish the row from equal ones
        (mostly empty).
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
    """Return details in which cells of one model may differ, the simplest first."""
    return (
        cell.benchmark.data,
        "" if cell.benchmark.seed is None else f"seed {cell.benchmark.seed}",
        cell.benchmark.said,
        cell.key[:8],
        counted(len(cell.runs), "run"),
    )


def _distinct_labels(labels: Sequence[str], details: Sequence[tuple[str, ...]]) -> list[str]:
    """Append details to equal labels until all labels differ or no detail is left."""
    distinct = list(labels)
    for words in zip(*details, strict=True):
        rows = list(zip(distinct, words, strict=True))
        alike = grouped(rows, lambda row: row[0])
        distinct = [
            f"{label} · {word}" if word and len({*alike[label]}) > 1 else label
            for label, word in rows
        ]
    return distinct


Pick = Callable[[CellRecord], Sequence[RunRecord]]
"""Selects the runs of a cell that a ranking is about."""
_WHOLE_LAYERS: Pick = attrgetter("whole_layers")


def models_of(cells: Iterable[CellRecord]) -> list[list[CellRecord]]:
    """Group cells by model: name, weights and dtype."""
    return list(grouped(cells, lambda cell: cell.model.key).values())


def named_models(cells: Iterable[CellRecord]) -> dict[str, list[CellRecord]]:
    """Group cells by model: its label among these models → its cells."""
    groups = models_of(cells)
    return dict(zip(model_labels([group[0].model for group in groups]), groups, strict=True))


def setting(cell: CellRecord) -> str:
    """Return a key of everything that must be equal before two models' figures are compared.

    It covers the format of prompts, the metric, the number of documents, and which were drawn.
    """
    benchmark = cell.benchmark.model_dump(
        mode="json", exclude={"data", "primary_metric", "found_by"}
    )
    # A cell that still lacks documents is compared with no other, even at equal counts.
    growing = cell.key if cell.unfinished is not None else ""
    return content_hash([benchmark, cell.metric, cell.n, cell.sample_seed, cell.removed, growing])


def countable(
    cells: Sequence[CellRecord], of: Pick = _WHOLE_LAYERS
) -> tuple[list[CellRecord], dict[str, str]]:
    """Choose the cells of one model that count, one for each benchmark, in their order.

    Also returns a reason for each benchmark, or other cell of it, that does not count.
    """
    labels = dict(zip(map(id, cells), benchmark_labels(cells), strict=True))
    later = outdated(cell for cell in cells if not unusable(cell, of))
    left_out: dict[str, str] = {}
    usable: list[CellRecord] = []
    for cell in cells:
        if why := unusable(cell, of):
            left_out[labels[id(cell)]] = why
        elif latest := later.get(id(cell)):
            label = labels[id(latest)]
            why = f"its task was edited since: what was measured last counts, {label}"
            left_out[labels[id(cell)]] = why
        else:
            usable.append(cell)
    best: dict[str, CellRecord] = {}
    for cell in usable:
        name = cell.benchmark.name
        best[name] = max(best.get(name, cell), cell, key=lambda cell: worth(cell, of))
    for cell in usable:
        if (counts := best[cell.benchmark.name]) is not cell:
            left_out[labels[id(cell)]] = f"the benchmark counts once, as {labels[id(counts)]}"
    return [cell for cell in usable if best[cell.benchmark.name] is cell], left_out


def worth(cell: CellRecord, of: Pick = _WHOLE_LAYERS) -> tuple[int, int, bool, bool]:
    """Return a sort key: of two cells on one benchmark the larger counts.

    It compares runs, documents, use of the benchmark's own metric, and random drawing, because the
    first documents are no sample.
    """
    return len(of(cell)), cell.n, not cell.other_metric, bool(cell.drawn)


def unusable(cell: CellRecord, of: Pick = _WHOLE_LAYERS) -> str | None:
    """Return the reason why a cell cannot be ranked; None if it can."""
    if cell.removed:
        return f"measured {cell.beneath}"
    if cell.is_raced:
        return cell.unfinished
    if not (runs := of(cell)):
        return "no whole single layer was removed"
    if all(run.accuracy_relevance is None for run in runs):
        return cell.reason_of("accuracy_relevance", runs[0])
    return None
