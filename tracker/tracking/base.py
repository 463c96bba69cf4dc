"""The seam between records and tracking backends.

A backend receives frozen records and files, nothing else. What every backend must agree on is in
pure functions: which run it is and whether it changed in `identity`, what it shows in `figures`.
How a cell is published is the same for all and stands here; a backend has the verbs.
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
"""How the names of figures begin that a run shows while its cell is measured."""
_LOCK_SECONDS = 600.0

Ability = Literal["live runs", "reports", "lighter models", "registered models"]
"""What a backend may show besides the runs of cells."""
Part = Literal["runs", "live runs", "lighter models", "trial", "sweep"]
"""What of a backend may be opened."""
OFFLINE = "offline"
"""The server of runs that are files, for a later upload to wherever it goes."""


@dataclass(frozen=True)
class Target:
    """Where runs go, or come from.

    Attributes:
        backend: A name that the registry knows.
        project: The project, in the backend's words; None = that of the experiment file.
        server: The server or the folder; None = that of the environment, or the backend's own.
    """

    backend: str
    project: str | None = None
    server: str | None = None


@dataclass(frozen=True)
class Published:
    """What one `publish` did, in runs: the cell's, the intact model's, and one for each run."""

    created: int
    updated: int
    unchanged: int
    location: str
    """What a person opens: an address, or the command that shows the runs."""
    notes: tuple[str, ...] = ()
    """What else a person should know."""
    project: str = ""
    """The project's whole name, where the backend completes it."""


@dataclass(frozen=True)
class RemoteCell:
    """A cell that a backend holds, with the files that it was derived from."""

    key: str
    """The run key of the cell's own run."""
    name: str
    version: str
    """Changes when the files do; empty where the backend holds no such files."""
    place: str
    """What the backend finds the files by."""


@dataclass(frozen=True)
class SweepTrial:
    """A trial of a sweep, in W&B's words."""

    id: str
    name: str
    state: str
    settings: dict[str, Any]
    """Its configuration: what the sweep asked of it, and what it logged."""


@dataclass(frozen=True)
class SavedModel:
    """A pruned model that was saved, for a backend to keep."""

    folder: Path
    name: str
    facts: Mapping[str, Any]
    """What is known of it, as plain values."""
    figures: Mapping[str, float]
    """What of it is a number, by name."""
    made_of: tuple[CellRecord, ...]
    """The cells that chose it, or say what it costs: the backend leads from it to them."""
    register: str | None = None
    """The name under which a registry keeps it; None for none."""


class Models(Protocol):
    """Where pruned models are kept beside the runs that chose them."""

    def add_model(self, model: SavedModel) -> str:
        """Add a version of a model, or its first one.

        Args:
            model: The model.

        Returns:
            What a person opens.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """

    def close(self) -> None:
        """Release what the backend holds; it never raises."""


@dataclass(frozen=True)
class Page:
    """Report over several cells, for a backend to keep.

    Attributes:
        files: The page and the files that go with it.
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
    """The runs that a backend shows while their cells are measured; nothing rests on it."""

    def begin(self, cell: CellRecord) -> None:
        """Open the cell's run, or continue it.

        Args:
            cell: What is known of the cell before it is measured.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """

    def update(self, key: str, figures: Mapping[str, float], step: int) -> None:
        """Show how far the cell is.

        Args:
            key: The run key of the cell's own run.
            figures: What is known so far, under names that begin with `PROGRESS`.
            step: Documents.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """

    def end(self, key: str, status: Ending) -> None:
        """Close the cell's run.

        Args:
            key: The run key of the cell's own run.
            status: What became of the cell.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """

    def close(self) -> None:
        """Show what is still open as killed; it never raises where it is called."""


class OpenRuns(LiveRun):
    """Live runs where they are open, each by its run key."""

    def __init__(self) -> None:
        self._runs: dict[str, Any] = {}

    @override
    def close(self) -> None:
        for key in list(self._runs):
            self.end(key, "killed")


class Backend(ABC):
    """Where runs are browsed. It may be unreachable; the ledger never depends on it.

    Args:
        project: The project, in the backend's words.
        results: The results folder.
    """

    name: ClassVar[str]
    """What a user types."""

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
        """Publish the cell as one run, one for the intact model, and one more for each of its runs.

        Of very many runs of a kind the cell's run has the table alone; `which` may say otherwise.

        Publishing the same again creates nothing and logs nothing twice; a changed record updates
        the runs that it has. After a failure anywhere, publishing again repairs what is missing.

        Args:
            cell: The record, complete or still growing.
            artifacts: Files to attach to the cell's run, each under its own file name.
            charts: Plotly figures of the cell's run, by name.
            tables: Tables of the cell's run besides those of the record, by name; they follow from
                the artifacts.
            which: Which of its runs are runs of their own.
            answer: What the benchmark shows by itself.

        Returns:
            How many runs were created, updated and left alone, and where to look at them.

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
            One entry a cell's run that was written whole.

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
            TrackingError: The backend could not be reached, or the files are not what was attached.
        """
        with self._explained("could not be read"):
            self._download(cell, folder)

    def add_page(self, page: Page) -> str:
        """Add a report as a run of its own, where the backend takes reports.

        Args:
            page: The report.

        Returns:
            An address, or the command that shows it.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """
        raise NotImplementedError(self.name, page)

    def close(self) -> None:  # noqa: B027  most hold nothing: a run is finished when it is written
        """Release what the backend holds; it never raises."""

    @contextmanager
    def _explained(self, problem: str, advice: str = "") -> Iterator[None]:
        """Raise a TrackingError with the problem where anything is raised inside."""
        with explaining(lambda error: self._explain(error, problem, advice)):
            yield

    def _explain(self, error: Exception, problem: str, advice: str) -> TrackingError:
        """Return what a person reads of an error of the SDK."""
        return explained(f"{self._to} {problem}", error, advice)

    @contextmanager
    def _one_writer(self, problem: str, advice: str = "") -> Iterator[None]:
        """Hold off other processes: no backend has "create unless it exists" for a run key."""
        with self._explained(problem, advice), lock_file(self._lock(), _LOCK_SECONDS):
            yield

    def _lock(self) -> Path:
        """Return the file that whoever writes to the project locks."""
        return self._results / f"{self.name}.lock"

    @abstractmethod
    def _write(self, runs: Sequence[DescribedRun]) -> Iterable[str]:
        """Bring the runs of a cell to what they should be, and check that they are.

        Args:
            runs: The runs as they should be, that of the cell last.

        Returns:
            What became of each: `created`, `updated` or `unchanged`.
        """

    @abstractmethod
    def _location(self) -> str:
        """Return what a person opens: an address, or a command."""

    def _cells(self) -> Iterable[RemoteCell]:
        """Find the cells whose runs were written whole."""
        raise TrackingError("it cannot be read back")

    def _download(self, cell: RemoteCell, folder: Path) -> None:
        """Download the files of a cell, checked by `check_listing` and `check_downloaded`."""
        raise TrackingError("it cannot be read back")

    def _setting(self) -> str:
        """Return what a command begins with so that it finds the project."""
        return ""

    def _notes(self) -> tuple[str, ...]:
        """Return what else a person should know after `_write`."""
        return ()

    def _whole_name(self) -> str:
        """Return the project's name where the backend completes what was asked for."""
        return ""


