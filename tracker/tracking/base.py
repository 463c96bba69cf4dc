"""Define the interface of tracking backends such as MLflow and W&B.

The module `identity` defines the names of runs for all backends. The module `figures` defines the
contents of runs. This module defines the steps that publish a cell (the results of one model on one
benchmark); each backend implements these steps.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import textwrap
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from typing_extensions import override

from tracker.ledger.files import lock_file
from tracker.schema.errors import RequestError, TrackerError, TrackingError
from tracker.schema.records import CellRecord
from tracker.schema.remote import ProcessEndedError, RemoteError, RemoteObject
from tracker.schema.text import mask_secrets
from tracker.tracking.figures import LoggedTable
from tracker.tracking.identity import files_digest
from tracker.tracking.runs import DescribedRun, RunSelection, describe_runs

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


class Isolated(RemoteObject):
    """Proxy for an object in a separate process; the process ends after a failed call.

    Args:
        name: Name of the object in error messages.
        kind: Class of the object, as `MODULE:CLASS`.
        *arguments: Arguments for the constructor of the class.
        removed_variables: Names of environment variables to unset in the separate process.
        added_variables: Additional environment variables of the separate process.
    """

    @override
    def _call(self, method: str, *arguments: object) -> Any:
        try:
            return super()._call(method, *arguments)
        except ProcessEndedError as error:
            reason = f"the process of {self.name} has ended ({error})"
            raise TrackingError(reason) from None
        except TrackerError as error:
            self.close()
            raise TrackingError(str(error)) if isinstance(error, RemoteError) else error from None

    @override
    def _popen(
        self, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe)


RunStatus = Literal["finished", "failed", "killed"]
PROGRESS = "progress/"
"""Prefix of the figures that a run shows during the measurement of its cell."""
_LOCK_SECONDS = 600.0
LARGEST_FILE = 2**28
"""Maximum number of bytes of a downloaded file; a shard has 32 documents."""

Ability = Literal["live runs", "reports", "lighter models", "registered models"]
"""Optional abilities of a backend besides the runs of cells."""
PartName = Literal["runs", "live runs", "lighter models", "trial", "sweep"]
"""Parts of a backend that can be opened."""
OFFLINE = "offline"
"""The server of runs that are written to files for a later upload."""


@dataclass(frozen=True)
class Target:
    """Project of a tracking backend, for writing runs or reading results.

    Attributes:
        backend: Name of a registered backend, such as `mlflow`.
        project: Name of the project, in the form that the backend expects. If None, the experiment
            file names the project.
        server: Address of the server, or a folder. None means the server that an environment
            variable names, or else the default server.
    """

    backend: str
    project: str | None = None
    server: str | None = None


@dataclass(frozen=True)
class Published:
    """Result of publishing: numbers of created, updated and unchanged runs, and their address."""

    created: int
    updated: int
    unchanged: int
    location: str
    """The address of the runs, or the command that shows them."""
    notes: tuple[str, ...] = ()
    """Further remarks for the user."""
    project: str = ""
    """The project's full name, if the backend completes the name; otherwise empty."""


@dataclass(frozen=True)
class RemoteCell:
    """Published results of one model on one benchmark, as listed by a tracking backend."""

    key: str
    """The run key of the cell's own run."""
    name: str
    version: str
    """Version that changes with the files; empty if the backend has none."""
    files_id: str
    """The backend's identifier of the files."""


@dataclass(frozen=True)
class SweepTrial:
    """A trial of a W&B sweep: its run, its state and its settings."""

    id: str
    name: str
    state: str
    settings: dict[str, Any]
    """The trial's configuration: the sweep's parameters, and logged values."""


@dataclass(frozen=True)
class SavedModel:
    """Saved pruned model (a folder), with the facts and metrics to publish with it."""

    folder: Path
    name: str
    facts: Mapping[str, Any]
    """Facts about the model, as plain values."""
    figures: Mapping[str, float]
    """Numeric figures of the model by name."""
    source_cells: tuple[CellRecord, ...]
    """The cells that chose the model's change or measured its cost; the backend links to them."""
    register: str | None = None
    """The model's name in a model registry; None for none."""


class Models(Protocol):
    """Storage of pruned models in a tracking project."""

    def add_model(self, model: SavedModel) -> str:
        """Publish a pruned model, or a new version of it if it is already published.

        Args:
            model: The pruned model.

        Returns:
            The address of the model in the backend.

        Raises:
            TrackingError: The backend refused the model or could not be reached.
        """

    def close(self) -> None:
        """Release all resources; never raise an exception."""


