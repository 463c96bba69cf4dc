"""Choose the documents to measure: the first documents or a random sample."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
DocumentPart = Literal["calibration", "test"]
"""Half of the documents: `calibration` to choose the pruned parts, `test` to evaluate them."""
DEFAULT_SEED = 1234
"""lm-eval's own default for the few-shot seed."""


class Extent(BaseModel):
    """The number of documents that are measured for each task, and their order.

    A seed determines one random order of a task's documents. This order is the same for all models.
    A random sample consists of the first documents in the random order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    limit: Positive | None = None
    """Number of documents per task, beginning with the first document (default: all)."""
    sample: Positive | None = None
    """Number of documents per task, drawn at random with the seed. Not allowed with limit."""
    seed: int = DEFAULT_SEED
    """Seed of few-shot examples, samples, and random strategies of searches."""

    @model_validator(mode="after")
    def _check_one_order(self) -> Extent:
        if self.limit is not None and self.sample is not None:
            raise ValueError("limit and sample are both given; leave one of them out")
        return self

    @property
    def size(self) -> float:
        """The maximum number of documents of each task; infinite for all documents."""
        return self.sample or self.limit or math.inf

    def select(self, task: str, documents: Sequence[int]) -> Sequence[int]:
        """Return the numbers of the documents to measure, in measuring order.

        `documents` are the numbers of all documents of the task in ascending order.
        """
        if self.sample is None:
            return documents[: self.limit]
        return random_order(self.seed, task, documents)[: self.sample]


class Clusters(BaseModel):
    """Documents that depend on each other, such as the questions on one passage."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    column: str
    """The column whose value all documents of a cluster share; `task` for the tasks of a group."""
    labels: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Pairs of a task and the cluster numbers of its documents, in the order of the documents."""

    def by_document(self, numbers: Mapping[str, Sequence[int]]) -> dict[tuple[str, int], int]:
        """Return the cluster number of each document, by (task, document number).

        Args:
            numbers: Numbers of all documents of each task, in ascending order.

        Returns:
            A dict from (task, document number) to cluster number.

        Raises:
            ValueError: `numbers` and `labels` contain different numbers of documents for a task.
        """
        labels = dict(self.labels)
        return {
            (task, document): label
            for task, documents in numbers.items()
            for document, label in zip(documents, labels.get(task, ()), strict=True)
        }


ALL_DOCUMENTS = Extent()
UNLIMITED_SAMPLE = 10**9
"""Size of a sample that contains all documents, in random order."""


def random_order(seed: int, task: str, documents: Iterable[int]) -> list[int]:
    """Return the document numbers of a task in a random order.

    The order depends only on the seed and the task's name. The orders of different tasks are
    independent.
    """
    return sorted(documents, key=lambda number: _random_key(seed, task, number))


@lru_cache(maxsize=256)
def half_numbers(part: DocumentPart, seed: int, task: str, documents: int) -> tuple[int, ...]:
    """Return the document numbers of one random half of a task, ascending.

    The calibration half contains the first half of the documents in random order. The test half
    contains all other documents. If the number of documents is odd, the test half has one more
    document.
    """
    order = random_order(seed, task, range(documents))
    n_calibration = documents // 2
    return tuple(sorted(order[:n_calibration] if part == "calibration" else order[n_calibration:]))


def shuffle_documents(seed: int, documents: Mapping[str, Iterable[int]]) -> list[tuple[str, int]]:
    """Return the documents of all tasks in one random order, as (task, number) pairs.

    The documents of each single task are in the order that `random_order` returns.
    """
    keys = [(task, number) for task, numbers in documents.items() for number in numbers]
    return sorted(keys, key=lambda key: _random_key(seed, *key))


def _random_key(seed: int, task: str, number: int) -> bytes:
    return hashlib.sha256(f"{seed}/{task}/{number}".encode()).digest()
