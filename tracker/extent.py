"""Which documents of a benchmark are meant: all, the first ones, or some drawn at random."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
DEFAULT_SEED = 1234
"""lm-eval's own default for the few-shot seed."""


class Extent(BaseModel):
    """How many documents of each task, in which order.

    A task has one random order a seed, for every model and in every folder, and a sample is its
    beginning: a larger sample holds the smaller one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    limit: Positive | None = None
    """Documents per task, from the first, as in lm-eval."""
    sample: Positive | None = None
    """Documents per task, drawn at random; never beside a limit."""
    seed: int = DEFAULT_SEED
    """Decides what is drawn."""

    def of(self, task: str, documents: int) -> Sequence[int]:
        """Number the documents of a task that are meant, in the order in which they are measured.

        `documents` is how many the task has.
        """
        if self.sample is None:
            return range(min(documents, self.limit or documents))
        return random_order(self.seed, task, documents)[: self.sample]


ALL = Extent()
EVERY = 10**9
"""A sample that leaves nothing out: all documents, in their random order."""


def random_order(seed: int, task: str, documents: int) -> list[int]:
    """Number the documents of a task in an order that is the same on every machine and for ever.

    The tasks of a group are drawn independently.
    """
    return sorted(range(documents), key=lambda number: _lot(seed, task, number))


def shuffled(seed: int, documents: Mapping[str, int]) -> list[tuple[str, int]]:
    """Put the documents of all tasks, of which each has so many, into one random order.

    Each task's own documents come in its `random_order`, and every beginning holds, but for
    chance, each task in proportion.
    """
    every = [(task, number) for task, count in documents.items() for number in range(count)]
    return sorted(every, key=lambda place: _lot(seed, *place))


def _lot(seed: int, task: str, number: int) -> bytes:
    return hashlib.sha256(f"{seed}/{task}/{number}".encode()).digest()
