"""Publish records to MLflow, W&B and Trackio, and read published records back.

The results folder (ledger) is the source of truth. A backend receives copies of records and files,
and can be filled again from the results folder at any time. A results folder stores the addresses
to which it was published. An address in a folder from another person can point to a server that
steals logins. So an address is contacted only if the environment names the same server, or if there
is no login to send.

Modules:
    mlflow: Write to MLflow.
    trackio: Write to Trackio.
    wandb: Write to Weights & Biases.
    base: Define the interface of a backend, and check the files that a server sends.
    figures: Flatten records into metrics, curves and tables.
    identity: Compute the keys, names and digests of runs.
    isolated: Call an SDK in a separate process.
    runs: Describe the runs to publish for a model and benchmark, for every backend.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from tracker.ledger.files import read_note, write_note
from tracker.schema.errors import RequestError, did_you_mean
from tracker.schema.extensions import load_extensions
from tracker.schema.provenance import content_hash
from tracker.schema.text import mask_secrets
from tracker.tracking.base import OFFLINE, Ability, Backend, LiveRun, Models, Service, Target

if TYPE_CHECKING:
    from tracker.ledger.cells import CellStore
    from tracker.schema.records import CellRecord


@cache
def backends() -> dict[str, Service]:
    """Return name → tracking backend, the built-in backends first.

    Other packages register backends by entry points in the group `layer_tracker.tracking`; each
    entry point names a subclass of `Service`. No SDK is imported.
    """
    # Here, since its package sets variables that MLflow reads when it is imported.
    from tracker.tracking.mlflow.service import MlflowService
    from tracker.tracking.trackio.service import TrackioService
    from tracker.tracking.wandb.service import WandbService

    services = (MlflowService(), WandbService(), TrackioService())
    ours: dict[str, Service] = {service.name: service for service in services}
    return ours | load_extensions("tracking", _new_service, reserved=ours)


def _new_service(extension: object) -> Service:
    """Create an instance of the `Service` subclass that an extension package provides."""
    if not (isinstance(extension, type) and issubclass(extension, Service)):
        raise TypeError(f"{extension!r} is no subclass of tracker.tracking.base.Service")
    return extension()


def service(name: str) -> Service:
    """Return the tracking backend with this name; RequestError if the name is unknown."""
    if name not in backends():
        advice = f"use one of: {', '.join(backends())}.{did_you_mean(name, backends())}"
        raise RequestError(f"There is no tracking backend {mask_secrets(name)!r}; {advice}")
    return backends()[name]


def target(text: str, *needs: Ability, is_source: bool = False) -> Target:
    """Parse a tracking target that a user typed, such as `wandb:ENTITY/PROJECT`.

    Args:
        text: `BACKEND` or `BACKEND:PROJECT`, e.g. `mlflow`, `wandb:ENTITY/PROJECT` or
            `mlflow:http://mlflow.lab:5000/EXPERIMENT`.
        *needs: Abilities that the backend must have.
        is_source: True if results are read from the target. The text must then name a project.

    Returns:
        The target: backend, project and server.

    Raises:
        RequestError: The backend does not exist or lacks an ability, or the text names no project
            to read from.
    """
    name, colon, project = text.partition(":")
    backend, masked = service(name), mask_secrets(text)
    if colon and not project.strip("/"):
        raise RequestError(f"{masked!r} names no project; write {name} or {name}:PROJECT")
    for ability in needs:
        if ability not in backend.can:
            names = ", ".join(key for key, entry in backends().items() if ability in entry.can)
            raise RequestError(f"{backend.title} takes no {ability}; use one of: {names}")
    return backend.target(project, is_source)


def sweep_backend() -> str | None:
    """Return the name of the backend whose sweep agent started this process, else None."""
    names = ((name, backend.sweep_variable) for name, backend in backends().items())
    return next((name for name, variable in names if variable and os.environ.get(variable)), None)


def in_sweep() -> bool:
    """Return whether a sweep agent started this process as a trial."""
    return sweep_backend() is not None


def default_targets() -> tuple[str, ...]:
    """Return the backends to which runs are published by default, such as `mlflow`."""
    return (sweep_backend() or "mlflow",)


def open_backend(name: str, project: str, results: Path, server: str | None = None) -> Backend:
    """Open a tracking backend; no server is contacted before the first use.

    Args:
        name: Name of a backend, a key of `backends()`.
        project: Name of the project, in the form that the backend expects.
        results: The results folder. A backend without a server stores its files in this folder.
        server: The server or folder, as in `Target.server`.

    Returns:
        The backend.
    """
    return cast(Backend, service(name).open("runs", project, results, server))


def open_live_run(name: str, project: str, results: Path, server: str | None = None) -> LiveRun:
    """Open the part of a backend that shows progress; arguments as in `open_backend`."""
    return cast(LiveRun, service(name).open("live runs", project, results, server))


def open_models(name: str, project: str, results: Path, server: str | None = None) -> Models:
    """Open a backend's storage of pruned models; arguments as in `open_backend`."""
    return cast(Models, service(name).open("lighter models", project, results, server))


