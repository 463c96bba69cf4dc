"""Define stopping rules, which end a measurement when enough documents are measured.

A run is one change of the model, such as the removal of a layer. The rules estimate the mean
accuracy drop of every run. Confidence bounds of a run's mean show how large the drop is, and
whether the drop is different from 0. `SequentialTopK` compares pairs of runs to find the largest
drops. After a run is decided, further documents do not change its result. `forecast_race` estimates
how many documents the measurement needs.

`SequentialTopK` finds the largest of several means by pairwise differences:

The difference of two runs on a document varies less than the values of single runs, because common
noise cancels. For each pair of runs, the rule tests the null hypothesis "the mean of run b is not
above the mean of run a". The test is a betting game, as in the module `confidence`. The game uses
all documents on which both runs have values.

The error probability is divided equally among the count · (runs − count) pairs of a best run and
another run.

`SmallestMean` finds the smallest of several means of unbounded values:

Log-probabilities are unbounded, so the rule uses an asymptotic confidence sequence, which is valid
for many documents. The confidence sequence assumes finite variances. The bounds can be wrong if the
sample contains none of the rare large values.

After t of N documents, the interval is the mean ± σ̂ · √(2 (τρ² + 1) / (τρ)² · log(√(τρ² + 1) /
α)). Here σ̂ is the standard deviation of the t values. The parameter ρ sets the number of documents
at which the interval is narrowest. The variable τ = t·N / (N − t) takes the finite population into
account.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tracker.schema.questions import Question
from tracker.stats.accuracy import LEVEL
from tracker.stats.arrays import Array, IntArray, Mask
from tracker.stats.confidence import MeanSequences
from tracker.stats.resampling import SEED

BET_FRACTIONS = 0.8 / 2.0 ** np.arange(4)
"""Fractions of the capital that the bets risk while few documents have been evaluated.

The optimal fraction is about range · mean difference / (variance of the difference).
"""

MAX_BET_FRACTION = 0.9
"""Largest fraction of the capital that a bet can risk."""

MEAN_TOLERANCE = 1e-9
"""Means that differ by less than this value count as equal."""

_MIN_ROOM = 1e-6
"""Minimum of the largest possible loss of a bet, in units of the range."""


class SequentialTopK:
    """Stopping rule that finds the `count` runs with the largest means over all documents.

    The documents must be evaluated in random order. A run is decided when the documents show, with
    the confidence `level`, whether its mean is one of the `count` largest means. Later values of a
    decided run are ignored. With a tolerance, the means of the chosen runs can be smaller than the
    largest means by up to the tolerance.

    Attributes:
        open: `[runs]`, mask of the runs that are not decided yet.
        chosen: `[runs]`, mask of the runs that are chosen.
        seen: Number of documents that were evaluated so far.

    References:
        S. Kalyanakrishnan, A. Tewari, P. Auer, P. Stone, ICML 2012. I. Waudby-Smith, A. Ramdas,
        JRSS-B 86 (2024) 1-27.

    Examples:
        Run 1 is right on all documents on which run 0 is right, and also on one document in eight.

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
        """Create the stopping rule, before any document is evaluated.

        Args:
            population: Number of documents in the population.
            n_runs: Number of runs; each run has one mean.
            count: Number of runs to choose; at least 1 and less than `n_runs`.
            tolerance: Difference of means that may be ignored; None for no tolerance.
            level: Minimum probability that the right runs are chosen.
            max_difference: Largest possible difference between two runs on a document.
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
        """Add the values of further documents, and update the masks `open` and `chosen`.

        Args:
            values: `[documents, runs]`, values of the further documents. Values of runs that are
                already decided are ignored and can be NaN.

        Raises:
            ValueError: The total number of documents exceeds the population, the values of two runs
                differ by more than `max_difference`, or a value is not finite.
        """
        if self.seen + len(values) > self._population:
            raise ValueError(f"more than all {self._population} documents")
        runs = np.flatnonzero(self.open)
        if not runs.size or not len(values):
            return
        values = np.asarray(values, dtype=np.float64)
        if not (np.ptp(values[:, runs], axis=1) <= self._max_difference + MEAN_TOLERANCE).all():
            limit = f"{self._max_difference:g}"
            raise ValueError(f"the values of two runs on a document differ by more than {limit}")
        a, b = (runs[indexes] for indexes in np.nonzero(~np.eye(runs.size, dtype=bool)))
        # Stop betting on b once a is known to be better.
        is_open = ~self._claims[a, b].all(axis=1) & ~self._claims[b, a, 0]
        a, b = a[is_open], b[is_open]
        self._update_capital(values, a, b)
        self._totals[runs] += values[:, runs].sum(axis=0)
        self.seen += len(values)
        log_capital = np.logaddexp.reduce(self._capital[:, a, b]) - math.log(len(BET_FRACTIONS))
        is_certain = np.zeros_like(log_capital, dtype=bool)
        if self.seen == self._population:
            means = (self._totals[a] - self._totals[b]) / self._population
            is_certain = means[:, None] < self._nulls
        self._claims[a, b] |= is_certain | (log_capital >= self._log_target)
        self._decide_runs()

    def _update_capital(self, values: Array, a: IntArray, b: IntArray) -> None:
        """Update the evidence that run b has a larger mean than run a, for many pairs of runs.

        The evidence is the capital of a player who bets on run b at every document. Pair i consists
        of the runs `a[i]` and `b[i]`; `values` is `[documents, runs]`.
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

    def _decide_runs(self) -> None:
        """Choose or exclude each run that enough comparisons with other runs decide."""
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
"""Number of documents that are evaluated before the first comparison."""
NARROWEST_AT = 512
"""Number of documents at which the intervals are optimised to be narrowest."""


