"""Collect the cells of several results folders and tracking projects.

The cells of a tracking project are downloaded once, into a cache that is a results folder, and then
handled like local ones. Downloads are checked first: the key is computed again, and no downloaded
name is used as a path.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock

from tracker.core.decision_records import DecisionsRecord
from tracker.core.distribution import other_format
from tracker.core.errors import TrackerError, TrackingError
from tracker.core.findings import FindingRecord
from tracker.core.grouping import grouped
from tracker.core.provenance import content_hash
from tracker.core.records import CellRecord, Place
from tracker.core.text import masked
from tracker.core.views import View
from tracker.ledger.cache import own_folder
from tracker.ledger.cells import CellStore
from tracker.ledger.files import read_note, write_note, write_text
from tracker.ledger.store import Ledger
from tracker.ledger.texts import is_texts
from tracker.ledger.views import CellIdentity, folder_name
from tracker.measuring.derive import decisions_of, record_of
from tracker.measuring.progress import Progress
from tracker.tracking import open_backend, service, target
from tracker.tracking.base import Backend, RemoteCell, Target


def pull(
    source: Target, name: str, progress: Progress
) -> tuple[list[tuple[CellStore, View]], dict[str, str]]:
    """Read the cells of a tracking project, downloading new ones.

    Args:
        source: The project.
        name: The project as the user typed it.
        progress: Receives the progress of the download.

    Returns:
        The cells with their views, and cell → reason for those that could not be downloaded.

    Raises:
        TrackingError: There is no such project, or the backend could not be reached.
    """
    where = source.server or service(source.backend).server()
    root = own_folder(f"{source.backend}-{content_hash([where, source.project])[:16]}")
    ledger = Ledger(root)
    ledger.create()
    opened = open_backend(source.backend, source.project or "", root, source.server)
    failed: dict[str, str] = {}
    with closing(opened) as backend:
        there = backend.cells()
        with FileLock(root / "pull.lock"):
            sound = {store.identity.key: store for store in ledger.cells()}
            stale = [cell for cell in there if not _is_here(root, cell, sound)]
            if stale:
                progress.start(f"downloading {masked(name)}", len(stale), "measurements")
            for cell in stale:
                try:
                    _fetch(backend, cell, root)
                except TrackerError as error:
                    failed[f"{cell.name} of {masked(name)}"] = masked(str(error))
                progress.advance(1)
            progress.finish()
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
    """Read the note about a cached cell: its version, view and shards."""
    return read_note(_note_path(root, cell))


def _is_here(root: Path, cell: RemoteCell, sound: Mapping[str, CellStore]) -> bool:
    """Check whether the cache holds a cell's current version, undamaged."""
    note = _note(root, cell)
    store = sound.get(note.get("cell", ""))
    if note.get("version") != cell.version or store is None:
        return False
    views = {store.views.name_of(asked.view) for asked in store.views.asked(damaged={})}
    shards = {name for name, _ in store.proofs()}
    return note["view"] in views and set(note["shards"]) <= shards


def _fetch(backend: Backend, cell: RemoteCell, root: Path) -> None:
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
            shards = [store.adopt(path) for path in parquet if not is_texts(path)]
            for path in filter(is_texts, parquet):
                store.texts.adopt(path)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise TrackingError(f"its files are not what tracker writes: {error}") from None
        write_text(store.folder / "cell.json", identity.sealed())
        store.views.write(asked)
    note = {"version": cell.version, "cell": identity.key, "shards": shards}
    write_note(_note_path(root, cell), note | {"view": store.views.name_of(asked.view)})


@dataclass
class Collected:
    """Cells from several sources.

    Attributes:
        cells: The records, each (cell, view, number of documents) once, derived from all outcomes
            in the sources.
        experiments: The experiment files in the results folders: name → exact text.
        failed: Source, or a cell of it → the reason why it is missing.
        findings: The findings of studies in the results folders.
        origins: Place of a record → the cell and the view that it was derived from.
        searched: The cells of the steps of searches.
        unfinished: Folders of unfinished cells, each with what to do.
        projects: The tracking projects of the cells in results folders.
    """

    cells: tuple[CellRecord, ...] = ()
    experiments: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    findings: tuple[FindingRecord, ...] = ()
    origins: dict[Place, tuple[CellStore, View]] = field(default_factory=dict)
    searched: set[Place] = field(default_factory=set)
    unfinished: list[str] = field(default_factory=list)
    projects: set[str] = field(default_factory=set)

    def decisions(self) -> dict[Place, DecisionsRecord]:
        """Derive the documents that the cells' runs lose and win: a cell's place → record.

        Cells that cannot be read are added to `failed`.
        """
        found = {}
        for place in [cell.place for cell in self.cells if cell.place in self.origins]:
            store, view = self.origins[place]
            try:
                if record := decisions_of(store, view):
                    found[place] = record
            except TrackerError as error:
                self.failed[str(store.folder)] = str(error)
        return found


