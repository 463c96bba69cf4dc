"""Publishes cells to MLflow: one run per cell, and one nested run per run of it.

Without `MLFLOW_TRACKING_URI` everything lands in the results folder (`mlflow.db` and
`mlartifacts/`) and no server is needed.

A run is found again by its tag `tracker.run_key`, and its tag `tracker.digest` is written last: a
run whose digest is missing or old is completed by the next `publish`. MLflow never lets a param
change, so params hold identity only; whatever may change is a metric or a tag.
"""

# ruff: noqa: E402  (MLflow's environment must be set before it is imported)
from __future__ import annotations

import getpass
import json
import logging
import math
import os
import re
import shlex
import sqlite3
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psutil
from filelock import FileLock

# MLflow reads these when it is imported or when it connects; a user's own setting wins. Its own
# limits (7 retries of 120 s) would hold up a measurement for minutes when a server is down.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}.items():
    os.environ.setdefault(_name, _value)

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException

from tracker.errors import TrackingError
from tracker.provenance import file_hash
from tracker.records import CellRecord
from tracker.text import masked
from tracker.tracking.base import (
    BOARD,
    BOARD_FILE,
    Published,
    RemoteCell,
    Table,
    files_digest,
    is_curve,
    sync_command,
)
from tracker.tracking.mlflow_runs import (
    FILES_TAG,
    KEY_TAG,
    KIND_TAG,
    Run,
    cell_run,
    layer_run,
    logged_tables,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# "Creating initial MLflow database tables...": nothing that a user of tracker must read.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)

DIGEST_TAG = "tracker.digest"

_RUNS_FIRST = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's page opens such an experiment with its runs, not with the traces of an agent."""
_DIGESTS = "digests/files.json"
"""The digests of the attached files, by name: what has not changed is not uploaded again."""
_LOCK_SECONDS = 600.0
_SAID_CHARACTERS = 500  # a proxy's error page is longer
_REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED")
_WHO = (
    "Say who you are: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN."
)
_SECRET_SETTINGS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]+)")
_NETWORK_FILE_SYSTEMS = re.compile(
    r"nfs|cifs|smb|lustre|gpfs|beegfs|ceph|gluster|afs|orangefs|pvfs|9p|fuse\.sshfs", re.IGNORECASE
)


