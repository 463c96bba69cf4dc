"""Stopping rules for questions about several means of one population.

The size of a drop, and whether it differs from 0, follow from bounds of each mean. The largest
drops follow from pairwise differences (`SequentialTopK`). Neither revises an answer: a settled run
stays settled when only others are measured. `forecast` estimates the documents that a question will
take.

The largest of several means, by pairwise differences:

Noise that two runs share cancels in the difference of their values of a document. Differences
therefore vary less than two single values, and need one error instead of two. Against each claim "b
is no better than a" one bets as in `confidence`, with all documents on which both were measured.

A wrong answer can come only from pairs of one of the `count` best with one of the others. These are
count · (runs − count) pairs, whichever the best are, and share the error evenly (a union bound).

The smallest of several means, for unbounded values:

Log-probabilities are unbounded, so bets on them cannot be bounded, and no interval holds exactly at
every look. An asymptotic confidence sequence holds in the limit, like a normal interval for a
single look. It needs finite variances, and enough documents before its first look. It cannot see
values so rare that none occurs: 128 documents miss what one document in 43 shows with a probability
of 5 %.

After t documents it is the mean ± σ̂ · √(2 (τρ² + 1) / (τρ)² · log(√(τρ² + 1) / α)), with the
standard deviation σ̂ so far. Documents are drawn from a finite population without replacement, so
the sum follows a Brownian bridge and not a Brownian motion. In the time τ = t·N / (N − t) the
bridge is a motion, and after the last document the interval is a point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tracker.core.questions import Question
from tracker.stats.accuracy import LEVEL
from tracker.stats.arrays import Array, Mask, Numbers
from tracker.stats.confidence import MeanSequences
from tracker.stats.resampling import SEED

FRACTIONS = 0.8 / 2.0 ** np.arange(4)
"""Shares of the capital that are risked while nearly all documents are to come.

The best share is about the range · the difference / its variance.
"""

MOST = 0.9
"""Largest share of the capital that is risked."""

SAME = 1e-9
"""Means that are nearer to each other than this differ by rounding alone."""

_LEAST = 1e-6
"""The least room that a null hypothesis is given, in units of the range; it makes bets smaller."""


class SequentialTopK:
    """The `count` largest of several means over one finite population.

    The documents must come in random order. A settled run takes no further part. With a tolerance,
    no chosen run is further below the last chosen rank than the tolerance, and no other run is
    further above it.

    Attributes:
        open: `[runs]`, mask of the runs that are not settled.
        chosen: `[runs]`, mask of the runs that are settled to be among the largest.
        seen: Number of evaluated documents.

    References:
        S. Kalyanakrishnan, A. Tewari, P. Auer, P. Stone, ICML 2012 (the answer, within a
        tolerance). I. Waudby-Smith, A. Ramdas, JRSS-B 86 (2024) 1-27 (betting).

    Examples:
        Run 1 is right whenever run 0 is, and on every eighth document more.

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
        """Start before the first document.

        Args:
            population: Number of documents in the population.
            runs: Number of means.
            count: Number of runs to choose, at least one and not all.
            within: Tolerance; None = no tolerance, so that exact ties for the last rank stay open.
            level: The probability with which the answer is right.
            reach: Largest difference of two values of a document.
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
        """Evaluate further documents, in their order.

        Args:
            values: `[documents, runs]`; values of settled runs are ignored, and may be missing.

        Raises:
            ValueError: There are more documents than the population has, or the values of two runs
                differ by more than `reach` or are not finite.
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
        # Stop betting on b once a is known to be better.
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
        # Mean difference over the remaining documents under the claim.
        rest = (self._population * self._nulls - before[:, :, None]) / left[:, None, None]
        room = np.maximum(self._reach - rest, _LEAST * self._reach)
        odds = (rest - differences[:, :, None]) / room
        for capital, fraction in zip(self._capital, FRACTIONS, strict=True):
            risked = np.minimum(fraction * self._population / left, MOST)[:, None, None]
            with np.errstate(over="ignore"):  # an infinite capital is enough
                capital[first, second] += np.log(np.prod(1 + risked * odds, axis=0))

    def _settle(self) -> None:
        """Settle the runs that beat, or lose to, enough of the open runs."""
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


