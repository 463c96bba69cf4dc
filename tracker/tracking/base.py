"""Define the interface of a tracking backend.

A backend receives only frozen records and files. Pure functions define the names and digests of
runs (`identity`) and the contents of runs (`figures`) for all backends. This module defines the
steps of publishing a cell, which are the same for all backends; a backend implements them.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from typing_extensions import override

from tracker.core.errors import RequestError, TrackingError
from tracker.core.records import CellRecord
from tracker.core.text import mask_secrets
from tracker.ledger.files import lock_file
from tracker.tracking.figures import LoggedTable
from tracker.tracking.identity import files_digest
from tracker.tracking.isolated import Isolated
from tracker.tracking.runs import DescribedRun, RunSelection, describe_runs

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

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
    """Project of a backend to which runs are written, or from which cells are read.

    Attributes:
        backend: A registered name.
        project: The project, in the backend's terms; None = the experiment file's project.
        server: The server or folder; None = the environment's server, or the backend's default.
    """

    backend: str
    project: str | None = None
    server: str | None = None


@dataclass(frozen=True)
class Published:
    """Numbers of created, updated and unchanged runs of one `publish`, and their location."""

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
    """A published cell in a backend, with the files from which its figures were derived."""

    key: str
    """The run key of the cell's own run."""
    name: str
    version: str
    """Version that changes with the files; empty if the backend has none."""
    files_id: str
    """The backend's identifier of the files."""


@dataclass(frozen=True)
class SweepTrial:
    """A trial of a sweep, in W&B's terms."""

    id: str
    name: str
    state: str
    settings: dict[str, Any]
    """The trial's configuration: the sweep's parameters, and logged values."""


@dataclass(frozen=True)
class SavedModel:
    """A saved pruned model to publish to a backend."""

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
    """Storage of pruned models beside the runs that chose them."""

    def add_model(self, model: SavedModel) -> str:
        """Add a model, or a new version of an existing model.

        Args:
            model: The model.

        Returns:
            The address of the model.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """

    def close(self) -> None:
        """Release all resources; never raises."""


@dataclass(frozen=True)
class Page:
    """Report about several cells to publish to a backend.

    Attributes:
        files: The page and its additional files.
        tables: Tables by name.
        cells: The cells in the report; the backend links to their outcomes.
        text: Summary in a few paragraphs of Markdown.
        charts: Plotly figures by name.
    """

    files: Sequence[Path]
    tables: Mapping[str, LoggedTable]
    cells: Sequence[CellRecord]
    text: str = ""
    charts: Mapping[str, Figure] = field(default_factory=dict)


class LiveRun(Protocol):
    """Runs that a backend shows during measurement; no result depends on them."""

    def begin(self, cell: CellRecord) -> None:
        """Open the cell's run, or continue it.

        Args:
            cell: The record of the cell before it is measured.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """

    def update(self, key: str, figures: Mapping[str, float], step: int) -> None:
        """Show the progress of the cell.

        Args:
            key: The run key of the cell's own run.
            figures: Interim figures, under names that begin with `PROGRESS`.
            step: Number of measured documents.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """

    def end(self, key: str, status: RunStatus) -> None:
        """Close the cell's run.

        Args:
            key: The run key of the cell's own run.
            status: The final status of the cell.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """

    def close(self) -> None:
        """Mark open runs as killed; never raises an exception."""


class OpenRuns(LiveRun):
    """Base class of live runs: holds the open runs of this process by run key."""

    def __init__(self) -> None:
        self._runs: dict[str, Any] = {}

    @override
    def close(self) -> None:
        for key in list(self._runs):
            self.end(key, "killed")