class MlflowBackend:
    """Keeps an MLflow experiment in step with the ledger.

    Args:
        project: The MLflow experiment's name.
        results: The results folder.
        tracking_uri: Where MLflow stores runs; by default `MLFLOW_TRACKING_URI`, else a SQLite
            file in the results folder.
    """

    name = "mlflow"

    def __init__(self, project: str, results: Path, tracking_uri: str | None = None) -> None:
        self._project = project
        self._results = results.absolute()
        elsewhere = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._uri = elsewhere or f"sqlite:///{self._results / 'mlflow.db'}"
        # Without it, the command that is told would publish into the results folder.
        self._again = f"MLFLOW_TRACKING_URI={shlex.quote(masked(elsewhere))} " if elsewhere else ""
        sqlite = _SQLITE.fullmatch(self._uri)
        self._database = Path(sqlite["path"]).absolute() if sqlite else None
        if self._database:
            self._uri = f"sqlite:///{self._database}"
        self._connection: tuple[Any, str] | None = None

    def publish(
        self,
        cell: CellRecord,
        artifacts: Sequence[Path],
        charts: Mapping[str, Figure] = MappingProxyType({}),
    ) -> Published:
        """Publish the cell as a parent run, and each of its runs as a nested one.

        Args:
            cell: The record, complete or still growing.
            artifacts: Files to attach to the cell's run, each under its own file name.
            charts: Plotly figures of the cell's run, by name.

        Returns:
            How many runs were created, updated and left alone, and where to look at them.

        Raises:
            TrackingError: MLflow refused or could not be reached.
        """
        again = self._again + sync_command(self._results, f"{self.name}:{self._project}")
        advice = f"The results are on disk; when it is back: {again}"
        with self._failures_explained("did not take the runs", advice), self._one_publisher():
            client, experiment = self._connect()
            existing = _runs_of_cell(client, experiment, cell.key)
            parent = cell_run(cell, artifacts, charts)
            outcomes = [_write(client, experiment, parent, existing)]
            parent_id = existing[parent.key].info.run_id
            # MLflow lists the newest run first, so layer 0 is written last.
            for layer in reversed(cell.runs):
                run = layer_run(cell, layer, parent_id)
                outcomes.append(_write(client, experiment, run, existing))
            location = self._location(experiment)
        return Published(
            created=outcomes.count("created"),
            updated=outcomes.count("updated"),
            unchanged=outcomes.count("unchanged"),
            location=location,
        )

    def cells(self) -> list[RemoteCell]:
        """List the cells of the experiment.

        Returns:
            One entry a cell's run that was written whole.

        Raises:
            TrackingError: There is no such experiment, or MLflow could not be reached.
        """
        with self._failures_explained("could not be read"):
            client, experiment = self._existing()
            runs = _search(client, experiment, f"tags.`{KIND_TAG}` = 'cell'")
            return [
                RemoteCell(
                    key=run.data.tags[KEY_TAG],
                    name=run.info.run_name,
                    version=run.data.tags.get(FILES_TAG, ""),
                    place=run.info.run_id,
                )
                for run in runs
                if DIGEST_TAG in run.data.tags
            ]

    def fetch(self, cell: RemoteCell, folder: Path) -> None:
        """Download the files of a cell, checked against the digest that its run states.

        Args:
            cell: One of `cells`.
            folder: An empty folder for them.

        Raises:
            TrackingError: MLflow could not be reached, or the files are not what was attached.
        """
        with self._failures_explained("could not be read"):
            client, _ = self._existing()
            there = _digests(client, cell.place)
            for artifact in client.list_artifacts(cell.place):
                if artifact.path in there or not (there or artifact.is_dir):
                    client.download_artifacts(cell.place, artifact.path, str(folder))
            if files_digest(folder.iterdir()) != cell.version:
                raise TrackingError(f"the files of {cell.name!r} are not those that were attached")

    def boards(self) -> list[str]:
        """List the versions of the experiment's leaderboard, the oldest first.

        Returns:
            Ids of runs; empty where there is none yet.
        """
        with self._failures_explained("could not be read"):
            client, experiment = self._connect()
            runs = _search(client, experiment, f"tags.`{KIND_TAG}` = '{BOARD}'")
            return [run.info.run_id for run in runs if run.info.status == "FINISHED"]

    def read_board(self, version: str) -> str:
        """Read one version of the leaderboard.

        Args:
            version: One of `boards`.

        Returns:
            Its text.
        """
        with self._failures_explained("could not be read"), TemporaryDirectory() as folder:
            client, _ = self._existing()
            path = client.download_artifacts(version, BOARD_FILE, folder)
            return Path(path).read_text(encoding="utf-8")

    def add_board(self, file: Path, tables: Mapping[str, Table]) -> str:
        """Add a version of the leaderboard as a run.

        Args:
            file: All of it, named `BOARD_FILE`.
            tables: What people browse.

        Returns:
            Where to look.
        """
        return self._add("leaderboard", BOARD, [file], tables, {})

    def add_report(
        self,
        text: str,
        files: Sequence[Path],
        tables: Mapping[str, Table],
        charts: Mapping[str, Figure],
    ) -> str:
        """Add a report as a run.

        Args:
            text: What it says in a few paragraphs.
            files: The page, and what goes with it.
            tables: What people browse.
            charts: Plotly figures, by name.

        Returns:
            Where to look.
        """
        return self._add("report", "report", files, tables, charts, text)

    def user(self) -> str:
        """Say as whom MLflow knows this user."""
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()

    def _add(
        self,
        name: str,
        kind: str,
        files: Sequence[Path],
        tables: Mapping[str, Table],
        charts: Mapping[str, Figure],
        note: str = "",
    ) -> str:
        """Log files, tables and charts in a run of their own."""
        with self._failures_explained(f"did not take the {name}"), self._one_publisher():
            client, experiment = self._connect()
            tags = {
                KIND_TAG: kind,
                "mlflow.source.name": "tracker",
                "mlflow.user": self.user(),
                "mlflow.loggedArtifacts": logged_tables(tables),
                "mlflow.note.content": note,
            }
            run_id = client.create_run(experiment, tags=tags, run_name=name).info.run_id
            _attach(client, run_id, tables, charts)
            for file in files:
                client.log_artifact(run_id, str(file))
            client.set_terminated(run_id, "FINISHED")
            return self._location(experiment)

    def close(self) -> None:
        """Leave the SQLite file complete on its own, so that it can be copied."""
        connected, self._connection = self._connection is not None, None
        if connected and self._database:
            with suppress(sqlite3.Error), closing(sqlite3.connect(self._database)) as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _connect(self) -> tuple[Any, str]:
        """Return the client and the experiment's id, creating what is not there yet."""
        if self._connection is None:
            if self._database:
                create_database(self._database)
            client = MlflowClient(tracking_uri=self._uri)
            self._connection = client, self._experiment_id(client)
        return self._connection

    def _existing(self) -> tuple[Any, str]:
        """Return the client and the experiment's id, creating nothing."""
        if self._connection is None:
            if self._database and not self._database.exists():
                raise TrackingError("there is no such file")
            client = MlflowClient(tracking_uri=self._uri)
            found = client.get_experiment_by_name(self._project)
            if found is None:
                names = ", ".join(repr(e.name) for e in client.search_experiments(max_results=20))
                raise TrackingError(f"it has no experiment {self._project!r}; it has {names}")
            self._connection = client, str(found.experiment_id)
        return self._connection

    def _experiment_id(self, client: Any) -> str:
        experiment = client.get_experiment_by_name(self._project)
        if experiment is None:
            try:
                place = self._artifact_location()
                return str(client.create_experiment(self._project, place, dict(_RUNS_FIRST)))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            experiment = client.get_experiment_by_name(self._project)
        if experiment.lifecycle_stage == "deleted":
            raise TrackingError(
                f"The MLflow experiment {self._project!r} was deleted. Choose another project, or "
                "restore it: mlflow experiments restore --experiment-id "
                f"{experiment.experiment_id}"
            )
        return str(experiment.experiment_id)

    def _artifact_location(self) -> str | None:
        """Keep files beside the runs; a server decides for itself."""
        if self._uri.startswith(("http://", "https://", "databricks")):
            return None
        return _artifact_folder(self._database or self._results / "mlflow.db").as_uri()

    def _location(self, experiment: str) -> str:
        if self._uri.startswith(("http://", "https://")):
            server = masked(self._uri).replace("***@", "").rstrip("/")
            return f"{server}/#/experiments/{experiment}/runs"
        uri = shlex.quote(masked(self._uri))
        return f"mlflow ui --backend-store-uri {uri} --port 5000"

    @contextmanager
    def _one_publisher(self) -> Iterator[None]:
        """Hold off other processes: MLflow has no "create unless it exists" for runs.

        The same lock guards the first use of a SQLite file, whose migrations break when two
        processes run them at once.
        """
        path = self._database or self._results / "mlflow"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_SECONDS):
            yield

    @contextmanager
    def _failures_explained(self, problem: str, advice: str = "") -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001  the SDK raises requests, SQL, cloud errors, ...
            secrets = _secrets(self._uri)
            said = str(error) or type(error).__name__
            text = masked(said, secrets)
            hidden = any(secrets) or text != said
            text = textwrap.shorten(text, _SAID_CHARACTERS, placeholder=" …")
            text = f"MLflow at {masked(self._uri)} {problem}: {text}"
            if getattr(error, "error_code", None) in _REFUSED:
                advice = f"{_WHO}\n{advice}"
            # A traceback prints the cause too, so it is dropped where it could show a password.
            raise TrackingError("\n".join(filter(None, (text, advice)))) from (
                None if hidden else error
            )


