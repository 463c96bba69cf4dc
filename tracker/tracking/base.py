"""Define the interface of a tracking backend.

A backend receives frozen records and files, nothing else. Pure functions define what all backends
have in common: `identity` the names and digests of runs, `figures` their contents. The steps of
publishing a cell are the same for all and defined here; a backend implements the operations.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from typing_extensions import override

from tracker.core.errors import RequestError, TrackingError
from tracker.core.records import CellRecord
from tracker.core.text import masked
from tracker.ledger.files import lock_file
from tracker.tracking.figures import LoggedTable
from tracker.tracking.isolated import Isolated
from tracker.tracking.runs import DescribedRun, Which, described

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Ending = Literal["finished", "failed", "killed"]
PROGRESS = "progress/"
"""Prefix of the figures that a run shows while its cell is measured."""
_LOCK_SECONDS = 600.0

Ability = Literal["live runs", "reports", "lighter models", "registered models"]
"""Optional abilities of a backend besides the runs of cells."""
Part = Literal["runs", "live runs", "lighter models", "trial", "sweep"]
"""Parts of a backend that can be opened."""
OFFLINE = "offline"
"""The server of runs that are written to files for a later upload."""


@dataclass(frozen=True)
class Target:
    """Target or source of runs.

    Attributes:
        backend: A registered name.
        project: The project, in the backend's words; None = that of the experiment file.
        server: The server or the folder; None = that of the environment, or the backend's own.
    """

    backend: str
    project: str | None = None
    server: str | None = None


@dataclass(frozen=True)
class Published:
    """Result of one `publish`, counted in runs: the cell's, the intact model's, and each run's."""

    created: int
    updated: int
    unchanged: int
    location: str
    """The address of the runs, or the command that shows them."""
    notes: tuple[str, ...] = ()
    """Further remarks."""
    project: str = ""
    """The project's full name, if the backend completes it; else empty."""


@dataclass(frozen=True)
class RemoteCell:
    """A published cell in a backend, with the files that it was derived from."""

    key: str
    """The run key of the cell's own run."""
    name: str
    version: str
    """Version that changes with the files; empty if the backend has none."""
    place: str
    """The backend's identifier of the files."""


@dataclass(frozen=True)
class SweepTrial:
    """A trial of a sweep, in W&B's terms."""

    id: str
    name: str
    state: str
    settings: dict[str, Any]
    """Its configuration: the sweep's parameters, and logged values."""


@dataclass(frozen=True)
class SavedModel:
    """A saved pruned model, for a backend."""

    folder: Path
    name: str
    facts: Mapping[str, Any]
    """Facts about it, as plain values."""
    figures: Mapping[str, float]
    """Its numeric figures by name."""
    made_of: tuple[CellRecord, ...]
    """The cells that chose it or measured its cost, to which the backend links."""
    register: str | None = None
    """Its name in a model registry; None for none."""


class Models(Protocol):
    """Storage of pruned models beside the runs that chose them."""

    def add_model(self, model: SavedModel) -> str:
        """Add a version of a model, or its first one.

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
    """Report over several cells, for a backend.

    Attributes:
        files: The page and its additional files.
        tables: Tables by name.
        cells: The cells it shows, to whose outcomes the backend links.
        text: Summary in a few paragraphs of Markdown.
        charts: Plotly figures by name.
    """

    files: Sequence[Path]
    tables: Mapping[str, LoggedTable]
    cells: Sequence[CellRecord]
    text: str = ""
    charts: Mapping[str, Figure] = field(default_factory=dict)


class LiveRun(Protocol):
    """Runs that a backend shows while their cells are measured; no result depends on them."""

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
            step: Number of documents.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """

    def end(self, key: str, status: Ending) -> None:
        """Close the cell's run.

        Args:
            key: The run key of the cell's own run.
            status: The final status of the cell.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """

    def close(self) -> None:
        """Mark open runs as killed; never raises in the caller."""


class OpenRuns(LiveRun):
    """Live runs in the process that opens them, each by its run key."""

    def __init__(self) -> None:
        self._runs: dict[str, Any] = {}

    @override
    def close(self) -> None:
        for key in list(self._runs):
            self.end(key, "killed")


