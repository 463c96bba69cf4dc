"""Publish results to W&B: a summary run per benchmark, and a run for each ablation.

One summary run shows one model on one benchmark (a cell). A separate run shows the intact model.
The module `isolated` runs this code in a separate process. The field `tracker.run_key` of a run's
config identifies the run. The field `tracker.digest` is written last. A run with a missing or
outdated digest is incomplete, and the next call of `publish` completes the run. The offline runs of
a project are listed in a file in the results folder.
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

from tracker.ledger.files import make_folder, write_text
from tracker.schema.distribution import extra_command
from tracker.schema.errors import TrackingError
from tracker.schema.records import CellRecord
from tracker.tracking.base import Backend, Page, RemoteCell, SavedModel, check_files, check_sizes
from tracker.tracking.runs import DescribedRun, artifact_name, move_runs
from tracker.tracking.wandb.writing import (
    WANDB_FORMAT,
    cell_group,
    finish_run,
    is_offline,
    log_files,
    log_in,
    model_artifact_name,
    run_id,
    run_labels,
    start_run,
    wandb_session,
    wandb_table,
    write_run,
)

_DELETED_MESSAGE = "previously created and deleted"
"""The server's message, with status 409, about the id of a deleted run."""
_MAX_IDS = 10  # maximum number of ids that are tried
_RENEWED_NOTE = (
    "some runs of this benchmark had been deleted in W&B; they were created again with new ids"
)


@dataclass(frozen=True)
class _ExistingRun:
    """A run that was written earlier, on the W&B server or in offline files."""

    id: str
    digest: str | None
    folder: str = ""
    """The name of the run's folder, if the run was written offline."""


