"""Decide when to stop measuring for questions about several means of one population.

Bounds of each mean decide the size of a drop, and whether it differs from 0. Pairwise differences
decide the largest drops (`SequentialTopK`). Neither revises an answer: a settled run stays settled
when only other runs are measured. `forecast_race` estimates the number of documents that a question
will take.

The largest of several means, by pairwise differences:

Noise that two runs share cancels in the difference of their values of a document. Differences
therefore vary less than two single values, and need one error instead of two. Against each claim "b
is no better than a" one bets as in `confidence`, with all documents on which both were measured.

A wrong answer can come only from pairs of one of the `count` best with one of the others. These are
count · (runs − count) pairs whichever runs are the best. Each pair gets an equal error share.

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
from tracker.stats.arrays import Array, IntArray, Mask
from tracker.stats.confidence import MeanSequences
from tracker.stats.resampling import SEED

BET_FRACTIONS = 0.8 / 2.0 ** np.arange(4)
"""Shares of the capital that bets risk while few documents have been seen.

The best share is about the range · the difference / the variance of the difference.
"""

MAX_BET_FRACTION = 0.9
"""Largest share of the capital that is risked."""

MEAN_TOLERANCE = 1e-9
"""Means that differ by less than this value count as equal."""

_MIN_ROOM = 1e-6
"""Minimum room of a null hypothesis, in units of the range; more room makes bets smaller."""


class SequentialTopK:
    """Sequential choice of the `count` largest means of a population.

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
        ...     duels.update(drawn[duels.seen :][:32])
        >>> duels.seen, duels.chosen.tolist()
        (128, [False, True, False])
    """

    def __init__(
        self,
        population: int,
        n_runs: int,
        count: int,
        *,
        tolerance: float | None = None,
        level: float = 0.95,
        max_difference: float = 1.0,
    ) -> None:
        """Begin a race that has seen no document yet.

        Args:
            population: Number of documents in the population.
            n_runs: Number of means.
            count: Number of runs to choose, at least one and not all.
            tolerance: Difference that is ignored; None = none, so that exact ties for the last
                rank stay open.
            level: The probability with which the answer is right.
            max_difference: Largest difference of two values of a document.
        """
        self.open: Mask = np.ones(n_runs, dtype=bool)
        self.chosen: Mask = np.zeros(n_runs, dtype=bool)
        self.seen = 0
        self._population, self._count, self._max_difference = population, count, max_difference
        # Null hypotheses: a − b is at least this. Rejection shows that b beats a, or nearly does.
        nulls = [] if tolerance is None else [tolerance + MEAN_TOLERANCE]
        self._nulls = np.array([-MEAN_TOLERANCE, *nulls])
        self._log_target = math.log(count * (n_runs - count) / (1 - level))
        self._totals = np.zeros(n_runs)
        self._capital = np.zeros((len(BET_FRACTIONS), n_runs, n_runs, len(self._nulls)))
        self._claims = np.zeros((n_runs, n_runs, len(self._nulls)), dtype=bool)

    def update(self, values: Array) -> None:
        """Evaluate further documents, in their order.

        Args:
            values: `[documents, runs]`; values of settled runs are ignored, and may be missing.

        Raises:
            ValueError: There are more documents than the population has, or the values of two runs
                differ by more than `max_difference` or are not finite.
        """
        if self.seen + len(values) > self._population:
            raise ValueError(f"more than all {self._population} documents")
        runs = np.flatnonzero(self.open)
        if not runs.size or not len(values):
            return
        values = np.asarray(values, dtype=np.float64)
        if not (np.ptp(values[:, runs], axis=1) <= self._max_difference + MEAN_TOLERANCE).all():
            limit = f"{self._max_difference:g}"
            raise ValueError(f"two values of a document differ by more than {limit}")
        a, b = (runs[indexes] for indexes in np.nonzero(~np.eye(runs.size, dtype=bool)))
        # Stop betting on b once a is known to be better.
        is_open = ~self._claims[a, b].all(axis=1) & ~self._claims[b, a, 0]
        a, b = a[is_open], b[is_open]
        self._bet(values, a, b)
        self._totals[runs] += values[:, runs].sum(axis=0)
        self.seen += len(values)
        log_capital = np.logaddexp.reduce(self._capital[:, a, b]) - math.log(len(BET_FRACTIONS))
        is_certain = np.zeros_like(log_capital, dtype=bool)
        if self.seen == self._population:
            means = (self._totals[a] - self._totals[b]) / self._population
            is_certain = means[:, None] < self._nulls
        self._claims[a, b] |= is_certain | (log_capital >= self._log_target)
        self._settle()

    def _bet(self, values: Array, a: IntArray, b: IntArray) -> None:
        """Bet for each pair (a, b) that b is better than a.

        The capital is a martingale if a is as good as b.
        """
        differences = values[:, a] - values[:, b]
        sums = np.cumsum(differences, axis=0) - differences
        sums += self._totals[a] - self._totals[b]
        n_left = (self._population - self.seen - np.arange(len(values)))[:, None, None]
        # Mean difference over the remaining documents under the claim.
        rest_means = (self._population * self._nulls - sums[:, :, None]) / n_left
        max_losses = np.maximum(self._max_difference - rest_means, _MIN_ROOM * self._max_difference)
        odds = (rest_means - differences[:, :, None]) / max_losses
        for capital, fraction in zip(self._capital, BET_FRACTIONS, strict=True):
            risks = np.minimum(fraction * self._population / n_left, MAX_BET_FRACTION)
            with np.errstate(over="ignore"):  # an infinite capital is enough
                capital[a, b] += np.log(np.prod(1 + risks * odds, axis=0))

    def _settle(self) -> None:
        """Settle the runs that beat, or lose to, enough other open runs."""
        while True:
            runs = np.flatnonzero(self.open)
            n_free = self._count - int(self.chosen.sum())
            claims = self._claims[np.ix_(runs, runs)]
            is_member = claims[..., 0].sum(axis=0) >= len(runs) - n_free
            is_outside = claims[..., 0].sum(axis=1) >= n_free
            order = np.lexsort((-self._totals[runs], is_outside, ~is_member))
            leaders, followers = order[:n_free], order[n_free:]
            is_answered = is_member.sum() >= n_free or is_outside.sum() >= len(followers)
            if len(self._nulls) > 1 and not is_answered:
                is_answered = bool(claims[np.ix_(followers, leaders)][..., 1].all())
            if is_answered:
                self.chosen[runs[leaders]] = True
                self.open[:] = False
                return
            if not (is_member | is_outside).any():
                return
            self.chosen[runs[is_member]] = True
            self.open[runs[is_member | is_outside]] = False


FIRST_LOOK = 128
"""Number of documents that are evaluated before the first look."""
NARROWEST_AT = 512
"""Number of documents at which the intervals are optimised to be narrowest."""


class SmallestMean:
    """Sequential choice of the smallest mean of a population.

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
        >>> race = SmallestMean(4000, 3, tolerance=0.01)
        >>> while race.open.any():
        ...     race.update(values[race.looked :][:32])
        >>> race.seen.tolist(), race.chosen.tolist()
        ([128, 160, 160], [False, False, True])
    """

    def __init__(self, population: int, n_runs: int, *, tolerance: float) -> None:
        """Begin a race that has seen no document yet.

        Args:
            population: Number of documents in the population.
            n_runs: Number of means.
            tolerance: Difference that is ignored. The answer is right with 95 % probability.
        """
        self.open: Mask = np.ones(n_runs, dtype=bool)
        self.chosen: Mask = np.zeros(n_runs, dtype=bool)
        self.seen: IntArray = np.zeros(n_runs, dtype=np.int64)
        self.means: Array = np.full(n_runs, np.nan)
        self._population, self._tolerance = population, tolerance
        self._error = (1 - LEVEL) / max(1, n_runs - 1)
        self._values: list[Array] = []

    @property
    def looked(self) -> int:
        """Number of evaluated documents."""
        return sum(map(len, self._values))

    def update(self, values: Array) -> None:
        """Evaluate further documents, in their order.

        Args:
            values: `[documents, runs]`; values of settled runs are ignored, and may be missing. A
                run with a value that is not finite is excluded.

        Raises:
            ValueError: There are more documents than the population has.
        """
        if self.looked + len(values) > self._population:
            raise ValueError(f"more than all {self._population} documents")
        runs = np.flatnonzero(self.open)
        if not runs.size or not len(values):
            return
        self._values.append(np.asarray(values, dtype=np.float64))
        self.seen[runs] += len(values)
        open_values = np.concatenate([block[:, runs] for block in self._values])
        is_usable = np.isfinite(open_values).all(axis=0)
        self.means[runs[~is_usable]] = np.inf
        self.open[runs[~is_usable]] = False
        if is_usable.any():
            self._settle(open_values[:, is_usable], runs[is_usable])

    def _settle(self, values: Array, runs: IntArray) -> None:
        """Drop runs whose mean is shown to be larger; stop if the best remaining run suffices."""
        n_looked, means = len(values), values.mean(axis=0)
        self.means[runs] = means
        best = int(means.argmin())
        if n_looked == self._population or len(runs) == 1:
            self.chosen[runs[means <= means[best] + MEAN_TOLERANCE]] = True
            self.open[:] = False
        elif n_looked >= FIRST_LOOK:
            deviations = (values - values[:, [best]]).std(axis=0, ddof=1)
            half_widths = deviations * half_width(n_looked, self._population, self._error)
            min_excess = means - means[best] - half_widths
            self.open[runs[min_excess > 0]] = False
            # −min_excess is the largest excess cost of the best over another run.
            if (min_excess >= -self._tolerance).all():
                self.chosen[runs[best]] = True
                self.open[:] = False


def half_width(n_looked: int, n_documents: int, error_rate: float) -> float:
    """Return the half width of a confidence sequence, in standard deviations.

    Args:
        n_looked: Number of evaluated documents.
        n_documents: Number of documents in the population, above `n_looked`.
        error_rate: The probability that the sequence ever misses the mean.

    Returns:
        The factor.

    Examples:
        Wider than an interval of one look, which is 1.96 / √512 = 0.087.

        >>> round(half_width(512, 10**9, 0.05), 3)
        0.134
    """
    log_term = -2 * math.log(error_rate)
    rho = (log_term + math.log(log_term + 1)) / NARROWEST_AT
    tau = n_looked * n_documents / (n_documents - n_looked)
    growth = tau * rho + 1
    return math.sqrt(2 * growth / (tau**2 * rho) * math.log(math.sqrt(growth) / error_rate))


def race_state(low: Array, high: Array, tolerance: float | None) -> tuple[Mask, Mask]:
    """Return the state of a question about single means.

    Args:
        low: `[runs]`, lower bounds that hold together.
        high: `[runs]`, upper bounds.
        tolerance: Target half width of each mean's interval; None = find the means that are not 0.

    Returns:
        The masks of open and of chosen runs, as in `Race`.

    Examples:
        >>> low, high = np.array([0.1, -0.3, 0.0]), np.array([0.35, 0.4, 0.05])
        >>> race_state(low, high, tolerance=0.1)[0].tolist()
        [True, True, False]
        >>> race_state(low, high, tolerance=None)[1].tolist()
        [True, False, False]
    """
    if tolerance is not None:
        return high - low > 2 * tolerance + MEAN_TOLERANCE, np.zeros(len(low), dtype=bool)
    is_nonzero = (low > MEAN_TOLERANCE) | (high < -MEAN_TOLERANCE)
    return ~is_nonzero & (high - low > MEAN_TOLERANCE), is_nonzero


class Race:
    """Race of several means of one population until a question is answered.

    The documents must come in random order. A settled run takes no further part.

    Attributes:
        open: `[runs]`, mask of the runs whose part of the answer is open.
        chosen: `[runs]`, mask of the runs that are settled to be in the requested set. For `sign`
            these are the runs whose mean is not 0; for `drop` none.
        seen: `[runs]`, number of documents of each run.
    """

    def __init__(
        self, question: Question, population: int, n_runs: int, max_value: float = 1.0
    ) -> None:
        """Begin a race that has seen no document yet.

        Args:
            question: The question.
            population: Number of documents in the population.
            n_runs: Number of means.
            max_value: Largest absolute value of a document, and largest difference of the values
                of two runs.

        Raises:
            ValueError: The question needs another number of runs.
        """
        question.check_runs(n_runs)
        self._question = question
        self._bounds = MeanSequences(
            population,
            n_runs,
            level=question.level,
            min_value=-max_value,
            max_value=max_value,
            half_width=question.within if question.kind == "drop" else None,
        )
        self._sign = -1.0 if question.kind == "prune" else 1.0
        self._duels = None
        if question.count is not None:
            self._duels = SequentialTopK(
                population,
                n_runs,
                question.count,
                tolerance=question.within,
                level=question.level,
                max_difference=max_value,
            )
        self.seen = np.zeros(n_runs, dtype=np.int64)
        self._pending: list[tuple[Array, IntArray]] = []
        self.open, self.chosen = self._read_state()

    @property
    def is_answered(self) -> bool:
        """True if no part of the answer is open."""
        return not self.open.any()

    @property
    def means(self) -> Array:
        """The midpoints `[runs]` of the bounds of the means."""
        return np.asarray((self.bounds.low + self.bounds.high) / 2)

    @property
    def bounds(self) -> MeanSequences:
        """The bounds of each mean, which hold together with the question's confidence.

        The answer has the same confidence separately, because the largest means are found without
        these bounds. The bounds are computed on first use.
        """
        while self._pending:
            self._bounds.add(*self._pending.pop(0))
        return self._bounds

    def update(self, values: Array) -> None:
        """Evaluate further documents.

        Args:
            values: `[documents, runs]`; values of settled runs are ignored, and may be missing.

        Raises:
            ValueError: A value is not finite or out of range, two are too far apart, or there are
                too many documents.
        """
        runs = np.flatnonzero(self.open)
        self._bounds.scale_values(values[:, runs])
        self._pending.append((values[:, runs], runs))
        if self._duels is not None:
            self._duels.update(self._sign * values)
        self.seen[runs] += len(values)
        self.open, self.chosen = self._read_state()

    def _read_state(self) -> tuple[Mask, Mask]:
        """Return the masks of open and of chosen runs."""
        if self._duels is not None:
            return self._duels.open.copy(), self._duels.chosen.copy()
        return race_state(self.bounds.low, self.bounds.high, self._question.within)


FORECAST_DRAWS = 24
"""Number of simulated populations."""

LOOK_SIZE = 32
"""Number of documents between two looks."""


@dataclass(frozen=True)
class RaceForecast:
    """Number of documents that a race takes in simulated populations.

    Attributes:
        looked: `[draws]`, number of evaluated documents.
        seen: `[draws, runs]`, number of documents of each run.
        answered: `[draws]`, whether the question was answered by the last evaluated document.
    """

    looked: IntArray
    seen: IntArray
    answered: Mask


def forecast_race(
    question: Question,
    values: Array,
    population: int,
    *,
    max_value: float = 1.0,
    chances: Array | None = None,
    n_draws: int = FORECAST_DRAWS,
) -> RaceForecast:
    """Simulate a race in populations drawn from measured documents.

    With few documents, runs differ by more on them than in the population, so the forecast is too
    low.

    Args:
        question: The question.
        values: `[documents, runs]`, measured values of at least one document.
        population: Number of documents in the population.
        max_value: Largest absolute value of a document, as for `Race`.
        chances: `[documents]`, probability of drawing each, summing to 1; None = equal.
        n_draws: Number of populations.

    Returns:
        The result of each race.

    Raises:
        ValueError: The question needs another number of runs.

    Examples:
        A run that loses half of the documents, among two that lose few: it is found in under 500 of
        2,000.

        >>> lost = np.array([[1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]] * 20, dtype=float)
        >>> races = forecast_race(Question("top", 1), lost, 2000)
        >>> bool(races.looked.max() < 500), bool(races.answered.all())
        (True, True)
    """
    rng = np.random.default_rng(SEED)
    results = []
    for _ in range(n_draws):
        race = Race(question, population, values.shape[1], max_value)
        n_looked = 0
        while n_looked < population and not race.is_answered:
            count = min(LOOK_SIZE, population - n_looked)
            race.update(values[rng.choice(len(values), size=count, p=chances)])
            n_looked += count
        results.append((n_looked, race.seen, race.is_answered))
    return RaceForecast(*map(np.array, zip(*results, strict=True)))
