"""Build distinct labels of models and cells, and select the cells that are ranked.

A cell contains the results of one model on one benchmark.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from operator import attrgetter
from typing import Any

from tracker.schema.formats import count_text, metric_format
from tracker.schema.grouping import group_by
from tracker.schema.identities import ModelIdentity
from tracker.schema.provenance import content_hash
from tracker.schema.records import CellRecord, RunRecord


def group_editions(cells: Iterable[CellRecord]) -> list[list[list[CellRecord]]]:
    """Group cells by model, benchmark and settings; split each group by task version.

    The task versions (editions) of a group are sorted by measurement date. Task versions without a
    measurement date come first.
    """
    requests: dict[str, dict[str, list[CellRecord]]] = {}
    for cell in cells:
        benchmark = cell.benchmark.model_dump(mode="json", exclude={"tasks", "found_by"})
        tasks = [[task.name, task.version, task.fingerprint] for task in cell.benchmark.tasks]
        group = requests.setdefault(content_hash([*cell.model.key, benchmark]), {})
        group.setdefault(content_hash(tasks), []).append(cell)
    return [sorted(group.values(), key=_last_measured) for group in requests.values()]


def _last_measured(edition: Iterable[CellRecord]) -> str:
    """Return the latest measurement date of the cells of one task version (edition)."""
    return max(cell.measured or "" for cell in edition)


def edition_labels(cells: Sequence[CellRecord]) -> list[str]:
    """Label the task version (edition) of each cell; "" if the task has only one edition.

    A label is, for example, `measured 2026-11-28 (1a2b3c4d)`. The time is added if several task
    versions were measured on one day.
    """
    labels: dict[int, str] = {}
    for editions in group_editions(cells):
        if len(editions) < 2:
            continue
        dates = [_last_measured(edition) for edition in editions]
        days = [date[:10] for date in dates]
        for edition, date, day in zip(editions, dates, days, strict=True):
            if days.count(day) > 1 and day:
                day = datetime.fromisoformat(date).strftime("%Y-%m-%d %H:%M:%S UTC")
            for cell in edition:
                key = cell.key[:8]
                labels[id(cell)] = f"measured {day} ({key})" if day else f"key {key}"
    return [labels.get(id(cell), "") for cell in cells]


def find_outdated(cells: Iterable[CellRecord]) -> dict[int, CellRecord]:
    """Find cells that were measured before their task was edited.

    Returns a dict: `id` of an outdated cell → a cell with the latest task version.
    """
    return {
        id(cell): editions[-1][0]
        for editions in group_editions(cells)
        for edition in editions[:-1]
        for cell in edition
        if _last_measured(edition) < _last_measured(editions[-1])
    }


def model_labels(models: Sequence[ModelIdentity]) -> list[str]:
    """Return a distinct name for each model.

    Args:
        models: Models to name.

    Returns:
        Name of each model. If names are equal, the dtype, revision, weights' fingerprint or source
        is appended.
    """
    return _distinct_labels(
        (
            model.name,
            model.dtype,
            f"revision {model.revision[:8]}" if model.revision else "",
            f"weights {model.fingerprint[:8]}",
            model.source,
        )
        for model in models
    )


def benchmark_labels(cells: Sequence[CellRecord]) -> list[str]:
    """Return a distinct benchmark name for each cell of one model.

    Args:
        cells: Cells of one model.

    Returns:
        Name of each cell's benchmark, e.g. `arc_easy · 0-shot`. Equal names are distinguished by
        further settings, e.g. the metric or the seed.
    """
    rows = []
    for cell, edition in zip(cells, edition_labels(cells), strict=True):
        words = (
            f"{cell.benchmark.title} · {cell.benchmark.num_fewshot}-shot",
            "chat" if cell.benchmark.apply_chat_template else "",
            cell.removed_text if cell.removed else "",
            "stopped at an answer" if cell.is_stopped else "",
        )
        label = " · ".join(filter(None, words))
        rows.append((label, cell.metric, edition, cell.documents_text, *_details(cell)))
    return _distinct_labels(rows)


def row_labels(cells: Sequence[CellRecord], documents: bool = True) -> list[tuple[str, str]]:
    """Return a distinct label for each row of a table of cells.

    Args:
        cells: Cells of the table, one for each row.
        documents: Whether the table also shows the number of documents.

    Returns:
        One pair for each row: the name of the model, and the rest of the label, which begins with
        the benchmark.
    """
    models = {cell.model.key: cell.model for cell in cells}
    names = dict(zip(models, model_labels(list(models.values())), strict=True))
    rows = []
    for cell, edition in zip(cells, edition_labels(cells), strict=True):
        words = [names[cell.model.key], cell.benchmark.title, str(cell.benchmark.num_fewshot)]
        words += [cell.metric, cell.removed_text, cell.sampling_text]
        label = " · ".join([*words, cell.counted if documents else ""])
        chat = "chat" if cell.benchmark.apply_chat_template else ""
        rows.append((label, chat, edition, cell.beside, *_details(cell)))
    labels = zip(cells, rows, _distinct_labels(rows), strict=True)
    return [
        (names[cell.model.key], label.removeprefix(row[0]).removeprefix(" · "))
        for cell, row, label in labels
    ]


def _details(cell: CellRecord) -> tuple[str, ...]:
    """Return texts that distinguish cells with equal labels, such as the seed."""
    return (
        cell.benchmark.data,
        "" if cell.benchmark.seed is None else f"seed {cell.benchmark.seed}",
        cell.benchmark.settings_text,
        cell.key[:8],
        count_text(len(cell.runs), "run"),
    )


def _distinct_labels(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Build a label from each row of texts, and make equal labels distinct.

    A label begins with the row's first text. The row's further texts are appended only to
    distinguish equal labels.
    """
    if not (columns := list(zip(*rows, strict=True))):
        return []
    labels = list(columns[0])
    for words in columns[1:]:
        pairs = list(zip(labels, words, strict=True))
        groups = group_by(pairs, lambda pair: pair[0]).items()
        equal = {label for label, group in groups if len({*group}) > 1}
        labels = [f"{old} · {word}" if word and old in equal else old for old, word in pairs]
    return labels


