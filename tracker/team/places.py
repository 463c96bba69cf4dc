"""The places that a results folder was published to, each a file: all are kept until it is deleted.

Another folder's place may be planted, and its server would get this user's login: so a place is
contacted where the environment names its server, or where there is no login that it could get.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote

from tracker.core.provenance import content_hash
from tracker.ledger.cells import CellStore
from tracker.ledger.notes import read_note, write_note
from tracker.tracking import BACKENDS, service
from tracker.tracking.base import Target


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


def places_of(store: CellStore, view: str, results: Path) -> dict[str, Target]:
    """Recall where a view was published to, or should have been: name → place."""
    found = {}
    for name in store.places(view):
        note = read_note(results / "places" / f"{quote(name, safe='')}.json")
        if note.get("backend") in BACKENDS and isinstance(note.get("project"), str):
            found[name] = Target(note["backend"], note["project"], note.get("server"))
    return found
