"""Collect measured results from several results folders and tracking projects.

A cell holds the results of one model on one benchmark. The cells of a tracking project are
downloaded once, to a cache folder with the structure of a results folder. Each download is
verified.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock

from tracker.analysis.decisions import Decisions, derive_decisions
from tracker.ledger.cache import private_folder
from tracker.ledger.cells import CellStore
from tracker.ledger.files import read_note, write_note, write_text
from tracker.ledger.store import Ledger
from tracker.ledger.texts import is_text_file
from tracker.ledger.views import CellIdentity, folder_name
from tracker.measuring.derive import derive_record, read_decisions
from tracker.measuring.progress import Progress
from tracker.report.dataset import RECORDS_FILE, read_dataset
from tracker.schema.distribution import version_problem
from tracker.schema.errors import TrackerError, TrackingError
from tracker.schema.findings import FindingRecord
from tracker.schema.grouping import group_by
from tracker.schema.provenance import content_hash
from tracker.schema.records import CellRecord, DecisionsRecord, RecordKey
from tracker.schema.text import mask_secrets
from tracker.schema.views import View
from tracker.tracking import open_backend, service, target
from tracker.tracking.base import Backend, RemoteCell, Target


def pull_project(
    source: Target, name: str, progress: Progress
) -> tuple[list[tuple[CellStore, View]], dict[str, str]]:
    """Download the new results of a tracking project; return all its results.

    Args:
        source: The tracking project.
        name: The project as the user typed it.
        progress: Receives the progress of the download.

    Returns:
        First, pairs of a cell (model and benchmark) and a selection of its runs. Second, the failed
        downloads, as name of a cell → reason.

    Raises:
        TrackingError: The project does not exist, or the backend could not be reached.
    """
    server = source.server or service(source.backend).server()
    root = private_folder(f"{source.backend}-{content_hash([server, source.project])[:16]}")
    ledger = Ledger(root)
    ledger.create()
    opened_backend = open_backend(source.backend, source.project or "", root, source.server)
    errors: dict[str, str] = {}
    with closing(opened_backend) as backend:
        remote_cells = backend.cells()
        with FileLock(root / "pull.lock"):
            stores = {store.identity.key: store for store in ledger.cells()}
            stale_cells = [cell for cell in remote_cells if not _is_cached(root, cell, stores)]
            if stale_cells:
                progress.start(
                    f"downloading {mask_secrets(name)}", len(stale_cells), "measurements"
                )
            for cell in stale_cells:
                try:
                    _download_cell(backend, cell, root)
                except TrackerError as error:
                    errors[f"{cell.name} of {mask_secrets(name)}"] = mask_secrets(str(error))
                progress.advance(1)
            progress.finish()
    wanted_views = {
        (note.get("cell"), note.get("view")) for note in (_read_note(root, c) for c in remote_cells)
    }
    views = [
        (store, view_request.view)
        for store, view_request in ledger.contents().views
        if (store.identity.key, store.views.view_name(view_request.view)) in wanted_views
    ]
    return views, errors


def _note_path(root: Path, cell: RemoteCell) -> Path:
    return root / "pulled" / f"{content_hash(cell.key)[:32]}.json"


def _read_note(root: Path, cell: RemoteCell) -> dict[str, Any]:
    """Read the cached metadata of a download: version, selection of runs, and outcome files."""
    return read_note(_note_path(root, cell))


def _is_cached(root: Path, cell: RemoteCell, stores: Mapping[str, CellStore]) -> bool:
    """Return whether the local cache has a complete, current copy of published results.

    `cell` describes the published results, `root` is the cache folder, and `stores` contains the
    cached results by cell key.
    """
    note = _read_note(root, cell)
    store = stores.get(note.get("cell", ""))
    if note.get("version") != cell.version or store is None:
        return False
    views = {
        store.views.view_name(view_request.view)
        for view_request in store.views.read_requested(damaged={})
    }
    shards = {name for name, _ in store.shard_digests()}
    return note["view"] in views and set(note["shards"]) <= shards


def _download_cell(backend: Backend, cell: RemoteCell, root: Path) -> None:
    if not cell.version:
        raise TrackingError(
            "the outcomes of this benchmark were not published; run tracker sync again with the "
            "results folder that was published"
        )
    with TemporaryDirectory(dir=root) as temporary_path:
        folder = Path(temporary_path)
        backend.fetch(cell, folder)
        try:
            (view_path,) = (path for path in folder.glob("*.json") if path.name != "cell.json")
            view_text = view_path.read_text(encoding="utf-8")
            if reason := version_problem(json.loads(view_text).get("format")):
                raise TrackingError(f"it {reason}")
            identity = CellIdentity.read((folder / "cell.json").read_bytes())
            if identity.key != cell.key.partition("/")[0]:
                raise ValueError("the cell's key does not fit the model and benchmark in cell.json")
            name = folder_name(identity.model.name, identity.benchmark.name, identity.key)
            store = CellStore(root / "cells" / name, identity)
            view_request = store.views.read(view_text)
            parquet_paths = sorted(folder.glob("*.parquet"))
            shards = [store.import_shard(path) for path in parquet_paths if not is_text_file(path)]
            for path in filter(is_text_file, parquet_paths):
                store.texts.import_file(path)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise TrackingError(f"the files do not have tracker's format: {error}") from None
        write_text(store.folder / "cell.json", identity.to_note())
        store.views.write(view_request)
    note = {"version": cell.version, "cell": identity.key, "shards": shards}
    write_note(_note_path(root, cell), note | {"view": store.views.view_name(view_request.view)})


@dataclass
class CollectedCells:
    """Measured results of several models and benchmarks, from several sources.

    Attributes:
        cells: Records of the cells, computed from the outcomes of all sources. One record for each
            cell and each selection of runs and documents.
        experiments: Name of an experiment file in a results folder → exact text of the file.
        failed: Name of a source (e.g. a folder) or of a cell → reason why it could not be read.
        findings: The stored results of studies in the results folders.
        origins: Record key → the stored cell, and the selection of runs and documents.
        searched: Keys of the records that were measured only as steps of a search for layers to
            remove.
        unfinished: One message for each unfinished measurement, with its folder and with advice.
        projects: Names of the tracking projects to which the results folders belong.
    """

    cells: tuple[CellRecord, ...] = ()
    experiments: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    findings: tuple[FindingRecord, ...] = ()
    origins: dict[RecordKey, tuple[CellStore, View]] = field(default_factory=dict)
    searched: set[RecordKey] = field(default_factory=set)
    unfinished: list[str] = field(default_factory=list)
    projects: set[str] = field(default_factory=set)

    def read_answers(self, cell: CellRecord) -> Decisions | None:
        """Read a model's answers to all documents; return None if no outcomes are stored."""
        origin = self.origins.get(cell.record_key)
        return derive_decisions(*origin) if origin else None

    def derive_decisions(self) -> dict[RecordKey, DecisionsRecord]:
        """List, for each ablation, the documents whose answer becomes wrong or becomes right.

        Returns a dict from record keys to these lists. The attribute `failed` receives folders that
        cannot be read, with the reason.
        """
        decisions = {}
        for key in [cell.record_key for cell in self.cells if cell.record_key in self.origins]:
            store, view = self.origins[key]
            try:
                if record := read_decisions(store, view):
                    decisions[key] = record
            except TrackerError as error:
                self.failed[str(store.folder)] = str(error)
        return decisions


