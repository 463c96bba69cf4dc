"""What bounds of several means say of a question, and who is still needed for its answer.

Bounds that are drawn together never take an answer back: a run whose part is settled stays settled
when only others are measured on. Values of runs whose bounds meet are not told apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracker.metrics.sequences import MeanSequences
from tracker.questions import Kind, Question

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_SAME = 1e-9
"""Bounds that are nearer to each other than this differ by rounding alone."""


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


def standing(
    kind: Kind,
    low: Array,
    high: Array,
    count: int | None = None,
    within: float | None = None,
) -> Standing:
    """Say how a question stands.

    A set is settled as in the identification of best arms: with `within` ε, none who is chosen
    is more than ε worse than the last place that counts, and none who is not is more than ε better.
    Without it the set is the only right one, so that exact ties for the last place stay open.

    Args:
        kind: `drop`: each mean is to be known within ± `within`. `top` and `prune`: the `count`
            largest or smallest means. `sign`: which means are not 0.
        low: `[runs]`, lower bounds that hold together.
        high: `[runs]`, upper bounds.
        count: How many are to be chosen.
        within: The tolerance, in the unit of the means.

    Returns:
        Who is open, and who is chosen.

    Raises:
        ValueError: The question lacks a number, or there are not more runs than are to be chosen.

    References:
        S. Kalyanakrishnan, A. Tewari, P. Auer, P. Stone, ICML 2012 (choosing by overlapping
        bounds, within a tolerance).

    Examples:
        >>> low, high = np.array([0.1, 0.3, 0.0]), np.array([0.35, 0.4, 0.05])
        >>> found = standing("top", low, high, count=1)
        >>> found.open.tolist(), found.answered
        ([True, True, False], False)
        >>> standing("top", low, high, count=2).chosen.tolist()
        [True, True, False]
    """
    none = np.zeros(len(low), dtype=bool)
    if kind == "drop":
        if within is None:
            raise ValueError("drop: within what?")
        return Standing(high - low > 2 * within + _SAME, none)
    if kind == "sign":
        differs = (low > _SAME) | (high < -_SAME)
        return Standing(~differs & (high - low > _SAME), differs)
    if count is None or not 0 < count < len(low):
        raise ValueError(f"{kind}: {count} of {len(low)}")
    if kind == "prune":
        low, high = -high, -low
    return _set(low, high, count, within or 0.0)


class Race:
    """Several means of one population, looked at until a question is answered.

    The documents must come in random order. A run whose part of the answer is settled takes no
    further part.

    Attributes:
        bounds: What is known of each mean, all of it together with the question's confidence.
        standing: How the question stands.
    """

    def __init__(
        self,
        asked: Question,
        population: int,
        runs: int,
        *,
        lowest: float = -1.0,
        highest: float = 1.0,
    ) -> None:
        """Begin before the first document.

        Args:
            asked: The question.
            population: Documents that there are.
            runs: How many means.
            lowest: The lowest value that a document can have.
            highest: The highest.

        Raises:
            ValueError: So many runs cannot answer it.
        """
        asked.refuse(runs)
        self._asked = asked
        self.bounds = MeanSequences(
            population, runs, level=asked.level, lowest=lowest, highest=highest
        )
        self.standing = self._stand()

    def look(self, values: Array) -> None:
        """Look at further documents.

        Args:
            values: `[documents, runs]`; of runs that are not open they do not count, and may be
                missing.

        Raises:
            ValueError: A value is not finite or out of range, or there are too many documents.
        """
        (contending,) = np.nonzero(self.standing.open)
        self.bounds.add(values[:, contending], contending)
        self.standing = self._stand()

    def _stand(self) -> Standing:
        low, high, asked = self.bounds.low, self.bounds.high, self._asked
        return standing(asked.kind, low, high, asked.count, asked.within)


def _set(low: Array, high: Array, count: int, within: float) -> Standing:
    """Choose the largest."""
    # [i, j]: i is not beaten by j, or by no more than is tolerated.
    stands = low[:, None] + within - high > (-_SAME if within else _SAME)
    np.fill_diagonal(stands, val=False)
    member = stands.sum(axis=1) >= len(low) - count
    outside = stands.sum(axis=0) >= count
    opened = ~(member | outside)
    chosen = member & ~outside
    if not opened.any():
        # At most `count` must be in and the others may; of those that may be either the best ones.
        order = np.lexsort((-(low + high), ~member, ~chosen))
        chosen = np.isin(np.arange(len(low)), order[:count])
    return Standing(opened, chosen)
