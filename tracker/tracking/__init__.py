"""Publish results to MLflow, W&B and Trackio, and read published results back.

The results folder (ledger) is the primary copy of all results. A backend receives copies of results
and files, which can be restored from the results folder at any time. A results folder also stores
the addresses of earlier publications. If the folder comes from another person, a stored address can
name a malicious server. Therefore, tracker sends a login only to a server that the environment
names.

Modules:
    mlflow: Write to MLflow.
    trackio: Write to Trackio.
    wandb: Write to Weights & Biases.
    base: Define the interface of a backend, call SDKs in separate processes, and check files.
    figures: Convert records to metrics, curves and tables.
    identity: Compute the keys, names and digests of runs.
    runs: Describe the runs to publish for a model and benchmark, in a form for all backends.
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
    """Return all tracking backends by name, starting with the built-in backends.

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
    """Create the backend of an extension package from its `Service` subclass."""
    if not (isinstance(extension, type) and issubclass(extension, Service)):
        raise TypeError(f"{extension!r} is not a subclass of tracker.tracking.base.Service")
    return extension()


def service(name: str) -> Service:
    """Return the tracking backend with this name.

    RequestError is raised if there is no such backend.
    """
    if name not in backends():
        advice = f"use one of: {', '.join(backends())}.{did_you_mean(name, backends())}"
        raise RequestError(f"There is no tracking backend {mask_secrets(name)!r}; {advice}")
    return backends()[name]


def target(text: str, *needs: Ability, is_source: bool = False) -> Target:
    """Parse a tracking target that a user typed, such as `wandb:ENTITY/PROJECT`.

    Args:
        text: `BACKEND` or `BACKEND:PROJECT`, e.g. `mlflow`, `wandb:ENTITY/PROJECT` or
            `mlflow:http://mlflow.lab:5000/EXPERIMENT`.
        *needs: Abilities that the backend must have, such as `reports`.
        is_source: True if results are read from the target; `text` must then name a project.

    Returns:
        The target: backend, project and server.

    Raises:
        RequestError: The backend does not exist or lacks an ability, or the text names no project
            to read from.
    """
    name, colon, project = text.partition(":")
    backend, masked = service(name), mask_secrets(text)
    if colon and not project.strip("/"):
        raise RequestError(f"{masked!r} does not name a project; write {name} or {name}:PROJECT")
    for ability in needs:
        if ability not in backend.can:
            names = ", ".join(key for key, entry in backends().items() if ability in entry.can)
            raise RequestError(f"{backend.title} does not support {ability}; use one of: {names}")
    return backend.target(project, is_source)


def sweep_backend() -> str | None:
    """Return the name of the backend whose sweep agent started this process, or None."""
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
    """Open a backend to show the progress of measurements.

    The arguments have the same meaning as those of `open_backend`.
    """
    return cast(LiveRun, service(name).open("live runs", project, results, server))


def open_models(name: str, project: str, results: Path, server: str | None = None) -> Models:
    """Open a backend to store pruned models.

    The arguments have the same meaning as those of `open_backend`.
    """
    return cast(Models, service(name).open("lighter models", project, results, server))


def open_trial(results: Path) -> Any:
    """Open the tracking run of this process's sweep trial; return a `WandbTrial`."""
    return _sweep_service().open("trial", "", results)


def open_sweep(path: str, results: Path) -> Any:
    """Open a sweep as a `WandbSweep`; no server is contacted before the first use.

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
    """Return the tracking backend that manages the current sweep.

    Outside a sweep, the first backend that supports sweeps is returned.
    """
    if name := sweep_backend():
        return service(name)
    return next(backend for backend in backends().values() if backend.sweep_variable)


def destination_hash(name: str, project: str, results: Path, server: str | None = None) -> str:
    """Compute a hash that identifies the storage of published runs.

    No server is contacted.

    Args:
        name: Name of a backend, a key of `backends()`.
        project: The project to which the runs are published.
        results: The results folder.
        server: The server or folder, as in `Target.server`.

    Returns:
        The hash, which changes if the project or the server changes, or if a local store is
        replaced or moved. The hash reveals neither the address nor a password.
    """
    store_setting, local_path = service(name).store(results, server)
    local_identity = None
    if local_path is not None and local_path.exists():
        local_identity = [local_path.stat().st_ino, str(local_path.absolute())]
    return content_hash([name, project, store_setting, local_identity])


def typed_address(address: Target) -> str:
    """Format a publishing address as users type it after `--to`."""
    has_server = address.server and service(address.backend).names_server
    server = f"{address.server}/" if has_server else ""
    return mask_secrets(f"{address.backend}:{server}{address.project}")


def address_file(address: Target, results: Path) -> Path:
    """Return the path of the file that stores a publishing address in the results folder."""
    name = re.sub(r"[^\w.-]+", "-", typed_address(address), flags=re.ASCII)[:80]
    return results / "places" / f"{name}--{content_hash(vars(address))[:8]}.json"


def write_address(address: Target, results: Path) -> str:
    """Store the address of a project in the results folder; return the file name without suffix."""
    path = address_file(address, results)
    if not read_note(path):
        write_note(path, dict(vars(address)))
    return path.stem


def published_targets(store: CellStore, record: CellRecord, results: Path) -> dict[str, Target]:
    """Return the projects to which results were published, by name of the address file.

    The dict includes projects to which publishing failed, and projects of smaller measurements that
    `record` replaces. For an offline backend, only offline projects are included; otherwise, only
    online projects are.
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
