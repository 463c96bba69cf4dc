"""Writes one run of W&B: curves, tables, charts, summary, the artifact, and its digest last.

W&B never takes a point of a curve back: where a figure has changed, its curve gets a second point.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb

from tracker.tracking.base import LoggedTable
from tracker.tracking.wandb.runs import WandbRun


def write(handle: Any, run: WandbRun, known: Sequence[Mapping[str, Any]]) -> None:
    """Log what a run says, the digest last.

    Args:
        handle: An open W&B run.
        run: What it should be.
        known: Rows of its history that it has already.
    """
    if run.curves:
        handle.define_metric("layer", hidden=True, summary="none")
        for name in dict.fromkeys(name for row in run.curves for name in row if name != "layer"):
            handle.define_metric(name, step_metric="layer", summary="none")
        for row in run.curves:
            if row not in known:
                handle.log(row)
        tables = {name: wandb_table(table) for name, table in run.tables.items()}
        handle.log({**tables, **{f"charts/{name}": c for name, c in run.charts.items()}})
    else:
        handle.log(run.summary)
    for name, value in dict(handle.summary).items():
        if name not in run.summary and isinstance(value, int | float) and name[0] != "_":
            del handle.summary[name]  # it was defined once
    handle.summary.update(run.summary)
    if run.outcomes:
        made = run.outcomes
        artifact = wandb.Artifact(made.name, type="outcomes", metadata=made.metadata)
        attach(handle, artifact, made.files, made.aliases)
    mine = {**run.config["tracker"], "digest": run.digest}
    handle.config.update({"tracker": mine}, allow_val_change=True)


def add_config(handle: Any, run: WandbRun) -> None:
    """Add to the configuration of a sweep's trial; the sweep's own values stand: W&B locks them."""
    handle.config.update({n: value for n, value in run.config.items() if n not in handle.config})


def attach(handle: Any, artifact: Any, files: Iterable[Path], aliases: Iterable[str] = ()) -> None:
    """Log an artifact of these files as the latest of its name, and wait until W&B has it."""
    for file in files:
        artifact.add_file(str(file), name=file.name)
    logged = handle.log_artifact(artifact, aliases=["latest", *aliases])
    if not handle.offline:
        logged.wait()


def wandb_table(table: LoggedTable) -> Any:
    """Make it a table of W&B's."""
    rows: list[Any] = [list(row) for row in table.rows]
    return wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=True)
