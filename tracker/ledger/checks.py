"""What attacks on architectures have shown, kept in a results folder so that each is made once."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tracker.errors import WorkError
from tracker.ledger.files import write_text


class Checks:
    """The verdicts of a results folder, as text.

    Args:
        root: The results folder.
    """

    def __init__(self, root: Path) -> None:
        self._folder = root / "checks"

    def recall(self, key: str) -> str | None:
        """Recall a verdict.

        Args:
            key: A hash of all that it follows from.

        Returns:
            It; None where none is kept, or it cannot be read.
        """
        try:
            return self._path(key).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None

    def keep(self, key: str, verdict: str) -> None:
        """Keep a verdict, where the folder can be written.

        Args:
            key: A hash of all that it follows from.
            verdict: The verdict.
        """
        with suppress(WorkError):
            write_text(self._path(key), verdict)

    def _path(self, key: str) -> Path:
        return self._folder / f"{key[:32]}.json"