def _search(client: Any, experiment: str, wanted: str) -> Iterator[Any]:
    """Find runs, the oldest first; deleted ones do not count."""
    token: str | None = None
    while True:
        page = client.search_runs(
            [experiment],
            filter_string=wanted,
            order_by=["attributes.start_time ASC"],
            page_token=token,
        )
        yield from page
        token = page.token
        if not token:
            return


def _runs_of_cell(client: Any, experiment: str, cell_key: str) -> dict[str, Any]:
    """Find the runs that a cell has, by run key."""
    found: dict[str, Any] = {}
    for run in _search(client, experiment, f"tags.`tracker.cell` = '{cell_key}'"):
        found.setdefault(run.data.tags.get(KEY_TAG, run.info.run_id), run)
    return found


def _write(client: Any, experiment: str, run: Run, existing: dict[str, Any]) -> str:
    """Bring one run to what it should be; `existing` learns of a run that is created."""
    found = existing.get(run.key)
    if found is None:
        found = client.create_run(experiment, tags=run.tags, run_name=run.name)
        existing[run.key] = found
        known, tags, outcome = {}, {}, "created"
    elif found.data.tags.get(DIGEST_TAG) == run.digest:
        return "unchanged"
    else:
        known, tags, outcome = _known_points(client, found, run), run.tags, "updated"

    run_id = found.info.run_id
    now = int(time.time() * 1000)
    client.log_batch(
        run_id,
        metrics=[
            Metric(name, value, now, step)
            for (name, step), value in _changes(known, run.points).items()
        ],
        params=[
            Param(name, value)
            for name, value in run.params.items()
            if name not in found.data.params
        ],
        tags=[RunTag(name, value) for name, value in tags.items()],
        synchronous=True,
    )
    for tag in found.data.tags:
        if tag.startswith("tracker.") and tag != DIGEST_TAG and tag not in run.tags:
            client.delete_tag(run_id, tag)
    _attach(client, run_id, run.tables, run.charts)
    if run.files:
        _attach_files(client, run_id, run.files)
    if run.data:
        # A data set that the run has already is not added again.
        context = [InputTag("mlflow.data.context", "evaluation")]
        client.log_inputs(run_id, [DatasetInput(Dataset(**data), context) for data in run.data])
    if found.info.run_name != run.name:
        client.update_run(run_id, name=run.name)
    if found.info.status != "FINISHED":
        client.set_terminated(run_id, "FINISHED")
    client.set_tag(run_id, DIGEST_TAG, run.digest, synchronous=True)
    return outcome


