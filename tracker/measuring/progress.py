"""Receivers of progress reports, which the command line displays and other programs can ignore."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Base class for receivers of a run's progress reports; its methods do nothing."""

    def say(self, message: str) -> None:
        """Receive a one-line message about a slow step or a problem."""

    def step(self, message: str) -> None:
        """Receive the name of the next step, to be shown until the step is done."""

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        """Receive the title of a new task, and its expected number of units of work."""

    def expect(self, more: int) -> None:
        """Receive an increase of the expected total; a negative number reduces the total."""

    def advance(self, responses: int) -> None:
        """Receive the number of responses that were computed since the last call."""

    def finish(self) -> None:
        """Receive the message that the current task has ended."""


class Silent(Progress):
    """Receiver that ignores all progress reports."""


@contextmanager
def report_work(
    progress: Progress, title: str, total: int, unit: str = "responses"
) -> Iterator[None]:
    """Report the start and the end of a `with` block to `progress`."""
    progress.start(title, total, unit)
    try:
        yield
    finally:
        progress.finish()
