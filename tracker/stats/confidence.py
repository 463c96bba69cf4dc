"""Compute confidence sequences of means, valid after every document drawn without replacement.

A confidence sequence is an interval after every document. All of them together contain the mean
with the stated confidence. Looking at it repeatedly and stopping at any time is therefore as safe
as looking once. The construction is a game. For each mean m that a population could have, one bets
that the next documents are above it (and, in a second game, below it). If m is the mean, the
capital that grows from a stake of 1 is a martingale, which ever reaches 1/α with a probability of
at most α (Ville). A candidate m whose game reaches this capital is rejected.

After t of N documents with the sum S, the rest has the mean m' = (N·m − S) / (N − t) if m is the
mean. The next document x, in [0, 1], multiplies a stake on "above" by 1 + λ·(x − m'), and one on
"below" by 1 − λ·(x − m'). If m is the mean, x − m' is 0 on average over the random order. A stake
is then a martingale for any λ that is chosen before x is seen and leaves no stake below 0. λ may
differ between candidates. Stakes may be split, because a sum of martingales is one. They may also
be left idle, abandoned, or underestimated (a supermartingale).

The best λ is about (μ − m) / σ² · N / (N − t): with fewer documents left, m' is further from their
mean. The rejected candidates are at least √(2 log(1/α) σ² / τ) from the mean. Here
τ = t·N / (N − t) is the number of documents that would be equally informative in an infinite
population. So the best λ for one τ is √(2 log(1/α) / (σ² τ)) · N / (N − t), with the variance of
the previous documents. Several bets run at once, each for a τ four times as large, with equal
stakes. This mixture costs the logarithm of their number. If intervals of one width are wanted,
most of the stake is on the λ that reaches it first.

The two bets for the smallest τ are bold, and are computed exactly for each candidate. A candidate's
λ is limited so that no document takes more than BOLDEST of its stake. They bet on the first BOLD_ON
documents only, because the others are better after them. λ of the other bets is limited so that no
document takes more than BOLDEST from any remaining candidate, and candidates are not tracked
individually. For y ≥ −BOLDEST, log(1 + y) ≥ y − y²/2 + y³/3 − y⁴/4 + y⁵/5 − C·y⁶. With
y = ±λ·(x − m') the sum over documents is a polynomial of degree six in m, whose coefficients are
sums over documents. It never overestimates a stake, and hardly underestimates it, since y is small.

A stake on "above" falls as m grows, so candidates are rejected from one end only, and the remaining
candidates are an interval.
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
"""Number of bets that are computed for each candidate."""

BOLD_ON = 256
"""Number of documents that bold bets use."""

BOLDEST = 0.65
"""Largest share of a stake that one document can take."""

EARLY = 3
"""Number of bets for the smallest τ if intervals of one width are wanted."""

EARLY_SHARE = 0.2
"""The part of the stake that they have together."""

_DEGREE = 6
_WEIGHTS = np.array([0.0, *((-1) ** (power + 1) / power for power in range(1, _DEGREE)), 0.0])
"""Coefficients of the powers of y in the lower bound of log(1 + y), with equality at −BOLDEST."""
_WEIGHTS[-1] = (
    math.log(1 - BOLDEST) - np.polynomial.Polynomial(_WEIGHTS)(-BOLDEST)
) / BOLDEST**_DEGREE

_HALVINGS = 10
"""Number of bisections of the distance from a bound to the mean."""

_LEAST = 1e-9
"""The least room below or above a candidate that is divided by."""

_SIDES = np.array([[1.0], [-1.0]])
"""Bets above a candidate, which draw up the lower bound, and below it."""


def horizons(population: int) -> Array:
    """List the values of τ for which bets are optimal, up to at least 8/9 of all documents.

    Args:
        population: Number of documents in the population.

    Returns:
        Numbers of documents that would be equally informative in an infinite population.

    Examples:
        >>> horizons(570).astype(int).tolist()
        [32, 128, 512, 2048, 8192]
    """
    steps = max(0, math.ceil(math.log(8 * population / 32, 4)))
    return np.asarray(32 * 4.0 ** np.arange(steps + 1), dtype=np.float64)


class MeanSequences:
    """Confidence sequences for the means of some series over one finite population.

    The documents must come in random order, the same order for every series. A series may skip
    later documents, and its bounds then stay unchanged. At the end of the population the bounds
    equal its mean.

    Attributes:
        low: `[count]`, the lower bounds so far, never falling.
        high: `[count]`, the upper bounds so far, never rising.
        seen: `[count]`, number of documents of each series.

    References:
        I. Waudby-Smith, A. Ramdas, JRSS-B 86 (2024) 1-27 (betting, the hedged capital, several
        bets side by side). I. Waudby-Smith, A. Ramdas, NeurIPS 2020 (without replacement).
        J. Ville, Étude critique de la notion de collectif (1939).

    Examples:
        Half of 1,000 documents are right: bounds after 200 of them, and after all.

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
        """Start before the first document.

        Args:
            population: Number of documents in the population.
            count: Number of series.
            level: The probability with which all bounds hold at all times.
            together: Number of series that share the error (a union bound, for any dependence);
                None = `count`.
            lowest: The lowest value that a document can have.
            highest: Highest value that a document can have.
            within: Target distance of the bounds from the mean, which they reach as early as
                possible; None = good bounds at any time.
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
        # Bold bets by document: its value, the terms of m' for a candidate, and λ.
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
        """Add further documents, in their order.

        Args:
            values: `[documents, series]`, their values.
            series: Indexes of these series; None = all.

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
        # Certain bounds: all remaining documents may be 0, or all may be 1.
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
        """Return the log stakes of bold bets: candidates `[2, series]` → `[bets, 2, series]`.

        This iterates over all documents in their order.
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
        """Return a lower bound of the log stakes of cautious bets, in the same form."""
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
