"""Downloading what a tracking project holds, once, into a cache that is a results folder.

From there on a colleague's cells are derived as one's own are. What comes is checked first: the key
is computed again, and no name in it becomes a path here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock

from tracker.core.distribution import other_format
from tracker.core.errors import TrackerError, TrackingError
from tracker.core.provenance import content_hash
from tracker.core.text import masked
from tracker.core.views import View
from tracker.ledger.cache import own_folder
from tracker.ledger.cells import CellStore
from tracker.ledger.files import write_text
from tracker.ledger.keys import folder_name
from tracker.ledger.notes import read_note, write_note
from tracker.ledger.store import Ledger
from tracker.ledger.texts import is_texts
from tracker.ledger.views import CellIdentity
from tracker.measuring.progress import Progress
from tracker.tracking import open_backend, service
from tracker.tracking.base import Backend, RemoteCell, Target
from tracker.tracking.isolated import Isolated

_LARGEST_NOTE = 2**24
"""Bytes of `cell.json`, and of what was asked: a run takes some hundred."""


def pull(
    source: Target, name: str, progress: Progress
) -> tuple[list[tuple[CellStore, View]], dict[str, str]]:
    """Read the cells of a tracking project, downloading what is new.

    Args:
        source: The project.
        name: What the user calls it.
        progress: Told what is downloaded.

    Returns:
        The cells with their views, and for each that could not be had, why.

    Raises:
        TrackingError: There is no such project, or the backend could not be reached.
    """
    where = source.server or service(source.backend).server()
    root = own_folder(f"{source.backend}-{content_hash([where, source.project])[:16]}")
    ledger = Ledger(root)
    ledger.create()
    backend = open_backend(source.backend, source.project or "", root, source.server)
    # It may not hold much memory.
    files = Isolated("what reads downloaded files", "tracker.tracking.foreign:ForeignFiles")
    failed: dict[str, str] = {}
    try:
        there = backend.cells()
        with FileLock(root / "pull.lock"):
            sound = {store.identity.key: store for store in ledger.cells()}
            stale = [cell for cell in there if not _is_here(root, cell, sound)]
            if stale:
                progress.start(f"downloading {masked(name)}", len(stale), "measurements")
            for cell in stale:
                try:
                    _fetch(backend, files, cell, root)
                except TrackerError as error:
                    failed[f"{cell.name} of {masked(name)}"] = masked(str(error))
                progress.advance(1)
            progress.finish()
    finally:
        files.close()
        backend.close()
    wanted = {(note.get("cell"), note.get("view")) for note in (_note(root, c) for c in there)}
    views = [
        (store, asked.view)
        for store, asked in ledger.contents().views
        if (store.identity.key, store.views.name_of(asked.view)) in wanted
    ]
    return views, failed


def _note_path(root: Path, cell: RemoteCell) -> Path:
    return root / "pulled" / f"{content_hash(cell.key)[:32]}.json"


def _note(root: Path, cell: RemoteCell) -> dict[str, Any]:
    """Say which version of a cell the cache holds, as which view, and in which shards."""
    return read_note(_note_path(root, cell))


def _is_here(root: Path, cell: RemoteCell, sound: Mapping[str, CellStore]) -> bool:
    """Say whether the cache holds a version of a cell, as it was downloaded."""
    note = _note(root, cell)
    store = sound.get(note.get("cell", ""))
    if note.get("version") != cell.version or store is None:
        return False
    views = {store.views.name_of(asked.view) for asked in store.views.asked(damaged={})}
    shards = {name for name, _ in store.proofs()}
    return note["view"] in views and set(note["shards"]) <= shards


def _fetch(backend: Backend, files: Isolated, cell: RemoteCell, root: Path) -> None:
    if not cell.version:
        raise TrackingError(
            "it was published without its outcomes; "
            "tracker sync, from the results folder that it came from"
        )
    with TemporaryDirectory(dir=root) as temporary:
        folder = Path(temporary)
        backend.fetch(cell, folder)
        try:
            (file,) = (path for path in folder.glob("*.json") if path.name != "cell.json")
            if max(note.stat().st_size for note in folder.glob("*.json")) > _LARGEST_NOTE:
                raise ValueError("what describes it is longer than any description")
            view = file.read_text(encoding="utf-8")
            if why := other_format(json.loads(view).get("format")):
                raise TrackingError(f"it {why}")
            identity = CellIdentity.read((folder / "cell.json").read_bytes())
            if identity.key != cell.key.partition("/")[0]:
                raise ValueError("its key is not that of what it describes")
            name = folder_name(identity.model.name, identity.benchmark.name, identity.key)
            store = CellStore(root / "cells" / name, identity)
            asked = store.views.read(view)
            parquet = sorted(folder.glob("*.parquet"))
            files.refuse_bombs(parquet)
            shards = [store.adopt(path) for path in parquet if not is_texts(path)]
            for path in filter(is_texts, parquet):
                store.texts.adopt(path)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise TrackingError(f"its files are not what tracker writes: {error}") from None
        write_text(store.folder / "cell.json", identity.sealed())
        store.views.write(asked)
    note = {"version": cell.version, "cell": identity.key, "shards": shards}
    write_note(_note_path(root, cell), note | {"view": store.views.name_of(asked.view)})
