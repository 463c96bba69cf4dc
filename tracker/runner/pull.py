"""Downloading what a tracking project holds, once, into a cache that is a results folder.

From there on a colleague's cells are derived as one's own are.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import platformdirs
from filelock import FileLock

from tracker.errors import TrackerError, TrackingError
from tracker.ledger.files import write_text
from tracker.ledger.keys import folder_name
from tracker.ledger.store import CellIdentity, CellStore, Ledger
from tracker.provenance import content_hash
from tracker.records import CellRecord
from tracker.runner.derive import all_records
from tracker.runner.progress import Progress
from tracker.tracking import Target, open_backend
from tracker.tracking.base import Backend, RemoteCell, run_key


def cache_folder() -> Path:
    """Say where downloads are kept: `TRACKER_CACHE`, else the user's cache folder."""
    chosen = os.environ.get("TRACKER_CACHE")
    return Path(chosen) if chosen else platformdirs.user_cache_path("tracker")


def pull(source: Target, name: str, progress: Progress) -> tuple[list[CellRecord], dict[str, str]]:
    """Read the cells of a tracking project, downloading what is new.

    Args:
        source: The project.
        name: What the user calls it.
        progress: Told what is downloaded.

    Returns:
        The records, and for each cell that could not be had, why.

    Raises:
        TrackingError: There is no such project, or the backend could not be reached.
    """
    setting = "MLFLOW_TRACKING_URI" if source.backend == "mlflow" else "WANDB_BASE_URL"
    where = source.server or os.environ.get(setting)
    root = cache_folder() / f"{source.backend}-{content_hash([where, source.project])[:16]}"
    ledger = Ledger(root)
    ledger.create()
    backend = open_backend(source.backend, source.project or "", root, source.server)
    failed: dict[str, str] = {}
    try:
        there = backend.cells()
        with FileLock(root / "pull.lock"):
            stale = [cell for cell in there if _version(root, cell) != cell.version]
            if stale:
                progress.start(f"downloading {name}", len(stale), "cells")
            for cell in stale:
                try:
                    _fetch(backend, cell, root)
                except TrackerError as error:
                    failed[f"{cell.name} of {name}"] = str(error)
                progress.advance(1)
            progress.finish()
    finally:
        backend.close()
    keys = {cell.key for cell in there}
    return [r for r in all_records(ledger) if r.n and run_key(r, "cell") in keys], failed


def _note(root: Path, cell: RemoteCell) -> Path:
    return root / "pulled" / f"{content_hash(cell.key)[:32]}.json"


def _version(root: Path, cell: RemoteCell) -> str | None:
    """Say which version of a cell the cache holds."""
    with suppress(FileNotFoundError, ValueError):
        return str(json.loads(_note(root, cell).read_text(encoding="utf-8")))
    return None


def _fetch(backend: Backend, cell: RemoteCell, root: Path) -> None:
    if not cell.version:
        raise TrackingError(
            "it was published without its outcomes, by an older tracker; "
            "tracker sync, from the results folder that it came from"
        )
    with TemporaryDirectory(dir=root) as temporary:
        folder = Path(temporary)
        backend.fetch(cell, folder)
        try:
            identity = CellIdentity.model_validate_json((folder / "cell.json").read_bytes())
            (view,) = (path for path in folder.glob("*.json") if path.name != "cell.json")
            name = folder_name(identity.model.name, identity.benchmark.name, identity.key)
            store = CellStore(root / "cells" / name, identity)
            asked = store.read_asked(view.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise TrackingError(f"its files are not what tracker writes: {error}") from None
        for path in folder.glob("*.parquet"):
            place = store.folder / "shards" / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            path.replace(place)
        write_text(store.folder / "cell.json", identity.model_dump_json(indent=2))
        store.write_asked(asked)
    write_text(_note(root, cell), json.dumps(cell.version))
