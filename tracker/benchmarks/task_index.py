"""What lm-eval calls its tasks and where each is written down: found once, then looked up."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.tasks import TaskManager

from tracker.benchmarks.private import Entry, Kind
from tracker.core.provenance import content_hash, file_stamp, package_versions
from tracker.ledger.cache import keep, recall

log = logging.getLogger(__name__)
_DATA = ("dataset_path", "dataset_name")
_FORMAT = 2
"""Of the note: another build of the same version, in the same cache, may write another."""


@cache
def known_tasks() -> dict[str, Any]:
    """List lm-eval's tasks, groups and tags.

    lm-eval reads 14,000 files for that, and a trial on a tiny model takes no longer than this does.
    So what they say is kept until one of them changes.

    Returns:
        lm-eval's entry of each, by name; of its settings, where the data lies on the hub.
    """
    folder = Path(lm_eval.tasks.__file__).parent
    stamp = file_stamp(_files(folder))
    versions = package_versions()
    key = content_hash([stamp, versions["lm-eval"], versions["tracker"], _FORMAT])
    # As one string: proving a digest writes everything once more, which of 14,000 values is slow.
    known = json.loads(recall("tasks", key).get("tasks", "{}"))
    if not known or not all(_is_inside(path) for _, path, *_ in known.values()):
        log.info("reading lm-eval's list of tasks, once")
        known = {name: _row(entry, folder) for name, entry in TaskManager().task_index.items()}
        keep("tasks", key, {"tasks": json.dumps(known)})
    return {name: _entry(name, folder, *row) for name, row in known.items()}


def _files(folder: str | Path) -> Iterator[os.DirEntry[str]]:
    """Find all files that can say something: templates have no suffix."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.is_dir():
                yield entry
            elif entry.name != "__pycache__":
                yield from _files(entry.path)


def _row(entry: Any, folder: Path) -> list[Any]:
    path = entry.yaml_path and str(entry.yaml_path.relative_to(folder))
    data = {key: entry.cfg[key] for key in _DATA if key in (entry.cfg or {})}
    return [entry.kind.name, path, sorted(entry.tags), data]


def _is_inside(path: str | None) -> bool:
    """Say whether a path stays in the folder that it is of: a task's file runs code."""
    return path is None or not (Path(path).is_absolute() or ".." in Path(path).parts)


def _entry(
    name: str, folder: Path, kind: str, path: str | None, tags: list[str], data: dict[str, Any]
) -> Any:
    return Entry(name, Kind[kind], folder / path if path else None, data, set(tags))
