"""Choose the documents of a benchmark: all or a half, the first or a random sample."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
DocumentPart = Literal["calibration", "test"]
"""Half of the documents: one half for choosing the pruned parts, the other for testing them."""
DEFAULT_SEED = 1234
"""lm-eval's own default for the few-shot seed."""


class Extent(BaseModel):
    """The number of documents of each task, and their order.

    Each seed gives a task one random order, the same for all models and folders. A sample is the
    beginning of this order, so a larger sample contains the smaller one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    limit: Positive | None = None
    """Number of documents per task, from the first (default: all)."""
    sample: Positive | None = None
    """Number of documents per task, drawn at random with the seed. Excludes a limit."""
    seed: int = DEFAULT_SEED
    """Seed of few-shot examples, samples, and random strategies of searches."""

    @model_validator(mode="after")
    def _check_one_order(self) -> Extent:
        if self.limit is not None and self.sample is not None:
            raise ValueError("limit and sample are both given; leave one of them out")
        return self

    @property
    def size(self) -> float:
        """The number of documents of each task; infinite for all."""
        return self.sample or self.limit or math.inf

    def select(self, task: str, documents: Sequence[int]) -> Sequence[int]:
        """Choose a task's documents, in the order in which they are measured.

        `documents` are the numbers of all the task's documents, ascending.
        """
        if self.sample is None:
            return documents[: self.limit]
        return random_order(self.seed, task, documents)[: self.sample]


ALL_DOCUMENTS = Extent()
UNLIMITED_SAMPLE = 10**9
"""A sample that leaves nothing out: all documents, in their random order."""


def random_order(seed: int, task: str, documents: Iterable[int]) -> list[int]:
    """Sort a task's documents into the random order of a seed, the same on every machine.

    A subset keeps the order of the whole task. The tasks of a group are drawn independently.
    """
    return sorted(documents, key=lambda number: _random_key(seed, task, number))


@lru_cache(maxsize=256)
def half_numbers(part: DocumentPart, seed: int, task: str, documents: int) -> tuple[int, ...]:
    """Return the numbers of one half of a task's documents, ascending.

    Calibration is the first half of the random order. Test is the rest, and has one document more
    if the number is odd.
    """
    order = random_order(seed, task, range(documents))
    n_calibration = documents // 2
    return tuple(sorted(order[:n_calibration] if part == "calibration" else order[n_calibration:]))


def shuffle_documents(seed: int, documents: Mapping[str, Iterable[int]]) -> list[tuple[str, int]]:
    """Sort the documents of all tasks into one random order.

    Each task's documents keep their `random_order`. Every beginning of the order holds each task
    in proportion to its size, up to chance.
    """
    keys = [(task, number) for task, numbers in documents.items() for number in numbers]
    return sorted(keys, key=lambda key: _random_key(seed, *key))


def _random_key(seed: int, task: str, number: int) -> bytes:
    return hashlib.sha256(f"{seed}/{task}/{number}".encode()).digest()