def collect_cells(
    sources: Sequence[str], progress: Progress, verify_all: bool = False
) -> CollectedCells:
    """Collect the measured results of several results folders and tracking projects.

    Args:
        sources: Results folders, folders of `report --format dataset`, `mlflow:URI/EXPERIMENT`,
            `mlflow:EXPERIMENT` (at `MLFLOW_TRACKING_URI`), `wandb:ENTITY/PROJECT` or
            `trackio:PROJECT`.
        progress: Receives the progress of downloads.
        verify_all: Whether to verify all outcomes again, even if they were verified earlier. A
            caller that shows outcomes of single documents needs `verify_all`.

    Returns:
        The collected results. The attribute `failed` lists sources and cells that cannot be read.

    Raises:
        RequestError: A source is invalid.
    """
    opened = {source: _open_source(source) for source in sources}
    collected = CollectedCells()
    views: list[tuple[CellStore, View]] = []
    published: list[CellRecord] = []
    for source, opened_source in opened.items():
        try:
            if isinstance(opened_source, list):
                published += opened_source
                continue
            if isinstance(opened_source, Target):
                remote_views, errors = pull_project(opened_source, source, progress)
                views += remote_views
                collected.failed |= errors
                continue
            contents = opened_source.contents()
            collected.failed |= contents.damaged
            views += [(store, request.view) for store, request in contents.views]
            collected.findings = tuple(dict.fromkeys((*collected.findings, *contents.findings)))
            collected.searched |= contents.search_keys
            collected.projects |= {request.project for _, request in contents.views}
            collected.unfinished += [
                f"{cell.folder}: {advice}" for cell, advice in contents.unfinished
            ]
            for name, text in contents.experiments.items():
                if collected.experiments.setdefault(name, text) != text:
                    collected.experiments[f"{name} ({mask_secrets(source)})"] = text
        except TrackerError as error:
            collected.failed[mask_secrets(source)] = mask_secrets(str(error))
    cells = []
    stores = {id(store): store for store, _ in views}
    if verify_all:
        for store in {store.folder: store for store in stores.values()}.values():
            store.shard_digests(verify_all=True)
    for same_views in group_by(views, _view_key).values():
        try:
            origin = _join_views(same_views)
            stores[id(origin[0])] = origin[0]
            cells.append(derive_record(*origin))
            collected.origins[cells[-1].record_key] = origin
        except TrackerError as error:
            collected.failed[str(same_views[0][0].folder)] = str(error)
    for store in stores.values():
        collected.failed |= store.damaged_shards()
    collected.cells = tuple(remove_contained(cell for cell in (*cells, *published) if cell.n))
    return collected


