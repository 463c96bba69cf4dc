"""Publish cells to Trackio: a run per cell, one for its intact model, one for each run.

This code runs in a process of its own, called by `isolated`. A run is found by `tracker.run_key` in
its config. Trackio cannot remove a figure, so a changed run is deleted and written again. It warns
where others raise errors, so written runs are read back.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from itertools import chain
from pathlib import Path
from typing import Any

import trackio
from trackio import cas, utils
from trackio.sqlite_storage import SQLiteStorage
from typing_extensions import override

from tracker.core.errors import TrackingError
from tracker.tracking.base import Backend, RemoteCell, explained
from tracker.tracking.downloads import check_downloaded, check_listing
from tracker.tracking.identity import filter_words, group_name
from tracker.tracking.runs import DescribedRun, artifact_name, take_over
from tracker.tracking.trackio.service import usual_folder

FORMAT = "1"
"""Part of every digest: raise it when runs are written differently, and all are updated once."""


class TrackioBackend(Backend):
    """Keeps a Trackio project in step with the ledger.

    Tracker's charts are left out: Trackio draws the curves, and keeps charts of deleted runs.

    Args:
        project: The project.
        results: The results folder.
        ignored: Environment variables that it ignores.
    """

    name = "trackio"

    def __init__(self, project: str, results: Path, ignored: Sequence[str] = ()) -> None:
        super().__init__(project, results)
        self._ignored = ignored

    @override
    def _write(self, runs: Sequence[DescribedRun]) -> Iterator[str]:
        SQLiteStorage.validate_project_name(self._project)
        if utils.get_storage_mode() != "sqlite":
            raise TrackingError(
                "it cannot be asked what it has where it appends to files, as on a network "
                "filesystem; set TRACKIO_DIR to a folder of this machine"
            )
        known = self._known()
        for former in chain(*take_over(known, runs[-1].cell, runs)):
            former.delete()
        for run in runs:
            there = known.get(run.key, [])
            if len(there) == 1 and self._is_whole(there[0], run):
                yield "unchanged"
                continue
            for former in there:
                former.delete()
            self._write_one(run)
            yield "updated" if there else "created"

    @override
    def _cells(self) -> Iterator[RemoteCell]:
        for _, mine in self._mine():
            if mine["ablation"] == "cell":
                yield RemoteCell(mine["run_key"], mine["name"], mine["files"], mine["outcomes"])

    @override
    def _download(self, cell: RemoteCell, folder: Path) -> None:
        there = self._files(cell.place)
        check_listing({name: entry["size"] for name, entry in there.items()})
        for name, entry in there.items():
            blob = cas.blob_path(self._project, cas.validate_digest(entry["digest"]))
            shutil.copyfile(blob, folder / name)
        check_downloaded(folder, cell)

    def _known(self) -> dict[str, list[Any]]:
        """Return the project's runs that tracker wrote, by run key."""
        found: dict[str, list[Any]] = {}
        if SQLiteStorage.get_project_db_path(self._project).exists():
            for run, mine in self._mine():
                found.setdefault(mine["run_key"], []).append(run)
        return found

    def _mine(self) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        """Yield the project's runs that tracker wrote, each with tracker's part of its config."""
        configs = SQLiteStorage.get_all_run_configs(self._project)  # each run asks by itself
        for run in trackio.Api().runs(self._project):
            mine = (configs.get(run.id) or {}).get("tracker")
            if isinstance(mine, Mapping) and "run_key" in mine:
                yield run, mine

    def _is_whole(self, found: Any, run: DescribedRun) -> bool:
        """Check whether a run is complete and equal to its description."""
        if found.config["tracker"].get("digest") != run.digest(FORMAT):
            return False
        logs = SQLiteStorage.get_logs(self._project, found.name, run_id=found.id)
        shown = {(row["step"], name) for row in logs for name in row if name != "timestamp"}
        wanted = {(at, name) for at, row in _rows(run).items() for name in (*row, "step")}
        files = {file.name for file in run.files}
        return shown == wanted and (not files or set(self._files(artifact_name(run.cell))) == files)

    def _write_one(self, run: DescribedRun) -> None:
        digest = {"digest": run.digest(FORMAT), "name": run.name, "files": run.version}
        config = {
            **run.config,
            "kind": run.kind,
            "tags": list(filter_words(run.cell)),
            "note": run.note,
            "tracker": {**run.config["tracker"], **digest},
        }
        handle = trackio.init(
            self._project,
            name=run.name,
            group=group_name(run.cell),
            config=config,
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        try:
            if run.outcomes and run.files:
                made = run.outcomes
                artifact = trackio.Artifact(made.name, "outcomes", metadata=made.metadata)
                for file in run.files:
                    artifact.add_file(file, name=file.name)
                handle.log_artifact(artifact, aliases=list(made.aliases))
            for step, row in _rows(run).items():
                handle.log(row, step=step)
        finally:
            trackio.finish()
        (found,) = (one for one in trackio.Api().runs(self._project) if one.id == handle.id)
        if not self._is_whole(found, run):
            raise TrackingError(f"the run {run.name!r} did not arrive whole")

    def _files(self, artifact: str) -> dict[str, dict[str, Any]]:
        """Return the files of an artifact's latest version, with their digests and sizes."""
        found = SQLiteStorage.get_artifact_manifest(self._project, artifact, None)
        return {entry["path"]: entry for entry in found["manifest"]} if found else {}

    @override
    def _location(self) -> str:
        project = SQLiteStorage.get_project_db_path(self._project).stem
        return f"{self._setting()}trackio show --project {shlex.quote(project)}"

    @override
    def _setting(self) -> str:
        if usual_folder() == utils.TRACKIO_DIR:
            return ""
        return f"TRACKIO_DIR={shlex.quote(str(utils.TRACKIO_DIR))} "

    @override
    def _notes(self) -> tuple[str, ...]:
        if not self._ignored:
            return ()
        names = ", ".join(self._ignored)
        return (f"{names} is not followed: runs are on this machine, and trackio sync sends them",)

    @override
    def _lock(self) -> Path:
        name = f"{utils.canonical_project_name(self._project)}.tracker.lock"
        return Path(utils.TRACKIO_DIR / name)

    @contextmanager
    def _explained(self, problem: str, advice: str = "") -> Iterator[None]:
        # Trackio prints the start and the end of every run.
        with super()._explained(problem, advice), redirect_stdout(StringIO()):
            yield

    @override
    def _explain(self, error: Exception, problem: str, advice: str) -> TrackingError:
        return explained(f"Trackio in {utils.TRACKIO_DIR} {problem}", error, advice)


def _rows(run: DescribedRun) -> dict[int, dict[str, Any]]:
    """Build the rows to log by step; figures and tables have the step of the run's layer."""
    rows: dict[int, dict[str, Any]] = {}
    for layer, points in run.curves:
        rows.setdefault(layer, {}).update(points)
    tables = {
        f"tables/{name}": trackio.Table(list(table.columns), [list(row) for row in table.rows])
        for name, table in run.tables.items()
    }
    rows.setdefault(run.step, {}).update({**run.figures, **tables})
    return rows