@contextmanager
def explaining(explain: Callable[[Exception], TrackingError]) -> Iterator[None]:
    """Raise the error that `explain` makes of whatever an SDK raises until exit."""
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
    """Say what did not work, why, in so many characters, and what to do; no secret is shown.

    Raise it from None: a traceback would print the cause too, which may show a password.
    """
    text = masked(str(error) or type(error).__name__, secrets)
    if characters is not None:
        text = textwrap.shorten(text, characters, placeholder=" …")
    return TrackingError("\n".join(filter(None, (f"{what}: {text}", advice))))


class Service(ABC):
    """A tracking backend as the rest of tracker sees it, without its SDK.

    Where not overridden, it is a store on this machine that needs no login.
    """

    name: ClassVar[str]
    """What a user types."""
    title: ClassVar[str]
    """What people call it."""
    can: ClassVar[frozenset[Ability]] = frozenset()
    names_server: ClassVar[bool] = False
    """Whether a user types a server before the project."""
    sweep_variable: ClassVar[str] = ""
    """The environment variable by which its agents tell a trial its sweep; empty without agents."""

    @abstractmethod
    def open(self, part: Part, project: str, results: Path, server: str | None = None) -> Any:
        """Open a part of the backend; nothing is contacted before it is used.

        Args:
            part: `runs` for a `Backend`, `live runs` for a `LiveRun`, `lighter models` for a
                `Models`; `trial` and `sweep` where it has a `sweep_variable`. Only those that it
                can are asked for.
            project: The project, in the backend's words; of a sweep, its path.
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
        """Raise RequestError where no run can be written, as far as this machine knows."""

    def target(self, project: str, reading: bool) -> Target:
        """Return the target that a user typed.

        Args:
            project: What stands behind the name and a colon; empty where nothing does.
            reading: Whether cells are read there.

        Returns:
            The target.

        Raises:
            RequestError: It is no target, or does not say where cells are read.
        """
        if reading and not project:
            raise RequestError(f"{self.name!r} names no project; write {self.name}:PROJECT")
        return Target(self.name, project or None)

    def server(self) -> str | None:
        """Return the server or folder of this environment, without a login; None for its own."""
        return None

    def place_of(self, to: Target, project: str) -> Target:
        """Return where a target is in this environment, so that another one finds it."""
        server = without_login(to.server) or self.server()
        return Target(self.name, masked(to.project or project), server)

    def target_of(self, place: Target, results: Path) -> Target:
        """Return how a place is reached from this environment.

        TrackingError, with what to type, where its server would get a login that is not for it.
        """
        return place

    def store(self, results: Path, server: str | None) -> tuple[str | None, Path | None]:
        """Return what tells its store from others: a setting, and a local file or folder."""
        return server or self.server(), None


def other_login(place: Target, setting: str, results: Path) -> TrackingError:
    """Say that a place would get another server's login, and what to type with its own."""
    again = sync_command(results.absolute(), f"{place.backend}:{place.project}")
    return TrackingError(
        "its server is another than this environment names, and would get the login that is "
        f"for that one. With the login for it: {setting}={place.server or ''} {again}"
    )


def without_login(uri: str | None) -> str | None:
    """Take the login out of an address."""
    return None if uri is None else masked(re.sub(r"://[^/\s]*@", "://", uri)).rstrip("/")


def sync_command(results: Path, to: str) -> str:
    """Say what to type when a backend is back; `to` is `BACKEND` or `BACKEND:PROJECT`."""
    return f"tracker sync --to {shlex.quote(to)} --results {shlex.quote(str(results))}"


def when_mended(command: str) -> str:
    """Say what to type where a backend did not take what is on disk."""
    return f"The results are on disk; when it is mended: {command}"