def _view_key(stored_view: tuple[CellStore, View]) -> Hashable:
    """Return a key that is equal for results of the same model, benchmark and runs."""
    store, view = stored_view
    return store.identity.key, store.views.view_name(view)


def _join_views(same_views: Sequence[tuple[CellStore, View]]) -> tuple[CellStore, View]:
    """Merge results with equal keys (see `_view_key`) from several folders.

    Returns a store that reads the outcomes of all folders, and the union of the selected runs and
    documents.
    """
    (store, view), *other_views = same_views
    if other_views:
        by_folder = {part.folder.resolve(): part for part, _ in same_views}
        store, *others = sorted(
            by_folder.values(), key=lambda part: (-len(part.shards()), str(part.folder))
        )
        names = {path.name for path in store.shards()}
        # Equal names hold the same documents and ablations, and equal keys mean equal outcomes.
        extra = [part for part in others if not {path.name for path in part.shards()} <= names]
        store = CellStore(store.folder, store.identity, extra)
        view = view.merge(*(shown for _, shown in other_views))
    return store, view


def remove_contained(cells: Iterable[CellRecord]) -> list[CellRecord]:
    """Remove records whose runs and documents are contained in another record.

    A record can only contain a record of the same model and benchmark.
    """
    groups: dict[object, list[CellRecord]] = {}
    for cell in cells:
        group = groups.setdefault((cell.key, cell.removed, cell.metric), [])
        if not any(member.contains(cell) for member in group):
            group[:] = [*(member for member in group if not cell.contains(member)), cell]
    return [cell for group in groups.values() for cell in group]


def _open_source(source: str) -> Ledger | Target | list[CellRecord]:
    """Open a results folder, read a data set, or parse a tracking project.

    RequestError is raised for an invalid source.
    """
    path = Path(source)
    is_data_set = False
    with suppress(OSError):  # the ledger explains a name that is too long
        is_data_set = (path / RECORDS_FILE).is_file()
    if is_data_set:
        return read_dataset(path)
    if ":" not in source or path.exists():
        return Ledger.open_existing(path)
    return target(source, is_source=True)
