"""Divide documents into the blocks that are computed and locked together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple
from urllib.parse import quote

from tracker.core.extent import random_order

BLOCK = 32
"""Documents of a block, which are locked together and usually computed and written together."""
PORTION = 2048
"""Maximum of documents times ablations that are computed and written together."""


@dataclass(frozen=True, order=True)
class Block:
    """Up to `BLOCK` documents of one task, consecutive in the order that a seed gives.

    Attributes:
        task: The lm-eval task.
        number: The number of the block, 0-based.
        seed: The seed of the random order; None for the documents in their own order.
    """

    task: str
    number: int
    seed: int | None = None

    @property
    def name(self) -> str:
        """The block's name in file names; a quoted task never contains a plus."""
        order = "" if self.seed is None else f"+{self.seed}"
        return f"{quote(self.task, safe='')}{order}.{self.number:05d}"


class Turn(NamedTuple):
    """A block in the order of measuring, with its number of documents.

    `end` is the number of documents of the order that are measured once the block is.
    """

    block: Block
    size: int
    end: int


def turns(order: Sequence[str], counts: Mapping[str, int], seed: int | None = None) -> list[Turn]:
    """List the blocks in the order in which an order of documents needs them.

    Each task has its own blocks. A block is measured as a whole when its first document is needed.

    Args:
        order: The task of each document.
        counts: Number of documents of each task, which may be more than are in the order.
        seed: The seed of the order; None for the documents in their own order.

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
    """Split a block's missing outcomes, so that a killed process loses minutes and not hours.

    Args:
        missing: Names of ablations → the documents that lack exactly these.

    Yields:
        Names of ablations and some of their documents: at most `PORTION` outcomes, or one document.
    """
    for names, documents in missing.items():
        size = max(1, PORTION // len(names))
        for start in range(0, len(documents), size):
            yield names, documents[start : start + size]


@lru_cache(maxsize=256)
def places(task: str, documents: Sequence[int], seed: int | None) -> Mapping[int, int]:
    """Map each document of a task, given ascending, to its position in a seed's order."""
    order = documents if seed is None else random_order(seed, task, documents)
    return {number: place for place, number in enumerate(order)}
