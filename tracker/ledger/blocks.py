"""Divide documents into the blocks that are computed and locked together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote

from tracker.core.extent import random_order

BLOCK_SIZE = 32
"""Number of documents of a block, which are locked and usually computed and written together."""
MAX_OUTCOMES = 2048
"""Maximum number of outcomes (documents × ablations) that are computed and written together."""


@dataclass(frozen=True, order=True)
class Block:
    """Up to `BLOCK_SIZE` documents of one task, consecutive in the random order of a seed.

    Attributes:
        task: The lm-eval task.
        number: The number of the block, 0-based.
        seed: The seed of the random order; None for the task's own order.
    """

    task: str
    number: int
    seed: int | None = None

    @property
    def name(self) -> str:
        """The block's part of file names; a quoted task never contains the plus before the seed."""
        order = "" if self.seed is None else f"+{self.seed}"
        return f"{quote(self.task, safe='')}{order}.{self.number:05d}"


class ScheduledBlock(NamedTuple):
    """A block that is to be measured, and its place in the order of all documents.

    `end` is the number of documents of the order that are measured after this block.
    """

    block: Block
    size: int
    end: int


def schedule_blocks(
    order: Sequence[str], counts: Mapping[str, int], seed: int | None = None
) -> list[ScheduledBlock]:
    """List the blocks in the order in which they are measured for an order of documents.

    Each task has its own blocks. The first needed document of a block has the whole block measured.

    Args:
        order: The task of each document.
        counts: Number of documents of each task, which may be more than the order holds.
        seed: The seed of the order; None for the tasks' own order.

    Returns:
        The blocks.
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
    """Split a block's missing outcomes into parts, so that a killed process loses only minutes.

    Args:
        missing: Names of ablations → the documents whose missing ablations are exactly these.

    Yields:
        Names of ablations and some of their documents: at most `MAX_OUTCOMES` outcomes, or one
        document.
    """
    for names, documents in missing.items():
        size = max(1, MAX_OUTCOMES // len(names))
        for start in range(0, len(documents), size):
            yield names, documents[start : start + size]


@lru_cache(maxsize=256)
def document_positions(task: str, documents: Sequence[int], seed: int | None) -> Mapping[int, int]:
    """Map each of a task's ascending document numbers to its position in a seed's order."""
    order = documents if seed is None else random_order(seed, task, documents)
    return {number: position for position, number in enumerate(order)}