FIRST = 128
"""Documents before the first look."""
BEST_AT = 512
"""Number of documents at which the intervals are optimised to be narrowest."""


class SmallestMean:
    """The smallest of several means over one finite population, within a tolerance.

    The documents must come in random order. A run that is shown to be larger than the smallest so
    far takes no further part. Differences are evaluated pairwise, on the documents of both. The
    pairs of the best run with each other run share the error, whichever is best (a union bound).

    Attributes:
        open: `[runs]`, mask of the runs that may be the smallest, or equally good.
        chosen: `[runs]`, mask of the runs that are at most the tolerance above the smallest; empty
            at first. Several only if they are equal on all documents.
        seen: `[runs]`, number of documents of each run.
        means: `[runs]`, mean of each run on these; infinite if a value is not finite.

    References:
        I. Waudby-Smith et al., Time-uniform central limit theory and asymptotic confidence
        sequences, Annals of Statistics 52 (2024), arXiv 2103.06476.

    Examples:
        Run 1 is 0.2 below run 0 on average, and run 2 is 0.005 above run 1: either is acceptable.

        >>> values = np.random.default_rng(0).normal(0, 0.3, (4000, 1)) + [[0.2, 0.0, 0.005]]
        >>> values += np.random.default_rng(1).normal(0, 0.05, values.shape)
        >>> race = SmallestMean(4000, 3, within=0.01)
        >>> while race.open.any():
        ...     race.look(values[race.looked :][:32])
        >>> race.seen.tolist(), race.chosen.tolist()
        ([128, 160, 160], [False, False, True])
    """

    def __init__(self, population: int, runs: int, *, within: float, level: float = LEVEL) -> None:
        """Start before the first document.

        Args:
            population: Number of documents in the population.
            runs: Number of means.
            within: Tolerance.
            level: Probability with which the answer is right.
        """
        self.open: Mask = np.ones(runs, dtype=bool)
        self.chosen: Mask = np.zeros(runs, dtype=bool)
        self.seen: Numbers = np.zeros(runs, dtype=np.int64)
        self.means: Array = np.full(runs, np.nan)
        self._population, self._within = population, within
        self._error = (1 - level) / max(1, runs - 1)
        self._values: list[Array] = []

    @property
    def looked(self) -> int:
        """Documents that were looked at."""
        return sum(map(len, self._values))

    def look(self, values: Array) -> None:
        """Evaluate further documents, in their order.

        Args:
            values: `[documents, runs]`; values of settled runs are ignored, and may be missing. A
                run with a value that is not finite is excluded.

        Raises:
            ValueError: There are more documents than the population has.
        """
        if self.looked + len(values) > self._population:
            raise ValueError(f"more than all {self._population} documents")
        (contending,) = np.nonzero(self.open)
        if not contending.size or not len(values):
            return
        self._values.append(np.asarray(values, dtype=np.float64))
        self.seen[contending] += len(values)
        here = np.concatenate([each[:, contending] for each in self._values])
        usable = np.isfinite(here).all(axis=0)
        self.means[contending] = np.where(usable, np.where(usable, here, 0).mean(axis=0), np.inf)
        self.open[contending[~usable]] = False
        if usable.any():
            self._settle(here[:, usable], contending[usable])

    def _settle(self, here: Array, contending: Numbers) -> None:
        """Drop those that are shown to be larger, and choose where the rest is as good."""
        looked, means = len(here), self.means[contending]
        best = int(means.argmin())
        if looked == self._population or len(contending) == 1:
            self.chosen[contending[means <= means[best] + SAME]] = True
            self.open[:] = False
        elif looked >= FIRST:
            apart = here - here[:, [best]]
            half = apart.std(axis=0, ddof=1) * width(looked, self._population, self._error)
            least = means - means[best] - half
            self.open[contending[least > 0]] = False
            # −least is the largest excess cost of the best over another run.
            if (least >= -self._within).all():
                self.chosen[contending[best]] = True
                self.open[:] = False


