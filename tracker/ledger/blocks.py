"""Documents that are computed, locked and written together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import quote

from tracker.core.extent import random_order

BLOCK = 32
"""Documents that are computed, locked and written together."""


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


@lru_cache(maxsize=256)
def places(task: str, documents: Sequence[int], seed: int | None) -> Mapping[int, int]:
    """Each of a task's documents, given ascending → its place in the order that a seed gives."""
    order = documents if seed is None else random_order(seed, task, documents)
    return {number: place for place, number in enumerate(order)}
