"""Publish results to Trackio: a summary run per benchmark, and a run for each ablation.

One summary run shows one model on one benchmark. A separate run shows the intact model. The module
`isolated` runs this code in a separate process. The field `tracker.run_key` of a run's config
identifies the run. Trackio cannot remove a metric, so a changed run is deleted and written again.
Trackio prints warnings instead of raising errors, so written runs are read back.
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

from tracker.schema.errors import TrackingError
from tracker.tracking.base import Backend, RemoteCell, build_error, check_files, check_sizes
from tracker.tracking.identity import filter_words, group_name
from tracker.tracking.runs import DescribedRun, artifact_name, move_runs
from tracker.tracking.trackio.service import default_folder

TRACKIO_FORMAT = "1"
"""Version in every digest; increase it when the form of runs changes, to update all runs once."""


class TrackioBackend(Backend):
    """Backend that updates a Trackio project with the results of a results folder.

    Charts are not published, because Trackio draws the curves itself.

    Args:
        project: Name of the Trackio project.
        results: The results folder.
        ignored: Names of environment variables that are set but ignored; a message tells the user.
    """

    name = "trackio"

    def __init__(self, project: str, results: Path, ignored: Sequence[str] = ()) -> None:
        super().__init__(project, results)
        self._ignored_settings = ignored

    @override
    def _write(self, runs: Sequence[DescribedRun]) -> Iterator[str]:
        SQLiteStorage.validate_project_name(self._project)
        if utils.get_storage_mode() != "sqlite":
            raise TrackingError(
                "trackio cannot use its SQLite database here (a network file system?); set "
                "TRACKIO_DIR to a local folder"
            )
        existing = self._runs_by_key()
        for old_run in chain(*move_runs(existing, runs[-1].cell, runs)):
            old_run.delete()
        for run in runs:
            old_runs = existing.get(run.key, [])
            if len(old_runs) == 1 and self._is_complete(old_runs[0], run):
                yield "unchanged"
                continue
            for old_run in old_runs:
                old_run.delete()
            self._write_run(run)
            yield "updated" if old_runs else "created"

    @override
    def _cells(self) -> Iterator[RemoteCell]:
        for _, config in self._tracker_runs():
            if config["ablation"] == "cell":
                keys = ("run_key", "name", "files", "outcomes")
                yield RemoteCell(*(config[key] for key in keys))

    @override
    def _download(self, cell: RemoteCell, folder: Path) -> None:
        entries = self._files(cell.files_id)
        check_sizes({name: entry["size"] for name, entry in entries.items()})
        for name, entry in entries.items():
            blob = cas.blob_path(self._project, cas.validate_digest(entry["digest"]))
            shutil.copyfile(blob, folder / name)
        check_files(folder, cell)

    def _runs_by_key(self) -> dict[str, list[Any]]:
        """Return the runs that tracker wrote to the project, by run key."""
        runs: dict[str, list[Any]] = {}
        if SQLiteStorage.get_project_db_path(self._project).exists():
            for run, config in self._tracker_runs():
                runs.setdefault(config["run_key"], []).append(run)
        return runs

    def _tracker_runs(self) -> Iterator[tuple[Any, Mapping[str, Any]]]:
        """Yield each run that tracker wrote, with the field `tracker` of the run's config."""
        configs = SQLiteStorage.get_all_run_configs(self._project)  # each run asks by itself
        for run in trackio.Api().runs(self._project):
            config = (configs.get(run.id) or {}).get("tracker")
            if isinstance(config, Mapping) and "run_key" in config:
                yield run, config

    def _is_complete(self, trackio_run: Any, run: DescribedRun) -> bool:
        """Return whether a stored run is complete and matches its description."""
        if trackio_run.config["tracker"].get("digest") != run.digest(TRACKIO_FORMAT):
            return False
        logs = SQLiteStorage.get_logs(self._project, trackio_run.name, run_id=trackio_run.id)
        points = {(row["step"], name) for row in logs for name in row if name != "timestamp"}
        rows = _rows_by_step(run).items()
        files = {file.name for file in run.files}
        return points == {(step, name) for step, row in rows for name in (*row, "step")} and (
            not files or set(self._files(artifact_name(run.cell))) == files
        )

    def _write_run(self, run: DescribedRun) -> None:
        """Write a run, read it back, and check that Trackio stored it completely."""
        digests = {"digest": run.digest(TRACKIO_FORMAT), "name": run.name, "files": run.version}
        config = {
            **run.config,
            "kind": run.kind,
            "tags": list(filter_words(run.cell)),
            "note": run.note,
            "tracker": {**run.config["tracker"], **digests},
        }
        switched_off = dict.fromkeys(("embed", "auto_log_cpu", "auto_log_gpu"), False)
        labels = {"name": run.name, "group": group_name(run.cell), "config": config}
        handle = trackio.init(self._project, **labels, **switched_off)
        try:
            if run.outcomes and run.files:
                outcomes = run.outcomes
                artifact = trackio.Artifact(outcomes.name, "outcomes", metadata=outcomes.metadata)
                for file in run.files:
                    artifact.add_file(file, name=file.name)
                handle.log_artifact(artifact, aliases=list(outcomes.aliases))
            for step, row in _rows_by_step(run).items():
                handle.log(row, step=step)
        finally:
            trackio.finish()
        (trackio_run,) = (r for r in trackio.Api().runs(self._project) if r.id == handle.id)
        if not self._is_complete(trackio_run, run):
            raise TrackingError(f"the run {run.name!r} arrived incomplete")

    def _files(self, artifact: str) -> dict[str, dict[str, Any]]:
        """Return digest and size of each file in an artifact's latest version, by file name."""
        manifest = SQLiteStorage.get_artifact_manifest(self._project, artifact, None)
        return {entry["path"]: entry for entry in manifest["manifest"]} if manifest else {}

    @override
    def _location(self) -> str:
        project = SQLiteStorage.get_project_db_path(self._project).stem
        return f"{self._environment()}trackio show --project {shlex.quote(project)}"

    @override
    def _environment(self) -> str:
        if default_folder() == utils.TRACKIO_DIR:
            return ""
        return f"TRACKIO_DIR={shlex.quote(str(utils.TRACKIO_DIR))} "

    @override
    def _notes(self) -> tuple[str, ...]:
        if not self._ignored_settings:
            return ()
        names = ", ".join(self._ignored_settings)
        advice = "runs are written to this machine only; to upload them, type: trackio sync"
        return (f"tracker ignores {names}: {advice}",)

    @override
    def _lock(self) -> Path:
        name = f"{utils.canonical_project_name(self._project)}.tracker.lock"
        return Path(utils.TRACKIO_DIR / name)

    @contextmanager
    def _explained(self, problem: str, advice: str = "") -> Iterator[None]:
        """Convert exceptions in a `with` block to a TrackingError, and hide Trackio's output."""
        # Trackio prints the start and the end of every run.
        with super()._explained(problem, advice), redirect_stdout(StringIO()):
            yield

    @override
    def _describe_error(self, error: Exception, problem: str, advice: str) -> TrackingError:
        return build_error(f"Trackio in {utils.TRACKIO_DIR} {problem}", error, advice)


def _rows_by_step(run: DescribedRun) -> dict[int, dict[str, Any]]:
    """Return the metrics to log at each step; the step of an ablation is its layer."""
    rows: dict[int, dict[str, Any]] = {}
    for layer, points in run.curves:
        rows.setdefault(layer, {}).update(points)
    tables = {
        f"tables/{name}": trackio.Table(list(table.columns), [list(row) for row in table.rows])
        for name, table in run.tables.items()
    }
    rows.setdefault(run.step, {}).update({**run.figures, **tables})
    return rows
