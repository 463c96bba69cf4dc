"""Gathering the cells of several results folders and tracking projects."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tracker.core.decision_records import DecisionsRecord
from tracker.core.errors import TrackerError
from tracker.core.findings import FindingRecord
from tracker.core.records import CellRecord, Place
from tracker.core.text import masked
from tracker.core.views import View
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring.derive import decisions_of, record_of
from tracker.measuring.progress import Progress
from tracker.team.pull import pull
from tracker.tracking import service, target
from tracker.tracking.base import Target


@dataclass(frozen=True)
class Collected:
    """Cells from several sources.

    Attributes:
        cells: The records, each (cell, view, number of documents) once, derived from all outcomes
            that the sources hold of it.
        experiments: The experiment files that the results folders keep: name → exact text.
        failed: Source, or a cell of it → why it is not among the cells.
        findings: What studies found, as the results folders keep it.
        origins: What each record was derived from, by its place.
        searched: The cells that searches took their steps in.
        unfinished: Folders of cells that are begun, and not among them, with what to do.
    """

    cells: tuple[CellRecord, ...]
    experiments: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    findings: tuple[FindingRecord, ...] = ()
    origins: dict[Place, tuple[CellStore, View]] = field(default_factory=dict)
    searched: Collection[Place] = ()
    unfinished: tuple[str, ...] = ()

    def decisions(self) -> dict[Place, DecisionsRecord]:
        """Derive what the cells' runs decide document by document: a cell's place → that."""
        mine = {cell.place: self.origins.get(cell.place) for cell in self.cells}
        found = {place: decisions_of(*origin) for place, origin in mine.items() if origin}
        return {place: record for place, record in found.items() if record is not None}


def collect(sources: Sequence[str], progress: Progress, anew: bool = False) -> Collected:
    """Gather cells.

    Args:
        sources: Results folders, `mlflow:URI/EXPERIMENT`, `mlflow:EXPERIMENT` (at
            `MLFLOW_TRACKING_URI`), `wandb:ENTITY/PROJECT` or `trackio:PROJECT`.
        progress: Told what is downloaded.
        anew: Whether every outcome is read and verified first, whatever was verified before: for
            what shows more than the records.

    Returns:
        The cells; a source, or a cell of it, that cannot be read does not keep the others away.

    Raises:
        RequestError: A source is no source.
    """
    opened = {source: _opened(source) for source in sources}
    views: list[tuple[CellStore, View]] = []
    experiments: dict[str, str] = {}
    failed: dict[str, str] = {}
    findings: dict[FindingRecord, None] = {}
    searched: set[Place] = set()
    unfinished: list[str] = []
    for source, place in opened.items():
        try:
            if isinstance(place, Target):
                there, lacking = pull(place, source, progress)
                views += there
                failed |= lacking
                continue
            contents = place.contents()
            failed |= contents.damaged
            views += [(store, asked.view) for store, asked in contents.views]
            findings |= dict.fromkeys(contents.findings)
            searched |= contents.searched
            unfinished += [f"{cell.folder}: {why}" for cell, why in contents.unfinished]
            for name, text in contents.experiments.items():
                if experiments.setdefault(name, text) != text:
                    experiments[f"{name} ({masked(source)})"] = text
        except TrackerError as error:
            failed[masked(source)] = masked(str(error))
    cells, origins = [], {}
    asked = {id(store): store for store, _ in views}
    if anew:
        for store in {store.folder: store for store in asked.values()}.values():
            store.proofs(anew=True)
    for same in _same(views):
        try:
            origin = _joined(same)
            asked[id(origin[0])] = origin[0]
            cells.append(record_of(*origin))
            origins[cells[-1].place] = origin
        except TrackerError as error:
            failed[str(same[0][0].folder)] = str(error)
    for store in asked.values():
        failed |= store.damage()
    shown = tuple(merged(cell for cell in cells if cell.n))
    return Collected(
        *(shown, experiments, failed, tuple(findings), origins, searched), tuple(unfinished)
    )


def _same(views: Iterable[tuple[CellStore, View]]) -> Iterable[list[tuple[CellStore, View]]]:
    """Group what shows one cell by one metric, over the same layers beneath and documents."""
    groups: dict[object, list[tuple[CellStore, View]]] = {}
    for store, view in views:
        documents = tuple(store.counts(view.extent).values())
        until = None if store.views.is_whole(view) else view.until
        place = (store.identity.key, view.removed, view.metric, documents, view.seed, until)
        groups.setdefault(place, []).append((store, view))
    return groups.values()


def _joined(same: Sequence[tuple[CellStore, View]]) -> tuple[CellStore, View]:
    """Join the outcomes that several folders hold of one view."""
    (store, view), *rest = sorted(same, key=lambda one: one[1].beside != "")
    if rest:
        by_folder = {one.folder.resolve(): one for one, _ in same}
        store, *others = sorted(
            by_folder.values(), key=lambda one: (-len(one.shards()), str(one.folder))
        )
        held = {path.name for path in store.shards()}
        # Equal names hold the same documents and ablations, and equal keys mean equal outcomes.
        more = [one for one in others if not {path.name for path in one.shards()} <= held]
        store = CellStore(store.folder, store.identity, more)
        until = next((each.until for _, each in same if each.until), None)
        view = view.joined(*(each for _, each in rest)).model_copy(update={"until": until})
    return store, view


def merged(cells: Iterable[CellRecord]) -> list[CellRecord]:
    """Leave out what another record of the same cell and view holds too.

    Records are never put together from parts: what is derived from some runs or documents is not
    what would be derived from all. The rest keep the order in which each was met.
    """
    found: dict[object, list[CellRecord]] = {}
    for cell in cells:
        known = found.setdefault((cell.key, cell.removed, cell.metric), [])
        if not any(other.holds(cell) for other in known):
            known[:] = [*(other for other in known if not cell.holds(other)), cell]
    return [cell for known in found.values() for cell in known]


def _opened(source: str) -> Ledger | Target:
    """Refuse what is no source before anything is downloaded."""
    path = Path(source)
    if ":" not in source or path.exists():
        return Ledger.existing(path)
    to = target(source)
    return service(to.backend).source(to, source)
