"""Which documents are computed twice in half precision, to see what rounding decides."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tracker.core.documents import Document
from tracker.core.extent import shuffled

RATE = 64
"""One in so many documents is computed twice."""
LEAST = 4
"""Documents of a cell that are at least: the first ones of its random order, which a question that
is answered early has looked at."""


def computed_twice(documents: Sequence[Document], seed: int) -> set[tuple[str, int]]:
    """Draw the documents, as (task, index), that are computed twice in half precision.

    Args:
        documents: The cell's documents. Only those have a margin that have two options.
        seed: Of the documents' random order.

    Returns:
        The same ones each time, and more of them when there are more documents.
    """
    of_task: dict[str, list[int]] = {}
    for document in documents:
        if document.choices > 1:
            of_task.setdefault(document.task, []).append(document.index)
    every = [(task, index) for task, some in of_task.items() for index in some]
    drawn = {
        place for place in every if random.Random("/".join(map(str, place))).random() < 1 / RATE
    }
    return drawn | {*shuffled(seed, of_task)[:LEAST]}
