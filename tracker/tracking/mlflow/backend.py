"""Publish cells to MLflow: one run per cell, with nested runs of the intact model and each run.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from typing_extensions import override

from tracker.core.errors import TrackingError
from tracker.core.provenance import content_hash
from tracker.core.records import CellRecord
from tracker.core.text import masked
from tracker.ledger.cache import own_folder
from tracker.ledger.files import as_shared
from tracker.tracking.base import (
    Backend,
    Page,
    RemoteCell,
    explained,
)
from tracker.tracking.downloads import check_downloaded, check_listing
from tracker.tracking.identity import run_key
from tracker.tracking.mlflow.database import artifact_folder, create_database, follow_folder
from tracker.tracking.mlflow.runs import (
    FILES_TAG,
    KEY_TAG,
    KIND_TAG,
    MlflowRun,
    child_links,
    mlflow_run,
    tables_tag,
    tags_of,
)
from tracker.tracking.mlflow.writing import (
    DIGEST_TAG,
    attach,
    every_page,
    lacks,
    later,
    ranked,
    stated_digests,
    write,
)
from tracker.tracking.runs import DescribedRun, cell_run, take_over

_RUNS_FIRST = {"mlflow.experimentKind": "custom_model_development"}
"""Tag with which MLflow's page opens an experiment with its runs, not with traces of agents."""
_SAID_CHARACTERS = 500  # a proxy's error page is longer
_REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED")
_WHO = (
    "Say who you are: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
    "MLFLOW_TRACKING_TOKEN."
)
_SECRET_SETTINGS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
_SQLITE = re.compile(r"sqlite(?:\+\w+)?:///(?P<path>[^?]+)")


