"""The seam between records and tracking backends.

A backend receives frozen records and files, nothing else. What every backend must agree on is in
pure functions: which run it is and whether it changed in `identity`, what it shows in `figures`.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tracker.core.records import CellRecord

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Ending = Literal["finished", "failed", "killed"]
PROGRESS = "progress/"
"""How the names of figures begin that a run shows while its cell is measured."""
Scalar = str | int | float | None


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
class LoggedTable:
    """Rows that a backend shows as a table; a value that is not defined is None."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Scalar, ...], ...]
    asked: tuple[str, ...] = ()
    """Columns that say what was asked: by these, rows of several runs can be set side by side."""
    scores: tuple[str, ...] = ()
    """Columns that say how good the answers are."""


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
        """Show what is still open as killed; it never raises."""


class Backend(Protocol):
    """Where runs are browsed. It may be unreachable; the ledger never depends on it."""

    name: str

    def publish(
        self,
        cell: CellRecord,
        artifacts: Sequence[Path],
        charts: Mapping[str, Figure],
        tables: Mapping[str, LoggedTable] = {},
    ) -> Published:
        """Publish the cell as one run, one for the intact model, and one more for each of its runs.

        Publishing the same again creates nothing and logs nothing twice; a changed record updates
        the runs that it has. After a failure anywhere, publishing again repairs what is missing.

        Args:
            cell: The record, complete or still growing.
            artifacts: Files to attach to the cell's run, each under its own file name.
            charts: Plotly figures of the cell's run, by name.
            tables: Tables of the cell's run besides those of the record, by name; they follow from
                the artifacts.

        Returns:
            How many runs were created, updated and left alone, and where to look at them.

        Raises:
            TrackingError: The backend refused or could not be reached.
        """

    def cells(self) -> list[RemoteCell]:
        """List the cells of the project.

        Returns:
            One entry a cell's run that was written whole.

        Raises:
            TrackingError: There is no such project, or the backend could not be reached.
        """

    def fetch(self, cell: RemoteCell, folder: Path) -> None:
        """Download the files that were attached to a cell's run.

        Args:
            cell: One of `cells`.
            folder: An empty folder for them.

        Raises:
            TrackingError: The backend could not be reached, or the files are not what was attached.
        """

    def boards(self) -> list[str]:
        """List the versions of the project's leaderboard, the oldest first.

        Returns:
            What `read_board` takes; empty where there is none yet.
        """

    def read_board(self, version: str) -> str:
        """Read one version of the leaderboard, as it was given to `add_board`."""

    def add_board(
        self, file: Path, tables: Mapping[str, LoggedTable], made_of: Sequence[CellRecord]
    ) -> str:
        """Add a version of the leaderboard.

        Args:
            file: All of it, named `BOARD_FILE`.
            tables: What people browse.
            made_of: The cells that it ranks: the backend leads from it to their outcomes.

        Returns:
            What a person opens.
        """

    def add_report(
        self,
        text: str,
        files: Sequence[Path],
        tables: Mapping[str, LoggedTable],
        charts: Mapping[str, Figure],
        made_of: Sequence[CellRecord],
    ) -> str:
        """Add a report.

        Args:
            text: What it says in a few paragraphs.
            files: The page, and what goes with it, each under its own file name.
            tables: What people browse.
            charts: Plotly figures, by name.
            made_of: The cells that it shows: the backend leads from it to their outcomes.

        Returns:
            What a person opens.
        """

    def user(self) -> str:
        """Say as whom the backend knows this user."""

    def close(self) -> None:
        """Release what the backend holds; it never raises."""


BOARD = "layer-leaderboard"
"""The leaderboard's name in every project."""
BOARD_FILE = "leaderboard.json"


def sync_command(results: Path, to: str) -> str:
    """Say what to type when a backend is back; `to` is `BACKEND` or `BACKEND:PROJECT`."""
    return f"tracker sync --to {shlex.quote(to)} --results {shlex.quote(str(results))}"
