"""What attacks on architectures have shown, kept in a results folder so that each is made once."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tracker.errors import WorkError
from tracker.ledger.notes import read_note, write_note


class Checks:
    """The verdicts of a results folder, as text; each key is a hash of all that it follows from."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "checks"

    def recall(self, key: str) -> str | None:
        """Recall a verdict; None where none is kept, or it is not what was kept."""
        return read_note(self._path(key)).get("verdict")

    def keep(self, key: str, verdict: str) -> None:
        """Keep a verdict, where the folder can be written."""
        with suppress(WorkError):
            write_note(self._path(key), {"verdict": verdict})

    def _path(self, key: str) -> Path:
        return self._folder / f"{key[:32]}.json"
