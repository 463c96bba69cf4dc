"""Label models and cells uniquely, and select the cells that are ranked together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from operator import attrgetter

from tracker.core.formats import count_text
from tracker.core.grouping import group_by
from tracker.core.identities import ModelIdentity
from tracker.core.provenance import content_hash
from tracker.core.records import CellRecord, RunRecord


def group_editions(cells: Iterable[CellRecord]) -> list[list[list[CellRecord]]]:
    """Group cells by request, and each group by the edition of its tasks.

    A request is a model and a benchmark with its data and settings. The editions of a group are
    sorted by the date of their last measurement; editions without a date come first.
    """
    requests: dict[str, dict[str, list[CellRecord]]] = {}
    for cell in cells:
        benchmark = cell.benchmark.model_dump(mode="json", exclude={"tasks", "found_by"})
        tasks = [[task.name, task.version, task.fingerprint] for task in cell.benchmark.tasks]
        group = requests.setdefault(content_hash([*cell.model.key, benchmark]), {})
        group.setdefault(content_hash(tasks), []).append(cell)
    return [sorted(group.values(), key=_last_measured) for group in requests.values()]


def _last_measured(edition: Iterable[CellRecord]) -> str:
    """Return the latest date of measurement of some cells."""
    return max(cell.measured or "" for cell in edition)


def edition_labels(cells: Sequence[CellRecord]) -> list[str]:
    """Label the edition of each cell's benchmark; empty if there is only one edition.

    For example `measured 2026-11-28 (1a2b3c4d)`, with the time if several are of one day.
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
    """Find cells of which a later edition exists; return `id` of the cell → a latest cell."""
    return {
        id(cell): editions[-1][0]
        for editions in group_editions(cells)
        for edition in editions[:-1]
        for cell in edition
        if _last_measured(edition) < _last_measured(editions[-1])
    }


def model_labels(models: Sequence[ModelIdentity]) -> list[str]:
    """Name models so that no two names are equal.

    Args:
        models: The models.

    Returns:
        Name of each model, with the dtype, revision, weights or source if these differ.
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
    """Name the benchmark of each cell of one model so that no two names are equal.

    Args:
        cells: Cells of one model.

    Returns:
        For example `arc_easy · 0-shot`. The metric, the edition of its task, the documents, the
        data, the seed, other settings, the cell's key or the number of runs follow if they differ.
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
    """Label the rows of a table of cells so that no two labels are equal.

    Args:
        cells: The cell of each row.
        documents: Whether the rows also show the number of documents.

    Returns:
        For each row the name of its model, and details that distinguish it from rows with the same
        name (mostly empty).
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
    """Return details in which cells of one model may differ, the simplest first."""
    return (
        cell.benchmark.data,
        "" if cell.benchmark.seed is None else f"seed {cell.benchmark.seed}",
        cell.benchmark.settings_text,
        cell.key[:8],
        count_text(len(cell.runs), "run"),
    )


def _distinct_labels(rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Label rows by their first word, and add further words as long as labels are equal."""
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
    """Group cells by model; return label of the model → cells of the model."""
    groups = group_models(cells)
    return dict(zip(model_labels([group[0].model for group in groups]), groups, strict=True))


def comparison_key(cell: CellRecord) -> str:
    """Return a key of all settings that must be equal to compare two models.

    The key covers prompt format, metric, number of documents, and selection of documents.
    """
    excluded = {"data", "primary_metric", "found_by"}
    benchmark = cell.benchmark.model_dump(mode="json", exclude=excluded)
    # A cell that still lacks documents is compared with no other, even at equal counts.
    growing = cell.key if cell.unfinished is not None else ""
    return content_hash([benchmark, cell.metric, cell.n, cell.sample_seed, cell.removed, growing])


def select_countable(
    cells: Sequence[CellRecord], select: RunSelector = _WHOLE_LAYERS
) -> tuple[list[CellRecord], dict[str, str]]:
    """Choose the cells of one model that count in rankings, one for each benchmark.

    Also returns a reason for each benchmark, and for each further cell, that does not count.
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
            reason = f"the task was edited later: only the latest measurement counts, {label}"
            left_out[labels[id(cell)]] = reason
        else:
            usable.append(cell)
    best = {
        name: max(group, key=lambda cell: cell_preference(cell, select))
        for name, group in group_by(usable, lambda cell: cell.benchmark.name).items()
    }
    for cell in usable:
        if (counted := best[cell.benchmark.name]) is not cell:
            left_out[labels[id(cell)]] = f"the benchmark counts once, as {labels[id(counted)]}"
    return [cell for cell in usable if best[cell.benchmark.name] is cell], left_out


def cell_preference(cell: CellRecord, select: RunSelector = _WHOLE_LAYERS) -> tuple[int, ...]:
    """Return a sort key; of two cells on one benchmark, the cell with the larger key counts.

    The key compares runs, documents, use of the benchmark's own metric, and random drawing, because
    the first documents of a split are no random sample.
    """
    return len(select(cell)), cell.n, not cell.other_metric, bool(cell.sampling_text)


def unusable_reason(cell: CellRecord, select: RunSelector = _WHOLE_LAYERS) -> str | None:
    """Return the reason why a cell cannot be ranked; None if it can."""
    if cell.removed:
        return f"measured {cell.removed_text}"
    if cell.is_raced:
        return cell.unfinished
    if not (runs := select(cell)):
        return "no run removed exactly one whole layer"
    if all(run.accuracy_relevance is None for run in runs):
        return cell.reason_of("accuracy_relevance", runs[0])
    return None
