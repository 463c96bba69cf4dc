"""What the runner says while it works; the command line shows it, a notebook may ignore it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Listens to a run; what it does not hear of is ignored."""

    def say(self, message: str) -> None:
        """Hear one line about something that takes a while or needs attention."""

    def step(self, message: str) -> None:
        """Hear what is done next, which matters only until it is done."""

    def start(self, title: str, total: int, unit: str = "responses") -> None:
        """Hear that work begins, of `total` responses, or whatever else is counted, to come."""

    def expect(self, more: int) -> None:
        """Hear that more of them are to come than was known; fewer if negative."""

    def advance(self, responses: int) -> None:
        """Hear that so many are there."""

    def finish(self) -> None:
        """Hear that the work has ended."""


class Silent(Progress):
    """Listens to nothing."""


@contextmanager
def telling(progress: Progress, title: str, total: int, unit: str = "responses") -> Iterator[None]:
    """Tell of the beginning of some work, and of its end, however that comes."""
    progress.start(title, total, unit)
    try:
        yield
    finally:
        progress.finish()
