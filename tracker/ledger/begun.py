"""Which searches are at a cell: what they measure is shown by what they find, and not by itself."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tracker.core.provenance import content_hash
from tracker.ledger.cells import CellStore
from tracker.ledger.notes import read_note, write_note

NOTES = "begun/*.json"
"""Where they stand in a cell's folder."""


def begin_search(store: CellStore, command: Sequence[str]) -> None:
    """Note that a search measures a cell; `command` is what was typed, without the folder."""
    write_note(_path(store, command), {"command": list(command)})


def end_search(store: CellStore, command: Sequence[str]) -> None:
    """Note that a search is over."""
    _path(store, command).unlink(missing_ok=True)
    with suppress(OSError):  # another search is at it, or none ever was
        _path(store, command).parent.rmdir()


def begun_searches(store: CellStore) -> list[list[str]]:
    """List the commands of the searches that are at a cell, or were stopped there."""
    return [
        [str(word) for word in read_note(path).get("command", ())]
        for path in sorted(store.folder.glob(NOTES))
    ]


def _path(store: CellStore, command: Sequence[str]) -> Path:
    return store.folder / "begun" / f"{content_hash(list(command))[:32]}.json"