def open_trial(results: Path) -> Any:
    """Open the run that the sweep agent created for this process; see `WandbTrial`."""
    return _sweep_service().open("trial", "", results)


def open_sweep(path: str, results: Path) -> Any:
    """Open a sweep (see `WandbSweep`); no server is contacted before the first use.

    Args:
        path: Path of the sweep, e.g. `ENTITY/PROJECT/ID`; empty for the sweep of this process.
        results: The results folder.

    Returns:
        The sweep.

    Raises:
        RequestError: `path` does not name a sweep.
    """
    return _sweep_service().open("sweep", path, results)


def _sweep_service() -> Service:
    """Return the backend of this process's sweep, or else the first backend with sweeps."""
    if name := sweep_backend():
        return service(name)
    return next(backend for backend in backends().values() if backend.sweep_variable)


def destination(name: str, project: str, results: Path, server: str | None = None) -> str:
    """Compute a hash of the project and server of published runs, contacting no server.

    Args:
        name: Name of a backend, a key of `backends()`.
        project: The project to which the runs are published.
        results: The results folder.
        server: The server or folder, as in `Target.server`.

    Returns:
        A hash that changes if the project or server changes, or if the local store is new or was
        moved. The hash reveals neither the address nor a password.
    """
    store_setting, local_path = service(name).store(results, server)
    local_identity = None
    if local_path is not None and local_path.exists():
        local_identity = [local_path.stat().st_ino, str(local_path.absolute())]
    return content_hash([name, project, store_setting, local_identity])


def typed_address(address: Target) -> str:
    """Return an address in the form that users type after `--to`."""
    has_server = address.server and service(address.backend).names_server
    server = f"{address.server}/" if has_server else ""
    return mask_secrets(f"{address.backend}:{server}{address.project}")


def address_file(address: Target, results: Path) -> Path:
    """Return the path of the file in the results folder that stores a publishing address."""
    name = re.sub(r"[^\w.-]+", "-", typed_address(address), flags=re.ASCII)[:80]
    return results / "places" / f"{name}--{content_hash(vars(address))[:8]}.json"


def write_address(address: Target, results: Path) -> str:
    """Write a publishing address to the results folder; return the name of its file."""
    path = address_file(address, results)
    if not read_note(path):
        write_note(path, dict(vars(address)))
    return path.stem


def published_targets(store: CellStore, record: CellRecord, results: Path) -> dict[str, Target]:
    """Return the targets to which a record was published, keyed by address name.

    Targets of records that this record replaces, and targets where publishing failed, are included.
    Targets that the current environment does not update are left out.
    """
    targets = {}
    for name in store.published_places(record.view, *record.supersedes):
        note = read_note(results / "places" / f"{quote(name, safe='')}.json")
        if note.get("backend") in backends() and isinstance(note.get("project"), str):
            published_target = Target(note["backend"], note["project"], note.get("server"))
            is_offline = service(published_target.backend).server() == OFFLINE
            if is_offline == (published_target.server == OFFLINE):
                targets[name] = published_target
    return targets
