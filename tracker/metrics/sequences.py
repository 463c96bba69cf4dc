"""Bounds of means that hold at every look, while documents are drawn without replacement.

A confidence sequence is an interval after every document, and all of them together hold the mean
with the stated confidence: whoever looks at it again and again, and stops when it pleases, is as
safe as who looks once. It comes from a game. Against each mean m that a population could have, one
bets that the next documents are above it (and, in a second game, below it). Were m the mean, what
the bets have made of a stake of 1 would be a martingale, which ever reaches 1/α with a probability
of at most α (Ville). So a candidate against which somebody became that rich is none any more.

After t of N documents with the sum S, the rest would have the mean m' = (N·m − S) / (N − t). The
next document x, in [0, 1], multiplies a stake on "above" by 1 + f·(x / m' − 1), where f is the
fraction of the capital that is risked. Several fractions play side by side, each with an equal
part of the stake, so that nobody needs to know the variance: that is the mixture's cost, and it is
the logarithm of their number. Each product falls as m grows, so that candidates are rejected
from one end only, and what is left is an interval.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tracker.metrics.accuracy import LEVEL

FRACTIONS = 0.9 / 2.0 ** np.arange(6)
"""What is risked of the capital. The best is about m √(2 log(2/α) / (σ² N)): for 30 series and
15,000 documents that are 0 as often as 1 it is 0.03, and more for anything that varies less."""

STEPS = 2000
"""Candidate means between the lowest and the highest value: 0.1 pp apart for a drop."""

_SLICE = 32
"""Documents that are multiplied before a logarithm is taken."""

_LEAST = 1e-6
"""A mean of the rest that is smaller is taken for this, which only makes bets smaller."""

Array = NDArray[np.float64]


class MeanSequences:
    """Confidence sequences for the means of some series over one finite population.

    The documents must come in random order, the same one for every series. A series may be left
    out of later documents, and its bounds stay what they are. At the end of the population they
    are its mean.

    Attributes:
        low: `[count]`, the lower bounds so far, never falling.
        high: `[count]`, the upper bounds so far, never rising.
        seen: `[count]`, the documents of each series.

    References:
        I. Waudby-Smith, A. Ramdas, JRSS-B 86 (2024) 1-27 (betting, the hedged capital, several
        bets side by side). I. Waudby-Smith, A. Ramdas, NeurIPS 2020 (without replacement).
        J. Ville, Étude critique de la notion de collectif (1939).

    Examples:
        Half of 1,000 documents are right; what 200 of them say of it, and what all do.

        >>> right = np.arange(1000) % 2
        >>> drawn = np.random.default_rng(0).permutation(right)[:, None]
        >>> sequence = MeanSequences(1000, 1, lowest=0, highest=1)
        >>> sequence.add(drawn[:200])
        >>> sequence.low.round(3).tolist(), sequence.high.round(3).tolist()
        ([0.36], [0.562])
        >>> sequence.add(drawn[200:])
        >>> sequence.low.tolist(), sequence.high.tolist()
        ([0.5], [0.5])
    """

    def __init__(
        self,
        population: int,
        count: int,
        *,
        level: float = LEVEL,
        together: int | None = None,
        lowest: float = -1.0,
        highest: float = 1.0,
    ) -> None:
        """Begin before the first document.

        Args:
            population: Documents that there are.
            count: Series.
            level: The probability with which all bounds hold at all times.
            together: Among how many series the error is shared (a union bound, whatever their
                dependence); None = `count`.
            lowest: The lowest value that a document can have.
            highest: The highest.

        Raises:
            ValueError: There are no documents or series, or nothing lies between the two values.
        """
        together = count if together is None else together
        if min(population, count, together) < 1 or not 0 < level < 1 or not lowest < highest:
            raise ValueError(
                f"{population} documents, {count} series of {together} together, level {level}, "
                f"values from {lowest} to {highest}"
            )
        self.population = population
        self.low = np.full(count, float(lowest))
        self.high = np.full(count, float(highest))
        self.seen = np.zeros(count, dtype=np.int64)
        self._lowest, self._range = float(lowest), float(highest) - float(lowest)
        self._sum = np.zeros(count)
        self._enough = math.log(2 * together / (1 - level))
        self._candidates = np.linspace(0.0, 1.0, STEPS + 1)
        # Logarithms of what each fraction has made of its stake: above and below each candidate.
        self._capital = np.zeros((count, 2, len(FRACTIONS), STEPS + 1))

    def add(self, values: Array, series: NDArray[np.int64] | None = None) -> None:
        """Look at further documents, in their order.

        Args:
            values: `[documents, series]`, their values.
            series: Which series these are; None = all.

        Raises:
            ValueError: A value is not finite or out of range, or there are more documents than
                the population has.
        """
        which = np.arange(len(self.low)) if series is None else np.asarray(series)
        scaled = (np.asarray(values, dtype=np.float64) - self._lowest) / self._range
        if scaled.shape[1:] != which.shape:
            raise ValueError(f"values of the shape {scaled.shape} for {len(which)} series")
        if not ((scaled >= 0) & (scaled <= 1)).all():
            raise ValueError(
                f"a value is not from {self._lowest:g} to {self._lowest + self._range:g}"
            )
        if not scaled.size:
            return
        if (self.seen[which] + len(scaled)).max() > self.population:
            raise ValueError(f"more than all {self.population} documents")
        for column, one in zip(scaled.T, which, strict=True):
            # Who was rejected stays rejected: nobody bets against it any more.
            begin = int(self._unit(self.low[one]) * STEPS)
            end = math.ceil(self._unit(self.high[one]) * STEPS)
            for start in range(0, len(column), _SLICE):
                self._bet(column[start : start + _SLICE], one, slice(begin, end))
            self._narrow(one, slice(begin, end))

    def _unit(self, bound: float) -> float:
        return min(1.0, max(0.0, (bound - self._lowest) / self._range))

    def _bet(self, values: Array, one: int, candidates: slice) -> None:
        """Multiply a series' capital against candidates by what a few documents make of it."""
        before = np.cumsum(values) - values + self._sum[one]
        left = self.population - self.seen[one] - np.arange(len(values))
        total = self.population * self._candidates[candidates]
        rest = (total - before[:, None]) / left[:, None]
        for side, (x, mean) in enumerate(((values, rest), (1 - values, 1 - rest))):
            odds = x[:, None] / np.clip(mean, _LEAST, 1.0) - 1
            with np.errstate(over="ignore"):  # an infinite capital is enough
                made = np.log(np.prod(1 + FRACTIONS[:, None, None] * odds, axis=1))
            self._capital[one, side, :, candidates] += made
        self._sum[one] += values.sum()
        self.seen[one] += len(values)

    def _narrow(self, one: int, candidates: slice) -> None:
        """Draw a series' bounds together: the innermost rejected candidate on each side."""
        means = self._candidates[candidates]
        capital = self._capital[one, :, :, candidates]
        rich = np.logaddexp.reduce(capital, axis=1) - math.log(len(FRACTIONS)) >= self._enough
        low = max([self._unit(self.low[one]), *means[rich[0]][-1:]])
        high = min([self._unit(self.high[one]), *means[rich[1]][:1]])
        # Nothing is left of an interval only where an error was made; then it is a point.
        low = min(low, high)
        # What is certain: the rest can be all 0 or all 1.
        least = self._sum[one] / self.population
        most = (self._sum[one] + self.population - self.seen[one]) / self.population
        self.low[one] = self._lowest + self._range * min(max(low, least), most)
        self.high[one] = self._lowest + self._range * min(max(high, least), most)
