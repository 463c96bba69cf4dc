"""A benchmark whose task was edited is several, under one name: which is which, and the latest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime

from tracker.core.provenance import content_hash
from tracker.core.records import CellRecord

_OF_TASKS = {"tasks", "found_by"}


def editions_of(cells: Iterable[CellRecord]) -> list[list[list[CellRecord]]]:
    """Group cells by what was asked for, and each group by what its tasks then were.

    What was asked for is a model and a benchmark with its data and its settings. The editions of a
    group come in the order in which they were measured last; what no date is known of comes first.
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
    """Say of each cell which edition of its benchmark it is; empty where there is one.

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
