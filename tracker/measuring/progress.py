"""Report progress; the command line shows the reports, and a notebook may ignore them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Receiver of progress reports of a run; this base class ignores them."""

    def say(self, message: str) -> None:
        """Receive a one-line message about a slow step or a problem."""

    def step(self, message: str) -> None:
        """Receive the name of the next step, to be shown until the step is done."""

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        """Receive the title of new work, and the number of responses (or `unit`) to expect."""

    def expect(self, more: int) -> None:
        """Receive a change of the total; a negative number reduces the total."""

    def advance(self, responses: int) -> None:
        """Receive the number of responses since the last call."""

    def finish(self) -> None:
        """Receive the end of the work."""


class Silent(Progress):
    """Receiver that ignores all progress reports."""


@contextmanager
def report_work(
    progress: Progress, title: str, total: int, unit: str = "responses"
) -> Iterator[None]:
    """Report the start and the end of the work in a `with` block, also after errors."""
    progress.start(title, total, unit)
    try:
        yield
    finally:
        progress.finish()
