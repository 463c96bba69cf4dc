"""Publish cells to Weights & Biases: a run per cell, one for its intact model, one for each run.

This code runs in a process of its own, called by `isolated`. A run is found by `tracker.run_key` in
its config, and `tracker.digest` is written last. A run whose digest is missing or old is completed
by the next `publish`. Offline, W&B cannot be queried, so a file beside the runs lists them.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import wandb
from typing_extensions import override
from wandb import Artifact

from tracker.core.distribution import install_extra
from tracker.core.errors import TrackingError
from tracker.core.records import CellRecord
from tracker.ledger.files import make_folder, write_text
from tracker.tracking.base import Backend, Page, RemoteCell, SavedModel
from tracker.tracking.downloads import check_downloaded, check_listing
from tracker.tracking.runs import DescribedRun, artifact_name, take_over
from tracker.tracking.wandb.session import finished, is_offline, log_in, session, start
from tracker.tracking.wandb.writing import (
    FORMAT,
    attach,
    group_of,
    labels_of,
    model_name,
    run_id,
    wandb_table,
    write,
)

_DELETED = "previously created and deleted"
"""The server's message, with status 409, about the id of a deleted run."""
_IDS = 10  # maximum number of ids that are tried
_RENEWED = (
    "runs of this benchmark had been deleted in W&B, which never frees an id; they are there "
    "again, under other ids"
)


@dataclass(frozen=True)
class _Known:
    """An existing run."""

    id: str
    digest: str | None
    folder: str = ""
    """The name of its folder, if it was written offline."""


