"""Publish results to MLflow: a summary run per benchmark, with nested runs of the ablations.

One summary run shows one model on one benchmark (a cell). Each summary run has a nested run that
shows the intact model. Without `MLFLOW_TRACKING_URI`, all data is written to the results folder
(`mlflow.db` and `mlartifacts/`), and no server is needed.

The tag `tracker.run_key` identifies a run. The tag `tracker.digest` is written last. A run with a
missing or outdated digest is incomplete, and the next call of `publish` completes the run.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from typing_extensions import override

from tracker.ledger.cache import private_folder
from tracker.ledger.files import shared_umask
from tracker.schema.errors import TrackingError
from tracker.schema.provenance import content_hash
from tracker.schema.records import CellRecord
from tracker.schema.text import mask_secrets
from tracker.tracking.base import Backend, Page, RemoteCell, build_error, check_files, check_sizes
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.database import artifact_folder, create_database, update_addresses
from tracker.tracking.mlflow.runs import (
    FILES_TAG,
    KEY_TAG,
    KIND_TAG,
    MlflowRun,
    child_links,
    mlflow_run,
    source_tags,
    tables_tag,
)
from tracker.tracking.mlflow.writing import (
    DIGEST_TAG,
    CellWriter,
    iterate_pages,
    log_attachments,
    next_timestamp,
    read_digests,
)
from tracker.tracking.runs import DescribedRun, describe_cell, move_runs

_RUNS_FIRST = {"mlflow.experimentKind": "custom_model_development"}
"""Tag that makes MLflow open an experiment at its runs instead of traces of agents."""
_MAX_CAUSE_CHARACTERS = 500  # a proxy's error page is longer
_LOGIN_ERRORS = ("UNAUTHENTICATED", "PERMISSION_DENIED")
_ADVICE = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."
_SECRET_SETTINGS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_SQLITE_URI = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]+)")


class MlflowBackend(Backend):
    """Backend that updates an MLflow experiment with the results of a results folder.

    A report is published as a run with files, tables and charts.

    Args:
        project: Name of the MLflow experiment.
        results: The results folder.
        tracking_uri: MLflow tracking URI. If None, `MLFLOW_TRACKING_URI` is used; without this
            variable, runs are stored in a SQLite file in the results folder.
    """

    name = "mlflow"

    def __init__(self, project: str, results: Path, tracking_uri: str | None = None) -> None:
        super().__init__(project, results)
        self._given_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._uri = self._given_uri or f"sqlite:///{self._results / 'mlflow.db'}"
        sqlite = _SQLITE_URI.fullmatch(self._uri)
        self._database = Path(sqlite["path"]).absolute() if sqlite else None
        if self._database:
            self._uri = f"sqlite:///{self._database}"
        self._connection: tuple[Any, str] | None = None

    @override
    def _write(self, runs: Sequence[DescribedRun]) -> list[str]:
        client, experiment = self._connect()
        *children, parent = runs
        cell = parent.cell
        existing = _find_cell_runs(client, experiment, cell.key)
        for obsolete_run in move_runs(existing, cell, runs):
            client.delete_run(obsolete_run.info.run_id)
        writer = CellWriter(client, experiment, existing)
        # Created first, for its children; its figures and the links to its children come last.
        is_new = parent.key not in existing
        parent_id = _open_cell_run(client, experiment, cell, existing)
        child_runs = [mlflow_run(run, parent_id) for run in children]
        outcomes = [writer.write(run) for run in child_runs]
        ids = {key: run.info.run_id for key, run in existing.items()}
        parent_run = mlflow_run(parent, None, child_links(cell, experiment, ids))
        outcome = writer.write(parent_run)
        outcomes.append("created" if is_new else outcome)
        if set(outcomes) != {"unchanged"}:
            _confirm_written(client, experiment, cell, (*child_runs, parent_run))
        return outcomes

    def open(self, cell: CellRecord) -> tuple[Any, str]:
        """Open or continue the summary run of a model and benchmark, before its measurement.

        Args:
            cell: The record of the cell before the measurement.

        Returns:
            The MLflow run, and the tracking URI.
        """
        with self._one_writer("does not show the progress of the measurement"):
            client, experiment = self._connect()
            existing = _find_cell_runs(client, experiment, cell.key)
            move_runs(existing, cell, [describe_cell(cell)])
            run_id = _open_cell_run(client, experiment, cell, existing)
            client.update_run(run_id, status="RUNNING")
            return existing[run_key(cell, "cell")], self._uri

    def begin(self, name: str, tags: Mapping[str, str]) -> tuple[str, str, str]:
        """Create a run for a model or report; return its run id, tracking URI and address."""
        with self._one_writer(f"did not accept {name}"):
            client, experiment = self._connect()
            run = client.create_run(experiment, tags=dict(tags), run_name=name)
            return str(run.info.run_id), self._uri, self._location()

    @contextmanager
    def connected(self, problem: str) -> Iterator[Any]:
        """Yield an MLflow client; convert errors in the `with` block to a TrackingError."""
        with self._explained(problem):
            yield self._connect()[0]

    @override
    def _cells(self) -> Iterator[RemoteCell]:
        client, experiment = self._connect_existing()
        for run in _search_runs(client, experiment, f"tags.`{KIND_TAG}` = 'cell'"):
            tags, info = run.data.tags, run.info
            if DIGEST_TAG in tags:
                yield RemoteCell(tags[KEY_TAG], info.run_name, tags.get(FILES_TAG, ""), info.run_id)

    @override
    def _download(self, cell: RemoteCell, folder: Path) -> None:
        client, _ = self._connect_existing()
        digests = read_digests(client, cell.files_id)
        artifacts = {artifact.path: artifact for artifact in client.list_artifacts(cell.files_id)}
        names = [name for name in artifacts if name in digests]
        if not digests:
            names = [name for name, artifact in artifacts.items() if not artifact.is_dir]
        check_sizes({name: artifacts[name].file_size for name in names})
        for name in names:
            client.download_artifacts(cell.files_id, name, str(folder))
        check_files(folder, cell)

    @override
    def add_page(self, page: Page) -> str:
        with self._one_writer("did not accept the report"):
            client, experiment = self._connect()
            tags = source_tags("report", page.cells, self.user(), page.text)
            tags["mlflow.loggedArtifacts"] = tables_tag(page.tables)
            # Start times increase, so that the newest report is the first in MLflow's list.
            reports = _search_runs(client, experiment, f"tags.`{KIND_TAG}` = 'report'")
            start = next_timestamp(max((run.info.start_time for run in reports), default=0))
            run_id = client.create_run(experiment, start, tags, page.name).info.run_id
            log_attachments(client, run_id, page.tables, page.charts)
            for file in page.files:
                client.log_artifact(run_id, str(file))
            client.set_terminated(run_id, "FINISHED", next_timestamp(start))
            return self._location()

    def user(self) -> str:
        """Return the user name that is stored with new MLflow runs."""
        if name := os.environ.get("MLFLOW_TRACKING_USERNAME"):
            return name
        with suppress(KeyError, OSError):
            return getpass.getuser()
        return f"user {os.getuid()}"  # of a container, in no passwd

    @override
    def close(self) -> None:
        # The SQLite file is left complete on its own, so that it can be copied.
        is_connected, self._connection = self._connection is not None, None
        if is_connected and self._database:
            with suppress(sqlite3.Error), closing(sqlite3.connect(self._database)) as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _connect(self) -> tuple[Any, str]:
        """Return the client and the experiment id; create the experiment if it does not exist."""
        if self._connection is None:
            if self._database:
                create_database(self._database)
            client = MlflowClient(tracking_uri=self._uri)
            self._connection = client, self._experiment_id(client)
        return self._connection

    def _connect_existing(self) -> tuple[Any, str]:
        """Return the client and the id of the existing experiment.

        TrackingError is raised if the experiment does not exist.
        """
        if self._connection is None:
            if self._database:
                if not self._database.exists():
                    raise TrackingError("there is no such file")
                with suppress(sqlite3.Error):  # nobody may write it, or it is none
                    update_addresses(self._database)
            client = MlflowClient(tracking_uri=self._uri)
            experiment = client.get_experiment_by_name(self._project)
            if experiment is None:
                names = ", ".join(repr(e.name) for e in client.search_experiments(max_results=20))
                raise TrackingError(
                    f"there is no experiment {self._project!r}; choose from: {names}"
                )
            self._connection = client, str(experiment.experiment_id)
        return self._connection

    def _experiment_id(self, client: MlflowClient) -> str:
        """Return the id of the experiment; create the experiment if it does not exist."""
        experiment = client.get_experiment_by_name(self._project)
        if experiment is None:
            try:
                artifact_uri = self._artifact_location()
                return str(client.create_experiment(self._project, artifact_uri, dict(_RUNS_FIRST)))
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
        """Return the folder for the artifacts of runs; None if an MLflow server chooses it."""
        if self._uri.startswith(("http://", "https://", "databricks")):
            return None
        return artifact_folder(self._database or self._results / "mlflow.db").as_uri()

    @override
    def _location(self) -> str:
        if self._uri.startswith(("http://", "https://")):
            server = mask_secrets(self._uri).replace("***@", "").rstrip("/")
            return f"{server}/#/experiments/{self._connect()[1]}/runs"
        uri = shlex.quote(mask_secrets(self._uri))
        return f"mlflow ui --backend-store-uri {uri} --port 5000"

    @override
    def _environment(self) -> str:
        # Without it, the suggested command would publish into the results folder.
        uri = self._given_uri
        return f"MLFLOW_TRACKING_URI={shlex.quote(mask_secrets(uri))} " if uri else ""

    @override
    def _lock(self) -> Path:
        path = self._database or self._results / "mlflow"
        if not self._database and not self._results.is_dir():
            # Nothing is stored there, so no folder is created there.
            path = private_folder("locks") / content_hash(self._uri)[:16]
        return path.with_name(f"{path.name}.lock")

    @contextmanager
    def _one_writer(self, problem: str, advice: str = "") -> Iterator[None]:
        """Lock the project in a `with` block, so that only one process writes to it.

        Errors in the `with` block become a TrackingError that states `problem` and `advice`. New
        files get the write permissions of the database's folder.
        """
        # The lock guards the first use of a SQLite file too, whose migrations break when two
        # processes run them at once.
        shared_files = shared_umask(self._database.parent) if self._database else nullcontext()
        with super()._one_writer(problem, advice), shared_files:
            yield

    @override
    def _describe_error(self, error: Exception, problem: str, advice: str) -> TrackingError:
        if getattr(error, "error_code", None) in _LOGIN_ERRORS:
            advice = f"{_ADVICE}\n{advice}"
        title, secrets = f"MLflow at {mask_secrets(self._uri)} {problem}", _passwords(self._uri)
        return build_error(title, _shorten_error(error), advice, secrets, _MAX_CAUSE_CHARACTERS)


def _shorten_error(error: Exception) -> Exception:
    """Replace a long connection error by its cause; return other errors unchanged."""
    if "ConnectionPool(" not in str(error):
        return error
    cause: BaseException = error
    while cause.__context__ is not None:
        cause = cause.__context__
    reason = getattr(cause, "strerror", None) or getattr(cause, "reason", None) or cause
    return TrackingError(f"the server does not answer ({reason}); starting it can take a minute")


def _search_runs(client: MlflowClient, experiment: str, filter_string: str) -> Iterator[Any]:
    """Yield the runs that match a filter and are not deleted, sorted by start time."""
    order = ["attributes.start_time ASC"]
    return iterate_pages(partial(client.search_runs, [experiment], filter_string, order_by=order))


def _find_cell_runs(client: MlflowClient, experiment: str, cell_key: str) -> dict[str, Any]:
    """Return all MLflow runs of one model and benchmark, by run key."""
    runs: dict[str, Any] = {}
    for run in _search_runs(client, experiment, f"tags.`tracker.cell` = '{cell_key}'"):
        runs.setdefault(run.data.tags.get(KEY_TAG, run.info.run_id), run)
    return runs


def _confirm_written(
    client: MlflowClient, experiment: str, cell: CellRecord, runs: Sequence[MlflowRun]
) -> None:
    """Verify that MLflow stored the runs correctly; write incorrect runs again.

    TrackingError is raised if a run is still incorrect after the second attempt.
    """
    for is_rewritten in (False, True):
        writer = CellWriter(client, experiment, _find_cell_runs(client, experiment, cell.key))
        differences = [writer.find_difference(run) for run in runs]
        if not any(differences):
            return
        for run, difference in zip(runs, differences, strict=True):
            if difference and is_rewritten:
                problem = f"MLflow stored the run {run.source.name!r} incorrectly twice"
                raise TrackingError(f"{problem}: {difference}")
            if difference:
                writer.write(run)


def _open_cell_run(
    client: MlflowClient, experiment: str, cell: CellRecord, existing: dict[str, Any]
) -> str:
    """Return the id of a benchmark's summary run; create the run if it is not in `existing`."""
    key = run_key(cell, "cell")
    if key not in existing:
        run = mlflow_run(describe_cell(cell))
        existing[key] = client.create_run(experiment, tags=run.tags, run_name=run.source.name)
    return str(existing[key].info.run_id)


def _passwords(uri: str) -> list[str | None]:
    """Return passwords to mask in messages, from environment variables and from the URI.

    An entry is None if a variable is not set or the URI contains no password.
    """
    passwords = [os.environ.get(name) for name in _SECRET_SETTINGS]
    with suppress(ValueError):
        passwords.append(urlsplit(uri).password)
    return passwords