class MlflowBackend(Backend):
    """Keeps an MLflow experiment in step with the ledger.

    A report is a run with its files, tables and charts.

    Args:
        project: The MLflow experiment's name.
        results: The results folder.
        tracking_uri: The store of runs; None for `MLFLOW_TRACKING_URI`, or else a SQLite file in
            the results folder.
    """

    name = "mlflow"

    def __init__(self, project: str, results: Path, tracking_uri: str | None = None) -> None:
        super().__init__(project, results)
        self._elsewhere = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._uri = self._elsewhere or f"sqlite:///{self._results / 'mlflow.db'}"
        sqlite = _SQLITE.fullmatch(self._uri)
        self._database = Path(sqlite["path"]).absolute() if sqlite else None
        if self._database:
            self._uri = f"sqlite:///{self._database}"
        self._connection: tuple[Any, str] | None = None

    @override
    def _write(self, runs: Sequence[DescribedRun]) -> list[str]:
        client, experiment = self._connect()
        *nested, own = runs
        cell = own.cell
        existing = _runs_of_cell(client, experiment, cell.key)
        for superfluous in take_over(existing, cell, runs):
            client.delete_run(superfluous.info.run_id)
        models = ranked(client, experiment, existing.values())
        # Created first, for its children; its figures and the links to its children come last.
        is_new = own.key not in existing
        parent_id = _opened(client, experiment, cell, existing)
        children = [mlflow_run(run, parent_id) for run in nested]
        outcomes = [write(client, experiment, run, existing, models) for run in children]
        ids = {key: found.info.run_id for key, found in existing.items()}
        whole = mlflow_run(own, None, child_links(cell, experiment, ids))
        outcome = write(client, experiment, whole, existing, models)
        outcomes.append("created" if is_new else outcome)
        if set(outcomes) != {"unchanged"}:
            _confirm(client, experiment, cell, (*children, whole))
        return outcomes

    def open(self, cell: CellRecord) -> tuple[Any, str]:
        """Open the run of a cell that is about to be measured, or continue it.

        Args:
            cell: The record of the cell so far.

        Returns:
            The run, and the tracking URI.
        """
        with self._one_writer("does not show what is measured"):
            client, experiment = self._connect()
            existing = _runs_of_cell(client, experiment, cell.key)
            take_over(existing, cell, [cell_run(cell)])
            run_id = _opened(client, experiment, cell, existing)
            client.update_run(run_id, status="RUNNING")
            return existing[run_key(cell, "cell")], self._uri

    def begin(self, name: str, tags: Mapping[str, str]) -> tuple[str, str, str]:
        """Create a separate run; return its id, the tracking URI and the location."""
        with self._one_writer(f"did not take {name}"):
            client, experiment = self._connect()
            run = client.create_run(experiment, tags=dict(tags), run_name=name)
            return str(run.info.run_id), self._uri, self._location()

    @contextmanager
    def connected(self, problem: str) -> Iterator[Any]:
        """Yield MLflow's client after `open` or `begin`; `problem` is the message of errors."""
        with self._explained(problem):
            yield self._connect()[0]

    @override
    def _cells(self) -> Iterator[RemoteCell]:
        client, experiment = self._existing()
        for run in _search(client, experiment, f"tags.`{KIND_TAG}` = 'cell'"):
            tags, info = run.data.tags, run.info
            if DIGEST_TAG in tags:
                yield RemoteCell(tags[KEY_TAG], info.run_name, tags.get(FILES_TAG, ""), info.run_id)

    @override
    def _download(self, cell: RemoteCell, folder: Path) -> None:
        client, _ = self._existing()
        stated = stated_digests(client, cell.place)
        listed = {a.path: a for a in client.list_artifacts(cell.place)}
        names = [n for n, a in listed.items() if n in stated or not (stated or a.is_dir)]
        check_listing({name: listed[name].file_size for name in names})
        for name in names:
            client.download_artifacts(cell.place, name, str(folder))
        check_downloaded(folder, cell)

    @override
    def add_page(self, page: Page) -> str:
        with self._one_writer("did not take the report"):
            client, experiment = self._connect()
            tags = tags_of("report", page.cells, self.user(), page.text)
            tags["mlflow.loggedArtifacts"] = tables_tag(page.tables)
            # Start times increase, so that the newest report is the first in MLflow's list.
            others = _search(client, experiment, f"tags.`{KIND_TAG}` = 'report'")
            start = later(max((run.info.start_time for run in others), default=0))
            run_id = client.create_run(experiment, start, tags, "report").info.run_id
            attach(client, run_id, page.tables, page.charts)
            for file in page.files:
                client.log_artifact(run_id, str(file))
            client.set_terminated(run_id, "FINISHED", later(start))
            return self._location()

    def user(self) -> str:
        """Return the name that MLflow shows beside this user's runs."""
        if name := os.environ.get("MLFLOW_TRACKING_USERNAME"):
            return name
        with suppress(KeyError, OSError):
            return getpass.getuser()
        return f"user {os.getuid()}"  # of a container, in no passwd

    @override
    def close(self) -> None:
        # The SQLite file is left complete on its own, so that it can be copied.
        connected, self._connection = self._connection is not None, None
        if connected and self._database:
            with suppress(sqlite3.Error), closing(sqlite3.connect(self._database)) as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _connect(self) -> tuple[Any, str]:
        """Return the client and the experiment's id, and create the experiment if needed."""
        if self._connection is None:
            if self._database:
                create_database(self._database)
            client = MlflowClient(tracking_uri=self._uri)
            self._connection = client, self._experiment_id(client)
        return self._connection

    def _existing(self) -> tuple[Any, str]:
        """Return the client and the id of an existing experiment."""
        if self._connection is None:
            if self._database:
                if not self._database.exists():
                    raise TrackingError("there is no such file")
                with suppress(sqlite3.Error):  # nobody may write it, or it is none
                    follow_folder(self._database)
            client = MlflowClient(tracking_uri=self._uri)
            found = client.get_experiment_by_name(self._project)
            if found is None:
                names = ", ".join(repr(e.name) for e in client.search_experiments(max_results=20))
                raise TrackingError(f"it has no experiment {self._project!r}; it has {names}")
            self._connection = client, str(found.experiment_id)
        return self._connection

    def _experiment_id(self, client: MlflowClient) -> str:
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
        """Return the folder of files beside the runs; None for servers, which decide themselves."""
        if self._uri.startswith(("http://", "https://", "databricks")):
            return None
        return artifact_folder(self._database or self._results / "mlflow.db").as_uri()

    @override
    def _location(self) -> str:
        if self._uri.startswith(("http://", "https://")):
            server = masked(self._uri).replace("***@", "").rstrip("/")
            return f"{server}/#/experiments/{self._connect()[1]}/runs"
        uri = shlex.quote(masked(self._uri))
        return f"mlflow ui --backend-store-uri {uri} --port 5000"

    @override
    def _setting(self) -> str:
        # Without it, the suggested command would publish into the results folder.
        elsewhere = self._elsewhere
        return f"MLFLOW_TRACKING_URI={shlex.quote(masked(elsewhere))} " if elsewhere else ""

    @override
    def _lock(self) -> Path:
        path = self._database or self._results / "mlflow"
        if not self._database and not self._results.is_dir():
            # Nothing is stored there, so no folder is created there.
            path = own_folder("locks") / content_hash(self._uri)[:16]
        return path.with_name(f"{path.name}.lock")

    @contextmanager
    def _one_writer(self, problem: str, advice: str = "") -> Iterator[None]:
        # The lock guards the first use of a SQLite file too, whose migrations break when two
        # processes run them at once.
        shared = as_shared(self._database.parent) if self._database else nullcontext()
        with super()._one_writer(problem, advice), shared:
            yield

    @override
    def _explain(self, error: Exception, problem: str, advice: str) -> TrackingError:
        if getattr(error, "error_code", None) in _REFUSED:
            advice = f"{_WHO}\n{advice}"
        title, secrets = f"MLflow at {masked(self._uri)} {problem}", _secrets(self._uri)
        return explained(title, _plain(error), advice, secrets, _SAID_CHARACTERS)