class Backend(ABC):
    """A tracking backend for browsing runs; it may be unreachable, the ledger never depends on it.

    Args:
        project: The project, in the backend's words.
        results: The results folder.
    """

    name: ClassVar[str]
    """The name that users type."""

    def __init__(self, project: str, results: Path) -> None:
        self._project = project
        self._results = results.absolute()
        self._to = f"{self.name}:{project}"

    def publish(
        self,
        cell: CellRecord,
        artifacts: Sequence[Path],
        charts: Mapping[str, Figure],
        tables: Mapping[str, LoggedTable] = {},
        which: Which = "auto",
        answer: str = "",
    ) -> Published:
        """Publish a cell: its own run, one for the intact model, and one for each of its runs.

        If there are very many runs of a kind, only the table in the cell's run has them, unless
        `which` selects otherwise.

        Publishing again creates and logs nothing twice; a changed record updates its runs. After
        any failure, publishing again completes what is missing.

        Args:
            cell: The record, complete or still growing.
            artifacts: Files to attach to the cell's run, each under its own file name.
            charts: Plotly figures of the cell's run, by name.
            tables: Additional tables of the cell's run by name, which are derived from the
                artifacts.
            which: Selection of the runs that are published as runs of their own.
            answer: The benchmark's answer on its own.

        Returns:
            The numbers of created, updated and unchanged runs, and their location.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """
        advice = when_mended(self._setting() + sync_command(self._results, self._to))
        with self._one_writer("did not take the runs", advice):
            runs = described(cell, artifacts, charts, tables, which, answer)
            outcomes = Counter(self._write(runs))
            return Published(
                created=outcomes["created"],
                updated=outcomes["updated"],
                unchanged=outcomes["unchanged"],
                location=self._location(),
                notes=self._notes(),
                project=self._whole_name(),
            )

    def cells(self) -> list[RemoteCell]:
        """List the cells of the project.

        Returns:
            One entry per completely written run of a cell.

        Raises:
            TrackingError: There is no such project, or the backend could not be reached.
        """
        with self._explained("could not be read"):
            return list(self._cells())

    def fetch(self, cell: RemoteCell, folder: Path) -> None:
        """Download the files that were attached to a cell's run.

        Args:
            cell: One of `cells`.
            folder: An empty folder for them.

        Raises:
            TrackingError: The backend could not be reached, or the files have changed.
        """
        with self._explained("could not be read"):
            self._download(cell, folder)

    def add_page(self, page: Page) -> str:
        """Add a report as a run of its own, if the backend supports reports.

        Args:
            page: The report.

        Returns:
            An address, or the command that shows it.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """
        raise NotImplementedError(self.name, page)

    def close(self) -> None:  # noqa: B027  most hold nothing: a run is finished when it is written
        """Release all resources; never raises."""

    @contextmanager
    def _explained(self, problem: str, advice: str = "") -> Iterator[None]:
        """Convert any exception inside a `with` block to a TrackingError about the problem."""
        with explaining(lambda error: self._explain(error, problem, advice)):
            yield

    def _explain(self, error: Exception, problem: str, advice: str) -> TrackingError:
        """Convert an error of the SDK to a readable TrackingError."""
        return explained(f"{self._to} {problem}", error, advice)

    @contextmanager
    def _one_writer(self, problem: str, advice: str = "") -> Iterator[None]:
        """Lock out other writers, since no backend can create a run key only if it is new."""
        with self._explained(problem, advice), lock_file(self._lock(), _LOCK_SECONDS):
            yield

    def _lock(self) -> Path:
        """Return the lock file of the project's writers."""
        return self._results / f"{self.name}.lock"

    @abstractmethod
    def _write(self, runs: Sequence[DescribedRun]) -> Iterable[str]:
        """Write the runs of a cell, and check the result.

        Args:
            runs: The described runs, that of the cell last.

        Returns:
            The outcome of each: `created`, `updated` or `unchanged`.
        """

    @abstractmethod
    def _location(self) -> str:
        """Return the location of the runs: an address, or a command."""

    def _cells(self) -> Iterable[RemoteCell]:
        """Return the cells whose runs were written completely."""
        raise TrackingError("it cannot be read back")

    def _download(self, cell: RemoteCell, folder: Path) -> None:
        """Download the files of a cell, checked by `check_listing` and `check_downloaded`."""
        raise TrackingError("it cannot be read back")

    def _setting(self) -> str:
        """Return the environment variables that a command needs to find the project."""
        return ""

    def _notes(self) -> tuple[str, ...]:
        """Return remarks on the last `_write`."""
        return ()

    def _whole_name(self) -> str:
        """Return the project's full name if the backend completes it; else an empty text."""
        return ""


