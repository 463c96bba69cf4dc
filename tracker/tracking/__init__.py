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
    figures: Flatten records into metrics, curves and tables.
    foreign: Bound the files that a server sends.
    identity: Compute the names and digests of runs.
    isolated: Call an SDK in a process of its own.
    runs: Describe the runs of a cell for every backend.
"""

from __future__ import annotations

import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import quote

from tracker.core.errors import RequestError, did_you_mean
from tracker.core.provenance import content_hash
from tracker.core.text import masked
from tracker.ledger.files import read_note, write_note
from tracker.tracking.base import Ability, Backend, LiveRun, Service, Target
from tracker.tracking.wandb.service import in_sweep

if TYPE_CHECKING:
    from tracker.core.records import CellRecord
    from tracker.ledger.cells import CellStore

BACKENDS = ("mlflow", "wandb", "trackio")
"""What a user may ask for; a backend's folder, and the service in it, is called as it is."""


@cache
def service(name: str) -> Service:
    """Say what a backend is to everybody else.

    Args:
        name: What a user typed.

    Returns:
        The service; it has imported no SDK.

    Raises:
        RequestError: There is no such backend.
    """
    if name not in BACKENDS:
        raise RequestError(
            f"There is no tracking backend {masked(name)!r}; use one of: {', '.join(BACKENDS)}."
            + did_you_mean(name, BACKENDS)
        )
    module = import_module(f"tracker.tracking.{name}.service")
    return cast(Service, getattr(module, f"{name.title()}Service")())


def target(text: str, *needs: Ability) -> Target:
    """Read where runs go.

    Args:
        text: `BACKEND` or `BACKEND:PROJECT`, e.g. `mlflow`, `wandb:ENTITY/PROJECT` or
            `mlflow:http://mlflow.lab:5000/EXPERIMENT`.
        *needs: What else is to go there.

    Returns:
        The target.

    Raises:
        RequestError: There is no such backend, or it does not take all that is to go there.
    """
    backend, colon, project = text.partition(":")
    known = service(backend)
    if colon and not project.strip("/"):
        raise RequestError(
            f"{masked(text)!r} names no project; write {backend} or {backend}:PROJECT"
        )
    for ability in needs:
        if ability not in known.can:
            others = ", ".join(name for name in BACKENDS if ability in service(name).can)
            raise RequestError(f"{known.title} takes no {ability}; use one of: {others}")
    return known.target(project)


def default_targets() -> tuple[str, ...]:
    """Say where runs go when nothing is said: a W&B sweep's trial to W&B, else to MLflow."""
    return ("wandb",) if in_sweep() else ("mlflow",)


def open_backend(name: str, project: str, results: Path, server: str | None = None) -> Backend:
    """Open a tracking backend; nothing is contacted before it is used.

    Args:
        name: One of `BACKENDS`.
        project: The project, in the backend's words.
        results: The results folder; a backend that needs no server may keep its files in it.
        server: As in a `Target`.

    Returns:
        The backend.
    """
    return service(name).open(project, results, server)


def open_live_run(name: str, project: str, results: Path, server: str | None = None) -> LiveRun:
    """Open what a backend that can shows while cells are measured; as `open_backend`."""
    return service(name).open_live_run(project, results, server)


def destination(name: str, project: str, results: Path, server: str | None = None) -> str:
    """Identify where a backend's runs would go, without contacting it or importing its SDK.

    Args:
        name: One of `BACKENDS`.
        project: The project that the runs go to.
        results: The results folder.
        server: As in a `Target`.

    Returns:
        A hash that changes with the project, the server, or a local store that is new or was moved;
        it gives away neither address nor password.
    """
    setting, local = service(name).store(results, server)
    made = None
    if local is not None and local.exists():
        made = [local.stat().st_ino, str(local.absolute())]
    return content_hash([name, project, setting, made])


def file_of(place: Target, results: Path) -> Path:
    """Say where it stands that a results folder keeps a place."""
    name = re.sub(r"[^\w.-]+", "-", service(place.backend).title_of(place), flags=re.ASCII)[:80]
    return results / "places" / f"{name}--{content_hash(vars(place))[:8]}.json"


def remember(place: Target, results: Path) -> str:
    """Keep a place, and say by which name receipts know it."""
    path = file_of(place, results)
    if not read_note(path):
        write_note(path, dict(vars(place)))
    return path.stem


def places_of(store: CellStore, record: CellRecord, results: Path) -> dict[str, Target]:
    """Return by name where a view or its predecessors were published to, or should have been.

    Places that are not kept in step in the environment of now are left out.
    """
    found = {}
    for name in store.places(record.view, *record.supersedes):
        note = read_note(results / "places" / f"{quote(name, safe='')}.json")
        if note.get("backend") in BACKENDS and isinstance(note.get("project"), str):
            place = Target(note["backend"], note["project"], note.get("server"))
            if service(place.backend).is_kept_here(place):
                found[name] = place
    return found
