"""What attacks on architectures have shown, kept so that each is made once on a machine.

In the results folder, whose figures rest on them, and in the user's cache, for the next folder.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tracker.errors import WorkError
from tracker.ledger.files import cache_folder
from tracker.ledger.notes import read_note, write_note


class Checks:
    """The verdicts of a results folder, as text; each key is a hash of all that it follows from."""

    def __init__(self, root: Path) -> None:
        self._here, self._cache = (folder / "checks" for folder in (root, cache_folder()))

    def recall(self, key: str) -> str | None:
        """Recall a verdict; None where none is kept, or it is not what was kept."""
        if (verdict := _read(self._here, key)) is None:
            verdict = _read(self._cache, key)
            if verdict is not None:
                _write(self._here, key, verdict)
        return verdict

    def keep(self, key: str, verdict: str) -> None:
        """Keep a verdict, where the folders can be written."""
        for folder in (self._here, self._cache):
            _write(folder, key, verdict)


def _read(folder: Path, key: str) -> str | None:
    return read_note(_path(folder, key)).get("verdict")


def _write(folder: Path, key: str, verdict: str) -> None:
    with suppress(WorkError):
        write_note(_path(folder, key), {"verdict": verdict})


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key[:32]}.json"