class Backend(ABC):
    """A tracking backend to browse runs; the ledger never depends on it, even if unreachable.

    Args:
        project: The project, in the backend's terms.
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
        """Publish a cell: its own run, one for the intact model, and one for each of its runs.

        If there are very many runs of a kind, only a table in the cell's run shows them, unless
        `selection` selects otherwise.

        Publishing again creates and logs nothing twice; a changed record updates its runs. After
        any failure, publishing again adds the missing parts.

        Args:
            cell: The record, complete or still growing.
            artifacts: Files to attach to the cell's run, each under its own file name.
            charts: Plotly figures of the cell's run, by name.
            tables: Additional tables of the cell's run by name, which are derived from the
                artifacts.
            selection: Selection of the runs that are published as runs of their own.
            answer: The answer that this benchmark alone gives.

        Returns:
            The numbers of created, updated and unchanged runs, and their location.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """
        advice = retry_advice(self._environment() + sync_command(self._results, self._typed_target))
        with self._one_writer("did not take the runs", advice):
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
        """List the cells of the project.

        Returns:
            One entry per completely written run of a cell.

        Raises:
            TrackingError: The project does not exist, or the backend could not be reached.
        """
        with self._explained("could not be read"):
            return list(self._cells())

    def fetch(self, cell: RemoteCell, folder: Path) -> None:
        """Download the files that were attached to a cell's run.

        Args:
            cell: One of `cells`.
            folder: An empty folder for the files.

        Raises:
            TrackingError: The backend could not be reached, or the files have changed.
        """
        with self._explained("could not be read"):
            self._download(cell, folder)

    def add_page(self, page: Page) -> str:
        """Add a report as a separate run, if the backend supports reports.

        Args:
            page: The report.

        Returns:
            The address of the report, or the command that shows it.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """
        raise NotImplementedError(self.name, page)

    def close(self) -> None:  # noqa: B027  most hold nothing: a run is finished when it is written
        """Release all resources; never raises."""

    @contextmanager
    def _explained(self, problem: str, advice: str = "") -> Iterator[None]:
        """Convert any exception inside a `with` block to a TrackingError that names the problem."""
        with explain_errors(lambda error: self._describe_error(error, problem, advice)):
            yield

    def _describe_error(self, error: Exception, problem: str, advice: str) -> TrackingError:
        """Convert an error of the SDK to a readable TrackingError."""
        return build_error(f"{self._typed_target} {problem}", error, advice)

    @contextmanager
    def _one_writer(self, problem: str, advice: str = "") -> Iterator[None]:
        """Lock out other writers, since backends cannot refuse a second run with the same key."""
        with self._explained(problem, advice), lock_file(self._lock(), _LOCK_SECONDS):
            yield

    def _lock(self) -> Path:
        """Return the lock file that writers of the project share."""
        return self._results / f"{self.name}.lock"

    @abstractmethod
    def _write(self, runs: Sequence[DescribedRun]) -> Iterable[str]:
        """Write the runs of a cell, and check the result.

        Args:
            runs: The described runs; the cell's own run is last.

        Returns:
            The outcome of each run: `created`, `updated` or `unchanged`.
        """

    @abstractmethod
    def _location(self) -> str:
        """Return the address of the runs, or the command that shows them."""

    def _cells(self) -> Iterable[RemoteCell]:
        """Return the cells of the project whose runs were written completely."""
        raise TrackingError("it cannot be read back")

    def _download(self, cell: RemoteCell, folder: Path) -> None:
        """Download the files of a cell, checked by `check_sizes` and `check_files`."""
        raise TrackingError("it cannot be read back")

    def _environment(self) -> str:
        """Return the environment variables that a command needs to find the project."""
        return ""

    def _notes(self) -> tuple[str, ...]:
        """Return remarks on the last `_write`."""
        return ()

    def _full_project(self) -> str:
        """Return the project's full name if the backend completes the name; else an empty text."""
        return ""


@contextmanager
def explain_errors(explain: Callable[[Exception], TrackingError]) -> Iterator[None]:
    """Convert any exception inside a `with` block with the function `explain`."""
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
    """Build a TrackingError from problem, cause and advice, with secrets masked.

    `max_characters` limits the length of the cause. Callers raise the error from None, since a
    traceback of the cause could show a password.
    """
    text = mask_secrets(str(error) or type(error).__name__, secrets)
    if max_characters is not None:
        text = textwrap.shorten(text, max_characters, placeholder=" …")
    return TrackingError("\n".join(filter(None, (f"{problem}: {text}", advice))))