def collect(sources: Sequence[str], progress: Progress, anew: bool = False) -> Collected:
    """Collect the cells of several sources.

    Args:
        sources: Results folders, `mlflow:URI/EXPERIMENT`, `mlflow:EXPERIMENT` (at
            `MLFLOW_TRACKING_URI`), `wandb:ENTITY/PROJECT` or `trackio:PROJECT`.
        progress: Receives the progress of downloads.
        anew: True if every outcome is read and verified first, also those verified before; needed
            by output that shows more than the records.

    Returns:
        The cells. Sources and cells that cannot be read are listed in `failed`.

    Raises:
        RequestError: A source is invalid.
    """
    opened = {source: _opened(source) for source in sources}
    found = Collected()
    views: list[tuple[CellStore, View]] = []
    for source, place in opened.items():
        try:
            if isinstance(place, Target):
                there, lacking = pull(place, source, progress)
                views += there
                found.failed |= lacking
                continue
            contents = place.contents()
            found.failed |= contents.damaged
            views += [(store, asked.view) for store, asked in contents.views]
            found.findings = tuple(dict.fromkeys((*found.findings, *contents.findings)))
            found.searched |= contents.searched
            found.projects |= {asked.project for _, asked in contents.views}
            found.unfinished += [f"{cell.folder}: {why}" for cell, why in contents.unfinished]
            for name, text in contents.experiments.items():
                if found.experiments.setdefault(name, text) != text:
                    found.experiments[f"{name} ({masked(source)})"] = text
        except TrackerError as error:
            found.failed[masked(source)] = masked(str(error))
    cells = []
    asked = {id(store): store for store, _ in views}
    if anew:
        for store in {store.folder: store for store in asked.values()}.values():
            store.proofs(anew=True)
    for same in grouped(views, _shown).values():
        try:
            origin = _joined(same)
            asked[id(origin[0])] = origin[0]
            cells.append(record_of(*origin))
            found.origins[cells[-1].place] = origin
        except TrackerError as error:
            found.failed[str(same[0][0].folder)] = str(error)
    for store in asked.values():
        found.failed |= store.damage()
    found.cells = tuple(merged(cell for cell in cells if cell.n))
    return found


def _shown(one: tuple[CellStore, View]) -> Hashable:
    """Return the identity of a view among all cells."""
    store, view = one
    return store.identity.key, store.views.name_of(view)


def _joined(same: Sequence[tuple[CellStore, View]]) -> tuple[CellStore, View]:
    """Join the outcomes of one view from several folders."""
    (store, view), *rest = same
    if rest:
        by_folder = {one.folder.resolve(): one for one, _ in same}
        store, *others = sorted(
            by_folder.values(), key=lambda one: (-len(one.shards()), str(one.folder))
        )
        held = {path.name for path in store.shards()}
        # Equal names hold the same documents and ablations, and equal keys mean equal outcomes.
        more = [one for one in others if not {path.name for path in one.shards()} <= held]
        store = CellStore(store.folder, store.identity, more)
        view = view.joined(*(each for _, each in rest))
    return store, view


def merged(cells: Iterable[CellRecord]) -> list[CellRecord]:
    """Remove records that another record of the same cell contains.

    Records are never merged from parts, since figures derived from some runs or documents differ
    from those of all. The remaining records keep their order.
    """
    found: dict[object, list[CellRecord]] = {}
    for cell in cells:
        known = found.setdefault((cell.key, cell.removed, cell.metric), [])
        if not any(other.holds(cell) for other in known):
            known[:] = [*(other for other in known if not cell.holds(other)), cell]
    return [cell for known in found.values() for cell in known]


def _opened(source: str) -> Ledger | Target:
    """Open a source; raise RequestError for an invalid one before anything is downloaded."""
    path = Path(source)
    if ":" not in source or path.exists():
        return Ledger.existing(path)
    return target(source, reading=True)
