"""Bounds of means that hold at every look, while documents are drawn without replacement.

A confidence sequence is an interval after every document, and all of them together hold the mean
with the stated confidence: whoever looks at it again and again, and stops when it pleases, is as
safe as who looks once. It comes from a game. Against each mean m that a population could have, one
bets that the next documents are above it (and, in a second game, below it). Were m the mean, what
the bets have made of a stake of 1 would be a martingale, which ever reaches 1/α with a probability
of at most α (Ville). So a candidate against which somebody became that rich is none any more.

After t of N documents with the sum S, the rest would have the mean m' = (N·m − S) / (N − t). The
next document x, in [0, 1], multiplies a stake on "above" by 1 + λ·(x − m'), and one on "below" by
1 − λ·(x − m'). Were m the mean, x − m' would be 0 on average, over what may come next in a random
order. So a stake is a martingale whatever λ is, if λ is said before x is seen and leaves no stake
below 0. It may differ between candidates. Stakes may be parted, since a sum of martingales is one;
they may be left to lie, be given up, or be said to be less than they are (a supermartingale).

The best λ is about (μ − m) / σ² · N / (N − t): the fewer documents are left, the further m' is from
their mean. What can be rejected lies √(2 log(1/α) σ² / τ) from the mean, where τ = t·N / (N − t) is
the number of documents that would say as much if there were no end of them. So the best λ for one τ
is √(2 log(1/α) / (σ² τ)) · N / (N − t), with the variance of the documents before. Several play at
once, each for a τ four times as large, with an equal part of the stake: that is the mixture's cost,
and it is the logarithm of their number. Where intervals of one width are wanted, most of the stake
is on the λ that comes there the soonest.

The two for the smallest τ are bold, and are followed as they are, one candidate at a time. A
candidate's λ is cut so that no document takes more than BOLDEST of its stake. They bet on the first
BOLD_ON documents alone, and are given up after them: then the others are better. These are cut so
that no document takes more than BOLDEST from any candidate that is left, and no candidate is
followed on its own. For y ≥ −BOLDEST, log(1 + y) ≥ y − y²/2 + y³/3 − y⁴/4 + y⁵/5 − C·y⁶, and with
y = ±λ·(x − m') the sum over documents is a polynomial of the sixth degree in m, whose coefficients
are sums over documents. What it says of a stake is never too much, and hardly too little, since y
is small.

A stake on "above" falls as m grows, so that candidates are rejected from one end only, and what is
left is an interval.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from itertools import accumulate

import numpy as np
from numpy.polynomial.polynomial import polyval

from tracker.stats.accuracy import LEVEL
from tracker.stats.arrays import Array, Numbers

BOLD = 2
"""How many bets are followed one candidate at a time."""

BOLD_ON = 256
"""How many documents they bet on."""

BOLDEST = 0.65
"""What a document can take of a stake at most."""

EARLY = 3
"""How many bets play for the smallest τ where intervals of one width are wanted."""

EARLY_SHARE = 0.2
"""The part of the stake that they have together."""

_DEGREE = 6
_WEIGHTS = np.array([0.0, *((-1) ** (power + 1) / power for power in range(1, _DEGREE)), 0.0])
"""What powers of y count in the lower bound of log(1 + y), which is an equality at −BOLDEST."""
_WEIGHTS[-1] = (
    math.log(1 - BOLDEST) - np.polynomial.Polynomial(_WEIGHTS)(-BOLDEST)
) / BOLDEST**_DEGREE

_HALVINGS = 10
"""How often the distance from a bound to the mean is halved to find where a stake is enough."""

_LEAST = 1e-9
"""The least room below or above a candidate that is divided by."""

_SIDES = np.array([[1.0], [-1.0]])
"""Bets above a candidate, which draw up the lower bound, and below it."""


def horizons(population: int) -> Array:
    """List the τ for which bets are the best, up to eight ninths of all documents, or more.

    Args:
        population: Documents that there are.

    Returns:
        How many documents would say as much if there were no end of them.

    Examples:
        >>> horizons(570).astype(int).tolist()
        [32, 128, 512, 2048, 8192]
    """
    steps = max(0, math.ceil(math.log(8 * population / 32, 4)))
    return np.asarray(32 * 4.0 ** np.arange(steps + 1), dtype=np.float64)


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
        ([0.362], [0.561])
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
        """
        together = count if together is None else together
        self.population = population
        self.low = np.full(count, float(lowest))
        self.high = np.full(count, float(highest))
        self.seen = np.zeros(count, dtype=np.int64)
        self._lowest, self._range = float(lowest), float(highest) - float(lowest)
        self._within = None if within is None else within / self._range
        every = horizons(population)
        stakes = np.full(len(every), 1 / len(every))
        if within is not None:
            every = every[:EARLY]
            stakes = np.append(EARLY_SHARE / len(every) * np.ones(len(every)), 1 - EARLY_SHARE)
        self._bold, self._cautious = every[:BOLD], every[BOLD:]
        self._stakes = np.log(stakes)
        self._enough = math.log(2 * together / (1 - level))
        self._sum, self._squares = np.zeros(count), np.zeros(count)
        # Of the bold bets, by document: it, what makes m' of a candidate, and λ.
        shape = (min(BOLD_ON, population), count)
        self._values, self._scale, self._shift = np.zeros((3, *shape))
        self._bets = np.zeros((len(self._bold), *shape))
        # Of the others, polynomials in the distance from `_centre`: the odd and the even terms of
        # the logarithm.
        others = len(stakes) - len(self._bold)
        self._centre = np.full(count, 0.5)
        self._odd = np.zeros((_DEGREE, others, count))
        self._even = np.zeros((_DEGREE + 1, others, count))

    def add(self, values: Array, series: Numbers | None = None) -> None:
        """Look at further documents, in their order.

        Args:
            values: `[documents, series]`, their values.
            series: Which series these are; None = all.

        Raises:
            ValueError: A value is not finite or out of range, or there are more documents than
                the population has.
        """
        which = np.arange(len(self.low)) if series is None else np.asarray(series)
        scaled = self.scaled(values)
        if not scaled.size:
            return
        if (self.seen[which] + len(scaled)).max() > self.population:
            raise ValueError(f"more than all {self.population} documents")
        self._bet(scaled, which)
        self._narrow(which)

    def scaled(self, values: Array) -> Array:
        """Write values as parts of the range; ValueError for one that is not in it."""
        scaled = (np.asarray(values, dtype=np.float64) - self._lowest) / self._range
        if not ((scaled >= 0) & (scaled <= 1)).all():
            raise ValueError(
                f"a value is not from {self._lowest:g} to {self._lowest + self._range:g}"
            )
        return scaled

    def _bet(self, values: Array, which: Numbers) -> None:
        """Bet on a few documents."""
        number = self.seen[which] + np.arange(len(values))[:, None]
        before = np.cumsum(values, axis=0) - values + self._sum[which]
        squares = np.cumsum(values**2, axis=0) - values**2 + self._squares[which]
        # Half a document at 0 and half a one at 1 come before all others.
        mean = (before + 0.5) / (number + 1)
        variance = (squares + 0.5) / (number + 1) - mean**2
        left = self.population - number
        scale, shift = self.population / left, before / left
        # The best λ for τ = 1; the others are a part of it.
        base = scale * np.sqrt(2 * (self._enough + math.log(len(self._stakes))) / variance)
        rows, columns = np.nonzero(number < len(self._values))
        if rows.size:
            place = number[rows, columns], which[columns]
            self._values[place] = values[rows, columns]
            self._scale[place], self._shift[place] = scale[rows, columns], shift[rows, columns]
            self._bets[:, *place] = base[rows, columns] / np.sqrt(self._bold)[:, None]
        best = base / np.sqrt(self._cautious)[:, None, None]
        if self._within is not None:
            best = np.concatenate([best, [scale * self._within / variance]])
        self._move(which, mean[0])
        # Of the candidates that are not rejected, the one that a bet can cost most.
        far = [scale * self._unit(bound[which]) - shift for bound in (self.low, self.high)]
        cap = BOLDEST / np.clip(np.maximum(far[1], 1 - far[0]), 0.5, 1.0)
        bet = np.minimum(best, cap)
        # y = centre − distance · slope
        centres = _powers(bet * (values + shift - mean[0] * scale))
        slopes = _powers(-bet * scale)
        for power, weight in enumerate(_WEIGHTS):
            terms = self._odd if power % 2 else self._even
            for degree in range(power + 1):
                part = np.einsum("bns,bns->bs", centres[power - degree], slopes[degree])
                terms[degree][:, which] += weight * math.comb(power, degree) * part
        self._sum[which] += values.sum(axis=0)
        self._squares[which] += (values**2).sum(axis=0)
        self.seen[which] += len(values)

    def _move(self, which: Numbers, centre: Array) -> None:
        """Write the polynomials as those of the distance from another centre."""
        by = centre - self._centre[which]
        for terms in (self._odd, self._even):
            for end in range(len(terms) - 1):
                for degree in range(len(terms) - 2, end - 1, -1):
                    terms[degree][:, which] += by * terms[degree + 1][:, which]
        self._centre[which] = centre

    def _unit(self, bound: Array) -> Array:
        return np.clip((bound - self._lowest) / self._range, 0.0, 1.0)

    def _narrow(self, which: Numbers) -> None:
        """Draw bounds together, as far as candidates are rejected."""
        # What is certain: the rest can be all 0 or all 1.
        least = self._sum[which] / self.population
        most = (self._sum[which] + self.population - self.seen[which]) / self.population
        low = np.clip(self._unit(self.low[which]), least, most)
        high = np.clip(self._unit(self.high[which]), least, most)
        rejected = np.stack([low, high])
        kept = np.clip(self._sum[which] / self.seen[which], low, high) + np.zeros((2, 1))
        cautious = self._cautious_stakes(which)
        bold = self._bold_stakes(which)
        for _ in range(_HALVINGS):
            middle = (rejected + kept) / 2
            logs = np.concatenate([bold(middle), cautious(middle)])
            logs += self._stakes[:, None, None]
            rich = np.logaddexp.reduce(logs) >= self._enough
            rejected, kept = np.where(rich, middle, rejected), np.where(rich, kept, middle)
        # Nothing is left of an interval only where an error was made; then it is a point.
        self.low[which] = self._lowest + self._range * rejected[0]
        self.high[which] = self._lowest + self._range * rejected.max(axis=0)

    def _bold_stakes(self, which: Numbers) -> Callable[[Array], Array]:
        """Say what became of bold bets' stakes: candidates `[2, series]` → `[bets, 2, series]`.

        All documents are gone through for it, as they came.
        """
        (playing,) = np.nonzero(self.seen[which] <= len(self._values))
        if not playing.size:
            return lambda candidates: np.full((len(self._bold), *candidates.shape), -np.inf)
        series = which[playing]
        until = slice(self.seen[series].max())
        values, scale, shift = (
            each[until, series] for each in (self._values, self._scale, self._shift)
        )
        bets = self._bets[:, until, series]

        def logs(candidates: Array) -> Array:
            rest = candidates[:, None, playing] * scale - shift
            gains = _SIDES[:, None] * (values - rest)
            room = np.stack([rest[0], 1 - rest[1]])
            cap = BOLDEST / np.maximum(room, _LEAST)
            found = np.full((len(bets), *candidates.shape), -np.inf)
            with np.errstate(over="ignore"):  # an infinite stake is enough
                for n, bet in enumerate(bets):
                    grown = np.prod(1 + np.minimum(bet, cap) * gains, axis=1)
                    found[n][:, playing] = np.log(grown)
            return found

        return logs

    def _cautious_stakes(self, which: Numbers) -> Callable[[Array], Array]:
        """Say at least what became of cautious bets' stakes, in the same way."""
        centre = self._centre[which]
        odd, even = (terms[:, :, None, which] for terms in (self._odd, self._even))

        def logs(candidates: Array) -> Array:
            distance = candidates - centre
            above, both = (polyval(distance, terms, tensor=False) for terms in (odd, even))
            return np.asarray(_SIDES * above + both)

        return logs


def _powers(values: Array) -> list[Array]:
    """List the powers from 0 to the highest."""
    return list(accumulate([np.ones_like(values), *[values] * _DEGREE], operator.mul))
