"""Compute confidence sequences for the mean of a finite population.

A confidence sequence has one confidence interval of the mean after each document. With the stated
confidence, all these intervals contain the mean. The confidence is therefore valid for any stopping
time.

The intervals are derived from betting games. For each candidate value m of the mean, two games are
played. In the first game, a player bets that the values of the next documents are above m. In the
second game, a player bets that the values of the next documents are below m. Each player begins
with a capital of 1. If m is the true mean, the capital reaches 1/α with a probability of at most α
(Ville's inequality). A candidate m is rejected when the capital in one of its games reaches 1/α.

Let S be the sum of the first t of N values. If m is the true mean, the remaining documents have the
mean m' = (N·m − S) / (N − t). Let x in [0, 1] be the next value. If a player bets that x is above
m', the stake is multiplied by 1 + λ·(x − m'). If a player bets that x is below m', the stake is
multiplied by 1 − λ·(x − m'). Ville's inequality requires that the factor λ does not depend on the
next value x, and that a stake is never negative. Ville's inequality remains valid if the capital is
divided among several bets, or if a stake is underestimated.

The effective sample size is τ = t·N / (N − t). The optimal λ for one τ is √(2 log(1/α) / (σ² τ)) ·
N / (N − t), where σ² is the variance of the previous values. The capital of a game is divided
equally among several bets. Each bet is optimal for a different τ, and each τ is four times the
previous τ.

The bets for the two smallest values of τ are called bold bets, and all other bets are called
cautious bets. A single document can reduce a stake by at most the fraction MAX_RISK.

The stakes of bold bets are computed exactly for each candidate. Bold bets use only the values of
the first BOLD_DOCUMENTS documents.

For cautious bets, polynomials in m approximate the logarithms of the stakes. The approximation
holds for candidates that are not rejected. The polynomials are based on a lower bound of the
logarithm. For y ≥ −MAX_RISK, log(1 + y) ≥ y − y²/2 + y³/3 − y⁴/4 + y⁵/5 − C·y⁶. With y = ±λ·(x −
m'), the sum of this lower bound over all documents is a polynomial of degree six in m. The
polynomial is never larger than the logarithm of the stake.

The first game rejects only the smallest candidates, and the second game only the largest. The
remaining candidates are therefore an interval.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from itertools import accumulate

import numpy as np
from numpy.polynomial.polynomial import polyval

from tracker.stats.accuracy import LEVEL
from tracker.stats.arrays import Array, IntArray

N_BOLD_BETS = 2
"""Number of bold bets, whose stakes are computed exactly for each candidate."""

BOLD_DOCUMENTS = 256
"""Number of documents that bold bets use."""

MAX_RISK = 0.65
"""Largest fraction of a stake that a bet can lose at one document."""

N_EARLY_BETS = 3
"""Number of bets for the smallest values of τ if a half width of the intervals is given."""

EARLY_STAKE = 0.2
"""Fraction of the capital that all `N_EARLY_BETS` bets have together."""

_DEGREE = 6
_LOG_COEFFICIENTS = np.array([0.0, *((-1) ** (n + 1) / n for n in range(1, _DEGREE)), 0.0])
"""Coefficients of the powers of y in the lower bound of log(1 + y), with equality at −MAX_RISK."""
_LOG_COEFFICIENTS[-1] = (
    math.log(1 - MAX_RISK) - np.polynomial.Polynomial(_LOG_COEFFICIENTS)(-MAX_RISK)
) / MAX_RISK**_DEGREE

_BISECTIONS = 10
"""Number of bisections of the distance from a bound to the mean."""

_MIN_ROOM = 1e-9
"""Minimum divisor; smaller distances from a candidate to 0 or 1 are replaced by this value."""

_SIDES = np.array([[1.0], [-1.0]])
"""Signs of bets above a candidate, which raise the lower bound, and of bets below it."""


def horizons(population: int) -> Array:
    """Return the sample sizes τ for which the bets of a confidence sequence are optimal.

    Args:
        population: Number of documents in the population.

    Returns:
        `[bets]`, the effective sample size τ of each bet.

    Examples:
        >>> horizons(570).astype(int).tolist()
        [32, 128, 512, 2048, 8192]
    """
    n_steps = max(0, math.ceil(math.log(8 * population / 32, 4)))
    return np.asarray(32 * 4.0 ** np.arange(n_steps + 1), dtype=np.float64)


class MeanSequences:
    """Confidence sequences for the means of several series over the same finite population.

    The documents must be added in random order, and in the same order for every series. A series
    can end before all documents are added.

    Attributes:
        low: `[series]`, the current lower bounds; further documents never lower them.
        high: `[series]`, the current upper bounds; further documents never raise them.
        seen: `[series]`, number of documents that were added to each series.

    References:
        I. Waudby-Smith, A. Ramdas, JRSS-B 86 (2024) 1-27. I. Waudby-Smith, A. Ramdas, NeurIPS 2020.
        J. Ville, Étude critique de la notion de collectif (1939).

    Examples:
        Half of 1,000 answers are right. The example shows the bounds after 200 and after all
        answers.

        >>> right = np.arange(1000) % 2
        >>> drawn = np.random.default_rng(0).permutation(right)[:, None]
        >>> sequence = MeanSequences(1000, 1, min_value=0, max_value=1)
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
        n_series: int,
        *,
        level: float = LEVEL,
        family: int | None = None,
        min_value: float = -1.0,
        max_value: float = 1.0,
        half_width: float | None = None,
    ) -> None:
        """Create the confidence sequences, before any document is added.

        Args:
            population: Number of documents in the population.
            n_series: Number of series.
            level: Confidence level, the probability that the bounds of all series are right after
                every document.
            family: Number of series among which the error rate 1 − `level` is divided; None means
                `n_series`.
            min_value: Lowest value that a document can have.
            max_value: Highest value that a document can have.
            half_width: Target half width of the intervals, for which the bets are optimised; None
                for no target.
        """
        family = n_series if family is None else family
        self.population = population
        self.low = np.full(n_series, float(min_value))
        self.high = np.full(n_series, float(max_value))
        self.seen = np.zeros(n_series, dtype=np.int64)
        self._lowest, self._range = float(min_value), float(max_value) - float(min_value)
        self._half_width = None if half_width is None else half_width / self._range
        taus = horizons(population)
        stakes = np.full(len(taus), 1 / len(taus))
        if half_width is not None:
            taus = taus[:N_EARLY_BETS]
            stakes = np.append(EARLY_STAKE / len(taus) * np.ones(len(taus)), 1 - EARLY_STAKE)
        self._bold_taus, self._cautious_taus = taus[:N_BOLD_BETS], taus[N_BOLD_BETS:]
        self._stakes = np.log(stakes)
        self._log_target = math.log(2 * family / (1 - level))
        self._sums, self._square_sums = np.zeros(n_series), np.zeros(n_series)
        # Bold bets, by document: its value, the scale and shift of m' for a candidate, and each λ.
        shape = (min(BOLD_DOCUMENTS, population), n_series)
        self._bold_rows = np.zeros((3 + len(self._bold_taus), *shape))
        # Cautious bets: even and odd terms of the logarithm, as polynomials in the distance from
        # `_centres`.
        n_cautious = len(stakes) - len(self._bold_taus)
        self._centres = np.full(n_series, 0.5)
        self._terms = np.zeros((2, _DEGREE + 1, n_cautious, n_series))

    def add(self, values: Array, series: IntArray | None = None) -> None:
        """Add the values of further documents, and update the bounds of the means.

        Args:
            values: `[documents, series]`, the values of the documents.
            series: Index of the series of each column of `values`; None for all series.

        Raises:
            ValueError: A value is not finite or out of range, or there are more documents than
                the population has.
        """
        indexes = np.arange(len(self.low)) if series is None else np.asarray(series)
        shares = self.scale_values(values)
        if not shares.size:
            return
        if (self.seen[indexes] + len(shares)).max() > self.population:
            raise ValueError(f"more than all {self.population} documents")
        self._update_stakes(shares, indexes)
        self._narrow_bounds(indexes)

    def scale_values(self, values: Array) -> Array:
        """Map [`min_value`, `max_value`] to [0, 1]; raise ValueError for values out of range."""
        shares = (np.asarray(values, dtype=np.float64) - self._lowest) / self._range
        if not ((shares >= 0) & (shares <= 1)).all():
            highest = self._lowest + self._range
            raise ValueError(f"a value is outside the range {self._lowest:g} to {highest:g}")
        return shares

    def _update_stakes(self, values: Array, indexes: IntArray) -> None:
        """Add further documents to the data from which the stakes of all bets are computed.

        The array `values` is `[documents, columns]`, in [0, 1]; column i contains the values of the
        series `indexes[i]`.
        """
        n_before = self.seen[indexes] + np.arange(len(values))[:, None]
        sums = np.cumsum(values, axis=0) - values + self._sums[indexes]
        squares = np.cumsum(values**2, axis=0) - values**2 + self._square_sums[indexes]
        # Half a document at 0 and half a one at 1 come before all others.
        means = (sums + 0.5) / (n_before + 1)
        variances = (squares + 0.5) / (n_before + 1) - means**2
        n_left = self.population - n_before
        scales, shifts = self.population / n_left, sums / n_left
        # The best λ for τ = 1; the others are a part of it.
        bet_log_target = self._log_target + math.log(len(self._stakes))
        base_bets = scales * np.sqrt(2 * bet_log_target / variances)
        rows, columns = np.nonzero(n_before < self._bold_rows.shape[1])
        if rows.size:
            bold_bets = base_bets / np.sqrt(self._bold_taus)[:, None, None]
            table = np.stack([values, scales, shifts, *bold_bets])[:, rows, columns]
            self._bold_rows[:, n_before[rows, columns], indexes[columns]] = table
        best_bets = base_bets / np.sqrt(self._cautious_taus)[:, None, None]
        if self._half_width is not None:
            best_bets = np.concatenate([best_bets, [scales * self._half_width / variances]])
        self._move_centres(indexes, means[0])
        # Of the candidates that are not rejected, the candidate whose bets can lose most.
        low, high = (self._scale_bounds(bounds[indexes]) for bounds in (self.low, self.high))
        max_losses = np.maximum(scales * high - shifts, 1 - (scales * low - shifts))
        bets = np.minimum(best_bets, MAX_RISK / np.clip(max_losses, 0.5, 1.0))
        # y = centre − distance · slope
        centres = _powers(bets * (values + shifts - means[0] * scales))
        slopes = _powers(-bets * scales)
        for power, weight in enumerate(_LOG_COEFFICIENTS):
            for degree in range(power + 1):
                products = np.einsum("bns,bns->bs", centres[power - degree], slopes[degree])
                terms = self._terms[power % 2, degree]
                terms[:, indexes] += weight * math.comb(power, degree) * products
        self._sums[indexes] += values.sum(axis=0)
        self._square_sums[indexes] += (values**2).sum(axis=0)
        self.seen[indexes] += len(values)

    def _move_centres(self, indexes: IntArray, centres: Array) -> None:
        """Express the polynomials of cautious bets in the distance from a new centre.

        Let m be a possible mean. A polynomial in m − (old centre) becomes the equal polynomial in m
        − (new centre). The new centre of the series `indexes[i]` is `centres[i]`.
        """
        distances = centres - self._centres[indexes]
        for lowest_degree in range(_DEGREE):
            for degree in range(_DEGREE - 1, lowest_degree - 1, -1):
                terms, higher_terms = self._terms[:, degree], self._terms[:, degree + 1]
                terms[..., indexes] += distances * higher_terms[..., indexes]
        self._centres[indexes] = centres

    def _scale_bounds(self, bounds: Array) -> Array:
        """Map bounds of means from [`min_value`, `max_value`] to [0, 1]."""
        return np.clip((bounds - self._lowest) / self._range, 0.0, 1.0)

    def _narrow_bounds(self, indexes: IntArray) -> None:
        """Move the bounds of the means inwards, past the values that the bets reject.

        The array `indexes` contains the numbers of the series whose bounds are updated.
        """
        sums = self._sums[indexes]
        # Certain bounds: all remaining documents may be 0, or all may be 1.
        certain_low = sums / self.population
        certain_high = (sums + self.population - self.seen[indexes]) / self.population
        low = np.clip(self._scale_bounds(self.low[indexes]), certain_low, certain_high)
        high = np.clip(self._scale_bounds(self.high[indexes]), certain_low, certain_high)
        rejected_means = np.stack([low, high])
        accepted_means = np.tile(np.clip(sums / self.seen[indexes], low, high), (2, 1))
        cautious_stakes = self._cautious_stakes(indexes)
        bold_stakes = self._bold_stakes(indexes)
        for _ in range(_BISECTIONS):
            candidates = (rejected_means + accepted_means) / 2
            log_stakes = np.concatenate([bold_stakes(candidates), cautious_stakes(candidates)])
            log_stakes += self._stakes[:, None, None]
            is_rejected = np.logaddexp.reduce(log_stakes) >= self._log_target
            rejected_means = np.where(is_rejected, candidates, rejected_means)
            accepted_means = np.where(is_rejected, accepted_means, candidates)
        # An interval becomes empty only if an error occurred; it is then replaced by a point.
        self.low[indexes] = self._lowest + self._range * rejected_means[0]
        self.high[indexes] = self._lowest + self._range * rejected_means.max(axis=0)

    def _bold_stakes(self, indexes: IntArray) -> Callable[[Array], Array]:
        """Return a function that computes the logarithm of each bold bet's stake.

        The returned function takes an array `[2, series]` of possible means: candidates for the
        lower bounds, and candidates for the upper bounds. The result is an array `[bets, 2,
        series]`.
        """
        (active,) = np.nonzero(self.seen[indexes] <= self._bold_rows.shape[1])
        n_bold = len(self._bold_taus)
        if not active.size:
            return lambda candidates: np.full((n_bold, *candidates.shape), -np.inf)
        series = indexes[active]
        values, scales, shifts, *bets = self._bold_rows[:, : self.seen[series].max(), series]

        def log_stakes(candidates: Array) -> Array:
            rest_means = candidates[:, None, active] * scales - shifts
            gains = _SIDES[:, None] * (values - rest_means)
            room = np.stack([rest_means[0], 1 - rest_means[1]])
            max_bets = MAX_RISK / np.maximum(room, _MIN_ROOM)
            logs = np.full((n_bold, *candidates.shape), -np.inf)
            with np.errstate(over="ignore"):  # an infinite stake is enough
                for table, bet in zip(logs, bets, strict=True):
                    capital = np.prod(1 + np.minimum(bet, max_bets) * gains, axis=1)
                    table[:, active] = np.log(capital)
            return logs

        return log_stakes

    def _cautious_stakes(self, indexes: IntArray) -> Callable[[Array], Array]:
        """Return a function that computes a lower bound of the log stake of each cautious bet.

        The returned function takes an array `[2, series]` of possible means: candidates for the
        lower bounds, and candidates for the upper bounds. The result is an array `[bets, 2,
        series]`.
        """
        centres = self._centres[indexes]
        coefficients = self._terms[:, :, :, None, indexes]

        def log_stakes(candidates: Array) -> Array:
            distances = candidates - centres
            sums = [polyval(distances, terms, tensor=False) for terms in coefficients]
            return np.asarray(_SIDES * sums[1] + sums[0])

        return log_stakes


def _powers(values: Array) -> list[Array]:
    """List the powers x⁰, x¹, … of an array up to `_DEGREE`."""
    return list(accumulate([np.ones_like(values), *[values] * _DEGREE], operator.mul))
