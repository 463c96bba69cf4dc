"""By how much something grows, document by document, and whether it grows at all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from scipy import stats

from tracker.core.estimates import Estimate
from tracker.stats.accuracy import LEVEL
from tracker.stats.arrays import Array, Strata
from tracker.stats.resampling import RESAMPLES, resampled_means


def growths(
    first: Array, last: Array, strata: Strata | None = None, seed: int = 0
) -> list[Estimate]:
    """Estimate the geometric mean of last / first over documents, for each column.

    The interval resamples the documents (within strata) and takes percentiles of the mean log
    ratio, as far out as Student's t asks for (Hesterberg's expanded percentiles): plain ones are
    too narrow for few documents. All columns see the same resampled documents. The p-value is that
    of Wilcoxon's signed rank test of the log ratios, exact for few documents without ties, against
    no growth. It takes the log ratios for independent, and for as likely to lie as far above as
    below 0 where nothing grows.

    Args:
        first: `[documents, k]`, positive.
        last: `[documents, k]`, of the same documents; for a comparison of two ways to grow, both
            are ratios themselves.
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
    """Count the documents without which Wilcoxon's test cannot show the growth of anything.

    All documents grow in one case of 2^n in each direction, so the smallest p-value is 2^(1 - n);
    Holm's method multiplies the smallest by the number of tests.

    Args:
        tests: How many columns are tested together.
        level: An adjusted p-value below this shows growth.

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