def width(looked: int, population: int, error: float) -> float:
    """Half of an asymptotic confidence sequence's width, in standard deviations.

    Args:
        looked: Documents that were looked at.
        population: Documents that there are, more than that.
        error: The probability with which it ever misses the mean.

    Returns:
        The factor.

    Examples:
        Wider than an interval of one look, which is 1.96 / √512 = 0.087.

        >>> round(width(512, 10**9, 0.05), 3)
        0.134
    """
    twice = -2 * math.log(error)
    rho = (twice + math.log(twice + 1)) / BEST_AT
    tau = looked * population / (population - looked)
    grown = tau * rho + 1
    return math.sqrt(2 * grown / (tau**2 * rho) * math.log(math.sqrt(grown) / error))


@dataclass(frozen=True)
class Standing:
    """State of a question.

    Attributes:
        open: `[runs]`, mask of the runs whose part of the answer is open.
        chosen: `[runs]`, mask of the runs that are settled to be in the requested set. For `sign`
            these are the runs whose mean is not 0; for `drop` none.
    """

    open: Mask
    chosen: Mask

    @property
    def answered(self) -> bool:
        """True if nothing is open."""
        return not self.open.any()


def standing(low: Array, high: Array, within: float | None) -> Standing:
    """Return the state of a question about single means.

    Args:
        low: `[runs]`, lower bounds that hold together.
        high: `[runs]`, upper bounds.
        within: Target half width of each mean's interval; None = find the means that are not 0.

    Returns:
        The masks of open and of chosen runs.

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
    """Race of several means of one population until a question is answered.

    The documents must come in random order. A settled run takes no further part.

    Attributes:
        standing: State of the question.
        seen: `[runs]`, number of documents of each run.
    """

    def __init__(self, asked: Question, population: int, runs: int, reach: float = 1.0) -> None:
        """Start before the first document.

        Args:
            asked: The question.
            population: Number of documents in the population.
            runs: Number of means.
            reach: Largest absolute value of a document, and largest difference of two runs' values.

        Raises:
            ValueError: The question needs another number of runs.
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
        """The mask `[runs]` of the runs that are settled to be in the requested set."""
        return self.standing.chosen

    @property
    def means(self) -> Array:
        """The midpoints `[runs]` of the bounds of the means."""
        return np.asarray((self.bounds.low + self.bounds.high) / 2)

    @property
    def bounds(self) -> MeanSequences:
        """The bounds of each mean, which hold together with the question's confidence.

        The answer separately has the same confidence, because the largest means are found without
        these bounds. They are computed on first use.
        """
        while self._unread:
            self._bounds.add(*self._unread.pop(0))
        return self._bounds

    def look(self, values: Array) -> None:
        """Evaluate further documents.

        Args:
            values: `[documents, runs]`; values of settled runs are ignored, and may be missing.

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
    """Number of documents that a race takes in simulated populations.

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
    """Simulate a race in populations that are drawn from measured documents with replacement.

    With few documents, runs differ by more on them than in the population, so the forecast is too
    low.

    Args:
        asked: The question.
        values: `[documents, runs]`, measured values of at least one document.
        population: Number of documents in the population.
        reach: Largest absolute value of a document, as for `Race`.
        chances: `[documents]`, probability of drawing each, summing to 1; None = equal.
        draws: Number of populations.

    Returns:
        The result of each race.

    Raises:
        ValueError: The question needs another number of runs.

    Examples:
        A run that loses half of the documents, among two that lose few: it is found in under 500 of
        2,000.

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