@dataclass(frozen=True)
class Page:
    """Report about several models and benchmarks, to be published to a backend.

    Attributes:
        files: The HTML page, and data files of the report.
        tables: Name → table to publish with the report.
        cells: Records of the models and benchmarks in the report. The backend links the report to
            the published outcomes of these records.
        text: Summary in a few paragraphs of Markdown.
        charts: Name → Plotly figure to publish with the report.
        name: Name of the report's run.
    """

    files: Sequence[Path]
    tables: Mapping[str, LoggedTable]
    cells: Sequence[CellRecord]
    text: str = ""
    charts: Mapping[str, Figure] = field(default_factory=dict)
    name: str = "report"


class LiveRun(Protocol):
    """Interface to runs that show the progress of a measurement, but never its final results."""

    def begin(self, cell: CellRecord) -> None:
        """Open the summary run of a model and benchmark, or continue an existing one.

        Args:
            cell: Record of the model and benchmark, before the measurement.

        Raises:
            TrackingError: The backend refused the run or could not be reached.
        """

    def update(self, key: str, figures: Mapping[str, float], step: int) -> None:
        """Show the progress of a measurement in its summary run.

        Args:
            key: Run key of the summary run that `begin` opened.
            figures: Name of a metric, with the prefix `PROGRESS` → interim value.
            step: Number of measured documents.

        Raises:
            TrackingError: The backend refused the figures or could not be reached.
        """

    def end(self, key: str, status: RunStatus) -> None:
        """Close the run that shows the progress of a model and benchmark.

        Args:
            key: Run key of the summary run that `begin` opened.
            status: The final status of the measurement.

        Raises:
            TrackingError: The backend refused the status or could not be reached.
        """

    def close(self) -> None:
        """Mark open runs as killed; never raises an exception."""


class OpenRuns(LiveRun):
    """Base class of live runs, with a dictionary of the open runs (run key → run)."""

    def __init__(self) -> None:
        self._runs: dict[str, Any] = {}

    @override
    def close(self) -> None:
        for key in list(self._runs):
            self.end(key, "killed")


class Backend(ABC):
    """Base class of tracking backends (MLflow, W&B, Trackio), to which results are published.

    Args:
        project: Name of the project, in the form that the backend expects.
        results: The results folder.
    """

    name: ClassVar[str]
    """The name that users type."""

    def __init__(self, project: str, results: Path) -> None:
        self._project = project
        self._results = results.absolute()
        self._typed_target = f"{self.name}:{project}"

    def publish(
        self,
        cell: CellRecord,
        artifacts: Sequence[Path],
        charts: Mapping[str, Figure],
        tables: Mapping[str, LoggedTable] = {},
        selection: RunSelection = "auto",
        answer: str = "",
    ) -> Published:
        """Publish the runs of a model and benchmark (a cell).

        The method publishes a summary run, a run of the intact model, and separate runs of the
        ablations that `selection` selects. The summary run contains a table of all ablations.

        A repeated call updates only the runs whose results have changed. After a failure, a
        repeated call adds the missing runs.

        Args:
            cell: The record of the cell; some runs or documents may not be measured yet.
            artifacts: Files to attach to the summary run under their file names.
            charts: Name → Plotly figure of the summary run.
            tables: Name → additional table of the summary run, derived from the artifacts.
            selection: Ablations with separate runs: `all`, `cells` (none), or `auto` (all except
                kinds with very many ablations, e.g. attention heads).
            answer: Sentence with the benchmark's conclusion, for the note of the summary run.

        Returns:
            The numbers of created, updated and unchanged runs, and their location.

        Raises:
            TrackingError: The backend refused a run or could not be reached.
        """
        advice = retry_advice(self._environment() + sync_command(self._results, self._typed_target))
        with self._one_writer("did not accept the runs", advice):
            runs = describe_runs(cell, artifacts, charts, tables, selection, answer)
            outcomes = Counter(self._write(runs))
            return Published(
                created=outcomes["created"],
                updated=outcomes["updated"],
                unchanged=outcomes["unchanged"],
                location=self._location(),
                notes=self._notes(),
                project=self._full_project(),
            )

    def cells(self) -> list[RemoteCell]:
        """List the models and benchmarks whose results are completely published in the project.

        Returns:
            One entry for each summary run that was written completely.

        Raises:
            TrackingError: The project does not exist, or the backend could not be reached.
        """
        with self._explained("could not be read"):
            return list(self._cells())

    def fetch(self, cell: RemoteCell, folder: Path) -> None:
        """Download the files that are attached to the summary run of a model and benchmark.

        Args:
            cell: An entry of the list that `cells` returns.
            folder: An empty folder, into which the files are downloaded.

        Raises:
            TrackingError: The backend could not be reached, or the files differ from the attached
                files.
        """
        with self._explained("could not be read"):
            self._download(cell, folder)

    def add_page(self, page: Page) -> str:
        """Publish a report as a separate run, if the backend supports reports.

        Args:
            page: The report with its files, tables and charts.

        Returns:
            The address of the report, or the command that shows it.

        Raises:
            TrackingError: The backend refused the report or could not be reached.
        """
        raise NotImplementedError(self.name, page)

    def close(self) -> None:  # noqa: B027  most hold nothing: a run is finished when it is written
        """Release all resources; never raise an exception."""

    @contextmanager
    def _explained(self, problem: str, advice: str = "") -> Iterator[None]:
        """Convert any exception in a `with` block to a TrackingError with the message `problem`."""
        with explain_errors(lambda error: self._describe_error(error, problem, advice)):
            yield

    def _describe_error(self, error: Exception, problem: str, advice: str) -> TrackingError:
        """Convert an exception of the backend's SDK to a TrackingError with a message for users."""
        return build_error(f"{self._typed_target} {problem}", error, advice)

    @contextmanager
    def _one_writer(self, problem: str, advice: str = "") -> Iterator[None]:
        """Lock the project in a `with` block, so that only one process writes to it."""
        with self._explained(problem, advice), lock_file(self._lock(), _LOCK_SECONDS):
            yield

    def _lock(self) -> Path:
        """Return the path of the file that every process locks before it writes to the project."""
        return self._results / f"{self.name}.lock"

    @abstractmethod
    def _write(self, runs: Sequence[DescribedRun]) -> Iterable[str]:
        """Write the runs of a model and benchmark, and check that the backend stored them.

        Args:
            runs: Descriptions of the runs; the summary run of the cell is last.

        Returns:
            For each run, `created`, `updated` or `unchanged`.
        """

    @abstractmethod
    def _location(self) -> str:
        """Return the address of the runs, or the command that shows them."""

    def _cells(self) -> Iterable[RemoteCell]:
        """List the models and benchmarks whose summary run was written completely."""
        raise TrackingError("it cannot be read back")

    def _download(self, cell: RemoteCell, folder: Path) -> None:
        """Download and verify the files of published results.

        Each backend calls `check_sizes` before the download, and `check_files` afterwards.
        """
        raise TrackingError("it cannot be read back")

    def _environment(self) -> str:
        """Return environment variables (`NAME=value`) that a suggested shell command needs."""
        return ""

    def _notes(self) -> tuple[str, ...]:
        """Return messages for the user about the runs that the last `_write` call wrote."""
        return ()

    def _full_project(self) -> str:
        """Return the full name of the project, such as `ENTITY/PROJECT`.

        Empty if the full project name is unknown, or if users always type the full name.
        """
        return ""


