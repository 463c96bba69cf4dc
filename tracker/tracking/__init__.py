"""Write records to MLflow, W&B and Trackio, and read them back.

The ledger is the source of truth. A backend receives frozen records and files, and can be filled
again from the ledger at any time. A results folder remembers where it was published. Another
folder's addresses may be planted to steal a login, so an address is contacted only if the
environment names its server, or if there is no login to send.

Modules:
    mlflow: Write to MLflow.
    trackio: Write to Trackio.
    wandb: Write to Weights & Biases.
    base: Define the interface of a backend.
    downloads: Check the files that a server sends.
    figures: Flatten records into metrics, curves and tables.
    identity: Compute the names and digests of runs.
    isolated: Call an SDK in a process of its own.
    runs: Describe the runs of a cell for every backend.
"""

from __future__ import annotations

import os
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

from tracker.core.errors import RequestError, did_you_mean
from tracker.core.extensions import load_extensions
from tracker.core.provenance import content_hash
from tracker.core.text import masked
from tracker.ledger.files import read_note, write_note
from tracker.tracking.base import OFFLINE, Ability, Backend, LiveRun, Models, Service, Target

if TYPE_CHECKING:
    from tracker.core.records import CellRecord
    from tracker.ledger.cells import CellStore


@cache
def backends() -> dict[str, Service]:
    """Return the tracking backends by the names that users type, ours first.

    Other packages add theirs as entry points of the group `layer_tracker.tracking`, which name a
    class that is a `Service`. No SDK is imported.
    """
    # Here, since its package sets variables that MLflow reads when it is imported.
    from tracker.tracking.mlflow.service import MlflowService
    from tracker.tracking.trackio.service import TrackioService
    from tracker.tracking.wandb.service import WandbService

    ours: dict[str, Service] = {
        "mlflow": MlflowService(),
        "wandb": WandbService(),
        "trackio": TrackioService(),
    }
    return ours | load_extensions("tracking", _new_service, reserved=ours)


def _new_service(extension: object) -> Service:
    if not (isinstance(extension, type) and issubclass(extension, Service)):
        raise TypeError(f"{extension!r} is no subclass of tracker.tracking.base.Service")
    return extension()


def service(name: str) -> Service:
    """Return a backend by its typed name; raise RequestError if there is none."""
    if name not in backends():
        raise RequestError(
            f"There is no tracking backend {masked(name)!r}; use one of: {', '.join(backends())}."
            + did_you_mean(name, backends())
        )
    return backends()[name]


def target(text: str, *needs: Ability, reading: bool = False) -> Target:
    """Read the target of runs from its typed form.

    Args:
        text: `BACKEND` or `BACKEND:PROJECT`, e.g. `mlflow`, `wandb:ENTITY/PROJECT` or
            `mlflow:http://mlflow.lab:5000/EXPERIMENT`.
        *needs: Abilities that the backend must have.
        reading: True if cells are read there, so that the text must name a project.

    Returns:
        The target.

    Raises:
        RequestError: There is no such backend, it lacks an ability, or the text names no project
            to read from.
    """
    name, colon, project = text.partition(":")
    backend = service(name)
    if colon and not project.strip("/"):
        raise RequestError(f"{masked(text)!r} names no project; write {name} or {name}:PROJECT")
    for ability in needs:
        if ability not in backend.can:
            able = ", ".join(name for name, other in backends().items() if ability in other.can)
            raise RequestError(f"{backend.title} takes no {ability}; use one of: {able}")
    return backend.target(project, reading)


def sweep_backend() -> str | None:
    """Return the backend whose agent started this process as a trial; None outside a sweep."""
    names = ((name, backend.sweep_variable) for name, backend in backends().items())
    return next((name for name, variable in names if variable and os.environ.get(variable)), None)


def in_sweep() -> bool:
    """Check whether an agent started this process as a trial of a sweep."""
    return sweep_backend() is not None


def default_targets() -> tuple[str, ...]:
    """Return where runs go by default: a sweep's trial to its backend, else to MLflow."""
    return (sweep_backend() or "mlflow",)


def open_backend(name: str, project: str, results: Path, server: str | None = None) -> Backend:
    """Open a tracking backend; nothing is contacted before it is used.

    Args:
        name: One of `backends()`.
        project: The project, in the backend's words.
        results: The results folder; a backend that needs no server may keep its files in it.
        server: As in a `Target`.

    Returns:
        The backend.
    """
    return cast(Backend, service(name).open("runs", project, results, server))


def open_live_run(name: str, project: str, results: Path, server: str | None = None) -> LiveRun:
    """Open the live runs of a backend with this ability, as `open_backend`."""
    return cast(LiveRun, service(name).open("live runs", project, results, server))


def open_models(name: str, project: str, results: Path, server: str | None = None) -> Models:
    """Open the storage of pruned models of a backend with this ability, as `open_backend`."""
    return cast(Models, service(name).open("lighter models", project, results, server))


def open_trial(results: Path) -> Any:
    """Open the run that an agent opened for this process; its interface is `WandbTrial`'s."""
    return _sweep_service().open("trial", "", results)


def open_sweep(path: str, results: Path) -> Any:
    """Open a sweep, with the interface of `WandbSweep`; nothing is contacted before its use.

    Args:
        path: The sweep, in its backend's words; empty for that of this process.
        results: The results folder.

    Returns:
        The sweep.

    Raises:
        RequestError: The path names no sweep.
    """
    return _sweep_service().open("sweep", path, results)


def _sweep_service() -> Service:
    """Return the backend of this process's sweep; outside one, the first that has sweeps."""
    if name := sweep_backend():
        return service(name)
    return next(backend for backend in backends().values() if backend.sweep_variable)


def destination(name: str, project: str, results: Path, server: str | None = None) -> str:
    """Compute a hash of a backend's destination, without contacting it or importing its SDK.

    Args:
        name: One of `backends()`.
        project: The project that the runs go to.
        results: The results folder.
        server: As in a `Target`.

    Returns:
        A hash that changes with the project, the server, or a local store that is new or was moved.
        It reveals neither address nor password.
    """
    setting, local = service(name).store(results, server)
    made = None
    if local is not None and local.exists():
        made = [local.stat().st_ino, str(local.absolute())]
    return content_hash([name, project, setting, made])


def title_of(address: Target) -> str:
    """Return an address as it is typed after `--to`."""
    named = address.server and service(address.backend).names_server
    return masked(f"{address.backend}:{f'{address.server}/' if named else ''}{address.project}")


def file_of(place: Target, results: Path) -> Path:
    """Return the file of a place in a results folder."""
    name = re.sub(r"[^\w.-]+", "-", title_of(place), flags=re.ASCII)[:80]
    return results / "places" / f"{name}--{content_hash(vars(place))[:8]}.json"


def remember(place: Target, results: Path) -> str:
    """Write a place to the results folder, and return its name in receipts."""
    path = file_of(place, results)
    if not read_note(path):
        write_note(path, dict(vars(place)))
    return path.stem


def places_of(store: CellStore, record: CellRecord, results: Path) -> dict[str, Target]:
    """Return the places by name that have or should have a view or its predecessors.

    Places that the current environment does not update are left out.
    """
    found = {}
    for name in store.places(record.view, *record.supersedes):
        note = read_note(results / "places" / f"{quote(name, safe='')}.json")
        if note.get("backend") in backends() and isinstance(note.get("project"), str):
            address = Target(note["backend"], note["project"], note.get("server"))
            is_offline = service(address.backend).server() == OFFLINE
            if is_offline == (address.server == OFFLINE):
                found[name] = address
    return found