class WandbBackend(Backend):
    """Backend that updates a W&B project with the results of a results folder.

    In a sweep, W&B itself creates the runs of ablations, one for each trial. In a sweep, the
    backend publishes only the summary run and the run of the intact model. A report is published as
    a W&B Report, a saved view, and a run with the HTML page, tables and charts.

    Args:
        project: Name of the project, as `PROJECT` or `ENTITY/PROJECT`.
        results: The results folder. Its subfolder `wandb` has the files of all runs.
        in_sweep: True if a W&B agent started this process as a trial.
    """

    name = "wandb"

    def __init__(self, project: str, results: Path, in_sweep: bool) -> None:
        super().__init__(project, results)
        entity, _, self._project = project.rpartition("/")
        self._entity = entity or os.environ.get("WANDB_ENTITY") or None
        self._in_sweep = in_sweep
        self._n_deleted = 0
        """Number of ids of the current cell's runs that were deleted in W&B."""

    def is_open(self) -> bool:
        """Return whether runs can be written: W&B has a login, or is in offline mode."""
        with wandb_session(self._results, "W&B could not be set up"):
            return is_offline() or bool(wandb.login(prompt=False, verify=False))

    @override
    def _write(self, runs: Sequence[DescribedRun]) -> list[str]:
        make_folder(self._folder)
        self._n_deleted = 0
        cell, offline = runs[-1].cell, is_offline()
        if not offline:
            log_in()
        existing = self._read_notes() if offline else self._find_cell_runs(cell)
        obsolete = move_runs(existing, cell, runs)
        runs = [run for run in runs if not (self._in_sweep and run.kind == "layer")]
        outcomes = []
        for run in runs:
            old_run, digest = existing.get(run.key), run.digest(WANDB_FORMAT)
            if old_run and old_run.digest == digest and (offline or self._has_files(run)):
                outcomes.append("unchanged")
                continue
            points = self._points(old_run) if old_run and run.curves and not offline else []
            with finish_run(self._open(run, existing)) as handle:
                write_run(handle, run, points)
            if offline:
                folder = Path(handle.dir).parent.name
                self._delete_offline_files(old_run, folder)
                existing[run.key] = _ExistingRun(handle.id, digest, folder)
                self._write_notes(existing)
            is_new = old_run is None or (offline and old_run.digest is None)
            outcomes.append("created" if is_new else "updated")
        for obsolete_run in obsolete:
            if offline:
                self._delete_offline_files(obsolete_run, "")
            else:
                wandb.Api().run(f"{self._path()}/{obsolete_run.id}").delete()
        if obsolete and offline:
            self._write_notes(existing)
        if not offline and {*outcomes} - {"unchanged"}:
            self._confirm(cell, runs)
        return outcomes

    @override
    def _cells(self) -> Iterator[RemoteCell]:
        for run, config in _find_runs(self._path(), {"jobType": "cell"}, must_exist=True):
            if run.state == "finished" and "digest" in config:
                artifact = str(config.get("outcomes", ""))
                version = str(config["digest"]) if artifact else ""
                yield RemoteCell(str(config["run_key"]), run.name, version, artifact)

    @override
    def _download(self, cell: RemoteCell, folder: Path) -> None:
        _download(wandb.Api().artifact(f"{self._path()}/{cell.files_id}:latest"), folder)

    @override
    def add_page(self, page: Page) -> str:
        views = _import_views()
        labels = {"name": page.name, "job_type": "report", "notes": page.text}
        with self._explained("did not accept the report"):
            log_in()
            with self._linked_run(page.cells, labels) as handle:
                handle.log({f"tables/{name}": wandb_table(t) for name, t in page.tables.items()})
                handle.log({f"charts/{name}": figure for name, figure in page.charts.items()})
                log_files(handle, wandb.Artifact(f"layer-{page.name}", type="report"), page.files)
            if not page.cells:  # the project's report is about its own cells
                return self._location()
            entity, _, project = self._path().rpartition("/")
            reports = wandb.Api().reports(self._path())
            ids = (report.id for report in reports if report.display_name == views.REPORT_TITLE)
            views.save_view(entity, project)
            return str(views.save_report(entity, project, page.text, next(ids, None)))

    def add_model(self, model: SavedModel) -> str:
        """Publish a pruned model, and return the address of the runs.

        The run of the model links to the published outcomes of `model.source_cells`.
        """
        with self._explained("did not accept the model"):
            if not is_offline():
                log_in()
            facts = dict(model.facts)
            labels = {"name": model.name, "job_type": "model", "config": {"tracker": facts}}
            with self._linked_run(model.source_cells, labels) as handle:
                handle.summary.update(dict(model.figures))
                name = model_artifact_name(model.name)
                artifact = wandb.Artifact(name, type="model", metadata=facts)
                log_files(handle, artifact, sorted(model.folder.iterdir()))
            return self._location()

    @contextmanager
    def _linked_run(self, cells: Iterable[CellRecord], labels: Mapping[str, Any]) -> Iterator[Any]:
        """Open a run for a report or model, with links to the published outcomes of `cells`."""
        with finish_run(self._start(**labels)) as handle:
            if not handle.offline:
                api, path = wandb.Api(), self._path()
                names = [f"{path}/{artifact_name(cell)}" for cell in cells]
                for name in names:
                    if api.artifact_collection_exists(name, "outcomes"):
                        handle.use_artifact(api.artifact(f"{name}:latest"))
            yield handle

    def _find_cell_runs(self, cell: CellRecord) -> dict[str, _ExistingRun]:
        """Return all runs of a model and benchmark on the W&B server, by run key."""
        runs: dict[str, _ExistingRun] = {}
        for run, config in _find_runs(self._path(), {"group": cell_group(cell)}):
            # A run that never ended may lack points that were sent before its digest.
            digest = config.get("digest") if run.state == "finished" else None
            runs.setdefault(str(config["run_key"]), _ExistingRun(run.id, digest))
        return runs

    def _confirm(self, cell: CellRecord, runs: Sequence[DescribedRun]) -> None:
        """Check that the server has the written runs; the SDK only logs failed uploads."""
        existing = self._find_cell_runs(cell)
        for run in runs:
            if run.key not in existing or existing[run.key].digest != run.digest(WANDB_FORMAT):
                raise TrackingError(f"the run {run.name!r} arrived incomplete")

    def _has_files(self, run: DescribedRun) -> bool:
        """Return whether the server has a run's artifact; True if the run needs no artifact."""
        if run.outcomes is None:
            return True
        try:
            artifact = wandb.Api().artifact(f"{self._path()}/{run.outcomes.name}:latest")
        except (ValueError, wandb.Error):
            return False
        return bool(artifact.metadata.get("files") == run.version)

    def _delete_offline_files(self, old_run: _ExistingRun | None, new_folder: str) -> None:
        """Delete the local files of a replaced offline run, unless they were uploaded already.

        `new_folder` contains the run that replaces the old run. If both runs remained, `wandb sync`
        could overwrite the new run with the old run.
        """
        if old_run is None or old_run.folder in ("", new_folder):
            return
        old_folder = self._folder / old_run.folder
        if old_folder.is_dir() and not any(old_folder.glob("*.sync*")):
            shutil.rmtree(old_folder)

    def _start(self, watched_pid: int | None = None, **run: Any) -> Any:
        """Open a run in the project of this backend."""
        labels = {"entity": self._entity, "project": self._project, **run}
        return start_run(self._results, watched_pid, **labels)

    def _open(
        self, run: DescribedRun, existing: Mapping[str, _ExistingRun], watched: int | None = None
    ) -> Any:
        """Open a run: continue the existing run, or create a run with an unused id."""
        old_run, used_ids = existing.get(run.key), {entry.id for entry in existing.values()}
        labels = run_labels(run.cell, run.name, run.kind) | {"config": run.config}
        labels["resume"] = None if is_offline() else "allow"
        while True:
            # An id may be in use by a run that was transferred to a larger view.
            ids = (run_id(run.key, number) for number in itertools.count(self._n_deleted))
            free_id = next(key for key in ids if key not in used_ids)
            try:
                return self._start(watched, id=old_run.id if old_run else free_id, **labels)
            except wandb.Error as error:
                if old_run or _DELETED_MESSAGE not in str(error) or self._n_deleted == _MAX_IDS:
                    raise
            # A refused id takes the client 15 s, and often all runs of a cell were deleted.
            self._n_deleted += 1

    def open(self, run: DescribedRun, watched_pid: int) -> Any:
        """Open the run that shows the progress while the process `watched_pid` is measuring.

        Args:
            run: Description of the run before the measurement.
            watched_pid: Id of the measuring process, whose system metrics W&B shows.

        Returns:
            The W&B run, or None if W&B is offline.
        """
        if is_offline():
            return None
        log_in()
        self._n_deleted = 0
        existing = self._find_cell_runs(run.cell)
        move_runs(existing, run.cell, [run])
        return self._open(run, existing, watched_pid)

    def _points(self, old_run: _ExistingRun) -> list[dict[str, Any]]:
        """Read the logged metric history of an existing run from the server."""
        history = wandb.Api().run(f"{self._path()}/{old_run.id}").scan_history()
        return [{k: v for k, v in row.items() if not k.startswith("_")} for row in history]

    def _path(self) -> str:
        """Return the full path of the project: `ENTITY/PROJECT`."""
        entity = self._entity or wandb.Api().default_entity
        return f"{entity}/{self._project}" if entity else self._project

    @override
    def _location(self) -> str:
        if is_offline():
            return f"wandb sync {shlex.quote(str(self._folder))}/offline-run-*"
        return f"{wandb.setup().settings.app_url}/{self._path()}"

    @override
    def _notes(self) -> tuple[str, ...]:
        return (_RENEWED_NOTE,) if self._n_deleted else ()

    @override
    def _full_project(self) -> str:
        return "" if is_offline() else self._path()

    @property
    def _folder(self) -> Path:
        """Folder in which the W&B SDK stores the files of runs."""
        return self._results / "wandb"

    @property
    def _notes_file(self) -> Path:
        """File in which tracker lists the offline runs of the project."""
        return self._folder / f"published-{self._entity or 'default'}-{self._project}.json"

    def _read_notes(self) -> dict[str, _ExistingRun]:
        """Read the list of the project's offline runs; return the runs by run key."""
        if not self._notes_file.exists():
            return {}
        content = json.loads(self._notes_file.read_text())
        existing = {key: _ExistingRun(**note) for key, note in content["runs"].items()}
        if content["folder"] == str(self._folder):
            return existing
        # Moved runs are written again: W&B stores absolute paths of an artifact's files.
        return {key: replace(note, digest=None) for key, note in existing.items()}

    def _write_notes(self, existing: Mapping[str, _ExistingRun]) -> None:
        """Write the list of the project's offline runs to its file."""
        runs = {key: vars(note) for key, note in existing.items()}
        write_text(self._notes_file, json.dumps({"folder": str(self._folder), "runs": runs}))

    @override
    def _lock(self) -> Path:
        return self._folder.with_name("wandb.lock")

    @override
    @contextmanager
    def _explained(self, problem: str, advice: str = "") -> Iterator[None]:
        with wandb_session(self._results, f"W&B {problem} ({self._typed_target})", advice):
            yield


