"""What checks of architectures have shown, kept so that each is made once on a machine.

In the results folder, whose figures rest on them, and in the user's cache, for the next folder. A
results folder that others can write is not believed: there the cache decides, or the check again.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tracker.core.errors import WorkError
from tracker.ledger.cache import believed_note, cache_folder, keep, note_path
from tracker.ledger.notes import write_note

_KIND = "checks"


class Checks:
    """The verdicts of a results folder, as text; each key is a hash of all that it follows from."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def recall(self, key: str) -> str | None:
        """Recall a verdict; None where none is kept, or it is not to be believed."""
        for root in (self._root, cache_folder()):
            verdict = believed_note(root, _KIND, key).get("verdict")
            if verdict is not None:
                if not note_path(self._root, _KIND, key).exists():
                    self._write(key, verdict)
                return str(verdict)
        return None

    def keep(self, key: str, verdict: str) -> None:
        """Keep a verdict, where the folders can be written."""
        self._write(key, verdict)
        keep(_KIND, key, {"verdict": verdict})

    def _write(self, key: str, verdict: str) -> None:
        with suppress(WorkError):
            write_note(note_path(self._root, _KIND, key), {"verdict": verdict})
