"""Documents that are computed, locked and written together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote

from tracker.core.extent import random_order

BLOCK = 32
"""Documents that are locked together, and computed and written, unless ablations are very many."""
PORTION = 2048
"""Documents times ablations that are computed and written together, of a block of more."""


@dataclass(frozen=True, order=True)
class Block:
    """Up to `BLOCK` documents of one task, consecutive in the order that a seed gives.

    Attributes:
        task: The lm-eval task.
        number: Which block, 0-based.
        seed: Of the random order; None for the documents as they come.
    """

    task: str
    number: int
    seed: int | None = None

    @property
    def name(self) -> str:
        """The block's name in file names; no quoted task holds a plus."""
        order = "" if self.seed is None else f"+{self.seed}"
        return f"{quote(self.task, safe='')}{order}.{self.number:05d}"


class Turn(NamedTuple):
    """A block of so many documents, which are measured together.

    `end` is how far one can look then: to the first document of the next block.
    """

    block: Block
    size: int
    end: int


def turns(order: Sequence[str], counts: Mapping[str, int], seed: int | None = None) -> list[Turn]:
    """Say in which order blocks are measured, so that documents can be looked at in an order.

    Tasks are measured in blocks of their own: the first document of one takes all of it.

    Args:
        order: The task of each document.
        counts: Documents that each task has, which may be more than are in the order.
        seed: Of the order, where it is that of a seed.

    Returns:
        The blocks.
    """
    seen: Counter[str] = Counter()
    begins: dict[int, Block] = {}
    for place, task in enumerate(order):
        if seen[task] % BLOCK == 0:
            begins[place] = Block(task, seen[task] // BLOCK, seed)
        seen[task] += 1
    ends = [*begins, len(order)][1:]
    return [
        Turn(block, min(BLOCK, counts[block.task] - block.number * BLOCK), end)
        for block, end in zip(begins.values(), ends, strict=True)
    ]


def portions(
    missing: Mapping[tuple[str, ...], Sequence[int]],
) -> Iterator[tuple[tuple[str, ...], Sequence[int]]]:
    """Part what a block lacks, so that a process that is killed loses minutes and not hours.

    Args:
        missing: Names of ablations → the documents that lack just these.

    Yields:
        The same, some documents at a time, `PORTION` answers at most where that is one or more.
    """
    for names, documents in missing.items():
        size = max(1, PORTION // len(names))
        for start in range(0, len(documents), size):
            yield names, documents[start : start + size]


@lru_cache(maxsize=256)
def places(task: str, documents: Sequence[int], seed: int | None) -> Mapping[int, int]:
    """Each of a task's documents, given ascending → its place in the order that a seed gives."""
    order = documents if seed is None else random_order(seed, task, documents)
    return {number: place for place, number in enumerate(order)}
