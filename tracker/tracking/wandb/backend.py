"""Publishes cells to Weights & Biases: a run per cell, one for its intact model, one for each run.

What stands here runs in a process of its own: `isolated` calls it. A run is found again by
`tracker.run_key` in its config, and `tracker.digest` is written last: a run whose digest is missing
or old is completed by the next `publish`. Offline nothing can be asked, so a file beside the
offline runs remembers them.
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


class WandbBackend(Backend):
    """Keeps a W&B project in step with the ledger.

    In a sweep each layer's run is its trial's, so there the cell's own run and the intact model's
    are all that is published here. A report is a W&B Report, a saved view, and a run with page,
    tables and charts.

    Args:
        project: `PROJECT` or `ENTITY/PROJECT`.
        results: The results folder; the files of runs, also of offline ones, lie in its `wandb`.
        in_sweep: Whether a W&B agent asked for this.
    """

    name = "wandb"

    def __init__(self, project: str, results: Path, in_sweep: bool) -> None:
        super().__init__(project, results)
        entity, _, self._project = project.rpartition("/")
        self._entity = entity or os.environ.get("WANDB_ENTITY") or None
        self._in_sweep = in_sweep
        self._deleted = 0
        """Ids of runs of the cell that is written, and that W&B does not give again."""

    def is_open(self) -> bool:
        """Say whether somebody is logged in, or nobody needs to be; no server is asked."""
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
        """Add a version of a pruned model, made of the outcomes of cells."""
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
        """Open a run of its own, which uses the outcomes of cells."""
        with finished(self._start(**run)) as handle:
            for outcomes in [] if handle.offline else self._outcomes(cells):
                handle.use_artifact(outcomes)
            yield handle

    def _outcomes(self, cells: Iterable[CellRecord]) -> list[Any]:
        """Find the outcomes of cells, as far as this project has them."""
        api, path = wandb.Api(), self._path()
        names = [f"{path}/{artifact_name(cell)}" for cell in cells]
        there = [name for name in names if api.artifact_collection_exists(name, "outcomes")]
        return [api.artifact(f"{name}:latest") for name in there]

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

    def _confirm(self, cell: CellRecord, runs: Sequence[DescribedRun]) -> None:
        """Read back: the client reports an upload that was given up only where it logs."""
        there = self._ask(cell)
        for run in runs:
            if run.key not in there or there[run.key].digest != run.digest(FORMAT):
                raise TrackingError(f"the run {run.name!r} did not arrive whole")

    def _has_files(self, run: DescribedRun) -> bool:
        """Say whether the artifact of a run is there, where it has one.

        `wandb sync` leaves out, without a word, what offline runs had where they were moved from.
        """
        if run.outcomes is None:
            return True
        try:
            there = wandb.Api().artifact(f"{self._path()}/{run.outcomes.name}:latest")
        except (ValueError, wandb.Error):
            return False
        return bool(there.metadata.get("files") == run.version)

    def _drop_former(self, found: _Known | None, now: str) -> None:
        """Remove what was written of an offline run before, unless it was sent.

        The run that was written since holds all of it; sent after it, the former would be shown:
        `wandb sync` goes by their names, which begin with what the clock said. Another project's
        run of the same cell has the same id, so the note alone says which folder was this one's.
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
        """Open one run of a cell that has some, under the first id of its series that is free."""
        former, used = existing.get(run.key), {entry.id for entry in existing.values()}
        about = labels_of(run.cell, run.name, run.kind) | {"config": run.config}
        about["resume"] = None if is_offline() else "allow"
        while True:
            try:
                # An id may be in use: its run belongs to a larger view since.
                free = (run_id(run.key, number) for number in itertools.count(self._deleted))
                name = former.id if former else next(key for key in free if key not in used)
                return self._start(watched, id=name, **about)
            except wandb.Error as error:
                if former or _DELETED not in str(error) or self._deleted == _IDS:
                    raise
            # A refused id takes the client 15 s, and who deletes one run may delete them all.
            self._deleted += 1

    def open(self, run: DescribedRun, watched: int) -> Any:
        """Open a run of a cell while it is measured by the process `watched`.

        Args:
            run: The run as it is at the beginning.
            watched: The process.

        Returns:
            W&B's run; None offline, where nobody looks on.
        """
        if is_offline():
            return None
        log_in()
        self._deleted = 0
        known = self._ask(run.cell)
        take_over(known, run.cell, [run])
        return self._open(run, known, watched)

    def _points(self, found: _Known) -> list[dict[str, Any]]:
        """Read the curves that a run has."""
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
        # Moved, they are written anew: W&B knows the files of an artifact by absolute paths.
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
    """Find runs; none where the project is not there yet."""
    try:
        return list(wandb.Api().runs(path, filters=filters, lazy=False, per_page=100))
    except ValueError as error:
        if "could not find project" in str(error).lower() and not must_exist:
            return []
        raise


def _download(artifact: Artifact, folder: Path) -> None:
    """Download an artifact; it checks each file against the digest in the manifest."""
    entries = artifact.manifest.entries
    check_listing({name: entry.size for name, entry in entries.items()})
    if elsewhere := next((name for name, entry in entries.items() if entry.ref is not None), None):
        raise TrackingError(f"the server keeps {elsewhere!r} elsewhere; nothing is downloaded")
    artifact.download(root=str(folder))
    check_downloaded(folder)
    artifact.verify(root=str(folder))
