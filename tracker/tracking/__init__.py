"""Tracking backends: where people browse what the ledger already holds.

The ledger is the source of truth. A backend is given frozen records and files, and can be filled
again from the ledger at any time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tracker.core.errors import RequestError, did_you_mean
from tracker.core.provenance import content_hash
from tracker.core.text import masked
from tracker.tracking.base import Backend, LiveRun, Models
from tracker.tracking.isolated import Isolated

_SWEEP = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")
"""What an agent tells its trial. Whoever has it can open the trial's own run and no other."""


def _mlflow(project: str, results: Path, server: str | None) -> Backend:
    from tracker.tracking.mlflow.backend import MlflowBackend

    return MlflowBackend(project, results, server)


def _wandb(project: str, results: Path, server: str | None) -> Backend:
    isolated = Isolated("WandbBackend", project, results, in_sweep(), without=_SWEEP)
    return cast(Backend, isolated)


BACKENDS: dict[str, Callable[[str, Path, str | None], Backend]] = {
    "mlflow": _mlflow,
    "wandb": _wandb,
}
"""What a user may ask for. Each entry imports its SDK only when it is called."""


@dataclass(frozen=True)
class Target:
    """Where runs go, or come from.

    Attributes:
        backend: A key of `BACKENDS`.
        project: The MLflow experiment or W&B project; None = that of the experiment file.
        server: MLflow's tracking URI; None = that of the environment, or the results folder's.
    """

    backend: str
    project: str | None = None
    server: str | None = None


def target(text: str) -> Target:
    """Read where runs go.

    Args:
        text: `BACKEND` or `BACKEND:PROJECT`, e.g. `mlflow`, `wandb:ENTITY/PROJECT` or
            `mlflow:http://mlflow.lab:5000/EXPERIMENT`.

    Returns:
        The target.

    Raises:
        RequestError: There is no such backend.
    """
    backend, colon, project = text.partition(":")
    if backend not in BACKENDS:
        raise RequestError(
            f"There is no tracking backend {masked(backend)!r}; use one of: {', '.join(BACKENDS)}."
            + did_you_mean(backend, BACKENDS)
        )
    if colon and not project.strip("/"):
        raise RequestError(
            f"{masked(text)!r} names no project; write {backend} or {backend}:PROJECT"
        )
    if backend != "mlflow" or "://" not in project:
        return Target(backend, project or None)
    server, project = _server_and_project(project)
    if not project:
        raise RequestError(f"{masked(text)!r} names no experiment; write mlflow:URI/EXPERIMENT")
    return Target(backend, project, server)


def _server_and_project(text: str) -> tuple[str, str]:
    """Split an address: a `#` says where, else a server ends at its port, a file at its name."""
    if "#" in text:
        server, _, project = text.partition("#")
    elif text.startswith(("http://", "https://")):
        scheme, _, rest = text.partition("://")
        host, _, project = rest.partition("/")
        server = f"{scheme}://{host}"
    else:
        server, _, project = text.rpartition("/")
    return server, project.strip("/")


def in_sweep() -> bool:
    """Say whether a W&B agent started this process."""
    return bool(os.environ.get("WANDB_SWEEP_ID"))


def default_targets() -> tuple[str, ...]:
    """Say where runs go when nothing is said: a W&B sweep's trial to W&B, else to MLflow."""
    return ("wandb",) if in_sweep() else ("mlflow",)


def open_backend(name: str, project: str, results: Path, server: str | None = None) -> Backend:
    """Open a tracking backend; nothing is contacted before it is used.

    Args:
        name: A key of `BACKENDS`.
        project: The MLflow experiment, or the W&B project as `PROJECT` or `ENTITY/PROJECT`.
        results: The results folder; a backend that needs no server keeps its files in it.
        server: MLflow's tracking URI; None for that of the environment.

    Returns:
        The backend.
    """
    return BACKENDS[name](project, results, server)


def open_live_run(name: str, project: str, results: Path, server: str | None = None) -> LiveRun:
    """Open what a backend shows while cells are measured, in a process of its own.

    Args:
        name: A key of `BACKENDS`.
        project: As for `open_backend`.
        results: The results folder.
        server: As for `open_backend`.

    Returns:
        The picture; nothing is contacted before it is used.
    """
    if name == "mlflow":
        return cast(LiveRun, Isolated("MlflowPicture", project, results, server))
    return cast(LiveRun, Isolated("WandbPicture", project, results, without=_SWEEP))


def open_models(name: str, project: str, results: Path, server: str | None = None) -> Models:
    """Open where a backend keeps pruned models, in a process of its own.

    MLflow's flavours write to whatever run is active, which may be a notebook's.

    Args:
        name: A key of `BACKENDS`.
        project: As for `open_backend`.
        results: The results folder.
        server: As for `open_backend`.

    Returns:
        The models; nothing is contacted before they are used.
    """
    if name == "mlflow":
        return cast(Models, Isolated("MlflowModels", project, results, server))
    return cast(Models, Isolated("WandbBackend", project, results, in_sweep(), without=_SWEEP))


def open_trial(results: Path) -> Isolated:
    """Open the run that a W&B agent opened for this process: a `WandbTrial` in one of its own."""
    return Isolated("WandbTrial", results)


def open_foreign_files() -> Isolated:
    """Open what reads downloaded files: `ForeignFiles` in a process with little memory."""
    return Isolated("ForeignFiles")


def open_sweep(path: str, results: Path) -> Isolated:
    """Open a W&B sweep: a `WandbSweep` in a process of its own.

    Args:
        path: `ENTITY/PROJECT/ID`.
        results: The results folder.

    Returns:
        The sweep; nothing is contacted before it is used.

    Raises:
        RequestError: The path names no sweep.
    """
    if len([part for part in path.split("/") if part]) != 3 or path.count("/") != 2:
        raise RequestError(f"{masked(path)!r} names no sweep; write ENTITY/PROJECT/ID")
    return Isolated("WandbSweep", path, results, without=_SWEEP)


def destination(name: str, project: str, results: Path, server: str | None = None) -> str:
    """Identify where a backend's runs would go, without contacting it or importing its SDK.

    Args:
        name: A key of `BACKENDS`.
        project: The project that the runs go to.
        results: The results folder.
        server: MLflow's tracking URI; None for that of the environment.

    Returns:
        A hash that changes with the project, the server, or a local store that is new or was moved;
        it gives away neither address nor password.
    """
    if name == "mlflow":
        server = server or os.environ.get("MLFLOW_TRACKING_URI")
        local = None if server else results / "mlflow.db"
    else:
        names = ("WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE", "WANDB_SWEEP_ID")
        server = " ".join(os.environ.get(setting, "") for setting in names)
        local = results / "wandb" if os.environ.get("WANDB_MODE") == "offline" else None
    made = None
    if local is not None and local.exists():
        made = [local.stat().st_ino, str(local.absolute())]
    return content_hash([name, project, server, made])
