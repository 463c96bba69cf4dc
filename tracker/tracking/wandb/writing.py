"""Write one run of W&B: curves, tables, charts, summary, the artifact, and its digest last.

W&B cannot remove a point of a curve: a changed figure adds a second point.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from wandb import Artifact

from tracker.core.records import CellRecord
from tracker.tracking.figures import LoggedTable
from tracker.tracking.identity import filter_words, group_name
from tracker.tracking.runs import ARTIFACT_NAME, NOT_IN_NAMES, DescribedRun, fitting

FORMAT = "5"
"""Part of every digest: raise it when runs are written differently, and all are updated once."""

# What W&B takes; counted in bytes, of which there are never fewer than characters.
_GROUP = 128  # the server: "invalid parameters: 128 limit exceeded for GroupName"
_NAME = 128  # a longer name of a run fails: NVIDIA-NeMo/Skills issue 842
_TAG = 64  # wandb/sdk/wandb_settings.py, validate_run_tags


def run_id(key: str, deleted: int = 0) -> str:
    """Return the id of a run key; `deleted` counts former ids, which W&B never frees."""
    nth = f"{key}#{deleted}" if deleted else key
    return hashlib.sha256(nth.encode()).hexdigest()[:16]


def group_of(cell: CellRecord) -> str:
    """Return the name of W&B's group of a cell's runs."""
    return fitting(group_name(cell), _GROUP)


def labels_of(cell: CellRecord, name: str, kind: str) -> dict[str, Any]:
    """Return the arguments of `wandb.init` that label a cell's run in lists."""
    return {
        "name": fitting(name, _NAME),
        "group": group_of(cell),
        "job_type": kind,
        "tags": tuple(fitting(word, _TAG) for word in filter_words(cell)),
    }


def model_name(name: str) -> str:
    """Return the name of a pruned model's artifact."""
    return fitting(re.sub(NOT_IN_NAMES, "-", name), ARTIFACT_NAME)


def write(handle: Any, run: DescribedRun, known: Sequence[Mapping[str, Any]]) -> None:
    """Log a described run, the digest last.

    Args:
        handle: An open W&B run.
        run: The described run.
        known: Existing rows of its history.
    """
    handle.notes = run.note
    if run.curves:
        handle.define_metric("layer", hidden=True, summary="none")
        for name in dict.fromkeys(name for _, points in run.curves for name in points):
            handle.define_metric(name, step_metric="layer", summary="none")
        for layer, points in run.curves:
            row = {"layer": layer, **points}
            if row not in known:
                handle.log(row)
        tables = {f"tables/{name}": wandb_table(table) for name, table in run.tables.items()}
        charts = {f"charts/{name}": chart for name, chart in run.charts.items()}
        handle.log({**tables, **charts})
    else:
        handle.log(run.figures)
    for name, value in dict(handle.summary).items():
        if name not in run.figures and isinstance(value, int | float) and name[0] != "_":
            del handle.summary[name]  # not defined any more
    handle.summary.update(run.figures)
    if run.outcomes:
        made = run.outcomes
        artifact = wandb.Artifact(made.name, type="outcomes", metadata=made.metadata)
        attach(handle, artifact, run.files, made.aliases)
    mine = {**run.config["tracker"], "digest": run.digest(FORMAT)}
    handle.config.update({"tracker": mine}, allow_val_change=True)


def attach(
    handle: Any, artifact: Artifact, files: Iterable[Path], aliases: Iterable[str] = ()
) -> None:
    """Log an artifact of these files as the latest of its name, and wait until W&B has it."""
    for file in files:
        artifact.add_file(str(file), name=file.name)
    logged = handle.log_artifact(artifact, aliases=["latest", *aliases])
    if not handle.offline:
        logged.wait()


def wandb_table(table: LoggedTable) -> Any:
    """Convert a table to one of W&B."""
    rows: list[Any] = [list(row) for row in table.rows]
    return wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=True)
