"""Publishes cells to Weights & Biases: a run per cell, one for its intact model, one for each run.

What stands here runs in a process of its own: `isolated` calls it. A run is found again by
`tracker.run_key` in its config, and `tracker.digest` is written last: a run whose digest is missing
or old is completed by the next `publish`. Offline nothing can be asked, so a file beside the
offline runs remembers them.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import wandb
from typing_extensions import override

from tracker.core.distribution import install_extra
from tracker.core.errors import TrackingError
from tracker.core.records import CellRecord
from tracker.ledger.files import lock_file, make_folder, write_text
from tracker.tracking.base import (
    BOARD,
    BOARD_FILE,
    Backend,
    LoggedTable,
    Pages,
    Published,
    RemoteCell,
    SavedModel,
)
from tracker.tracking.foreign import downloading, refuse_lies
from tracker.tracking.runs import artifact_name, described
from tracker.tracking.wandb.runs import (
    WandbRun,
    group_of,
    model_name,
    wandb_run,
)
from tracker.tracking.wandb.session import finished, is_offline, log_in, publishing, session, start
from tracker.tracking.wandb.writing import attach, wandb_table, write

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_LOCK_SECONDS = 600.0
_DELETED = "previously created and deleted"
"""What the server says, with 409, to the id of a run that was deleted."""
_IDS = 10  # that are tried
_RENEWED = (
    "runs of this benchmark had been deleted in W&B, which never frees an id; they are there "
    "again, under other ids"
)


@dataclass(frozen=True)
class _Known:
    """A run that is there already."""

    id: str
    digest: str | None
    folder: str = ""
    """The name of the folder that it was written to offline."""


class WandbBackend(Backend, Pages):
    """Keeps a W&B project in step with the ledger.

    In a sweep each layer's run is its trial's, so there the cell's own run and the intact model's
    are all that is published here. A version of the leaderboard is an artifact, and a run with its
    tables. A report is a W&B Report, a saved view, and a run with page, tables and charts.

    Args:
        project: `PROJECT` or `ENTITY/PROJECT`.
        results: The results folder; the files of runs, also of offline ones, lie in its `wandb`.
        in_sweep: Whether a W&B agent asked for this.
    """

    def __init__(self, project: str, results: Path, in_sweep: bool) -> None:
        entity, _, self._project = project.rpartition("/")
        self._entity = entity or os.environ.get("WANDB_ENTITY") or None
        self._results = results.absolute()
        self._to = f"wandb:{project}"
        self._in_sweep = in_sweep

    @override
    def publish(
        self,
        cell: CellRecord,
        artifacts: Sequence[Path],
        charts: Mapping[str, Figure],
        tables: Mapping[str, LoggedTable] = {},
    ) -> Published:
        every = described(cell, artifacts, charts, tables)
        runs = [wandb_run(run) for run in every if not (self._in_sweep and run.kind == "layer")]
        with publishing(self._results, self._to), self._one_publisher():
            offline = is_offline()
            if not offline:
                log_in()
            known = self._read_notes() if offline else self._ask(cell)
            outcomes = {"created": 0, "updated": 0, "unchanged": 0}
            deleted = 0
            for run in runs:
                found = known.get(run.key)
                if found and found.digest == run.digest and (offline or self._has_files(run)):
                    outcomes["unchanged"] += 1
                    continue
                # A refused id takes the client 15 s, and who deletes one run may delete them all.
                folder, deleted = self._write(run, found, offline, deleted)
                is_there = found is not None and not (offline and found.digest is None)
                outcomes["updated" if is_there else "created"] += 1
                if offline:
                    self._drop_former(found)
                    known[run.key] = _Known(run.id(), run.digest, folder)
                    self._write_notes(known)
            changed = outcomes["created"] + outcomes["updated"]
            if changed and not offline:
                self._confirm(cell, runs)
            notes = (_RENEWED,) if deleted else ()
            project = "" if offline else self._path()
            location = self._location(offline)
            return Published(**outcomes, location=location, notes=notes, project=project)

    @override
    def cells(self) -> list[RemoteCell]:
        found = []
        with self._reading():
            for run in _runs(self._path(), {"jobType": "cell"}, must_exist=True):
                mine = run.config.get("tracker")
                if run.state == "finished" and isinstance(mine, Mapping) and "digest" in mine:
                    place = str(mine.get("outcomes", ""))
                    version = str(mine["digest"]) if place else ""
                    found.append(RemoteCell(str(mine["run_key"]), run.name, version, place))
        return found

    @override
    def fetch(self, cell: RemoteCell, folder: Path) -> None:
        with self._reading():
            _download(wandb.Api().artifact(f"{self._path()}/{cell.place}:latest"), folder)

    @override
    def boards(self) -> list[str]:
        with self._reading():
            collection = f"{self._path()}/{BOARD}"
            if not wandb.Api().artifact_collection_exists(collection, "leaderboard"):
                return []
            versions = [
                artifact.version for artifact in wandb.Api().artifacts("leaderboard", collection)
            ]
        return sorted(versions, key=lambda version: int(version.removeprefix("v")))

    @override
    def read_board(self, version: str) -> str:
        with self._reading(), TemporaryDirectory() as folder:
            _download(wandb.Api().artifact(f"{self._path()}/{BOARD}:{version}"), Path(folder))
            return (Path(folder) / BOARD_FILE).read_text(encoding="utf-8")

    @override
    def add_board(
        self, file: Path, tables: Mapping[str, LoggedTable], made_of: Sequence[CellRecord]
    ) -> str:
        self._add("leaderboard", BOARD, "leaderboard", [file], tables, {}, made_of)
        return f"{self._home()}/artifacts/leaderboard/{BOARD}"

    @override
    def add_report(
        self,
        text: str,
        files: Sequence[Path],
        tables: Mapping[str, LoggedTable],
        charts: Mapping[str, Figure],
        made_of: Sequence[CellRecord],
    ) -> str:
        try:
            from tracker.tracking.wandb import views
        except ImportError:
            raise TrackingError(
                f"a W&B Report needs a package more; type: {install_extra('reports')}"
            ) from None
        self._add("report", "layer-report", "report", files, tables, charts, made_of)
        with self._reading("W&B did not take the report"):
            entity, _, project = self._path().rpartition("/")
            there = wandb.Api().reports(self._path())
            known = (one.id for one in there if one.display_name == views.TITLE)
            views.save_view(entity, project)
            return views.save_report(entity, project, text, next(known, None))

    def add_model(self, model: SavedModel) -> str:
        """Add a version of a pruned model, the best one by now, made of the outcomes of cells."""
        with self._reading("W&B did not take the model"):
            offline = is_offline()
            if not offline:
                log_in()
            place: dict[str, Any] = {"entity": self._entity, "project": self._project}
            facts = dict(model.facts)
            handle = start(
                self._results, **place, name=model.name, job_type="model", config={"tracker": facts}
            )
            with finished(handle):
                for outcomes in [] if handle.offline else self._outcomes(model.made_of):
                    handle.use_artifact(outcomes)
                handle.summary.update(dict(model.figures))
                artifact = wandb.Artifact(model_name(model.name), type="model", metadata=facts)
                attach(handle, artifact, sorted(model.folder.iterdir()), ["best"])
            return self._location(offline)

    @override
    def user(self) -> str:
        with self._reading():
            return str(wandb.Api().viewer.username)

    @override
    def close(self) -> None:
        pass  # every run is finished when it is written

    def _add(
        self,
        name: str,
        artifact: str,
        kind: str,
        files: Sequence[Path],
        tables: Mapping[str, LoggedTable],
        charts: Mapping[str, Figure],
        made_of: Sequence[CellRecord],
    ) -> None:
        """Log files, tables and charts in a run of their own, which uses the cells' outcomes."""
        with self._reading(f"W&B did not take the {name}"):
            log_in()
            place: dict[str, Any] = {"entity": self._entity, "project": self._project}
            handle = start(self._results, **place, name=name, job_type="report")
            with finished(handle):
                for outcomes in [] if handle.offline else self._outcomes(made_of):
                    handle.use_artifact(outcomes)
                handle.log({f"tables/{n}": wandb_table(table) for n, table in tables.items()})
                handle.log({f"charts/{n}": figure for n, figure in charts.items()})
                attach(handle, wandb.Artifact(artifact, type=kind), files)

    def _outcomes(self, cells: Iterable[CellRecord]) -> list[Any]:
        """Find the outcomes of cells, as far as this project has them."""
        api, path = wandb.Api(), self._path()
        names = [f"{path}/{artifact_name(cell)}" for cell in cells]
        there = [name for name in names if api.artifact_collection_exists(name, "outcomes")]
        return [api.artifact(f"{name}:latest") for name in there]

    @contextmanager
    def _reading(self, problem: str = "W&B could not be read") -> Iterator[None]:
        with session(self._results, f"{problem} ({self._to})"):
            yield

    def _ask(self, cell: CellRecord) -> dict[str, _Known]:
        """Find the runs that the cell has, by run key."""
        found: dict[str, _Known] = {}
        for run in _runs(self._path(), {"group": group_of(cell)}):
            mine = run.config.get("tracker")
            if isinstance(mine, Mapping) and "run_key" in mine:
                # A run that never ended may lack points that were sent before its digest.
                digest = mine.get("digest") if run.state == "finished" else None
                found.setdefault(str(mine["run_key"]), _Known(run.id, digest))
        return found

    def _confirm(self, cell: CellRecord, runs: Sequence[WandbRun]) -> None:
        """Read back: the client reports an upload that was given up only where it logs."""
        there = self._ask(cell)
        for run in runs:
            found = there.get(run.key)
            if found is None or found.digest != run.digest:
                raise TrackingError(f"the run {run.name!r} did not arrive whole")

    def _has_files(self, run: WandbRun) -> bool:
        """Say whether the artifact of a run is there, where it has one.

        `wandb sync` leaves out, without a word, what offline runs had where they were moved from.
        """
        if run.outcomes is None:
            return True
        try:
            there = wandb.Api().artifact(f"{self._path()}/{run.outcomes.name}:latest")
        except (ValueError, wandb.Error):
            return False
        files = run.outcomes.metadata["files"]
        return bool(there.metadata.get("files") == files)

    def _write(
        self, run: WandbRun, found: _Known | None, offline: bool, deleted: int
    ) -> tuple[str, int]:
        """Bring one run to what it should be; say in which folder, and how many ids are gone."""
        points = self._points(found) if found and run.curves and not offline else []
        handle, deleted = self._open(run, found, offline, deleted)
        with finished(handle):
            write(handle, run, points)
        return Path(handle.dir).parent.name, deleted

    def _drop_former(self, found: _Known | None) -> None:
        """Remove what was written of an offline run before, unless it was sent.

        The run that was written since holds all of it; sent after it, the former would be shown:
        `wandb sync` goes by their names, which begin with what the clock said. Another project's
        run of the same cell has the same id, so the note alone says which folder was this one's.
        """
        former = self._folder / found.folder if found and found.folder else None
        if former and former.is_dir() and not any(former.glob("*.sync*")):
            shutil.rmtree(former)

    def _open(
        self,
        run: WandbRun,
        found: _Known | None,
        offline: bool,
        deleted: int,
        watched: int | None = None,
    ) -> tuple[Any, int]:
        """Open one run, under the first id of its series that is not gone; say how many are."""
        try:
            handle = start(
                self._results,
                watched,
                entity=self._entity,
                project=self._project,
                id=found.id if found else run.id(deleted),
                config=run.config,
                resume=None if offline else "allow",
                **run.labels,
            )
        except wandb.Error as error:
            if found or _DELETED not in str(error) or deleted == _IDS:
                raise
            return self._open(run, found, offline, deleted + 1, watched)
        return handle, deleted

    def open(self, run: WandbRun, cell: CellRecord, watched: int) -> Any:
        """Open a run of a cell while it is measured by the process `watched`.

        Args:
            run: The run as it is at the beginning.
            cell: The cell.
            watched: The process.

        Returns:
            W&B's run; None offline, where nobody looks on.
        """
        if is_offline():
            return None
        log_in()
        return self._open(run, self._ask(cell).get(run.key), False, 0, watched)[0]

    def _points(self, found: _Known) -> list[dict[str, Any]]:
        """Read the curves that a run has."""
        history = wandb.Api().run(f"{self._path()}/{found.id}").scan_history()
        return [{k: v for k, v in row.items() if not k.startswith("_")} for row in history]

    def _path(self) -> str:
        entity = self._entity or wandb.Api().default_entity
        return f"{entity}/{self._project}" if entity else self._project

    def _location(self, offline: bool) -> str:
        if offline:
            return f"wandb sync {shlex.quote(str(self._folder))}/offline-run-*"
        return self._home()

    def _home(self) -> str:
        return f"{wandb.setup().settings.app_url}/{self._path()}"

    @property
    def _folder(self) -> Path:
        return self._results / "wandb"

    @property
    def _notes(self) -> Path:
        return self._folder / f"published-{self._entity or 'default'}-{self._project}.json"

    def _read_notes(self) -> dict[str, _Known]:
        if not self._notes.exists():
            return {}
        kept = json.loads(self._notes.read_text())
        known = {key: _Known(**note) for key, note in kept.get("runs", kept).items()}
        if kept.get("folder", str(self._folder)) == str(self._folder):
            return known
        # Moved, they are written anew: W&B knows the files of an artifact by absolute paths.
        return {key: replace(note, digest=None) for key, note in known.items()}

    def _write_notes(self, known: Mapping[str, _Known]) -> None:
        runs = {key: vars(note) for key, note in known.items()}
        write_text(self._notes, json.dumps({"folder": str(self._folder), "runs": runs}))

    @contextmanager
    def _one_publisher(self) -> Iterator[None]:
        """Hold off other processes: W&B has no "create unless it exists" by run key."""
        make_folder(self._folder)
        with lock_file(self._folder.with_name("wandb.lock"), _LOCK_SECONDS):
            yield


def _runs(path: str, filters: dict[str, Any], must_exist: bool = False) -> list[Any]:
    """Find runs; none where the project is not there yet."""
    try:
        return list(wandb.Api().runs(path, filters=filters, lazy=False, per_page=100))
    except ValueError as error:
        if "could not find project" in str(error).lower() and not must_exist:
            return []
        raise


def _download(artifact: Any, folder: Path) -> None:
    """Download an artifact; it checks each file against the digest in the manifest."""
    entries = artifact.manifest.entries
    refuse_lies({name: entry.size for name, entry in entries.items()})
    if elsewhere := next((name for name, entry in entries.items() if entry.ref is not None), None):
        raise TrackingError(f"the server keeps {elsewhere!r} elsewhere; nothing is downloaded")
    with downloading(folder):
        artifact.download(root=str(folder))
    artifact.verify(root=str(folder))
