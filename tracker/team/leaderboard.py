"""The leaderboard that a team shares: entries are cells, versions only ever add up.

Nobody waits for anybody: each version names the versions that it holds, a reader merges all that no
other version holds, and merging gives the same whatever its order. So two people who publish at the
same time lose nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from tracker.core.distribution import other_format
from tracker.core.errors import ResultsError
from tracker.core.grouping import grouped
from tracker.core.identities import Record, Shown
from tracker.core.records import CellRecord
from tracker.core.text import as_markdown
from tracker.report.export import board_data
from tracker.report.leaderboard.claims import claims
from tracker.report.leaderboard.comparable import named_models
from tracker.report.leaderboard.parts import model_answer, part_boards
from tracker.report.leaderboard.rules import INTERVAL_RULE, LAYER_RULE, MODEL_RULE
from tracker.tracking.base import BOARD_FILE, Page, Pages
from tracker.tracking.figures import LoggedTable, logged
from tracker.tracking.identity import content_digest

FORMAT = 4
_ROUNDS = 5


class BoardEntry(Record):
    """A cell on the leaderboard, with its provenance; who published it, and when (UTC)."""

    cell: CellRecord
    by: Shown
    at: str

    @property
    def order(self) -> tuple[bool, str, str]:
        """Of two entries that hold the same the larger stays: complete, then newer."""
        return (self.cell.is_complete, self.at, content_digest(self))

    def gives_way_to(self, other: BoardEntry) -> bool:
        """Whether another entry shows all that this one does, and is the one to stay."""
        if not other.cell.holds(self.cell):
            return False
        return not self.cell.holds(other.cell) or self.order < other.order


class Board(Record):
    """One version of the leaderboard.

    Attributes:
        format: How it is written.
        entries: What no other entry holds too, sorted by place.
        holds: The versions whose entries are among these.
    """

    format: int = FORMAT
    entries: tuple[BoardEntry, ...] = ()
    holds: tuple[str, ...] = ()

    @property
    def cells(self) -> list[CellRecord]:
        """What is ranked."""
        return [entry.cell for entry in self.entries]


def merge(boards: Iterable[Board]) -> Board:
    """Merge versions; the result does not depend on their order."""
    boards = [*boards]
    holds = {version for board in boards for version in board.holds}
    entries = (entry for board in boards for entry in board.entries)
    views = grouped(entries, lambda each: (each.cell.key, each.cell.removed, each.cell.metric))
    kept = {
        (entry.cell.place, entry.order): entry
        for view in views.values()
        for entry in view
        if not any(entry.gives_way_to(other) for other in view)
    }
    return Board(entries=tuple(kept[p] for p in sorted(kept)), holds=tuple(sorted(holds)))


def read_board(backend: Pages) -> tuple[Board, int]:
    """Read the leaderboard of a project, and how many versions no other version holds.

    TrackingError if the backend could not be reached; ResultsError if a version is damaged, or of
    another format.
    """
    read: dict[str, Board] = {}
    held: set[str] = set()
    for version in reversed(backend.boards()):  # the newest holds most, where clocks agree
        if version not in held:
            board = _read(backend.read_board(version), version)
            held |= {*board.holds}
            read[version] = board.model_copy(update={"holds": (*board.holds, version)})
    heads = [board for version, board in read.items() if version not in held]
    return merge(heads), len(heads)


def _read(text: str, version: str) -> Board:
    try:
        if why := other_format(json.loads(text).get("format"), FORMAT):
            raise ResultsError(f"version {version} of the leaderboard {why}")
        return Board.model_validate_json(text)
    except (ValueError, TypeError, AttributeError):
        raise ResultsError(f"version {version} of the leaderboard is damaged") from None


def publish_board(backend: Pages, cells: Iterable[CellRecord]) -> tuple[Board, str]:
    """Add cells to the leaderboard of a project.

    A cell that is there already, with the same figures, stays its first publisher's. With the
    leaderboard comes where to look, empty when nothing was added. TrackingError if the backend
    could not be reached.
    """
    by, cells = backend.user(), list(cells)
    location = ""
    for _ in range(_ROUNDS):
        there, heads = read_board(backend)
        known = {content_digest(entry.cell) for entry in there.entries}
        new = [
            BoardEntry(cell=cell, by=by, at=_after(there, cell))
            for cell in cells
            if content_digest(cell) not in known
        ]
        whole = merge([there, Board(entries=tuple(new))])
        if heads < 2 and whole.entries == there.entries:
            return whole, location
        with TemporaryDirectory() as folder:
            file = Path(folder) / BOARD_FILE
            file.write_text(whole.model_dump_json(), encoding="utf-8")
            tables = board_tables(whole.cells)
            page = Page("leaderboard", [file], tables, whole.cells, board_text(whole.cells))
            location = backend.add_page(page)
    return whole, location


def _after(board: Board, cell: CellRecord) -> str:
    """Give the present, or what is later than all that a board has of a cell: clocks differ."""
    held = (datetime.fromisoformat(entry.at) for entry in board.entries if entry.cell.holds(cell))
    after = (at + timedelta(seconds=1) for at in held)
    return max([datetime.now(UTC), *after]).isoformat(timespec="seconds")


def board_tables(cells: Sequence[CellRecord]) -> Mapping[str, LoggedTable]:
    """Lay `layer_leaderboard` and `model_leaderboard` out for the page of a tracking backend."""
    return {name: logged(made) for name, made in board_data(cells).items()}


def board_text(cells: Sequence[CellRecord]) -> str:
    """Write what is shown of each model, and how its leaderboards are read, in Markdown."""
    answers = (
        f"**{as_markdown(model)}**: "
        + as_markdown(model_answer(claims(mine), part_boards(mine), mine))
        for model, mine in named_models(cells).items()
    )
    return "\n\n".join((*answers, LAYER_RULE, MODEL_RULE, INTERVAL_RULE))