def _plain(error: Exception) -> Exception:
    """Return a short error if no server answers; other errors are unchanged."""
    if "ConnectionPool(" not in str(error):
        return error
    cause: BaseException = error
    while cause.__context__ is not None:
        cause = cause.__context__
    why = getattr(cause, "strerror", None) or getattr(cause, "reason", None) or cause
    return TrackingError(f"it does not answer ({why}); one that was just started needs a minute")


def _search(client: MlflowClient, experiment: str, wanted: str) -> Iterator[Any]:
    """Yield matching runs, the oldest first, without deleted ones."""
    order = ["attributes.start_time ASC"]
    return every_page(partial(client.search_runs, [experiment], wanted, order_by=order))


def _runs_of_cell(client: MlflowClient, experiment: str, cell_key: str) -> dict[str, Any]:
    """Return the runs of a cell by run key."""
    found: dict[str, Any] = {}
    for run in _search(client, experiment, f"tags.`tracker.cell` = '{cell_key}'"):
        found.setdefault(run.data.tags.get(KEY_TAG, run.info.run_id), run)
    return found


def _confirm(
    client: MlflowClient, experiment: str, cell: CellRecord, runs: Sequence[MlflowRun]
) -> None:
    """Read written runs back, and write those again that MLflow shows wrongly.

    TrackingError is raised if one is still wrong.
    """
    for tried in (False, True):
        there = _runs_of_cell(client, experiment, cell.key)
        models = ranked(client, experiment, there.values())
        lacking = ((run, lacks(there.get(run.of.key), run, models)) for run in runs)
        wrong = [(run, why) for run, why in lacking if why]
        if tried and wrong:
            run, why = wrong[0]
            raise TrackingError(f"of the run {run.of.name!r}, {why}")
        for run, _ in wrong:
            write(client, experiment, run, there, models)
        if not wrong:
            return


def _opened(
    client: MlflowClient, experiment: str, cell: CellRecord, existing: dict[str, Any]
) -> str:
    """Return the id of a cell's run; a new run is created and added to `existing`."""
    key = run_key(cell, "cell")
    if key not in existing:
        run = mlflow_run(cell_run(cell))
        existing[key] = client.create_run(experiment, tags=run.tags, run_name=run.of.name)
    return str(existing[key].info.run_id)


def _secrets(uri: str) -> list[str | None]:
    """Return the passwords in the address and the environment, which are masked."""
    passwords = [os.environ.get(name) for name in _SECRET_SETTINGS]
    with suppress(ValueError):
        passwords.append(urlsplit(uri).password)
    return passwords
