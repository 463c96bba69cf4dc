"""Says in W&B's words how the runs of a cell should be; needs no wandb."""

from __future__ import annotations

import hashlib
import re
from typing import Any

from tracker.core.records import CellRecord
from tracker.tracking.identity import filter_words, group_name
from tracker.tracking.runs import ARTIFACT_NAME, NOT_IN_NAMES, fitting

FORMAT = "5"
"""Part of every digest: raise it when runs are written differently, and all are updated once."""

# What W&B takes; counted in bytes, of which there are never fewer than characters.
_GROUP = 128  # the server: "invalid parameters: 128 limit exceeded for GroupName"
_NAME = 128  # a longer name of a run fails: NVIDIA-NeMo/Skills issue 842
_TAG = 64  # wandb/sdk/wandb_settings.py, validate_run_tags


def run_id(key: str, deleted: int = 0) -> str:
    """Name the run of a key alike everywhere: W&B never frees the id of one that was `deleted`."""
    nth = f"{key}#{deleted}" if deleted else key
    return hashlib.sha256(nth.encode()).hexdigest()[:16]


def group_of(cell: CellRecord) -> str:
    """Name what W&B groups the runs of a cell by."""
    return fitting(group_name(cell), _GROUP)


def labels_of(cell: CellRecord, name: str, kind: str) -> dict[str, Any]:
    """Say what W&B lists a run of a cell by, in the words of `wandb.init`."""
    return {
        "name": fitting(name, _NAME),
        "group": group_of(cell),
        "job_type": kind,
        "tags": tuple(fitting(word, _TAG) for word in filter_words(cell)),
    }


def model_name(name: str) -> str:
    """Name the artifact of a pruned model."""
    return fitting(re.sub(NOT_IN_NAMES, "-", name), ARTIFACT_NAME)
