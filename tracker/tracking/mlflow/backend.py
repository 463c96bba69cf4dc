"""Publishes cells to MLflow: one run per cell, and nested in it the intact model and each run.

Without `MLFLOW_TRACKING_URI` everything lands in the results folder (`mlflow.db` and
`mlartifacts/`) and no server is needed.

A run is found again by its tag `tracker.run_key`, and its tag `tracker.digest` is written last: a
run whose digest is missing or old is completed by the next `publish`.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import sqlite3
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from typing_extensions import override

from tracker.core.errors import TrackingError
from tracker.core.provenance import content_hash
from tracker.core.records import CellRecord
from tracker.core.text import masked
from tracker.ledger.cache import own_folder
from tracker.ledger.files import as_shared, lock_file
from tracker.tracking.base import (
    BOARD,
    BOARD_FILE,
    Backend,
    LoggedTable,
    Pages,
    Published,
    RemoteCell,
    sync_command,
)
from tracker.tracking.foreign import downloading, refuse_lies
from tracker.tracking.identity import files_digest, run_key
from tracker.tracking.mlflow.database import artifact_folder, create_database, follow_folder
from tracker.tracking.mlflow.ranked import ranked
from tracker.tracking.mlflow.runs import (
    FILES_TAG,
    KEY_TAG,
    KIND_TAG,
    MlflowRun,
    child_links,
    made_of_tag,
    mlflow_run,
    tables_tag,
)
from tracker.tracking.mlflow.writing import (
    DIGEST_TAG,
    attach,
    lacks,
    later,
    stated_digests,
    write,
)
from tracker.tracking.runs import cell_run, described

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


_RUNS_FIRST = {"mlflow.experimentKind": "custom_model_development"}
"""MLflow's page opens such an experiment with its runs, not with the traces of an agent."""
_LOCK_SECONDS = 600.0
_SAID_CHARACTERS = 500  # a proxy's error page is longer
_REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED")
_WHO = (
    "Say who you are: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN."
)
_SECRET_SETTINGS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]+)")


