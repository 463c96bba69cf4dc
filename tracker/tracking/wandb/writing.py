"""Configure the W&B SDK, and open, write and close runs.

The contents of a run are written in this order: curves, tables, charts, summary, artifact, digest.

W&B cannot remove a point of a curve, so a changed value becomes a second point at the same layer.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from wandb import Artifact, Run

from tracker.schema.errors import TrackingError
from tracker.schema.records import CellRecord
from tracker.tracking.base import build_error, explain_errors
from tracker.tracking.figures import LoggedTable
from tracker.tracking.identity import filter_words, group_name
from tracker.tracking.runs import INVALID_NAME_PATTERN, MAX_ARTIFACT_NAME, DescribedRun, cut_text

_FINISH_SECONDS = 120.0
_ENVIRONMENT = {
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
    # Its own limits (20 retries and more, up to a minute apart) would hold up a measurement for an
    # hour when the server is down. The login and the `Api` take them from here alone.
    "WANDB__FILE_STREAM_RETRY_MAX": "4",
    "WANDB__FILE_TRANSFER_RETRY_MAX": "4",
    "WANDB__GRAPHQL_RETRY_MAX": "3",
}
"""Environment variables that W&B reads at set-up; values set by the user take precedence."""

_QUIET = ("silent", "disable_code", "disable_git", "x_disable_machine_info", "x_disable_meta")


@contextmanager
def wandb_session(results: Path, problem: str, advice: str = "") -> Iterator[None]:
    """Configure the W&B SDK, and convert exceptions in a `with` block to TrackingError.

    Args:
        results: The results folder.
        problem: Beginning of the error message, which names the failed action.
        advice: End of the error message, which gives advice.

    Yields:
        Nothing.

    Raises:
        TrackingError: The code in the `with` block raised an exception.
    """
    # Beside the runs, so that offline runs have their artifacts with them.
    environment = {**_ENVIRONMENT, "WANDB_DATA_DIR": str(results / "wandb" / "data")}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    secrets = [os.environ.get("WANDB_API_KEY")]
    with explain_errors(lambda error: build_error(problem, error, advice, secrets)):
        yield


def is_offline() -> bool:
    """Return whether runs are written to local files, which `wandb sync` uploads later."""
    return bool(wandb.setup().settings._offline)


def log_in() -> None:
    """Log in to W&B without a prompt; raise TrackingError if no login is configured."""
    if not wandb.login(prompt=False, verify=True):
        raise TrackingError(
            "nobody is logged in to W&B: run `wandb login`, set WANDB_API_KEY, or write offline "
            "runs with WANDB_MODE=offline"
        )


def start_run(results: Path, /, watched_pid: int | None = None, **run: Any) -> Any:
    """Open an additional W&B run, which records no console output and no data about this machine.

    Args:
        results: The results folder, in which the files of the run are stored.
        watched_pid: Id of the process whose system metrics W&B records; None for no system metrics.
        **run: The arguments of `wandb.init` that identify the run.

    Returns:
        The open W&B run; the caller ends the run with `finish_run`.
    """
    settings = wandb.Settings(
        root_dir=str(results),
        console="off",
        x_disable_stats=watched_pid is None,
        x_stats_pid=watched_pid or os.getpid(),
        x_save_requirements=False,
        init_timeout=60,
        finish_timeout=_FINISH_SECONDS,
        finish_timeout_raises=True,
        **dict.fromkeys(_QUIET, True),
    )
    return wandb.init(reinit="create_new", settings=settings, **run)


@contextmanager
def finish_run(handle: Run, exit_code: int = 0) -> Iterator[Any]:
    """Yield a W&B run, and end it after the `with` block; an exception marks it as failed."""
    try:
        yield handle
    except BaseException:
        handle.finish(exit_code=1)
        raise
    handle.finish(exit_code=exit_code)


WANDB_FORMAT = "5"
"""Version in every digest; increase it when the form of runs changes, to update all runs once."""

# What W&B takes; counted in bytes, of which there are never fewer than characters.
_MAX_GROUP = 128  # the server: "invalid parameters: 128 limit exceeded for GroupName"
_MAX_NAME = 128  # a longer name of a run fails: NVIDIA-NeMo/Skills issue 842
_MAX_TAG = 64  # wandb/sdk/wandb_settings.py, validate_run_tags


def run_id(key: str, n_deleted: int = 0) -> str:
    """Return the W&B id for a run key; `n_deleted` counts earlier ids that were deleted in W&B."""
    numbered_key = f"{key}#{n_deleted}" if n_deleted else key
    return hashlib.sha256(numbered_key.encode()).hexdigest()[:16]


def cell_group(cell: CellRecord) -> str:
    """Return the name of the W&B group that contains all runs of a model and benchmark."""
    return cut_text(group_name(cell), _MAX_GROUP)


def run_labels(cell: CellRecord, name: str, kind: str) -> dict[str, Any]:
    """Return the arguments of `wandb.init` that set the name, group, type and tags of a run."""
    tags = tuple(cut_text(word, _MAX_TAG) for word in filter_words(cell))
    labels = {"name": cut_text(name, _MAX_NAME), "group": cell_group(cell), "job_type": kind}
    return labels | {"tags": tags}


def model_artifact_name(name: str) -> str:
    """Return the name of the W&B artifact for a pruned model."""
    return cut_text(re.sub(INVALID_NAME_PATTERN, "-", name), MAX_ARTIFACT_NAME)


def write_run(handle: Any, run: DescribedRun, existing_rows: Sequence[Mapping[str, Any]]) -> None:
    """Write metrics, tables, charts and files to an open W&B run; the digest is written last.

    Args:
        handle: An open W&B run.
        run: The content to write.
        existing_rows: Rows of metrics that W&B already has; these rows are not logged again.
    """
    handle.notes = run.note
    if run.curves:
        handle.define_metric("layer", hidden=True, summary="none")
        for name in dict.fromkeys(name for _, points in run.curves for name in points):
            handle.define_metric(name, step_metric="layer", summary="none")
        for layer, points in run.curves:
            row = {"layer": layer, **points}
            if row not in existing_rows:
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
        outcomes = run.outcomes
        artifact = wandb.Artifact(outcomes.name, type="outcomes", metadata=outcomes.metadata)
        log_files(handle, artifact, run.files, outcomes.aliases)
    tracker_config = {**run.config["tracker"], "digest": run.digest(WANDB_FORMAT)}
    handle.config.update({"tracker": tracker_config}, allow_val_change=True)


def log_files(
    handle: Any, artifact: Artifact, files: Iterable[Path], aliases: Iterable[str] = ()
) -> None:
    """Log files as the latest version of a W&B artifact, and wait until the upload is complete."""
    for file in files:
        artifact.add_file(str(file), name=file.name)
    logged_artifact = handle.log_artifact(artifact, aliases=["latest", *aliases])
    if not handle.offline:
        logged_artifact.wait()


def wandb_table(table: LoggedTable) -> Any:
    """Convert a table to a W&B table."""
    rows: list[Any] = [list(row) for row in table.rows]
    return wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=True)
