"""Report progress, which the command line shows and a notebook may ignore."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Receiver of a run's progress; this class ignores everything."""

    def say(self, message: str) -> None:
        """Receive one line about something that takes a while or needs attention."""

    def step(self, message: str) -> None:
        """Receive the name of the next step, which is of interest only until it is done."""

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        """Receive the start of work of `total` responses, or of another unit."""

    def expect(self, more: int) -> None:
        """Receive a change of the total; negative if it becomes smaller."""

    def advance(self, responses: int) -> None:
        """Receive the number of new responses."""

    def finish(self) -> None:
        """Receive the end of the work."""


class Silent(Progress):
    """Receiver that ignores everything."""


@contextmanager
def telling(progress: Progress, title: str, total: int, unit: str = "responses") -> Iterator[None]:
    """Report the start of the work of a `with` block and its end, also after errors."""
    progress.start(title, total, unit)
    try:
        yield
    finally:
        progress.finish()
