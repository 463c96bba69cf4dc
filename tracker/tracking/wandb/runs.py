"""Says in W&B's words how the runs of a cell should be; needs no wandb."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tracker.core.records import CellRecord
from tracker.tracking.base import LoggedTable
from tracker.tracking.identity import filter_words, group_name
from tracker.tracking.runs import (
    ARTIFACT_NAME,
    NOT_IN_NAMES,
    DescribedRun,
    OutcomesArtifact,
    fitting,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FORMAT = "5"
"""Part of every digest: raise it when runs are written differently, and all are updated once."""

# What W&B takes; counted in bytes, of which there are never fewer than characters.
_GROUP = 128  # the server: "invalid parameters: 128 limit exceeded for GroupName"
_NAME = 128  # a longer name of a run fails: NVIDIA-NeMo/Skills issue 842
_TAG = 64  # wandb/sdk/wandb_settings.py, validate_run_tags


@dataclass(frozen=True)
class WandbRun:
    """One W&B run as it should be."""

    key: str
    name: str
    job_type: str
    group: str
    digest: str
    tags: tuple[str, ...]
    config: dict[str, Any]
    note: str
    summary: dict[str, float]
    curves: tuple[dict[str, float], ...] = ()
    """One row of points a layer, each with `layer`."""
    tables: dict[str, LoggedTable] = field(default_factory=dict)
    charts: Mapping[str, Figure] = field(default_factory=dict)
    outcomes: OutcomesArtifact | None = None

    @property
    def labels(self) -> dict[str, Any]:
        """What W&B lists it by, in the words of `wandb.init`."""
        return {n: getattr(self, n) for n in ("name", "group", "job_type", "tags")}

    def id(self, deleted: int = 0) -> str:
        """Name the run alike everywhere: W&B never frees the id of a run that was `deleted`."""
        nth = f"{self.key}#{deleted}" if deleted else self.key
        return hashlib.sha256(nth.encode()).hexdigest()[:16]


def group_of(cell: CellRecord) -> str:
    """Name what W&B groups the runs of a cell by."""
    return fitting(group_name(cell), _GROUP)


def labels_of(cell: CellRecord, name: str, job_type: str) -> dict[str, Any]:
    """Say what W&B lists a run of a cell by, in the words of `wandb.init`."""
    return {
        "name": fitting(name, _NAME),
        "group": group_of(cell),
        "job_type": job_type,
        "tags": tuple(fitting(word, _TAG) for word in filter_words(cell)),
    }


def wandb_run(run: DescribedRun) -> WandbRun:
    """Say how a run should be."""
    return WandbRun(
        key=run.key,
        **labels_of(run.cell, run.name, run.kind),
        digest=run.digest(FORMAT),
        config=run.config,
        note=run.note,
        summary=dict(run.figures),
        curves=tuple({"layer": layer, **points} for layer, points in run.curves),
        tables={f"tables/{name}": table for name, table in run.tables.items()},
        charts=run.charts,
        outcomes=run.outcomes,
    )


def model_name(name: str) -> str:
    """Name the artifact of a pruned model."""
    return fitting(re.sub(NOT_IN_NAMES, "-", name), ARTIFACT_NAME)
