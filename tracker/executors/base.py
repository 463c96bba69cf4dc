"""What an executor does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tracker.ledger.store import Ledger
from tracker.measuring.job import Begun, Done, Job
from tracker.measuring.progress import Progress


class Executor(Protocol):
    """Measures what cells lack; whatever breaks one cell, the others go on.

    Attributes:
        models_loaded: How many times a model was loaded so far.
    """

    models_loaded: int

    def measure(
        self, jobs: Sequence[Job], ledger: Ledger, progress: Progress, begun: Begun, done: Done
    ) -> None:
        """Measure cells.

        Args:
            jobs: The cells, equal models next to each other.
            ledger: The results folder.
            progress: Told what happens.
            begun: Told of each cell when it is about to be measured.
            done: Told of each cell when it is finished or has failed.
        """


def last_line(error: Exception) -> str:
    """Say what is worth reading in the long messages of a scheduler: how they end."""
    lines = [line.strip(" -") for line in str(error).splitlines()]
    return next((line for line in reversed(lines) if line), type(error).__name__)[:300]
