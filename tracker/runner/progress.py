"""What the runner says while it works; the command line shows it, a notebook may ignore it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Listens to a run."""

    def say(self, message: str) -> None:
        """Hear one line about something that takes a while or needs attention."""

    def start(self, title: str, total: int) -> None:
        """Hear that a cell begins, of `total` responses to come."""

    def advance(self, responses: int) -> None:
        """Hear that so many responses are there."""

    def finish(self) -> None:
        """Hear that the cell is done."""


class Silent:
    """Listens to nothing."""

    def say(self, message: str) -> None:
        """Ignore a line."""

    def start(self, title: str, total: int) -> None:
        """Ignore the beginning of a cell."""

    def advance(self, responses: int) -> None:
        """Ignore progress."""

    def finish(self) -> None:
        """Ignore the end of a cell."""
