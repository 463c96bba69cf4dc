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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from typing_extensions import override

from tracker.core.errors import TrackingError
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

    @abstractmethod
    def _explained(self, problem: str, advice: str = "") -> AbstractContextManager[None]:
        """Say what the backend did not do where anything is raised inside: a TrackingError."""

    @contextmanager
    def _one_writer(self, problem: str, advice: str = "") -> Iterator[None]:
        """Hold off other processes: no backend has "create unless it exists" for a run key."""
        with self._explained(problem, advice), lock_file(self._lock(), _LOCK_SECONDS):
            yield

    @abstractmethod
    def _lock(self) -> Path:
        """Say which file whoever writes to the project locks."""

    @abstractmethod
    def _write(self, runs: Sequence[DescribedRun]) -> Iterable[str]:
        """Bring the runs of a cell to what they should be, and prove that they are.

        What became of each is `created`, `updated` or `unchanged`.
        """

    @abstractmethod
    def _location(self) -> str:
        """Say what a person opens."""

    @abstractmethod
    def _cells(self) -> Iterable[RemoteCell]: ...

    @abstractmethod
    def _download(self, cell: RemoteCell, folder: Path) -> None: ...

    def _setting(self) -> str:
        """Say what a command begins with so that it finds the project."""
        return ""

    def _notes(self) -> tuple[str, ...]:
        """Say what else a person should know after `_write`."""
        return ()

    def _whole_name(self) -> str:
        """Name the project where the backend completes what was asked for."""
        return ""


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
    """What a backend is to everybody else: what it can, and where its runs are.

    It imports no SDK. Where not overridden, it is a store on this machine that needs no login.
    """

    name: ClassVar[str]
    """What a user types."""
    title: ClassVar[str]
    """What people call it."""
    can: ClassVar[frozenset[Ability]] = frozenset()
    runs_sweeps: ClassVar[bool] = False
    """Whether its agents start trials, each with a run of its own."""

    @abstractmethod
    def open(self, project: str, results: Path, server: str | None) -> Backend:
        """Open it; nothing is contacted before it is used."""

    def _isolated(self, kind: str, *arguments: object, **environment: Any) -> Isolated:
        """Open a class of the backend's folder, as `MODULE:CLASS`, in a process of its own."""
        kind = f"tracker.tracking.{self.name}.{kind}"
        return Isolated(self.title, kind, *arguments, **environment)

    def refuse_closed(self, results: Path) -> None:  # noqa: B027  most need no login
        """Raise RequestError where no run can be written, as far as this machine knows."""

    def open_live_run(self, project: str, results: Path, server: str | None) -> LiveRun:
        """Open what it shows while cells are measured, where it can."""
        raise NotImplementedError(self.name, project, results, server)

    def open_models(self, project: str, results: Path, server: str | None) -> Models:
        """Open where it keeps pruned models, where it can."""
        raise NotImplementedError(self.name, project, results, server)

    def target(self, project: str) -> Target:
        """Read what a user typed after its name and a colon; RequestError if it cannot be."""
        return Target(self.name, project or None)

    def source(self, to: Target, typed: str) -> Target:
        """Say where cells are read; RequestError if what was typed does not say where."""
        return to

    @abstractmethod
    def server(self) -> str | None:
        """Name the server or folder of this environment, without a login; None for its own."""

    def place_of(self, to: Target, project: str) -> Target:
        """Say where a target is in the environment of now, so that it is found from another one."""
        server = without_login(to.server) or self.server()
        return Target(self.name, masked(to.project or project), server)

    def target_of(self, place: Target, results: Path) -> Target:
        """Say how a place is reached from the environment of now.

        TrackingError, with what to type, where its server would get a login that is not for it.
        """
        return place

    def is_kept_here(self, place: Target) -> bool:
        """Say whether the environment of now is one in which a place is kept in step."""
        return True

    def title_of(self, place: Target) -> str:
        """Name a place as it is typed after `--to`."""
        return masked(f"{self.name}:{place.project}")

    @abstractmethod
    def store(self, results: Path, server: str | None) -> tuple[str | None, Path | None]:
        """Say what tells its store from others: a setting, and a local file or folder."""


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