class SmallestMean:
    """Stopping rule that finds the run with the smallest mean over all documents.

    The documents must be evaluated in random order. A run is excluded when its mean is
    significantly larger than the smallest mean so far. The tests are corrected for the number of
    runs by a union bound.

    Attributes:
        open: `[runs]`, mask of the runs that can still have the smallest mean.
        chosen: `[runs]`, mask of the chosen run. Several runs are chosen only if their means over
            all documents are equal.
        seen: `[runs]`, number of documents that were evaluated for each run.
        means: `[runs]`, mean of each run on its evaluated documents; infinite if a value is not
            finite.

    References:
        I. Waudby-Smith et al., Time-uniform central limit theory and asymptotic confidence
        sequences, Annals of Statistics 52 (2024), arXiv 2103.06476.

    Examples:
        The mean of run 1 is 0.2 below run 0 and 0.005 below run 2. Runs 1 and 2 are both
        acceptable.

        >>> values = np.random.default_rng(0).normal(0, 0.3, (4000, 1)) + [[0.2, 0.0, 0.005]]
        >>> values += np.random.default_rng(1).normal(0, 0.05, values.shape)
        >>> race = SmallestMean(4000, 3, tolerance=0.01)
        >>> while race.open.any():
        ...     race.update(values[race.looked :][:32])
        >>> race.seen.tolist(), race.chosen.tolist()
        ([128, 160, 160], [False, False, True])
    """

    def __init__(self, population: int, n_runs: int, *, tolerance: float) -> None:
        """Create the stopping rule, before any document is evaluated.

        Args:
            population: Number of documents in the population.
            n_runs: Number of runs; each run has one mean.
            tolerance: With a probability of 95 %, the mean of the chosen run exceeds the smallest
                mean by at most this value.
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
        """Number of documents that were evaluated so far."""
        return sum(map(len, self._values))

    def update(self, values: Array) -> None:
        """Add the values of further documents, and update the masks `open` and `chosen`.

        Args:
            values: `[documents, runs]`, values of the further documents. Values of excluded runs
                are ignored and can be NaN. A NaN or an infinite value excludes a run.

        Raises:
            ValueError: The total number of documents exceeds the population.
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
            self._decide_runs(open_values[:, is_usable], runs[is_usable])

    def _decide_runs(self, values: Array, runs: IntArray) -> None:
        """Exclude runs with significantly larger means; choose the best run within the tolerance.

        The array `values` is `[documents, columns]`; column i contains the values of the run
        `runs[i]`.
        """
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
    """Return the half width of the asymptotic confidence sequence, in standard deviations.

    Args:
        n_looked: Number of documents that were evaluated so far.
        n_documents: Number of documents in the population, above `n_looked`.
        error_rate: Probability that at least one interval of the sequence misses the mean.

    Returns:
        The half width for a standard deviation of 1.

    Examples:
        An interval that is valid only at 512 documents would be narrower: 1.96 / √512 = 0.087.

        >>> round(half_width(512, 10**9, 0.05), 3)
        0.134
    """
    log_term = -2 * math.log(error_rate)
    rho = (log_term + math.log(log_term + 1)) / NARROWEST_AT
    tau = n_looked * n_documents / (n_documents - n_looked)
    growth = tau * rho + 1
    return math.sqrt(2 * growth / (tau**2 * rho) * math.log(math.sqrt(growth) / error_rate))


