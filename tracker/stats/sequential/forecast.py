"""How many documents a question will take, from some that were measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracker.core.questions import Question
from tracker.stats.arrays import Array, Mask, Numbers
from tracker.stats.resampling import SEED
from tracker.stats.sequential.stopping import Race

DRAWS = 24
"""Populations that are simulated."""

LOOK = 32
"""Documents between two looks."""


@dataclass(frozen=True)
class Forecast:
    """What a race took in simulated populations.

    Attributes:
        looked: `[draws]`, documents that were looked at.
        seen: `[draws, runs]`, the documents of each run.
        answered: `[draws]`, whether the question was answered by the last of them.
    """

    looked: Numbers
    seen: Numbers
    answered: Mask


def forecast(
    asked: Question,
    values: Array,
    population: int,
    *,
    reach: float = 1.0,
    chances: Array | None = None,
    draws: int = DRAWS,
) -> Forecast:
    """Run a race in populations whose documents are drawn from measured ones, with replacement.

    It knows no more than these: where there are few, runs differ by more among them than among all,
    and the forecast is too low.

    Args:
        asked: The question.
        values: `[documents, runs]`, what was measured, of one document at least.
        population: Documents that there are.
        reach: As of a `Race`.
        chances: `[documents]`, how likely each is drawn, summing to 1; None = all alike.
        draws: How many populations.

    Returns:
        What each took.

    Raises:
        ValueError: So many runs cannot answer it.

    Examples:
        A run that loses half of the documents among two that lose few: how many of 2,000 show it.

        >>> lost = np.array([[1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]] * 20, dtype=float)
        >>> found = forecast(Question("top", 1), lost, 2000)
        >>> bool(found.looked.max() < 500), bool(found.answered.all())
        (True, True)
    """
    dice = np.random.default_rng(SEED)
    took = []
    for _ in range(draws):
        race = Race(asked, population, values.shape[1], reach)
        at = 0
        while at < population and not race.standing.answered:
            count = min(LOOK, population - at)
            race.look(values[dice.choice(len(values), size=count, p=chances)])
            at += count
        took.append((at, race.seen, race.standing.answered))
    return Forecast(*map(np.array, zip(*took, strict=True)))
