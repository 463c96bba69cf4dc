"""Outcomes of runs that stop early, and races of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tracker.core.questions import question
from tracker.stats.accuracy import weights_by_task
from tracker.stats.stopping import Race

SEED = 5


RUNS = 4


LOST = [0.6, 0.35, 0.1, 0.02]
"""How much each layer costs."""


Outcomes = dict[tuple[str, int], np.ndarray]


def outcomes(sizes: Mapping[str, int], *lost: list[float]) -> Outcomes:
    """Draw whether each model is right on each document; `lost` holds the drops of each task."""
    draw = np.random.default_rng(1)
    return {
        (task, number): np.array([1.0, *(draw.random(RUNS) >= costs)])
        for (task, size), costs in zip(sizes.items(), lost or [LOST] * len(sizes), strict=True)
        for number in range(size)
    }


def begun(order: list[tuple[str, int]], sizes: Mapping[str, int]) -> int:
    """Count the documents of the whole blocks that contain the beginning of an order."""
    return sum(
        min(size, -(-sum(name == task for name, _ in order) // 32) * 32)
        for task, size in sizes.items()
    )


def raced(every: Outcomes, order: list[tuple[str, int]], by_size: bool = True) -> Race:
    """Return the race over outcomes in an order, a look after each 32 of them."""
    weights = weights_by_task([task for task, _ in order], by_size) * len(order)
    drops = np.array([every[place][0] - every[place][1:] for place in order]) * weights[:, None]
    plain = Race(question("top 1"), len(order), RUNS, float(weights.max()))
    for start in range(0, len(order), 32):
        if not plain.standing.answered:
            plain.look(drops[start : start + 32])
    return plain
