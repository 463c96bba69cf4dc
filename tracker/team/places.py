"""The places that a results folder was published to, each a file: all are kept until it is deleted.

Another folder's place may be planted, and its server would get this user's login: so a place is
contacted where the environment names its server, or where there is no login that it could get.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote, urlsplit

from tracker.core.errors import TrackingError
from tracker.core.provenance import content_hash
from tracker.core.text import masked
from tracker.ledger.cells import CellStore
from tracker.ledger.notes import read_note, write_note
from tracker.tracking import BACKENDS, Target
from tracker.tracking.base import sync_command

_OFFLINE = "offline"
"""Where W&B writes files: they go wherever `wandb sync` sends them."""
_LOGINS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
)
_LOGIN_FILE = Path("~/.mlflow/credentials")


def place_of(to: Target, project: str) -> Target:
    """Say where a target is in the environment of now, so that it is found from another one.

    Args:
        to: The target.
        project: The project, where it names none.

    Returns:
        The place; its server is None for MLflow's file in the results folder, and for W&B's own.
    """
    project = masked(to.project or project)
    if to.backend == "mlflow":
        return Target(to.backend, project, _without_login(to.server or _mlflow_server()))
    entity = os.environ.get("WANDB_ENTITY")
    if entity and "/" not in project:
        project = f"{entity}/{project}"
    return Target(to.backend, project, _wandb_server())


def target_of(place: Target, results: Path) -> Target:
    """Say how a place is reached from the environment of now.

    TrackingError, with what to type, where its server would get a login that may not be for it.
    """
    here = _mlflow_server()
    if place.backend == "wandb":
        if place.server == _wandb_server():
            return Target(place.backend, place.project)
        setting = f"WANDB_BASE_URL={place.server or ''} "
    elif place.server is None:
        own = f"sqlite:///{results.absolute() / 'mlflow.db'}" if here else None
        return Target(place.backend, place.project, own)
    elif place.server == _without_login(here):
        return Target(place.backend, place.project)
    elif not _is_remote(place.server) or not _has_login():
        return place
    else:
        setting = f"MLFLOW_TRACKING_URI={place.server} "
    again = sync_command(results.absolute(), f"{place.backend}:{place.project}")
    raise TrackingError(
        "its server is another than this environment names, and would get the login that is "
        f"for that one. With the login for it: {setting}{again}"
    )


def is_kept_here(place: Target) -> bool:
    """Say whether W&B's mode of now is that of a place: offline runs go to files, others do not."""
    return place.backend != "wandb" or (place.server == _OFFLINE) == (_wandb_server() == _OFFLINE)


def title_of(place: Target) -> str:
    """Name a place as it is typed after `--to`."""
    server = f"{place.server}/" if place.backend == "mlflow" and place.server else ""
    return masked(f"{place.backend}:{server}{place.project}")


def file_of(place: Target, results: Path) -> Path:
    """Say where it stands that a results folder keeps a place."""
    name = re.sub(r"[^\w.-]+", "-", title_of(place), flags=re.ASCII)[:80]
    return results / "places" / f"{name}--{content_hash(vars(place))[:8]}.json"


def remember(place: Target, results: Path) -> str:
    """Keep a place, and say by which name receipts know it."""
    path = file_of(place, results)
    if not read_note(path):
        write_note(path, dict(vars(place)))
    return path.stem


def places_of(store: CellStore, view: str, results: Path) -> dict[str, Target]:
    """Recall where a view was published to, or should have been: name → place."""
    found = {}
    for name in store.places(view):
        note = read_note(results / "places" / f"{quote(name, safe='')}.json")
        if note.get("backend") in BACKENDS and isinstance(note.get("project"), str):
            found[name] = Target(note["backend"], note["project"], note.get("server"))
    return found


def _mlflow_server() -> str | None:
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def _wandb_server() -> str | None:
    if os.environ.get("WANDB_MODE") == _OFFLINE:
        return _OFFLINE
    return _without_login(os.environ.get("WANDB_BASE_URL") or None)


def _without_login(uri: str | None) -> str | None:
    return None if uri is None else masked(re.sub(r"://[^/\s]*@", "://", uri)).rstrip("/")


def _is_remote(uri: str) -> bool:
    return urlsplit(uri).scheme not in ("sqlite", "file", "")


def _has_login() -> bool:
    return any(map(os.environ.get, _LOGINS)) or _LOGIN_FILE.expanduser().exists()
