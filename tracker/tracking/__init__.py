"""Tracking backends: where people browse what the ledger already holds.

The ledger is the source of truth. A backend is given frozen records and files, and can be filled
again from the ledger at any time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tracker.errors import RequestError, did_you_mean
from tracker.provenance import content_hash
from tracker.tracking.base import Backend


def _mlflow(project: str, results: Path) -> Backend:
    from tracker.tracking.mlflow import MlflowBackend

    return MlflowBackend(project, results)


BACKENDS: dict[str, Callable[[str, Path], Backend]] = {"mlflow": _mlflow}
"""What a user may ask for. Each entry imports its SDK only when it is called."""


def open_backend(name: str, project: str, results: Path) -> Backend:
    """Open a tracking backend; nothing is contacted before its first `publish`.

    Args:
        name: A key of `BACKENDS`.
        project: The MLflow experiment or W&B project that the runs go to.
        results: The results folder; a backend that needs no server keeps its files in it.

    Returns:
        The backend.

    Raises:
        RequestError: There is no such backend.
    """
    known_backend(name)
    return BACKENDS[name](project, results)


def known_backend(name: str) -> None:
    """Refuse a backend that is not there.

    Args:
        name: What the user typed.

    Raises:
        RequestError: There is no such backend.
    """
    if name not in BACKENDS:
        raise RequestError(
            f"There is no tracking backend {name!r}; use one of: {', '.join(BACKENDS)}."
            + did_you_mean(name, BACKENDS)
        )


def destination(name: str, project: str, results: Path) -> str:
    """Identify where a backend's runs would go, without contacting it or importing its SDK.

    Args:
        name: A key of `BACKENDS`.
        project: The project that the runs go to.
        results: The results folder.

    Returns:
        A hash that changes with the project, the server, or a new database file; it gives away
        neither address nor password.
    """
    server = os.environ.get("MLFLOW_TRACKING_URI")
    database = results / "mlflow.db"
    file = database.stat().st_ino if not server and database.is_file() else None
    return content_hash([name, project, server, file])
