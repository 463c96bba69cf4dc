"""Which documents of a benchmark are meant: all or a half; of these the first, or some drawn."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Part = Literal["calibration", "test"]
"""Documents that choose what is pruned, and those that say what it costs: never the same ones."""
DEFAULT_SEED = 1234
"""lm-eval's own default for the few-shot seed."""


class Extent(BaseModel):
    """How many documents of each task, in which order.

    A task has one random order a seed, for every model and in every folder, and a sample is its
    beginning: a larger sample holds the smaller one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    limit: Positive | None = None
    """The first documents of each task; default: all."""
    sample: Positive | None = None
    """So many documents of each task, drawn at random with the seed; not beside a limit."""
    seed: int = DEFAULT_SEED
    """Of few-shot examples, samples, and random strategies of searches."""

    @model_validator(mode="after")
    def _has_one_order(self) -> Extent:
        if self.limit is not None and self.sample is not None:
            raise ValueError(
                "limit and sample are both given: the first documents, or some drawn at random? "
                "Leave one of them out"
            )
        return self

    @property
    def size(self) -> float:
        """The number of documents of each task; infinite for all, in whatever order."""
        return self.sample or self.limit or math.inf

    def of(self, task: str, documents: Sequence[int]) -> Sequence[int]:
        """Choose the documents of a task that are meant, in the order in which they are measured.

        `documents` are the numbers of all, ascending.
        """
        if self.sample is None:
            return documents[: self.limit]
        return random_order(self.seed, task, documents)[: self.sample]


ALL = Extent()
EVERY = 10**9
"""A sample that leaves nothing out: all documents, in their random order."""


def random_order(seed: int, task: str, documents: Iterable[int]) -> list[int]:
    """Put documents of a task into an order that is the same on every machine and for ever.

    Some of them come in the order that they have among all. The tasks of a group are drawn
    independently.
    """
    return sorted(documents, key=lambda number: _lot(seed, task, number))


@lru_cache(maxsize=256)
def half(part: Part, seed: int, task: str, documents: int) -> tuple[int, ...]:
    """Choose one half of a task's so many documents, ascending.

    Calibration is the first half of the random order, test is the rest: one more of an odd number.
    """
    order = random_order(seed, task, range(documents))
    middle = documents // 2
    return tuple(sorted(order[:middle] if part == "calibration" else order[middle:]))


def shuffled(seed: int, documents: Mapping[str, Iterable[int]]) -> list[tuple[str, int]]:
    """Put the documents of all tasks, given by their numbers, into one random order.

    Each task's own documents come in its `random_order`, and every beginning holds, but for
    chance, each task in proportion.
    """
    every = [(task, number) for task, some in documents.items() for number in some]
    return sorted(every, key=lambda place: _lot(seed, *place))


def _lot(seed: int, task: str, number: int) -> bytes:
    return hashlib.sha256(f"{seed}/{task}/{number}".encode()).digest()
