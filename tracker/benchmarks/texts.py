"""What lm-eval's documents say in front of people, and whether anybody may read it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tracker.benchmarks.own import check_own
from tracker.benchmarks.sources import HUB, PACKAGE
from tracker.core.config import CellRequest
from tracker.core.documents import DocumentText

_FILES = ("arrow", "audiofolder", "csv", "imagefolder", "json", "pandas", "parquet", "text", "xml")
"""What `datasets` calls files that somebody names, in the place of a data set's name."""


def choice_text(task: Any, doc: Any) -> DocumentText:
    """Say what a multiple-choice document asks: what its prompt ends with, and the options."""
    # Where the options are beginnings, what they are continued with is the same for all.
    question = task.doc_to_target(doc) if task.multiple_input else task.doc_to_text(doc)
    return DocumentText(str(question), tuple(map(str, task.doc_to_choice(doc))))


def is_public(request: CellRequest, tasks: Iterable[Any]) -> bool:
    """Say whether all documents are those of the hub or of a package, and none a user's own.

    Args:
        request: What was asked for: the benchmark, and where its data comes from.
        tasks: The benchmark's tasks, which may name files themselves.

    Returns:
        Whether they are; a task of one's own is not, wherever it reads.
    """
    if check_own(request):
        return False
    if request.data != HUB:
        return request.data.startswith(PACKAGE)
    return not any(_reads_files(task.config) for task in tasks)


def _reads_files(config: Any) -> bool:
    if config.custom_dataset is not None or (config.dataset_kwargs or {}).get("data_files"):
        return True
    name = str(config.dataset_path or "")
    return name in _FILES or Path(name).expanduser().exists()