def race_state(low: Array, high: Array, tolerance: float | None) -> tuple[Mask, Mask]:
    """Decide by confidence bounds which runs are undecided, and which means differ from 0.

    With a tolerance, a run is undecided while its interval is too wide, and no run is chosen.
    Without a tolerance, a run is chosen if its bounds exclude 0. If the bounds contain 0, the run
    is undecided until the two bounds are equal.

    Args:
        low: `[runs]`, lower bounds of the means; the bounds of all runs hold simultaneously.
        high: `[runs]`, upper bounds of the means.
        tolerance: Largest acceptable half width of an interval; None for no tolerance.

    Returns:
        The mask `[runs]` of the undecided runs, and the mask `[runs]` of the chosen runs.

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
    """Stopping rule for several runs: documents are evaluated until every run is decided.

    The documents must be evaluated in random order. A run is decided when the question is answered
    for the run, for example when the run is known to be among the best runs.

    Attributes:
        open: `[runs]`, mask of the runs that are not decided yet.
        chosen: `[runs]`, mask of the chosen runs. The question `top` chooses the runs with the
            largest means, `prune` those with the smallest means. The question `sign` chooses the
            runs whose means differ from 0, and `drop` chooses no run.
        seen: `[runs]`, number of documents that were evaluated for each run.
    """

    def __init__(
        self, question: Question, population: int, n_runs: int, max_value: float = 1.0
    ) -> None:
        """Create the stopping rule, before any document is evaluated.

        Args:
            question: Condition that ends the measurement, such as `top 3`: the three largest means
                are found.
            population: Number of documents in the population.
            n_runs: Number of runs; each run has one mean.
            max_value: Largest possible absolute value; also the largest possible difference between
                two runs on a document.

        Raises:
            ValueError: The condition is impossible for this number of runs.
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
        """True if all runs are decided, so that no further documents are needed."""
        return not self.open.any()

    @property
    def means(self) -> Array:
        """The estimated means `[runs]`, each midway between its lower and upper bound."""
        return np.asarray((self.bounds.low + self.bounds.high) / 2)

    @property
    def bounds(self) -> MeanSequences:
        """Simultaneous confidence bounds of the runs' means.

        The questions `top` and `prune` are decided by comparing pairs of runs, without these
        bounds.
        """
        while self._pending:
            self._bounds.add(*self._pending.pop(0))
        return self._bounds

    def update(self, values: Array) -> None:
        """Add the values of further documents, and update the masks `open` and `chosen`.

        Args:
            values: `[documents, runs]`, values of the further documents. Values of runs that are
                already decided are ignored and can be NaN.

        Raises:
            ValueError: A value is not finite or violates `max_value`, or there are more documents
                than in the population.
        """
        runs = np.flatnonzero(self.open)
        self._bounds.scale_values(values[:, runs])
        self._pending.append((values[:, runs], runs))
        if self._duels is not None:
            self._duels.update(self._sign * values)
        self.seen[runs] += len(values)
        self.open, self.chosen = self._read_state()

    def _read_state(self) -> tuple[Mask, Mask]:
        """Return a mask of the undecided runs and a mask of the chosen runs, each `[runs]`."""
        if self._duels is not None:
            return self._duels.open.copy(), self._duels.chosen.copy()
        return race_state(self.bounds.low, self.bounds.high, self._question.within)


FORECAST_DRAWS = 24
"""Number of simulated populations."""

LOOK_SIZE = 32
"""Number of documents that are evaluated between two checks of the stopping rule."""


@dataclass(frozen=True)
class RaceForecast:
    """Result of `forecast_race`: how many documents a stopping rule evaluates in simulations.

    Attributes:
        looked: `[draws]`, number of documents after which each simulation stopped.
        seen: `[draws, runs]`, number of documents that were evaluated for each run.
        answered: `[draws]`, True if all runs were decided in the simulation.
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
    """Simulate how many documents the stopping rule `Race` needs.

    The documents of a simulated population are drawn from the measured documents. If only few
    documents are measured, the simulated numbers of documents are too low.

    Args:
        question: Condition that ends the measurement, such as `top 3`: the three largest means are
            found.
        values: `[documents, runs]`, the values of the measured documents; at least one document.
        population: Number of documents in the population.
        max_value: Largest possible absolute value, as for `Race`.
        chances: `[documents]`, probability of drawing each document, summing to 1; None = equal
            probabilities.
        n_draws: Number of simulated populations.

    Returns:
        The numbers of evaluated documents in each simulation, and whether all runs were decided.

    Raises:
        ValueError: The condition is impossible for this number of runs.

    Examples:
        Run 0 loses half of the documents, and the other two runs lose few. The rule finds run 0
        with fewer than 500 of 2,000 documents.

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
