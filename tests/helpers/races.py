"""Outcomes of runs that stop early, and races of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from tracker.schema.questions import parse_question
from tracker.stats.accuracy import weights_by_task
from tracker.stats.stopping import Race

SEED = 5


N_RUNS = 4


LAYER_LOSSES = [0.6, 0.35, 0.1, 0.02]
"""How much each layer costs."""


Outcomes = dict[tuple[str, int], np.ndarray]


def draw_outcomes(sizes: Mapping[str, int], *task_losses: list[float]) -> Outcomes:
    """Draw whether each model is right on each document; each task has drops of its own."""
    generator = np.random.default_rng(1)
    outcomes, drops = {}, task_losses or [LAYER_LOSSES] * len(sizes)
    for (task, size), losses in zip(sizes.items(), drops, strict=True):
        for number in range(size):
            outcomes[task, number] = np.array([1.0, *(generator.random(N_RUNS) >= losses)])
    return outcomes


def count_started(order: list[tuple[str, int]], sizes: Mapping[str, int]) -> int:
    """Count the documents of the whole blocks that contain the beginning of an order."""
    counts = Counter(task for task, _ in order)
    return sum(min(size, -(-counts[task] // 32) * 32) for task, size in sizes.items())


def run_race(outcomes: Outcomes, order: list[tuple[str, int]], by_size: bool = True) -> Race:
    """Return the race over outcomes in an order, a look after each 32 of them."""
    weights = weights_by_task([task for task, _ in order], by_size) * len(order)
    drops = np.array([outcomes[d][0] - outcomes[d][1:] for d in order]) * weights[:, None]
    race = Race(parse_question("top 1"), len(order), N_RUNS, float(weights.max()))
    for start in range(0, len(order), 32):
        if not race.is_answered:
            race.update(drops[start : start + 32])
    return race