def _import_views() -> ModuleType:
    """Import the module `views`.

    TrackingError is raised if the optional dependencies are not installed.
    """
    try:
        from tracker.tracking.wandb import views
    except ImportError:
        command = extra_command("reports")
        raise TrackingError(f"a W&B Report needs an additional package; type: {command}") from None
    return views


def _find_runs(
    path: str, filters: dict[str, Any], must_exist: bool = False
) -> Iterator[tuple[Any, Mapping[str, Any]]]:
    """Yield the runs written by tracker that match the filters, each with its `tracker` config.

    If the project does not exist, nothing is yielded; if `must_exist` is true, ValueError is
    raised.
    """
    try:
        runs = list(wandb.Api().runs(path, filters=filters, lazy=False, per_page=100))
    except ValueError as error:
        if must_exist or "could not find project" not in str(error).lower():
            raise
        return
    for run in runs:
        config = run.config.get("tracker")
        if isinstance(config, Mapping) and "run_key" in config:
            yield run, config


def _download(artifact: Artifact, folder: Path) -> None:
    """Download all files of an artifact, and verify their sizes and digests."""
    entries = artifact.manifest.entries
    check_sizes({name: entry.size for name, entry in entries.items()})
    external_names = [name for name, entry in entries.items() if entry.ref is not None]
    if external_names:
        name = external_names[0]
        raise TrackingError(f"{name!r} was not downloaded, because it refers to an external URL")
    artifact.download(root=str(folder))
    check_files(folder)
    artifact.verify(root=str(folder))