@contextmanager
def explaining(explain: Callable[[Exception], TrackingError]) -> Iterator[None]:
    """Convert any exception inside a `with` block by `explain`."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  SDKs raise requests, SQL, cloud errors, ...
        # Neither chained nor logged: the cause may show a password.
        raise explain(error) from None


def explained(
    what: str,
    error: Exception,
    advice: str,
    secrets: Sequence[str | None] = (),
    characters: int | None = None,
) -> TrackingError:
    """Build a TrackingError with problem, cause and advice, in which secrets are masked.

    `characters` limits the length of the cause. Raise it from None: a traceback of the cause could
    show a password.
    """
    text = masked(str(error) or type(error).__name__, secrets)
    if characters is not None:
        text = textwrap.shorten(text, characters, placeholder=" …")
    return TrackingError("\n".join(filter(None, (f"{what}: {text}", advice))))


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
    """True if users type a server before the project."""
    sweep_variable: ClassVar[str] = ""
    """The environment variable of a trial's sweep, set by its agents; empty without agents."""

    @abstractmethod
    def open(self, part: Part, project: str, results: Path, server: str | None = None) -> Any:
        """Open a part of the backend; nothing is contacted before it is used.

        Args:
            part: `runs` for a `Backend`, `live runs` for a `LiveRun`, `lighter models` for a
                `Models`; `trial` and `sweep` if it has a `sweep_variable`. Only supported parts
                are requested.
            project: The project, in the backend's terms; for a sweep, its path.
            results: The results folder.
            server: The server or the folder; None for that of the environment.

        Returns:
            The part.
        """

    def _isolated(self, kind: str, *arguments: object, **environment: Any) -> Isolated:
        """Open a class beside the service's module, as `MODULE:CLASS`, in its own process."""
        package = type(self).__module__.rpartition(".")[0]
        return Isolated(self.title, f"{package}.{kind}", *arguments, **environment)

    def refuse_closed(self, results: Path) -> None:  # noqa: B027  most need no login
        """Raise RequestError if runs cannot be written, as far as this machine can tell."""

    def target(self, project: str, reading: bool) -> Target:
        """Return the target that a user typed.

        Args:
            project: The text after the name and a colon; empty if there is none.
            reading: True if cells are read there.

        Returns:
            The target.

        Raises:
            RequestError: It is invalid, or names no project to read from.
        """
        if reading and not project:
            raise RequestError(f"{self.name!r} names no project; write {self.name}:PROJECT")
        return Target(self.name, project or None)

    def server(self) -> str | None:
        """Return the server or folder of this environment, without a login; None for its own."""
        return None

    def place_of(self, to: Target, project: str) -> Target:
        """Return the full address of a target in this environment, for use in another one."""
        server = without_login(to.server) or self.server()
        return Target(self.name, masked(to.project or project), server)

    def target_of(self, place: Target, results: Path) -> Target:
        """Return the target that reaches a place from this environment.

        TrackingError, with a command, is raised if the place's server would get another server's
        login.
        """
        return place

    def store(self, results: Path, server: str | None) -> tuple[str | None, Path | None]:
        """Return the identity of its store: a setting, and a local file or folder."""
        return server or self.server(), None


def other_login(place: Target, setting: str, results: Path) -> TrackingError:
    """Build the error about a place that would get another server's login."""
    again = sync_command(results.absolute(), f"{place.backend}:{place.project}")
    return TrackingError(
        "its server is another than this environment names, and would get the login that is "
        f"for that one. With the login for it: {setting}={place.server or ''} {again}"
    )


def without_login(uri: str | None) -> str | None:
    """Return an address without its login."""
    return None if uri is None else masked(re.sub(r"://[^/\s]*@", "://", uri)).rstrip("/")


def sync_command(results: Path, to: str) -> str:
    """Return the command that syncs a backend; `to` is `BACKEND` or `BACKEND:PROJECT`."""
    return f"tracker sync --to {shlex.quote(to)} --results {shlex.quote(str(results))}"


def when_mended(command: str) -> str:
    """Return the advice after a failed publication: the command to repeat it."""
    return f"The results are on disk; when it is mended: {command}"
