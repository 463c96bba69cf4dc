"""What is asked of several means of one population, and who is still needed for its answer.

How large a drop is, and whether it differs from 0, is read from bounds of each mean. Which are the
largest is read from differences, two by two (`duels`). Neither takes an answer back: a run whose
part is settled stays settled when only others are measured on.

And how many documents a question will take, from some that were measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracker.core.questions import Question
from tracker.stats.arrays import Array, Mask, Numbers
from tracker.stats.resampling import SEED
from tracker.stats.sequential.confidence import MeanSequences
from tracker.stats.sequential.top_k import SAME, SequentialTopK


@dataclass(frozen=True)
class Standing:
    """How a question stands.

    Attributes:
        open: `[runs]`, whose part of the answer is not settled.
        chosen: `[runs]`, who is in the set that is asked for, as far as it is settled: for `sign`
            whose mean is not 0; for `drop` nobody.
    """

    open: Mask
    chosen: Mask

    @property
    def answered(self) -> bool:
        """Whether nothing is open."""
        return not self.open.any()


def standing(low: Array, high: Array, within: float | None) -> Standing:
    """Say how a question about single means stands.

    Args:
        low: `[runs]`, lower bounds that hold together.
        high: `[runs]`, upper bounds.
        within: Each mean is to be known within ± this; None: which means are not 0?

    Returns:
        Who is open, and who is chosen.

    Examples:
        >>> low, high = np.array([0.1, -0.3, 0.0]), np.array([0.35, 0.4, 0.05])
        >>> standing(low, high, within=0.1).open.tolist()
        [True, True, False]
        >>> standing(low, high, within=None).chosen.tolist()
        [True, False, False]
    """
    if within is not None:
        return Standing(high - low > 2 * within + SAME, np.zeros(len(low), dtype=bool))
    differs = (low > SAME) | (high < -SAME)
    return Standing(~differs & (high - low > SAME), differs)


class Race:
    """Several means of one population, looked at until a question is answered.

    The documents must come in random order. A run whose part of the answer is settled takes no
    further part.

    Attributes:
        standing: How the question stands.
        seen: `[runs]`, the documents of each run.
    """

    def __init__(self, asked: Question, population: int, runs: int, reach: float = 1.0) -> None:
        """Begin before the first document.

        Args:
            asked: The question.
            population: Documents that there are.
            runs: How many means.
            reach: How far a document's values can be from 0, and two runs' values of it apart.

        Raises:
            ValueError: So many runs cannot answer it.
        """
        asked.refuse(runs)
        self._asked = asked
        self._bounds = MeanSequences(
            population,
            runs,
            level=asked.level,
            lowest=-reach,
            highest=reach,
            within=asked.within if asked.kind == "drop" else None,
        )
        self._sign = -1.0 if asked.kind == "prune" else 1.0
        self._duels = None
        if asked.count is not None:
            self._duels = SequentialTopK(
                population, runs, asked.count, within=asked.within, level=asked.level, reach=reach
            )
        self.seen = np.zeros(runs, dtype=np.int64)
        self._unread: list[tuple[Array, Numbers]] = []
        self.standing = self._stand()

    @property
    def open(self) -> Mask:
        """`[runs]`, whose part of the answer is not settled."""
        return self.standing.open

    @property
    def chosen(self) -> Mask:
        """`[runs]`, who is in the set that is asked for, as far as it is settled."""
        return self.standing.chosen

    @property
    def means(self) -> Array:
        """`[runs]`, the middle of what is known of each mean."""
        return np.asarray((self.bounds.low + self.bounds.high) / 2)

    @property
    def bounds(self) -> MeanSequences:
        """What is known of each mean, all of it together with the question's confidence.

        The answer has that confidence too, each for itself: the largest means are found without
        these bounds, which are drawn when they are asked for.
        """
        while self._unread:
            self._bounds.add(*self._unread.pop(0))
        return self._bounds

    def look(self, values: Array) -> None:
        """Look at further documents.

        Args:
            values: `[documents, runs]`; of runs that are not open they do not count, and may be
                missing.

        Raises:
            ValueError: A value is not finite or out of range, two are too far apart, or there are
                too many documents.
        """
        (contending,) = np.nonzero(self.standing.open)
        self._bounds.scaled(values[:, contending])
        self._unread.append((values[:, contending], contending))
        if self._duels is not None:
            self._duels.look(self._sign * values)
        self.seen[contending] += len(values)
        self.standing = self._stand()

    def _stand(self) -> Standing:
        if self._duels is not None:
            return Standing(self._duels.open.copy(), self._duels.chosen.copy())
        return standing(self.bounds.low, self.bounds.high, self._asked.within)


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