RunSelector = Callable[[CellRecord], Sequence[RunRecord]]
"""Function that selects the runs of a cell that are ranked."""
_WHOLE_LAYERS: RunSelector = attrgetter("whole_layers")


def group_models(cells: Iterable[CellRecord]) -> list[list[CellRecord]]:
    """Group cells by model, which is identified by name, weights and dtype."""
    return list(group_by(cells, lambda cell: cell.model.key).values())


def named_models(cells: Iterable[CellRecord]) -> dict[str, list[CellRecord]]:
    """Group cells by model; return a dict that maps each model's label to its cells."""
    groups = group_models(cells)
    return dict(zip(model_labels([group[0].model for group in groups]), groups, strict=True))


def comparison_key(cell: CellRecord) -> str:
    """Return a hash that is equal for cells with comparable results.

    The hash covers the prompt format, the metric, and the number and selection of documents.
    """
    excluded: dict[str, Any] = dict.fromkeys(("data", "primary_metric", "found_by"), True)
    excluded["tasks"] = {"__all__": {"has_options"}}
    benchmark = cell.benchmark.model_dump(mode="json", exclude=excluded)
    # A cell that still lacks documents is compared with no other, even at equal counts.
    growing = cell.key if cell.unfinished is not None else ""
    return content_hash([benchmark, cell.metric, cell.n, cell.sample_seed, cell.removed, growing])


def select_ranked_cells(
    cells: Sequence[CellRecord], select: RunSelector = _WHOLE_LAYERS
) -> tuple[list[CellRecord], dict[str, str]]:
    """Choose one cell of each benchmark for the rankings of one model.

    `select` is a function that returns the ranked runs of a cell. Returns the chosen cells, and a
    dict: label of an excluded cell → reason.
    """
    labels = dict(zip(map(id, cells), benchmark_labels(cells), strict=True))
    outdated = find_outdated(cell for cell in cells if not unusable_reason(cell, select))
    left_out: dict[str, str] = {}
    usable: list[CellRecord] = []
    for cell in cells:
        if reason := unusable_reason(cell, select):
            left_out[labels[id(cell)]] = reason
        elif latest := outdated.get(id(cell)):
            label = labels[id(latest)]
            left_out[labels[id(cell)]] = (
                "the task was edited after this measurement; only the latest measurement counts: "
                f"{label}"
            )
        else:
            usable.append(cell)
    best = {
        name: max(group, key=lambda cell: cell_preference(cell, select))
        for name, group in group_by(usable, lambda cell: cell.benchmark.name).items()
    }
    for cell in usable:
        if (counted := best[cell.benchmark.name]) is not cell:
            left_out[labels[id(cell)]] = (
                f"the ranking uses another measurement of this benchmark: {labels[id(counted)]}"
            )
    counted_cells = [cell for cell in usable if best[cell.benchmark.name] is cell]
    # Different quantities have no mean; accuracy comes first if both are as frequent.
    levels = Counter(metric_format(cell).level for cell in counted_cells)
    quantity = max(levels, key=lambda name: (levels[name], name == "accuracy"), default="")
    for cell in counted_cells:
        if metric_format(cell).level != quantity:
            left_out[labels[id(cell)]] = (
                f"the mean over benchmarks cannot combine {quantity} with the metric {cell.metric}"
            )
    return [cell for cell in counted_cells if metric_format(cell).level == quantity], left_out


def cell_preference(cell: CellRecord, select: RunSelector = _WHOLE_LAYERS) -> tuple[int, ...]:
    """Return a sort key of a cell; rankings use the cell with the largest key.

    The key prefers more runs, then more documents, then the benchmark's own metric, then documents
    that are randomly drawn or clustered.
    """
    return len(select(cell)), cell.n, not cell.other_metric, bool(cell.sampling_text)


def unusable_reason(cell: CellRecord, select: RunSelector = _WHOLE_LAYERS) -> str | None:
    """Return the reason why rankings cannot use a cell; return None for a usable cell.

    `select` returns the runs of a cell that are ranked.
    """
    if cell.removed:
        return f"measured {cell.removed_text}"
    if cell.is_raced:
        return cell.unfinished
    if not (runs := select(cell)):
        return "the removal of a single layer is not measured"
    if all(run.accuracy_relevance is None for run in runs):
        return cell.reason_of("accuracy_relevance", runs[0])
    return None
