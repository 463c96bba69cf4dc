"""Configure the W&B SDK in this process, log in, and open and close runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from wandb import Run

from tracker.schema.errors import TrackingError
from tracker.tracking.base import build_error, explain_errors

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
    """Log in to W&B without a prompt; TrackingError if no login is configured."""
    if not wandb.login(prompt=False, verify=True):
        raise TrackingError(
            "nobody is logged in to W&B: run `wandb login`, set WANDB_API_KEY, or write offline "
            "runs with WANDB_MODE=offline"
        )


def start_run(results: Path, /, watched_pid: int | None = None, **run: Any) -> Any:
    """Open a further W&B run, without console output and without data about this machine.

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