@contextmanager
def explain_errors(explain: Callable[[Exception], TrackingError]) -> Iterator[None]:
    """Convert any exception in a `with` block to the TrackingError that `explain` returns."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  SDKs raise requests, SQL, cloud errors, ...
        # Neither chained nor logged: the cause may show a password.
        raise explain(error) from None


def build_error(
    problem: str,
    error: Exception,
    advice: str,
    secrets: Sequence[str | None] = (),
    max_characters: int | None = None,
) -> TrackingError:
    """Build a TrackingError from a problem, its cause and advice, with secrets masked.

    `max_characters` limits the length of the cause. Callers use `raise … from None`, because the
    traceback of the cause could show a password.
    """
    text = mask_secrets(str(error) or type(error).__name__, secrets)
    if max_characters is not None:
        text = textwrap.shorten(text, max_characters, placeholder=" …")
    return TrackingError("\n".join(filter(None, (f"{problem}: {text}", advice))))


class Service(ABC):
    """Interface of a tracking backend that can be used without importing the backend's SDK.

    The default implementations suit a backend that stores runs on this machine and needs no login.
    """

    name: ClassVar[str]
    """The name that users type."""
    title: ClassVar[str]
    """The name for display."""
    can: ClassVar[frozenset[Ability]] = frozenset()
    names_server: ClassVar[bool] = False
    """True if users can type a server before the project."""
    sweep_variable: ClassVar[str] = ""
    """Environment variable with a trial's sweep, set by agents; empty if there are no agents."""

    @abstractmethod
    def open(self, part: PartName, project: str, results: Path, server: str | None = None) -> Any:
        """Open the backend for runs, live runs, models or sweeps, without contacting a server.

        Args:
            part: Interface to open: `runs` for a `Backend`, `live runs` for a `LiveRun`, and
                `lighter models` for a `Models`. `trial` and `sweep` are only for services that set
                `sweep_variable`.
            project: Name of the project, in the form that the backend expects. For a sweep, this is
                the path of the sweep.
            results: The results folder.
            server: The server or folder; None for the server that the environment names.

        Returns:
            An object with the requested interface.
        """

    def _isolated(
        self, kind: str, *arguments: object, remove: Sequence[str] = (), add: Mapping[str, str] = {}
    ) -> Isolated:
        """Create an object in a separate process; `kind` is its class, as `MODULE:CLASS`.

        `remove` lists environment variables to unset in the process. `add` maps additional
        environment variables to values.
        """
        path = f"{type(self).__module__.rpartition('.')[0]}.{kind}"
        return Isolated(self.title, path, *arguments, removed_variables=remove, added_variables=add)

    def refuse_closed(self, results: Path) -> None:  # noqa: B027  most need no login
        """Raise RequestError if runs cannot be written (e.g. no login); no server is contacted."""

    def target(self, project: str, is_source: bool) -> Target:
        """Parse the part of a target that follows the name of the backend.

        Args:
            project: The text after the backend's name and a colon; empty if there is none.
            is_source: True if results are read from the target.

        Returns:
            The target: backend, project and server.

        Raises:
            RequestError: The text is invalid, or `is_source` is True and the text names no project.
        """
        if is_source and not project:
            raise RequestError(f"{self.name!r} does not name a project; write {self.name}:PROJECT")
        return Target(self.name, project or None)

    def server(self) -> str | None:
        """Return the server or folder that the environment sets, without login data, or None."""
        return None

    def full_address(self, target: Target, project: str) -> Target:
        """Return the target with server and project filled in; `project` is the default."""
        server = without_login(target.server) or self.server()
        return Target(self.name, mask_secrets(target.project or project), server)

    def reachable_target(self, address: Target, results: Path) -> Target:
        """Return the target for publishing to a stored address.

        The target depends on the environment variables of this process. TrackingError is raised if
        the configured login belongs to another server than the address.
        """
        return address

    def store(self, results: Path, server: str | None) -> tuple[str | None, Path | None]:
        """Return the server setting and the local path that identify the storage of runs."""
        return server or self.server(), None