class MlflowBackend(Backend, Pages):
    """Keeps an MLflow experiment in step with the ledger.

    A version of the leaderboard is a run, and so is a report.

    Args:
        project: The MLflow experiment's name.
        results: The results folder.
        tracking_uri: Where MLflow stores runs; by default `MLFLOW_TRACKING_URI`, else a SQLite
            file in the results folder.
    """

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

    @override
    def publish(
        self,
        cell: CellRecord,
        artifacts: Sequence[Path],
        charts: Mapping[str, Figure],
        tables: Mapping[str, LoggedTable] = {},
    ) -> Published:
        again = self._again + sync_command(self._results, f"mlflow:{self._project}")
        advice = f"The results are on disk; when it is back: {again}"
        with self._failures_explained("did not take the runs", advice), self._one_publisher():
            client, experiment = self._connect()
            existing = _runs_of_cell(client, experiment, cell.key)
            models = ranked(client, experiment, existing.values())
            # First, for its children; its figures come last, and with them where its children are.
            parent = run_key(cell, "cell")
            is_new = parent not in existing
            parent_id = _opened(client, experiment, cell, existing)
            *nested, own = described(cell, artifacts, charts, tables)
            children = [mlflow_run(run, parent_id) for run in nested]
            outcomes = [write(client, experiment, run, existing, models) for run in children]
            ids = {key: found.info.run_id for key, found in existing.items()}
            links = child_links(cell, experiment, ids)
            whole = mlflow_run(own, None, links)
            outcome = write(client, experiment, whole, existing, models)
            outcomes.append("created" if is_new else outcome)
            if set(outcomes) != {"unchanged"}:
                _confirm(client, experiment, cell, (*children, whole))
            location = self._location(experiment)
        return Published(
            created=outcomes.count("created"),
            updated=outcomes.count("updated"),
            unchanged=outcomes.count("unchanged"),
            location=location,
        )

    def open(self, cell: CellRecord) -> tuple[Any, str]:
        """Open the run of a cell that is about to be measured, or continue it.

        Args:
            cell: What is known of it.

        Returns:
            The run, and the tracking URI.
        """
        with self.connected("does not show what is measured") as client, self._one_publisher():
            _, experiment = self._connect()
            existing = _runs_of_cell(client, experiment, cell.key)
            run_id = _opened(client, experiment, cell, existing)
            client.update_run(run_id, status="RUNNING")
            return existing[run_key(cell, "cell")], self._uri

    def begin(self, name: str, tags: Mapping[str, str]) -> tuple[str, str, str]:
        """Open a run of its own: its id, the tracking URI, and what a person opens."""
        with self.connected(f"did not take {name}") as client, self._one_publisher():
            _, experiment = self._connect()
            run = client.create_run(experiment, tags=dict(tags), run_name=name)
            return str(run.info.run_id), self._uri, self._location(experiment)

    @contextmanager
    def connected(self, problem: str) -> Iterator[Any]:
        """Give MLflow's client, and say what did not work where it fails.

        Args:
            problem: The words for that.

        Yields:
            The client.
        """
        with self._failures_explained(problem):
            if self._connection is None:
                with self._one_publisher():
                    self._connect()
            yield self._connect()[0]

    @override
    def cells(self) -> list[RemoteCell]:
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

    @override
    def fetch(self, cell: RemoteCell, folder: Path) -> None:
        with self._failures_explained("could not be read"):
            client, _ = self._existing()
            with downloading(folder):
                there = stated_digests(client, cell.place)
                listed = {a.path: a for a in client.list_artifacts(cell.place)}
                mine = [n for n, a in listed.items() if n in there or not (there or a.is_dir)]
                refuse_lies({name: listed[name].file_size for name in mine})
                for name in mine:
                    client.download_artifacts(cell.place, name, str(folder))
            if files_digest(folder.iterdir()) != cell.version:
                raise TrackingError(f"the files of {cell.name!r} are not those that were attached")

    @override
    def boards(self) -> list[str]:
        with self._failures_explained("could not be read"):
            client, experiment = self._connect()
            runs = _search(client, experiment, f"tags.`{KIND_TAG}` = '{BOARD}'")
            return [run.info.run_id for run in runs if run.info.status == "FINISHED"]

    @override
    def read_board(self, version: str) -> str:
        with self._failures_explained("could not be read"), TemporaryDirectory() as folder:
            client, _ = self._existing()
            with downloading(Path(folder)):
                path = client.download_artifacts(version, BOARD_FILE, folder)
            return Path(path).read_text(encoding="utf-8")

    @override
    def add_board(
        self, file: Path, tables: Mapping[str, LoggedTable], made_of: Sequence[CellRecord]
    ) -> str:
        return self._add("leaderboard", BOARD, [file], tables, {}, made_of)

    @override
    def add_report(
        self,
        text: str,
        files: Sequence[Path],
        tables: Mapping[str, LoggedTable],
        charts: Mapping[str, Figure],
        made_of: Sequence[CellRecord],
    ) -> str:
        return self._add("report", "report", files, tables, charts, made_of, text)

    @override
    def user(self) -> str:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()

    def _add(
        self,
        name: str,
        kind: str,
        files: Sequence[Path],
        tables: Mapping[str, LoggedTable],
        charts: Mapping[str, Figure],
        made_of: Sequence[CellRecord],
        note: str = "",
    ) -> str:
        """Log files, tables and charts in a run of their own."""
        with self._failures_explained(f"did not take the {name}"), self._one_publisher():
            client, experiment = self._connect()
            tags = {
                KIND_TAG: kind,
                "tracker.made_of": made_of_tag(made_of),
                "mlflow.source.name": "tracker",
                "mlflow.user": self.user(),
                "mlflow.loggedArtifacts": tables_tag(tables),
                "mlflow.note.content": note,
            }
            # The newest of its kind is the first in MLflow's list, whatever the clock says.
            others = _search(client, experiment, f"tags.`{KIND_TAG}` = '{kind}'")
            start = later(max((run.info.start_time for run in others), default=0))
            run_id = client.create_run(experiment, start, tags, name).info.run_id
            attach(client, run_id, tables, charts)
            for file in files:
                client.log_artifact(run_id, str(file))
            client.set_terminated(run_id, "FINISHED", later(start))
            return self._location(experiment)

    @override
    def close(self) -> None:
        # The SQLite file is left complete on its own, so that it can be copied.
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
            if self._database:
                with suppress(sqlite3.Error):  # nobody may write it, or it is none
                    follow_folder(self._database)
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
        return artifact_folder(self._database or self._results / "mlflow.db").as_uri()

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
        if not self._database and not self._results.is_dir():
            # Nothing is kept there, so no folder is made there.
            path = own_folder("locks") / content_hash(self._uri)[:16]
        with lock_file(path.with_name(f"{path.name}.lock"), _LOCK_SECONDS):
            if not self._database:
                yield
                return
            with as_shared(path.parent):
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


def _confirm(client: Any, experiment: str, cell: CellRecord, runs: Sequence[MlflowRun]) -> None:
    """Read back what MLflow shows of runs that were written, and write once more what is not that.

    TrackingError if it is still shown otherwise.
    """
    for tried in (False, True):
        there = _runs_of_cell(client, experiment, cell.key)
        models = ranked(client, experiment, there.values())
        wrong = [(run, why) for run in runs if (why := lacks(there.get(run.key), run, models))]
        if tried and wrong:
            run, why = wrong[0]
            raise TrackingError(f"of the run {run.name!r}, {why}")
        for run, _ in wrong:
            write(client, experiment, run, there, models)
        if not wrong:
            return


def _opened(client: Any, experiment: str, cell: CellRecord, existing: dict[str, Any]) -> str:
    """Find the run of a cell, or create it; `existing` learns of it."""
    key = run_key(cell, "cell")
    if key not in existing:
        run = mlflow_run(cell_run(cell))
        existing[key] = client.create_run(experiment, tags=run.tags, run_name=run.name)
    return str(existing[key].info.run_id)


def _secrets(uri: str) -> list[str | None]:
    """What in the address and the environment nobody may see."""
    passwords = [os.environ.get(name) for name in _SECRET_SETTINGS]
    with suppress(ValueError):
        passwords.append(urlsplit(uri).password)
    return passwords
