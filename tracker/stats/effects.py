"""Test effects of removals: interaction of two, growth, and the best of many by chance.

The interaction of two layers is drop(both) − drop(first) − drop(second), from the same documents.
Above 0, both together cost more than the sum, because each compensates for the other (redundancy).
Below 0 they cost less, because part of their losses is the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from scipy import stats

from tracker.core.estimates import Estimate
from tracker.stats.accuracy import LEVEL, mean_interval
from tracker.stats.arrays import Array, Mask, Strata, divided
from tracker.stats.rank_agreement import rounded, row_coefficients
from tracker.stats.resampling import RESAMPLES, bias_corrected_interval, resampled_means

SIGN_FLIPS = 19_999
_SIGNS_AT_ONCE = 4_000_000
"""Signs that are held in memory at once."""


def interactions(values: Array, weights: Array | None = None, seed: int = 0) -> list[Estimate]:
    """Estimate mean interactions from those of every document, and test that they are 0.

    Where all values are whole numbers, as from outcomes that are right or wrong, each lies in
    {−2, …, 2}. The interval is then a Wald interval after one document with +1 and one with −1 is
    added, as Bonett and Price (2012) do for paired proportions, and the test is exact. For other
    values it is the t interval, and the test draws its signs at random.

    The test is a sign-flip test. If a document's interaction is as likely to be x as −x, all signs
    of the values other than 0 are equally likely. p is the share of signs whose sum is as far from
    0 as the observed one (two-sided). Each document counts once, regardless of its weight. For
    asymmetric values with mean 0 the test is not exact; simulated examples stay near 5 %
    (tests/stats/test_interaction.py).

    Args:
        values: `[documents, pairs]`, drop(both) − drop(first) − drop(second) of every document; NaN
            where a score is not finite.
        weights: `[documents]`, summing to 1; None for equal weights.
        seed: Seed of the signs, which are the same for all pairs.

    Returns:
        One estimate a pair; None with a reason without documents, or with a NaN.

    References:
        R. A. Fisher, The Design of Experiments (1935), section 21 (signs that are equally likely).
        D. G. Bonett, R. M. Price, Journal of Educational and Behavioral Statistics 37 (2012)
        479-488. B. Phipson, G. K. Smyth, Statistical Applications in Genetics and Molecular Biology
        9 (2010) 39 (p-values from draws).

    Examples:
        Of ten documents, both removals together lose five that each alone keeps.

        >>> (found,) = interactions(np.array([[1.0]] * 5 + [[0.0]] * 5))
        >>> found.value, round(found.p_value, 4)
        (0.5, 0.0625)
    """
    documents = len(values)
    if not documents:
        return [Estimate(None, reason="no documents")] * values.shape[1]
    whole: Mask = np.all(np.isin(values, (-2, -1, 0, 1, 2)), axis=0)
    finite: Mask = np.all(np.isfinite(values), axis=0)
    drawn = np.full(values.shape[1], np.nan)
    others = finite & ~whole
    if others.any():
        drawn[others] = _drawn_p(values[:, others], seed)
    found = []
    for pair, column in enumerate(values.T):
        if not finite[pair]:
            bad = int((~np.isfinite(column)).sum())
            reason = f"{bad} of {documents} documents have no finite score"
            found.append(Estimate(None, reason=reason))
            continue
        value = float(column.mean()) if weights is None else float(column @ weights)
        ends = mean_interval(column, weights, (1.0, -1.0) if whole[pair] else ())
        p = sign_flip_p(column) if whole[pair] else float(drawn[pair])
        found.append(Estimate(value, *ends, p))
    return found


def sign_flip_p(values: Array) -> float:
    """Test exactly that small whole numbers are as likely to be x as −x.

    Args:
        values: `[documents]`, each in {−2, …, 2}.

    Returns:
        The two-sided p-value of their sum, from all signs of the values that are not 0.

    Examples:
        >>> round(sign_flip_p(np.array([2.0, 1.0, 0.0])), 4)
        0.5
    """
    sums, chances = [], []
    for size in (1, 2):
        count = int((np.abs(values) == size).sum())
        positive = np.arange(count + 1)
        sums.append(size * (2 * positive - count))
        chances.append(stats.binom.pmf(positive, count, 0.5))
    far = np.abs(np.add.outer(*sums)) >= abs(values.sum()) - 1e-9
    return min(1.0, float(np.multiply.outer(*chances)[far].sum()))


def _drawn_p(values: Array, seed: int) -> Array:
    """Return the p-value of each pair from random signs, the same for all pairs."""
    generator = np.random.default_rng(seed)
    documents = len(values)
    far = np.abs(values.sum(axis=0))
    # Equal sums may differ by rounding.
    bar = far - 1e-9 * np.abs(values).sum(axis=0)
    beyond = np.ones(values.shape[1])
    step = max(1, _SIGNS_AT_ONCE // max(documents, values.shape[1]))
    for start in range(0, SIGN_FLIPS, step):
        size = (min(step, SIGN_FLIPS - start), documents)
        signs = 2.0 * generator.integers(0, 2, size=size) - 1
        beyond += (np.abs(signs @ values) >= bar).sum(axis=0)
    return np.asarray(beyond / (SIGN_FLIPS + 1))


def additivity(
    alone: Sequence[float] | Array,
    together: Sequence[float] | Array,
    resampled: tuple[Array, Array],
) -> tuple[Estimate, Estimate]:
    """Estimate how well sums of two drops predict the joint drops, over pairs.

    R² takes the sum itself as the prediction, 1 − Σ (joint − sum)² / Σ (joint − mean)². No line is
    fitted, so it is 1 if drops add up, and below 0 if their mean predicts better. Sum and joint
    drop rest on the same documents, so common noise favours additivity.

    Args:
        alone: `[pairs]`, drop(first) + drop(second).
        together: `[pairs]`, drop(both).
        resampled: The same two from resampled documents, `[resamples, pairs]` each.

    Returns:
        Spearman's coefficient and R², each with the 95 % interval of `bias_corrected_interval`;
        None with a reason for fewer than three pairs, a NaN, or values that are equal for all
        pairs.

    Examples:
        >>> sums, joint = np.array([0.1, 0.2, 0.3]), np.array([0.1, 0.2, 0.4])
        >>> rank, share = additivity(sums, joint, (sums[None], joint[None]))
        >>> round(rank.value, 3), round(share.value, 3)
        (1.0, 0.786)
    """
    sums, joint = (np.asarray(each, dtype=np.float64) for each in (alone, together))
    if len(sums) < 3:
        why = f"{len(sums)} pairs, and three are needed"
        return Estimate(None, reason=why), Estimate(None, reason=why)

    def estimate(measure: Callable[[Array, Array], Array]) -> Estimate:
        (value,) = measure(sums[None], joint[None]).tolist()
        if not math.isfinite(value):
            return Estimate(None, reason="the sums or the joint drops are all the same")
        return Estimate(value, *bias_corrected_interval(value, measure(*resampled), highest=1))

    return estimate(partial(row_coefficients, coefficient="spearman")), estimate(_explained)


def _explained(sums: Array, joint: Array) -> Array:
    rest = ((joint - sums) ** 2).sum(axis=1)
    spread = ((joint - joint.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    varies = np.ptp(rounded(joint), axis=1) > 0
    return 1 - divided(rest, np.where(varies, spread, 0))


def growths(
    first: Array, last: Array, strata: Strata | None = None, seed: int = 0
) -> list[Estimate]:
    """Estimate the geometric mean of last / first over documents, for each column.

    The interval resamples the documents (within strata) and takes percentiles of the mean log
    ratio, widened to match Student's t (Hesterberg's expanded percentiles), because plain ones are
    too narrow for few documents. All columns use the same resampled documents. The p-value is that
    of Wilcoxon's signed rank test of the log ratios against no growth, exact for few documents
    without ties. It assumes that the log ratios are independent, and symmetric about 0 if nothing
    grows.

    Args:
        first: `[documents, k]`, positive.
        last: `[documents, k]`, of the same documents. To compare two kinds of growth, pass the
            ratios of both.
        strata: `[documents]`, e.g. each document's task.
        seed: Seed of the resamples.

    Returns:
        For each column the factor, 1 = as large as before, with its 95 % interval and p-value.
        None with a reason for fewer than two documents, or where one of the two is not positive
        and finite in some document.

    References:
        F. Wilcoxon, Biometrics Bulletin 1 (1945) 80-83. T. C. Hesterberg, The American
        Statistician 69 (2015) 371-386 (the expanded percentile interval).

    Examples:
        >>> (found,) = growths(np.ones((3, 1)), np.array([[2.0], [4.0], [8.0]]))
        >>> round(found.value, 9), found.p_value
        (4.0, 0.25)
    """
    n, columns = first.shape
    if n < 2:
        why = f"{n} document{'' if n == 1 else 's'}, and growth needs two"
        return [Estimate(None, reason=why)] * columns
    usable = np.isfinite(first) & np.isfinite(last) & (first > 0) & (last > 0)
    logs = np.log(np.where(usable, last, 1) / np.where(usable, first, 1))
    means = resampled_means(logs, RESAMPLES, seed, strata)
    far = np.sqrt(n / (n - 1)) * stats.t.ppf((1 + LEVEL) / 2, n - 1)
    lows, highs = np.exp(np.quantile(means, stats.norm.cdf([-far, far]), axis=0))
    found = []
    for column, low, high, fine in zip(logs.T, lows, highs, usable.T, strict=True):
        if not fine.all():
            why = f"nothing to grow, or not finite, in {int((~fine).sum())} of {n} documents"
            found.append(Estimate(None, reason=why))
            continue
        still = np.allclose(column, 0, rtol=0, atol=1e-12)
        p_value = 1.0 if still else float(stats.wilcoxon(column).pvalue)
        found.append(Estimate(float(np.exp(column.mean())), float(low), float(high), p_value))
    return found


def fewest_to_show(tests: int, level: float) -> int:
    """Count the documents that Wilcoxon's test needs to be able to show any growth.

    All documents grow in one case of 2^n in each direction, so the smallest p-value is 2^(1 - n);
    Holm's method multiplies the smallest by the number of tests.

    Args:
        tests: Number of columns that are tested together.
        level: Adjusted p-value below which growth is shown.

    Returns:
        The smallest number of documents, 2 or more.

    Examples:
        >>> fewest_to_show(1, 0.05), fewest_to_show(29, 0.05)
        (6, 11)
    """
    return next(n for n in itertools.count(2) if tests * 2.0 ** (1 - n) < level)


def unequal_growth(groups: Sequence[Array]) -> float | None:
    """Test whether growth differs between groups of independent documents.

    Kruskal and Wallis's test, by ranks: only that some group's ratios tend to be larger.

    Args:
        groups: The ratio last / first of each document of each group.

    Returns:
        The p-value; None with fewer than two groups, a group of fewer than five documents (for
        which the chi-squared distribution is no approximation), a value that is not finite, or
        where all are equal.

    References:
        W. H. Kruskal, W. A. Wallis, Journal of the American Statistical Association 47 (1952)
        583-621.

    Examples:
        >>> low, high = np.arange(1.0, 6), np.arange(6.0, 11)
        >>> round(unequal_growth([low, high]), 4)
        0.009
    """
    if len(groups) < 2 or min(map(len, groups)) < 5:
        return None
    every = np.concatenate(list(groups))
    if not np.isfinite(every).all() or np.ptp(every) == 0:
        return None
    return float(stats.kruskal(*groups).pvalue)


GAIN_FLIPS = 1_999
_DRAWS_AT_ONCE = 64
"""Number of sign flips that are multiplied at once."""


class BestByChance(NamedTuple):
    """Largest of many mean gains under random signs.

    Attributes:
        middle: Median of the largest mean.
        high: Value that the largest mean exceeds in one of twenty draws.
        p_value: Share of draws in which it is as large as the largest observed mean; the
            observation itself counts as one draw.
    """

    middle: float
    high: float
    p_value: float


def best_by_chance(gains: Array, weights: Array | None = None, seed: int = 0) -> BestByChance:
    """Estimate the largest of many mean gains if no candidate gained or lost anything.

    The signs of all gains of a document are flipped together at random, so that candidates that
    change the same documents stay correlated. It assumes that documents are independent and that,
    without any effect, a document is as likely to gain x as to lose it. Candidates that change many
    documents, as harmful ones do, increase the best by chance.

    Args:
        gains: `[documents, candidates]`, finite improvement of each document by each candidate.
        weights: `[documents]`, summing to 1; None for equal weights.
        seed: Seed of the signs.

    Returns:
        The best by chance, in the unit of the gains.

    References:
        P. H. Westfall, S. S. Young, Resampling-Based Multiple Testing (1993), section 2.5 (the
        largest of many under signs that are equally likely).

    Examples:
        Two candidates that change the same 100 documents, one for the better and one for the worse.

        >>> found = best_by_chance(np.tile([[1.0, -1.0]], (100, 1)))
        >>> 0.05 < found.middle < 0.1, found.p_value
        (True, 0.0005)
    """
    share = np.full(len(gains), 1 / len(gains)) if weights is None else weights
    scaled = gains * share[:, None]
    draw = np.random.default_rng(seed)
    best = np.empty(GAIN_FLIPS)
    for first in range(0, GAIN_FLIPS, _DRAWS_AT_ONCE):
        count = min(_DRAWS_AT_ONCE, GAIN_FLIPS - first)
        signs = draw.integers(0, 2, (count, len(gains))) * 2.0 - 1.0
        best[first : first + count] = (signs @ scaled).max(axis=1)
    found = scaled.sum(axis=0).max()
    reached = int((best >= found - 1e-12).sum()) + 1
    middle, high = np.quantile(best, [0.5, 0.95])
    return BestByChance(float(middle), float(high), reached / (GAIN_FLIPS + 1))