class Service(ABC):
    """Description of a tracking backend that does not import its SDK.

    The default methods describe a store on this machine that needs no login.
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
        """Open a part of the backend; no server is contacted before the first use.

        Args:
            part: `runs` for a `Backend`, `live runs` for a `LiveRun`, `lighter models` for a
                `Models`; `trial` and `sweep` if the service has a `sweep_variable`. Only supported
                parts are requested.
            project: The project, in the backend's terms; for a sweep, its path.
            results: The results folder.
            server: The server or folder; None for the environment's server.

        Returns:
            The part.
        """

    def _isolated(
        self, kind: str, *arguments: object, remove: Sequence[str] = (), add: Mapping[str, str] = {}
    ) -> Isolated:
        """Open a class `MODULE:CLASS` of the service's package in a separate process.

        `remove` lists environment variables to remove from the process; `add` has additional ones.
        """
        path = f"{type(self).__module__.rpartition('.')[0]}.{kind}"
        return Isolated(self.title, path, *arguments, removed_variables=remove, added_variables=add)

    def refuse_closed(self, results: Path) -> None:  # noqa: B027  most need no login
        """Raise RequestError if runs cannot be written; check without contacting a server."""

    def target(self, project: str, is_source: bool) -> Target:
        """Parse the target that a user typed.

        Args:
            project: The text after the backend's name and a colon; empty if there is none.
            is_source: True if cells are read from the target.

        Returns:
            The target.

        Raises:
            RequestError: The text is invalid, or names no project to read from.
        """
        if is_source and not project:
            raise RequestError(f"{self.name!r} names no project; write {self.name}:PROJECT")
        return Target(self.name, project or None)

    def server(self) -> str | None:
        """Return the environment's server or folder, without login; None for the default."""
        return None

    def full_address(self, target: Target, project: str) -> Target:
        """Return a target's full address, valid in other environments."""
        server = without_login(target.server) or self.server()
        return Target(self.name, mask_secrets(target.project or project), server)

    def reachable_target(self, address: Target, results: Path) -> Target:
        """Return the target by which this environment reaches an address.

        TrackingError, with a command for the user, is raised if the address's server would get the
        login of another server.
        """
        return address

    def store(self, results: Path, server: str | None) -> tuple[str | None, Path | None]:
        """Return the identity of the backend's store: a setting, and a local file or folder."""
        return server or self.server(), None


def login_error(address: Target, setting: str, results: Path) -> TrackingError:
    """Build the error about an address whose server would get another server's login."""
    command = sync_command(results.absolute(), f"{address.backend}:{address.project}")
    return TrackingError(
        "its server is not the server of this environment, whose login would be sent to it. With "
        f"the right login, type: {setting}={address.server or ''} {command}"
    )


def without_login(uri: str | None) -> str | None:
    """Return an address without user name and password."""
    return None if uri is None else mask_secrets(re.sub(r"://[^/\s]*@", "://", uri)).rstrip("/")


def sync_command(results: Path, target: str) -> str:
    """Return the command that syncs to a backend; `target` is `BACKEND` or `BACKEND:PROJECT`."""
    return f"tracker sync --to {shlex.quote(target)} --results {shlex.quote(str(results))}"


def retry_advice(command: str) -> str:
    """Return the advice after a failed publication: the command to repeat it."""
    return f"The results are on disk; once the problem is solved, type: {command}"


def check_sizes(sizes: Mapping[str, int | None]) -> None:
    """Check a server's list of files before any file is downloaded.

    Args:
        sizes: Size in bytes of each file by name; None if the server does not give sizes.

    Raises:
        TrackingError: A name is not a plain file name, or a file is too large.
    """
    for name, size in sizes.items():
        plain_names = {PurePosixPath(name).name, PureWindowsPath(name).name}
        if plain_names != {name} or name in ("", "..") or "\0" in name:
            raise TrackingError(f"invalid file name {name!r}; it is not downloaded")
        _check_size(name, size or 0)


def check_files(folder: Path, cell: RemoteCell | None = None) -> None:
    """Check downloaded files, independently of the server's list.

    Args:
        folder: The folder of the files.
        cell: The cell whose version the files must match; None if the client compares them.

    Raises:
        TrackingError: A file is too large, or the files differ from those attached.
    """
    for path in folder.iterdir():
        _check_size(path.name, path.stat().st_size)
    if cell is not None and files_digest(folder.iterdir()) != cell.version:
        raise TrackingError(f"the files of {cell.name!r} differ from the attached files")


def _check_size(name: str, size: int) -> None:
    """Raise TrackingError for a file that is too large."""
    if size > LARGEST_FILE:
        raise TrackingError(
            f"the server's file {name!r} has {size} bytes; tracker writes at most "
            f"{LARGEST_FILE // 2**20} MiB per file"
        )
