"""Which of several means are the largest, by their differences, two by two.

What two runs have in common cancels in the difference of their values of a document, so differences
vary less than two values that are looked at one by one, and a difference has one error instead of
two. Against each claim "b is no better than a" one bets as in `sequences`, with all documents that
both were measured on.

Of all pairs, only those count from which a wrong answer could come: one of the `count` best beside
one of the others. That are count · (runs − count), whichever the best are, and the error is shared
evenly among so many (a union bound).
"""

from __future__ import annotations

import math

import numpy as np

from tracker.stats.arrays import Array, Mask, Numbers

FRACTIONS = 0.8 / 2.0 ** np.arange(4)
"""What is risked of the capital while nearly all documents are still to come. The best is about
the range · the difference / its variance."""

MOST = 0.9
"""What is risked at most."""

SAME = 1e-9
"""Means that are nearer to each other than this differ by rounding alone."""

_LEAST = 1e-6
"""The least room that a null hypothesis is given, in units of the range; it makes bets smaller."""


class SequentialTopK:
    """The `count` largest of several means over one finite population.

    The documents must come in random order. Who is settled takes no further part. With a
    tolerance, none who is chosen is more than that below the last place that counts, and none who
    is not is more than that above it.

    Attributes:
        open: `[runs]`, who is not settled.
        chosen: `[runs]`, who is among the largest, as far as that is settled.
        seen: Documents that were looked at.

    References:
        S. Kalyanakrishnan, A. Tewari, P. Auer, P. Stone, ICML 2012 (the answer, within a
        tolerance). I. Waudby-Smith, A. Ramdas, JRSS-B 86 (2024) 1-27 (betting).

    Examples:
        Run 1 is right where run 0 is, and on every eighth document more.

        >>> right = np.arange(400)[:, None] % [2, 2, 3] == 0
        >>> right[:, 1] |= np.arange(400) % 8 == 1
        >>> drawn = np.random.default_rng(0).permutation(right)
        >>> duels = SequentialTopK(400, 3, count=1)
        >>> while duels.open.any():
        ...     duels.look(drawn[duels.seen :][:32])
        >>> duels.seen, duels.chosen.tolist()
        (128, [False, True, False])
    """

    def __init__(
        self,
        population: int,
        runs: int,
        count: int,
        *,
        within: float | None = None,
        level: float = 0.95,
        reach: float = 1.0,
    ) -> None:
        """Begin before the first document.

        Args:
            population: Documents that there are.
            runs: How many means.
            count: How many are to be chosen, at least one and not all.
            within: The tolerance; None = none at all, so that exact ties for the last place stay
                open.
            level: The probability with which the answer is right.
            reach: How far two values of a document can lie apart.
        """
        self.open: Mask = np.ones(runs, dtype=bool)
        self.chosen: Mask = np.zeros(runs, dtype=bool)
        self.seen = 0
        self._population, self._count, self._reach = population, count, reach
        self._tolerant = within is not None
        # By how much a is better than b, at least, were it wrong that b beats a, or nearly does.
        self._nulls = np.array([-SAME] if within is None else [-SAME, within + SAME])
        self._enough = math.log(count * (runs - count) / (1 - level))
        self._totals = np.zeros(runs)
        self._capital = np.zeros((len(FRACTIONS), runs, runs, len(self._nulls)))
        self._claimed = np.zeros((runs, runs, len(self._nulls)), dtype=bool)

    def look(self, values: Array) -> None:
        """Look at further documents, in their order.

        Args:
            values: `[documents, runs]`; of runs that are not open they do not count, and may be
                missing.

        Raises:
            ValueError: There are more documents than the population has, or values of two runs
                lie further apart than was said, or are not finite.
        """
        if self.seen + len(values) > self._population:
            raise ValueError(f"more than all {self._population} documents")
        contending = np.flatnonzero(self.open)
        values = np.asarray(values, dtype=np.float64)
        spread = np.ptp(values[:, contending], axis=1) if contending.size else np.zeros(1)
        if not (spread <= self._reach + SAME).all():
            raise ValueError(f"two values of a document are more than {self._reach:g} apart")
        if not contending.size or not len(values):
            return
        first, second = (contending[of] for of in np.nonzero(~np.eye(contending.size, dtype=bool)))
        # Where a is known to be better than b, nobody bets on b any more.
        lacking = ~self._claimed[first, second].all(axis=1) & ~self._claimed[second, first, 0]
        first, second = first[lacking], second[lacking]
        self._bet(values, first, second)
        self._totals[contending] += values[:, contending].sum(axis=0)
        self.seen += len(values)
        rich = np.logaddexp.reduce(self._capital[:, first, second]) - math.log(len(FRACTIONS))
        certain = np.zeros_like(rich, dtype=bool)
        if self.seen == self._population:
            means = (self._totals[first] - self._totals[second]) / self._population
            certain = means[:, None] < self._nulls
        self._claimed[first, second] |= certain | (rich >= self._enough)
        self._settle()

    def _bet(self, values: Array, first: Numbers, second: Numbers) -> None:
        """Bet for each pair that the second is better: its capital if the first were as good."""
        differences = values[:, first] - values[:, second]
        before = np.cumsum(differences, axis=0) - differences
        before += self._totals[first] - self._totals[second]
        left = self._population - self.seen - np.arange(len(values))
        # What the difference would be, on average, over the documents that are left.
        rest = (self._population * self._nulls - before[:, :, None]) / left[:, None, None]
        room = np.maximum(self._reach - rest, _LEAST * self._reach)
        odds = (rest - differences[:, :, None]) / room
        for capital, fraction in zip(self._capital, FRACTIONS, strict=True):
            risked = np.minimum(fraction * self._population / left, MOST)[:, None, None]
            with np.errstate(over="ignore"):  # an infinite capital is enough
                capital[first, second] += np.log(np.prod(1 + risked * odds, axis=0))

    def _settle(self) -> None:
        """Settle who beats, or is beaten by, as many of those who are open as it takes."""
        while True:
            contending = np.flatnonzero(self.open)
            places = self._count - int(self.chosen.sum())
            claimed = self._claimed[np.ix_(contending, contending)]
            member = claimed[..., 0].sum(axis=0) >= len(contending) - places
            outside = claimed[..., 0].sum(axis=1) >= places
            order = np.lexsort((-self._totals[contending], outside, ~member))
            ahead, behind = order[:places], order[places:]
            answered = member.sum() >= places or outside.sum() >= len(behind)
            if self._tolerant and not answered:
                answered = bool(claimed[np.ix_(behind, ahead)][..., 1].all())
            if answered:
                self.chosen[contending[ahead]] = True
                self.open[:] = False
                return
            if not (member | outside).any():
                return
            self.chosen[contending[member]] = True
            self.open[contending[member | outside]] = False