def login_error(address: Target, setting: str, results: Path) -> TrackingError:
    """Build the error for results that belong to another server than the configured one.

    `address` names the server of the results. `setting` is the environment variable that sets the
    server.
    """
    command = sync_command(results.absolute(), f"{address.backend}:{address.project}")
    return TrackingError(
        "these results were published to another server than the configured server. tracker "
        "sends a login only to the server to which it belongs. To use the other server, configure "
        f"a login for that server, and type: {setting}={address.server or ''} {command}"
    )


def without_login(uri: str | None) -> str | None:
    """Return a URI without the user name and password that it contains."""
    return None if uri is None else mask_secrets(re.sub(r"://[^/\s]*@", "://", uri)).rstrip("/")


def sync_command(results: Path, target: str) -> str:
    """Return the shell command that publishes a results folder to `target`."""
    return f"tracker sync --to {shlex.quote(target)} --results {shlex.quote(str(results))}"


def retry_advice(command: str) -> str:
    """Return advice for the user after publishing has failed.

    `command` is the shell command that publishes the results again.
    """
    return f"The results are on disk; once the problem is solved, type: {command}"


def check_sizes(sizes: Mapping[str, int | None]) -> None:
    """Check the file names and sizes that a server lists, before any file is downloaded.

    Args:
        sizes: Name of a file → size in bytes; None if the server does not give the size.

    Raises:
        TrackingError: A name is not a plain file name, or a file is too large.
    """
    for name, size in sizes.items():
        plain_names = {PurePosixPath(name).name, PureWindowsPath(name).name}
        if plain_names != {name} or name in ("", "..") or "\0" in name:
            raise TrackingError(f"invalid file name {name!r}; it is not downloaded")
        _check_size(name, size or 0)


def check_files(folder: Path, cell: RemoteCell | None = None) -> None:
    """Check the sizes of downloaded files, and the digest of all files together.

    Args:
        folder: The folder of the files.
        cell: The published cell to which the files belong; the digest of all files must equal
            `cell.version`. None if the SDK compares digests itself.

    Raises:
        TrackingError: A file is too large, or the downloaded files differ from the published files.
    """
    for path in folder.iterdir():
        _check_size(path.name, path.stat().st_size)
    if cell is not None and files_digest(folder.iterdir()) != cell.version:
        raise TrackingError(f"the downloaded files of {cell.name!r} differ from the published ones")


def _check_size(name: str, size: int) -> None:
    """Raise TrackingError if a file is larger than any file that tracker writes."""
    if size > LARGEST_FILE:
        raise TrackingError(
            f"the server's file {name!r} has {size} bytes, but tracker writes at most "
            f"{LARGEST_FILE // 2**20} MiB per file"
        )