class WandbBackend(Backend):
    """Keeps a W&B project in step with the ledger.

    In a sweep each layer's run is its trial's, so only the runs of the cell and of the intact model
    are published. A report is a W&B Report, a saved view, and a run with page, tables and charts.

    Args:
        project: `PROJECT` or `ENTITY/PROJECT`.
        results: The results folder; the files of runs, also of offline ones, are in its `wandb`.
        in_sweep: True if a W&B agent started this process as a trial.
    """

    name = "wandb"

    def __init__(self, project: str, results: Path, in_sweep: bool) -> None:
        super().__init__(project, results)
        entity, _, self._project = project.rpartition("/")
        self._entity = entity or os.environ.get("WANDB_ENTITY") or None
        self._in_sweep = in_sweep
        self._deleted = 0
        """Number of ids of the current cell's runs that were deleted in W&B."""

    def is_open(self) -> bool:
        """Check that a user is logged in or need not be, without contacting a server."""
        with session(self._results, "W&B could not be set up"):
            return is_offline() or bool(wandb.login(prompt=False, verify=False))

    @override
    def _write(self, runs: Sequence[DescribedRun]) -> Iterator[str]:
        make_folder(self._folder)
        self._deleted = 0
        cell, offline = runs[-1].cell, is_offline()
        if not offline:
            log_in()
        known = self._read_notes() if offline else self._ask(cell)
        superfluous = take_over(known, cell, runs)
        runs = [run for run in runs if not (self._in_sweep and run.kind == "layer")]
        written = False
        for run in runs:
            found, digest = known.get(run.key), run.digest(FORMAT)
            if found and found.digest == digest and (offline or self._has_files(run)):
                yield "unchanged"
                continue
            points = self._points(found) if found and run.curves and not offline else []
            with finished(self._open(run, known)) as handle:
                write(handle, run, points)
            if offline:
                folder = Path(handle.dir).parent.name
                self._drop_former(found, folder)
                known[run.key] = _Known(handle.id, digest, folder)
                self._write_notes(known)
            written = True
            is_there = found is not None and not (offline and found.digest is None)
            yield "updated" if is_there else "created"
        for former in superfluous:
            if offline:
                self._drop_former(former, "")
            else:
                wandb.Api().run(f"{self._path()}/{former.id}").delete()
        if superfluous and offline:
            self._write_notes(known)
        if written and not offline:
            self._confirm(cell, runs)

    @override
    def _cells(self) -> Iterator[RemoteCell]:
        for run in _runs(self._path(), {"jobType": "cell"}, must_exist=True):
            mine = run.config.get("tracker")
            if run.state == "finished" and isinstance(mine, Mapping) and "digest" in mine:
                place = str(mine.get("outcomes", ""))
                version = str(mine["digest"]) if place else ""
                yield RemoteCell(str(mine["run_key"]), run.name, version, place)

    @override
    def _download(self, cell: RemoteCell, folder: Path) -> None:
        _download(wandb.Api().artifact(f"{self._path()}/{cell.place}:latest"), folder)

    @override
    def add_page(self, page: Page) -> str:
        views = _views()
        with self._explained("did not take the report"):
            log_in()
            with self._run_made_of(
                page.cells, name="report", job_type="report", notes=page.text
            ) as handle:
                handle.log({f"tables/{n}": wandb_table(table) for n, table in page.tables.items()})
                handle.log({f"charts/{n}": figure for n, figure in page.charts.items()})
                attach(handle, wandb.Artifact("layer-report", type="report"), page.files)
            entity, _, project = self._path().rpartition("/")
            there = wandb.Api().reports(self._path())
            known = (report.id for report in there if report.display_name == views.TITLE)
            views.save_view(entity, project)
            return str(views.save_report(entity, project, page.text, next(known, None)))

    def add_model(self, model: SavedModel) -> str:
        """Add a version of a pruned model, linked to the outcomes of its cells."""
        with self._explained("did not take the model"):
            if not is_offline():
                log_in()
            facts = dict(model.facts)
            about = {"name": model.name, "job_type": "model", "config": {"tracker": facts}}
            with self._run_made_of(model.made_of, **about) as handle:
                handle.summary.update(dict(model.figures))
                artifact = wandb.Artifact(model_name(model.name), type="model", metadata=facts)
                attach(handle, artifact, sorted(model.folder.iterdir()))
            return self._location()

    @contextmanager
    def _run_made_of(self, cells: Iterable[CellRecord], **run: Any) -> Iterator[Any]:
        """Open a separate run that uses the outcomes of cells."""
        with finished(self._start(**run)) as handle:
            for outcomes in [] if handle.offline else self._outcomes(cells):
                handle.use_artifact(outcomes)
            yield handle

    def _outcomes(self, cells: Iterable[CellRecord]) -> list[Any]:
        """Return the artifacts of cells' outcomes that this project has."""
        api, path = wandb.Api(), self._path()
        names = [f"{path}/{artifact_name(cell)}" for cell in cells]
        there = [name for name in names if api.artifact_collection_exists(name, "outcomes")]
        return [api.artifact(f"{name}:latest") for name in there]

    def _ask(self, cell: CellRecord) -> dict[str, _Known]:
        """Query the runs of a cell, by run key."""
        found: dict[str, _Known] = {}
        for run in _runs(self._path(), {"group": group_of(cell)}):
            mine = run.config.get("tracker")
            if isinstance(mine, Mapping) and "run_key" in mine:
                # A run that never ended may lack points that were sent before its digest.
                digest = mine.get("digest") if run.state == "finished" else None
                found.setdefault(str(mine["run_key"]), _Known(run.id, digest))
        return found

    def _confirm(self, cell: CellRecord, runs: Sequence[DescribedRun]) -> None:
        """Read written runs back, since the client reports failed uploads only in its log."""
        there = self._ask(cell)
        for run in runs:
            if run.key not in there or there[run.key].digest != run.digest(FORMAT):
                raise TrackingError(f"the run {run.name!r} did not arrive whole")

    def _has_files(self, run: DescribedRun) -> bool:
        """Check whether the artifact of a run exists, if it should have one.

        `wandb sync` silently skips the files of offline runs that were moved.
        """
        if run.outcomes is None:
            return True
        try:
            there = wandb.Api().artifact(f"{self._path()}/{run.outcomes.name}:latest")
        except (ValueError, wandb.Error):
            return False
        return bool(there.metadata.get("files") == run.version)

    def _drop_former(self, found: _Known | None, now: str) -> None:
        """Remove the former files of an offline run, unless they were sent.

        The newer run contains everything. `wandb sync` sends runs in the order of their names,
        which begin with a time, so the former run could overwrite it. Another project's run of the
        same cell has the same id, so only the note identifies the folder.
        """
        if found is None or found.folder in ("", now):
            return
        former = self._folder / found.folder
        if former.is_dir() and not any(former.glob("*.sync*")):
            shutil.rmtree(former)

    def _start(self, watched: int | None = None, **run: Any) -> Any:
        return start(self._results, watched, entity=self._entity, project=self._project, **run)

    def _open(
        self, run: DescribedRun, existing: Mapping[str, _Known], watched: int | None = None
    ) -> Any:
        """Open one run of a cell, under its former id or the first free id of its series."""
        former, used = existing.get(run.key), {entry.id for entry in existing.values()}
        about = labels_of(run.cell, run.name, run.kind) | {"config": run.config}
        about["resume"] = None if is_offline() else "allow"
        while True:
            try:
                # An id may be in use by a run that was transferred to a larger view.
                free = (run_id(run.key, number) for number in itertools.count(self._deleted))
                name = former.id if former else next(key for key in free if key not in used)
                return self._start(watched, id=name, **about)
            except wandb.Error as error:
                if former or _DELETED not in str(error) or self._deleted == _IDS:
                    raise
            # A refused id takes the client 15 s, and often all runs of a cell were deleted.
            self._deleted += 1

    def open(self, run: DescribedRun, watched: int) -> Any:
        """Open a run of a cell while it is measured by the process `watched`.

        Args:
            run: The described run at its start.
            watched: The process that measures.

        Returns:
            W&B's run; None if offline, where there is nothing to watch.
        """
        if is_offline():
            return None
        log_in()
        self._deleted = 0
        known = self._ask(run.cell)
        take_over(known, run.cell, [run])
        return self._open(run, known, watched)

    def _points(self, found: _Known) -> list[dict[str, Any]]:
        """Read the curves of an existing run."""
        history = wandb.Api().run(f"{self._path()}/{found.id}").scan_history()
        return [{k: v for k, v in row.items() if not k.startswith("_")} for row in history]

    def _path(self) -> str:
        entity = self._entity or wandb.Api().default_entity
        return f"{entity}/{self._project}" if entity else self._project

    @override
    def _location(self) -> str:
        if is_offline():
            return f"wandb sync {shlex.quote(str(self._folder))}/offline-run-*"
        return self._home()

    @override
    def _notes(self) -> tuple[str, ...]:
        return (_RENEWED,) if self._deleted else ()

    @override
    def _whole_name(self) -> str:
        return "" if is_offline() else self._path()

    def _home(self) -> str:
        return f"{wandb.setup().settings.app_url}/{self._path()}"

    @property
    def _folder(self) -> Path:
        return self._results / "wandb"

    @property
    def _published(self) -> Path:
        return self._folder / f"published-{self._entity or 'default'}-{self._project}.json"

    def _read_notes(self) -> dict[str, _Known]:
        if not self._published.exists():
            return {}
        kept = json.loads(self._published.read_text())
        known = {key: _Known(**note) for key, note in kept["runs"].items()}
        if kept["folder"] == str(self._folder):
            return known
        # Moved runs are written again: W&B stores absolute paths of an artifact's files.
        return {key: replace(note, digest=None) for key, note in known.items()}

    def _write_notes(self, known: Mapping[str, _Known]) -> None:
        runs = {key: vars(note) for key, note in known.items()}
        write_text(self._published, json.dumps({"folder": str(self._folder), "runs": runs}))

    @override
    def _lock(self) -> Path:
        return self._folder.with_name("wandb.lock")

    @override
    @contextmanager
    def _explained(self, problem: str, advice: str = "") -> Iterator[None]:
        with session(self._results, f"W&B {problem} ({self._to})", advice):
            yield


def _views() -> ModuleType:
    try:
        from tracker.tracking.wandb import views
    except ImportError:
        raise TrackingError(
            f"a W&B Report needs a package more; type: {install_extra('reports')}"
        ) from None
    return views


def _runs(path: str, filters: dict[str, Any], must_exist: bool = False) -> list[Any]:
    """Return matching runs; none if the project does not exist yet."""
    try:
        return list(wandb.Api().runs(path, filters=filters, lazy=False, per_page=100))
    except ValueError as error:
        if "could not find project" in str(error).lower() and not must_exist:
            return []
        raise


def _download(artifact: Artifact, folder: Path) -> None:
    """Download an artifact, and verify each file's digest."""
    entries = artifact.manifest.entries
    check_listing({name: entry.size for name, entry in entries.items()})
    if elsewhere := next((name for name, entry in entries.items() if entry.ref is not None), None):
        raise TrackingError(f"the server keeps {elsewhere!r} elsewhere; nothing is downloaded")
    artifact.download(root=str(folder))
    check_downloaded(folder)
    artifact.verify(root=str(folder))
