"""Divide a task's documents into blocks; a process locks a whole block and computes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote

from tracker.schema.extent import random_order

BLOCK_SIZE = 32
"""Number of documents of a block, which are locked and usually computed and written together."""
MAX_OUTCOMES = 2048
"""Maximum number of outcomes (documents × ablations) that are computed and written together."""


@dataclass(frozen=True, order=True)
class Block:
    """Up to `BLOCK_SIZE` consecutive documents of one task, in a given order.

    Attributes:
        task: The lm-eval task.
        number: The 0-based number of the block in the order of the documents.
        seed: The seed of the random order of the documents; None if the documents are in the
            task's own order.
    """

    task: str
    number: int
    seed: int | None = None

    @property
    def name(self) -> str:
        """Name of the block in file names, with task, seed and number."""
        order = "" if self.seed is None else f"+{self.seed}"
        return f"{quote(self.task, safe='')}{order}.{self.number:05d}"


class ScheduledBlock(NamedTuple):
    """Block to measure, with its size and its position in the order of documents.

    `end` is the number of documents in the block and all earlier blocks.
    """

    block: Block
    size: int
    end: int


def schedule_blocks(
    order: Sequence[str], counts: Mapping[str, int], seed: int | None = None
) -> list[ScheduledBlock]:
    """Divide documents into blocks, in the order of measurement.

    Args:
        order: The task of each document, in the order of the documents.
        counts: Total number of documents of each task; `order` can contain only some of these
            documents.
        seed: The seed of the documents' random order; None for the tasks' own order.

    Returns:
        The blocks. Each block is measured as a whole.
    """
    n_seen: Counter[str] = Counter()
    blocks: dict[int, Block] = {}  # by the position of their first document
    for position, task in enumerate(order):
        if n_seen[task] % BLOCK_SIZE == 0:
            blocks[position] = Block(task, n_seen[task] // BLOCK_SIZE, seed)
        n_seen[task] += 1
    sizes = (min(BLOCK_SIZE, counts[b.task] - b.number * BLOCK_SIZE) for b in blocks.values())
    ends = [*blocks, len(order)][1:]
    return list(map(ScheduledBlock, blocks.values(), sizes, ends))


def split_missing(
    missing: Mapping[tuple[str, ...], Sequence[int]],
) -> Iterator[tuple[tuple[str, ...], Sequence[int]]]:
    """Split missing outcomes into portions of at most `MAX_OUTCOMES` outcomes.

    Args:
        missing: Names of ablations → numbers of documents that lack outcomes under the ablations.

    Yields:
        Names of ablations, and numbers of documents to measure under the ablations.
    """
    for names, documents in missing.items():
        size = max(1, MAX_OUTCOMES // len(names))
        for start in range(0, len(documents), size):
            yield names, documents[start : start + size]


@lru_cache(maxsize=256)
def document_positions(task: str, documents: Sequence[int], seed: int | None) -> Mapping[int, int]:
    """Map each document to its position in the random order of `seed`, or in `documents`."""
    order = documents if seed is None else random_order(seed, task, documents)
    return {number: position for position, number in enumerate(order)}
