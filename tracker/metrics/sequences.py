"""Bounds of means that hold at every look, while documents are drawn without replacement.

A confidence sequence is an interval after every document, and all of them together hold the mean
with the stated confidence: whoever looks at it again and again, and stops when it pleases, is as
safe as who looks once. It comes from a game. Against each mean m that a population could have, one
bets that the next documents are above it (and, in a second game, below it). Were m the mean, what
the bets have made of a stake of 1 would be a martingale, which ever reaches 1/α with a probability
of at most α (Ville). So a candidate against which somebody became that rich is none any more.

After t of N documents with the sum S, the rest would have the mean m' = (N·m − S) / (N − t). The
next document x, in [0, 1], multiplies a stake on "above" by 1 + λ·(x − m'), and one on "below" by
1 − λ·(x − m'). The best λ is about (μ − m) / σ² · N / (N − t): the fewer documents are left, the
further m' is from their mean. Several λ play side by side, each with an equal part of the stake,
so that nobody needs to know the variance and the difference: that is the mixture's cost, and it is
the logarithm of their number. Where intervals of one width are wanted, one λ is enough, with the
variance of the documents seen so far.

No candidate is followed on its own. For y ≥ −BOLDEST, log(1 + y) ≥ y − y²/2 + y³/3 − C·y⁴, and
with y = ±λ·(x − m') the sum over documents is a polynomial of the fourth degree in m, whose
coefficients are sums over documents. What it says of a capital is never too much, and hardly too
little, since y is small. The capital falls as m grows, so that candidates are rejected from one
end only, and what is left is an interval.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tracker.metrics.accuracy import LEVEL

BETS = 1.2 / 2.0 ** np.arange(5)
"""The λ that play side by side, while nearly all documents are still to come. The best is about
√(2 log(2/α) / (σ² N)): for 30 series and 15,000 documents that are 0 as often as 1 it is 0.06, and
more for anything that varies less."""

BOLDEST = 0.6
"""What a document can take of a capital at most."""

_C = (-math.log(1 - BOLDEST) - BOLDEST - BOLDEST**2 / 2 - BOLDEST**3 / 3) / BOLDEST**4
_HALVINGS = 14
"""How often the distance from a bound to the mean is halved to find where a capital is enough."""

_SIDES = np.array([1.0, -1.0])[:, None, None]
"""Bets above a candidate, which draw up the lower bound, and below it."""

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
        ([0.364], [0.558])
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
        within: float | None = None,
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
            within: How far from the mean the bounds are wanted to be, so that they come there the
                soonest; None = good bounds at any time.

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
        self._within = None if within is None else within / self._range
        bets = len(BETS) if within is None else 1
        self._enough = math.log(2 * together * bets / (1 - level))
        self._sum, self._squares = np.zeros(count), np.zeros(count)
        # Polynomials in the distance from `_centre`: the odd and the even terms of the logarithm.
        self._centre = np.full(count, 0.5)
        self._odd = np.zeros((4, count, bets))
        self._even = np.zeros((5, count, bets))

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
        self._bet(scaled, which)
        self._narrow(which)

    def _bet(self, values: Array, which: NDArray[np.int64]) -> None:
        """Add what a few documents make of each capital."""
        # Half a document at 0 and half a one at 1 come before all others.
        mean = (self._sum[which] + 0.5) / (self.seen[which] + 1)
        variance = (self._squares[which] + 0.5) / (self.seen[which] + 1) - mean**2
        self._move(which, mean)
        before = np.cumsum(values, axis=0) - values + self._sum[which]
        left = self.population - self.seen[which] - np.arange(len(values))[:, None]
        scale = self.population / left
        best = BETS if self._within is None else (self._within / variance)[:, None]
        # Of the candidates that are not rejected, the one that a bet can cost most.
        far = [scale * self._unit(bound[which]) - before / left for bound in (self.low, self.high)]
        cap = BOLDEST / np.clip(np.maximum(far[1], 1 - far[0]), 0.5, 1.0)
        bet = np.minimum(best * scale[:, :, None], cap[:, :, None])
        # y = centre − distance · slope
        centres = _powers(bet * (values + before / left - mean * scale)[:, :, None])
        slopes = _powers(-bet * scale[:, :, None])
        for power, weight in ((1, 1.0), (2, -1 / 2), (3, 1 / 3), (4, -_C)):
            terms = self._odd if power % 2 else self._even
            for degree in range(power + 1):
                part = np.einsum("nsb,nsb->sb", centres[power - degree], slopes[degree])
                terms[degree][which] += weight * math.comb(power, degree) * part
        self._sum[which] += values.sum(axis=0)
        self._squares[which] += (values**2).sum(axis=0)
        self.seen[which] += len(values)

    def _move(self, which: NDArray[np.int64], centre: Array) -> None:
        """Write the polynomials as those of the distance from another centre."""
        by = (centre - self._centre[which])[:, None]
        for terms in (self._odd, self._even):
            for end in range(len(terms) - 1):
                for degree in range(len(terms) - 2, end - 1, -1):
                    terms[degree][which] += by * terms[degree + 1][which]
        self._centre[which] = centre

    def _unit(self, bound: Array) -> Array:
        return np.clip((bound - self._lowest) / self._range, 0.0, 1.0)

    def _narrow(self, which: NDArray[np.int64]) -> None:
        """Draw bounds together, as far as candidates are rejected."""
        # What is certain: the rest can be all 0 or all 1.
        least = self._sum[which] / self.population
        most = (self._sum[which] + self.population - self.seen[which]) / self.population
        low = np.clip(self._unit(self.low[which]), least, most)
        high = np.clip(self._unit(self.high[which]), least, most)
        rejected = np.stack([low, high])
        kept = np.clip(self._sum[which] / self.seen[which], low, high) + np.zeros((2, 1))
        odd, even = self._odd[:, which], self._even[:, which]
        for _ in range(_HALVINGS):
            middle = (rejected + kept) / 2
            distance = (middle - self._centre[which])[:, :, None]
            log = _SIDES * _polynomial(odd, distance) + _polynomial(even, distance)
            rich = np.logaddexp.reduce(log, axis=2) >= self._enough
            rejected, kept = np.where(rich, middle, rejected), np.where(rich, kept, middle)
        # Nothing is left of an interval only where an error was made; then it is a point.
        self.low[which] = self._lowest + self._range * rejected[0]
        self.high[which] = self._lowest + self._range * rejected.max(axis=0)


def _powers(values: Array) -> list[Array]:
    """List the powers from 0 to 4."""
    square = values * values
    return [np.ones_like(values), values, square, square * values, square * square]


def _polynomial(terms: Array, at: Array) -> Array:
    """Evaluate polynomials by Horner's scheme; the constant terms come first."""
    found: Array = terms[-1]
    for term in terms[-2::-1]:
        found = found * at + term
    return found
