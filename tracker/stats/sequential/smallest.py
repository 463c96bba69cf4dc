"""Which of several means is the smallest, where values have no bounds.

Log-probabilities have none, so that no bets on them can be bounded, and no interval holds exactly
at every look. An asymptotic confidence sequence holds in the limit, as an interval by the normal
distribution does of one look: it needs finite variances, and enough documents before its first
look. What is so rare that it shows in none of these is not seen by it: what one document in 43
shows is missed by 128 documents with a probability of 5 %.

After t documents it is the mean ± σ̂ · √(2 (τρ² + 1) / (τρ)² · log(√(τρ² + 1) / α)), with the
standard deviation σ̂ so far. Documents are drawn from a finite population without replacement, so
that the sum follows a Brownian bridge and not a Brownian motion; in the time τ = t·N / (N − t) the
bridge is one, and after the last document the interval is a point.
"""

from __future__ import annotations

import math

import numpy as np

from tracker.stats.accuracy import LEVEL
from tracker.stats.arrays import Array, Mask, Numbers
from tracker.stats.sequential.top_k import SAME

FIRST = 128
"""Documents before the first look."""
BEST_AT = 512
"""After so many documents intervals are as narrow as they can be made."""


class SmallestMean:
    """The smallest of several means over one finite population, within a tolerance.

    The documents must come in random order. Who is shown to be larger than the smallest so far
    takes no further part. Differences are looked at two by two, on the documents of both: the error
    is shared among the pairs of the best with one of the others, whichever it is (a union bound).

    Attributes:
        open: `[runs]`, who may be the smallest, or as good as it.
        chosen: `[runs]`, who is at most the tolerance above the smallest; nobody at first. Several
            only where they are level on all documents.
        seen: `[runs]`, the documents of each.
        means: `[runs]`, the mean of each on these; infinite where a value is not finite.

    References:
        I. Waudby-Smith et al., Time-uniform central limit theory and asymptotic confidence
        sequences, Annals of Statistics 52 (2024), arXiv 2103.06476.

    Examples:
        Run 1 is 0.2 below run 0 on average, and run 2 is 0.005 above it: either will do.

        >>> values = np.random.default_rng(0).normal(0, 0.3, (4000, 1)) + [[0.2, 0.0, 0.005]]
        >>> values += np.random.default_rng(1).normal(0, 0.05, values.shape)
        >>> race = SmallestMean(4000, 3, within=0.01)
        >>> while race.open.any():
        ...     race.look(values[race.looked :][:32])
        >>> race.seen.tolist(), race.chosen.tolist()
        ([128, 160, 160], [False, False, True])
    """

    def __init__(self, population: int, runs: int, *, within: float, level: float = LEVEL) -> None:
        """Begin before the first document.

        Args:
            population: Documents that there are.
            runs: How many means.
            within: The tolerance.
            level: The probability with which the answer is right.
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
        """Look at further documents, in their order.

        Args:
            values: `[documents, runs]`; of runs that are not open they do not count, and may be
                missing. A run with a value that is not finite is out.

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
        """Let those go that are shown to be larger, and choose where the rest is as good."""
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
            # What the best costs more than another at most is −least.
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