def _attach(
    client: Any, run_id: str, tables: Mapping[str, Table], charts: Mapping[str, Figure]
) -> None:
    for name, table in tables.items():
        # Not log_table: it appends to a table that is already there.
        content = {"columns": table.columns, "data": table.rows}
        client.log_text(run_id, json.dumps(content), f"tables/{name}.json")
    for name, figure in charts.items():
        client.log_figure(run_id, figure, f"charts/{name}.html")


def _digests(client: Any, run_id: str) -> dict[str, str]:
    """Read which files a run states to have; a run of an older tracker states none."""
    there = {artifact.path for artifact in client.list_artifacts(run_id)}
    if _DIGESTS.split("/")[0] not in there:
        return {}
    with TemporaryDirectory() as folder, suppress(ValueError):
        path = client.download_artifacts(run_id, _DIGESTS, folder)
        stated: dict[str, str] = json.loads(Path(path).read_text(encoding="utf-8"))
        return {name: digest for name, digest in stated.items() if name in there}
    return {}


def _attach_files(client: Any, run_id: str, files: Sequence[Path]) -> None:
    """Upload the files that a run lacks, and state the digests of all."""
    digests = {file.name: file_hash([file]) for file in files}
    stated = _digests(client, run_id)
    kept = {name: old for name, old in stated.items() if digests.get(name) == old}
    if kept != stated:
        # First, so that a replacement that breaks off is not taken for the file of before.
        client.log_text(run_id, json.dumps(kept), _DIGESTS)
    for file in files:
        if file.name not in kept:
            client.log_artifact(run_id, str(file))
    client.log_text(run_id, json.dumps(digests), _DIGESTS)


def _known_points(client: Any, found: Any, run: Run) -> dict[tuple[str, int], float]:
    """Read back the newest value of every metric at every step."""
    known: dict[tuple[str, int], float] = {}
    for name, value in found.data.metrics.items():
        if run.has_curves and is_curve(name):
            history = client.get_metric_history(found.info.run_id, name)
            for point in sorted(history, key=lambda point: point.timestamp):
                known[name, point.step] = point.value
        else:
            known[name, run.step] = value
    return known


def _changes(
    known: Mapping[tuple[str, int], float], wanted: Mapping[tuple[str, int], float]
) -> dict[tuple[str, int], float]:
    """Pick the values that must be logged.

    MLflow cannot take a metric back, so a value that is no longer defined becomes NaN.
    """
    changed = {at: value for at, value in wanted.items() if known.get(at) != value}
    gone = (at for at, old in known.items() if at not in wanted and not math.isnan(old))
    return changed | dict.fromkeys(gone, math.nan)


def _artifact_folder(database: Path) -> Path:
    return database.parent / "mlartifacts"


def create_database(path: Path) -> None:
    """Create the SQLite file, or find out quickly that the one there cannot be used.

    MLflow's migrations take seconds and cannot be repeated when they are interrupted, so they run
    on a draft that is renamed when it is complete. The caller holds the lock.

    Args:
        path: The SQLite file.
    """
    if path.exists() and path.stat().st_size:
        with closing(sqlite3.connect(path)) as database:
            database.execute("PRAGMA schema_version")
        return

    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    draft = path.with_name(f"{path.name}.draft")
    for suffix in ("", "-journal", "-shm", "-wal"):
        Path(f"{draft}{suffix}").unlink(missing_ok=True)
    if _on_local_disk(path.parent):
        # Three times as fast for runs that are logged one by one; it stays on in the file.
        with closing(sqlite3.connect(draft)) as database:
            database.execute("PRAGMA journal_mode=WAL")
    store = SqlAlchemyStore(f"sqlite:///{draft}", _artifact_folder(path).as_uri())
    store.engine.dispose()
    draft.replace(path)


def _on_local_disk(folder: Path) -> bool:
    """Say whether SQLite's write-ahead log is safe here: it is not on network file systems."""
    mounts = [
        mount
        for mount in psutil.disk_partitions(all=True)
        if folder.resolve().is_relative_to(mount.mountpoint)
    ]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    return nearest is None or not _NETWORK_FILE_SYSTEMS.search(nearest.fstype)


def _secrets(uri: str) -> list[str | None]:
    """What in the address and the environment nobody may see."""
    passwords = [os.environ.get(name) for name in _SECRET_SETTINGS]
    with suppress(ValueError):
        passwords.append(urlsplit(uri).password)
    return passwords
