"""Compute accuracies, drops, their intervals, and the drops that a sample can reveal.

All values are fractions, never percentage points. They are computed from per-document outcomes: one
number in [0, 1] for each document, mostly 0 or 1, NaN if the model gave no finite score. The same
functions estimate a loss, in its own unit. An undefined figure is None with a reason, never 0.

Metrics that divide a sum over all documents by another sum are weighted means of documents. A
document has a pair (sum, units): log-likelihood and bytes, or right tokens and tokens. The ratio of
both sums is the mean of the documents' own ratios, weighted by their units. Drops, intervals and
resampling therefore work as for any other metric.

Power: how small a change a sample reveals, and how many documents reveal a change.

A two-sided test of the paired outcomes at the level `ALPHA` reveals a change if it finds the change
with the probability `POWER`. Power depends on the variance of one document's outcome change, which
is observed in a cell, or assumed before a cell is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import scipy  # imports its slow submodules on first use
from numpy.typing import ArrayLike

from tracker.core.estimates import Estimate
from tracker.stats.arrays import Array, Numbers, divided

RATIO = "ratio"
"""The plain ratio of both sums."""
SCALES = {RATIO: 1.0, "bits_per_byte": -1 / math.log(2)}
"""Aggregations that are a ratio of sums, ours or lm-eval's → factor of the ratio."""


def ratio_of_sums(how: str, pairs: Sequence[tuple[float, float]]) -> float:
    """Aggregate a metric over documents.

    Args:
        how: The aggregation, one of `SCALES`.
        pairs: One (sum, units) a document.

    Returns:
        The scaled ratio; NaN without units.

    Examples:
        >>> ratio_of_sums("ratio", [(1, 2), (5, 6)])
        0.75
    """
    total = sum(units for _, units in pairs)
    return SCALES[how] * sum(part for part, _ in pairs) / total if total else math.nan


def document_ratios(how: str, sums: Array, units: Array) -> Array:
    """Compute each document's own ratio.

    Args:
        how: The aggregation, one of `SCALES`.
        sums: `[documents]`.
        units: `[documents]`, 0 or more.

    Returns:
        `[documents]`, scaled; 0 for an empty document, whose weight is 0 too, and NaN for one that
        has a sum but no units.

    Examples:
        >>> document_ratios("ratio", np.array([1.0, 0.0]), np.array([2.0, 0.0])).tolist()
        [0.5, 0.0]
    """
    nothing = np.where((units == 0) & (sums == 0), 0.0, np.nan)
    return divided(SCALES[how] * sums, units, nothing)


LEVEL = 0.95
"""The confidence level of every interval in this module."""

_SAME = 1e-9
"""Accuracies and weights that are nearer to each other than this differ by rounding alone."""


def weights_by_task(
    tasks: Sequence[str], weight_by_size: bool, units: Array | None = None
) -> Array:
    """Weigh each document so that the weighted mean is the benchmark's accuracy.

    lm-eval aggregates a group either over its documents (`weight_by_size: true`) or as the plain
    mean of its tasks' accuracies. The mean of task means is a weighted mean over documents too.

    Args:
        tasks: The task of every document.
        weight_by_size: Whether every document has the same weight; otherwise every task does.
        units: `[documents]`, the units behind each outcome where the metric is a ratio of sums;
            None where it is a mean over documents.

    Returns:
        `[documents]`, summing to 1 (empty without documents): 1 / N, or 1 / (T · n) for a document
        of a task with n documents, one of T tasks. With units, the documents of a task share its
        weight in proportion to their units.

    Examples:
        >>> weights_by_task(["law", "law", "art"], weight_by_size=False).tolist()
        [0.25, 0.25, 0.5]
    """
    if not len(tasks):
        return np.empty(0)
    names, task, sizes = np.unique(np.asarray(tasks), return_inverse=True, return_counts=True)
    each = np.full(len(names), 1 / len(tasks)) if weight_by_size else 1 / (len(names) * sizes)
    if units is None:
        return np.asarray(each[task], dtype=np.float64)
    known = np.nan_to_num(units)
    totals = np.bincount(task, known).astype(np.float64)
    shared = divided(known, totals[task], 1 / sizes[task])
    return np.asarray(each[task] * sizes[task] * shared, dtype=np.float64)


def accuracy(outcomes: Array, weights: Array | None = None) -> Estimate:
    """Estimate the accuracy from the outcomes of independent documents.

    The interval is Wilson's for 0/1 outcomes of equal weight. For 0/1 outcomes of unequal weight it
    is the normal interval after adding two right and two wrong documents of mean weight (Agresti &
    Coull's "plus four"), because a plain one has no width when all are right. For any other
    outcomes it is the t interval of the weighted mean. The last two are not clipped and may reach
    beyond [0, 1]. Unequal weights are taken as given and the tasks behind them as unknown, so for a
    group whose tasks differ in accuracy the interval is rather too wide than too narrow.

    Args:
        outcomes: `[documents]`, in [0, 1]; NaN where there is no finite score.
        weights: `[documents]`, summing to 1; None for equal weights.

    Returns:
        The weighted mean and its interval (None for a single document that is not 0/1); no p-value.

    References:
        E. B. Wilson, JASA 22 (1927) 209-212. A. Agresti, B. A. Coull, The American Statistician 52
        (1998) 119-126.

    Examples:
        >>> estimate = accuracy(np.array([1.0] * 81 + [0.0] * 182))
        >>> round(estimate.value, 4), round(estimate.low, 4), round(estimate.high, 4)
        (0.308, 0.2553, 0.3662)
    """
    values, shares = _checked(outcomes, weights)
    if reason := _undefined(values):
        return Estimate(None, reason=reason)
    if not _binary(values):
        low, high = _t_interval(values, shares)
    elif _equal(shares):
        wilson = scipy.stats.binomtest(int(values.sum()), len(values)).proportion_ci(
            LEVEL, "wilson"
        )
        low, high = float(wilson.low), float(wilson.high)
    else:
        low, high = _adjusted_wald(values, shares, (1.0, 1.0, 0.0, 0.0))
    return Estimate(_mean(values, shares), low, high)


def accuracy_drop(baseline: Array, ablated: Array, weights: Array | None = None) -> Estimate:
    """Estimate the accuracy that an ablation costs, from the same documents with and without it.

    Positive = the layer mattered. For 0/1 outcomes the interval is Bonett & Price's adjusted Wald
    interval for paired proportions: a Wald interval after one document is added to each of the two
    discordant cells; with unequal weights the two have the mean weight. The value stays the raw
    difference, which is therefore not the middle of the interval. For other outcomes it is the
    paired t interval. Neither is clipped; both may reach beyond [-1, 1].

    The p-value is the exact two-sided McNemar test of "as many documents are lost as won". Each
    document counts once, regardless of its weight. It is 1 when no document changes, and None for
    outcomes other than 0/1.

    Args:
        baseline: `[documents]`, the intact model's outcomes; NaN where there is no finite score.
        ablated: `[documents]`, the ablated model's outcomes on the same documents.
        weights: `[documents]`, summing to 1; None for equal weights.

    Returns:
        The weighted mean of baseline minus ablated, its interval (None for a single document that
        is not 0/1) and the p-value.

    References:
        D. G. Bonett, R. M. Price, Journal of Educational and Behavioral Statistics 37 (2012)
        479-488. Q. McNemar, Psychometrika 12 (1947) 153-157.

    Examples:
        Of 20 documents the removal loses six and wins one.

        >>> baseline = np.array([1.0] * 12 + [0.0] * 8)
        >>> ablated = np.array([1.0] * 6 + [0.0] * 6 + [1.0] + [0.0] * 7)
        >>> drop = accuracy_drop(baseline, ablated)
        >>> drop.value, drop.p_value
        (0.25, 0.125)
        >>> round(drop.low, 3), round(drop.high, 3)
        (-0.023, 0.477)
    """
    before, shares = _checked(baseline, weights)
    after, _ = _checked(ablated, None)
    difference = before - after
    if reason := _undefined(difference):
        return Estimate(None, reason=reason)
    value = _mean(difference, shares)
    if not (_binary(before) and _binary(after)):
        return Estimate(value, *_t_interval(difference, shares))
    low, high = _adjusted_wald(difference, shares, (1.0, -1.0))
    lost, won = int((difference > 0).sum()), int((difference < 0).sum())
    p_value = float(scipy.stats.binomtest(lost, lost + won).pvalue) if lost + won else 1.0
    return Estimate(value, low, high, p_value)


def drop_sd(baseline: Array, ablated: Array, weights: Array | None = None) -> Estimate:
    """Estimate the spread of the drops of single documents.

    Args:
        baseline: `[documents]`, the intact model's outcomes; NaN where there is no finite score.
        ablated: `[documents]`, the ablated model's outcomes on the same documents.
        weights: `[documents]`, summing to 1; None for equal weights.

    Returns:
        The standard deviation of baseline minus ablated, without an interval. With unequal weights
        it is that of equally many documents of equal weight with the same standard error.

    Examples:
        >>> drop_sd(np.array([1.0, 1.0, 0.0, 1.0]), np.array([0.0, 1.0, 0.0, 1.0])).value
        0.5
    """
    before, shares = _checked(baseline, weights)
    difference = before - _checked(ablated, None)[0]
    if reason := _undefined(difference):
        return Estimate(None, reason=reason)
    concentration = float(shares @ shares)
    if 1 - concentration < _SAME:
        return Estimate(None, reason="one document has no spread")
    squares = (difference - float(shares @ difference)) ** 2
    variance = float(shares**2 @ squares) * len(squares) / (1 - concentration)
    return Estimate(math.sqrt(variance))


def mean_interval(
    values: Array, weights: Array | None = None, extra: tuple[float, ...] = ()
) -> tuple[float | None, float | None]:
    """Return the 95 % interval of the mean of documents' own figures.

    Args:
        values: `[documents]`, finite.
        weights: `[documents]`, summing to 1; None for equal weights.
        extra: Documents of mean weight that are added for a Wald interval; none for a t interval.

    Returns:
        Both ends, not clipped; None for a single document without `extra`.
    """
    numbers, shares = _checked(values, weights)
    return _adjusted_wald(numbers, shares, extra) if extra else _t_interval(numbers, shares)


def chance_accuracy(choices: Numbers | Array, weights: Array | None = None) -> float:
    """Return the expected accuracy of a predictor that picks a choice at random.

    Args:
        choices: `[documents]`, how many choices each has; 0 for generation and greedy match, where
            a random predictor is never right.
        weights: `[documents]`, summing to 1; None for equal weights.

    Returns:
        The weighted mean of 1 / choices; NaN without documents.

    Examples:
        >>> chance_accuracy(np.array([4, 4, 5, 0]))
        0.175
    """
    counts, shares = _checked(choices, weights)
    if not len(counts):
        return math.nan
    return _mean(divided(1.0, counts, 0.0), shares)


def accuracy_relevance(baseline: float | None, ablated: float | None, chance: float) -> Estimate:
    """Score a layer by the share of the accuracy above chance that its removal costs.

    1 - max(ablated - chance, 0) / max(baseline - chance, 0): 1 = down to chance, 0 = no change,
    negative = the removal helps.

    Args:
        baseline: Accuracy of the intact model.
        ablated: Accuracy of the ablated model on the same documents.
        chance: Expected accuracy of a random predictor on these documents.

    Returns:
        The relevance, without an interval; None with a reason when an input is missing, or when the
        baseline is not above chance, because then there is nothing to lose.

    References:
        arXiv 2605.14075.

    Examples:
        >>> accuracy_relevance(0.75, 0.5, chance=0.25).value
        0.5
        >>> accuracy_relevance(0.25, 0.2, chance=0.25).reason
        'the baseline accuracy 0.2500 is not above chance 0.2500'
    """
    if baseline is None or not math.isfinite(baseline):
        return Estimate(None, reason="the baseline accuracy is undefined")
    if ablated is None or not math.isfinite(ablated):
        return Estimate(None, reason="the ablated accuracy is undefined")
    if not math.isfinite(chance):
        return Estimate(None, reason="the chance accuracy is undefined")
    if baseline - chance <= _SAME:
        reason = f"the baseline accuracy {baseline:.4f} is not above chance {chance:.4f}"
        return Estimate(None, reason=reason)
    return Estimate(1 - max(ablated - chance, 0.0) / (baseline - chance))


def _checked(values: ArrayLike, weights: Array | None) -> tuple[Array, Array]:
    """Return the values and their weights."""
    numbers = np.asarray(values, dtype=np.float64)
    n = len(numbers)
    if weights is None:
        return numbers, np.full(n, 1 / max(n, 1))
    shares = np.asarray(weights, dtype=np.float64)
    if n and not ((shares >= 0).all() and abs(shares.sum() - 1) < _SAME * n):
        raise ValueError(f"weights must be 0 or more and sum to 1, not {shares.sum()}")
    return numbers, shares


def _equal(shares: Array) -> bool:
    return bool(np.allclose(shares * len(shares), 1, rtol=0, atol=_SAME))


def _mean(values: Array, shares: Array) -> float:
    """Return the weighted mean; of equal weights the plain one, which rounds less."""
    return float(values.mean() if _equal(shares) else values @ shares)


def _undefined(values: Array) -> str | None:
    """Return the reason why no mean of these values is defined; None if it is."""
    if not len(values):
        return "no documents"
    if missing := int((~np.isfinite(values)).sum()):
        verb = "has" if missing == 1 else "have"
        return f"{missing} of {len(values)} documents {verb} no finite score"
    return None


def _binary(values: Array) -> bool:
    return bool(((values == 0) | (values == 1)).all())


def _t_interval(values: Array, shares: Array) -> tuple[float | None, float | None]:
    """Return the t interval of a weighted mean; Kish's effective sample size gives its df."""
    concentration = float(shares @ shares)
    if 1 - concentration < _SAME:
        return None, None
    mean = float(values @ shares)
    error = math.sqrt(float(shares**2 @ (values - mean) ** 2) / (1 - concentration))
    half = float(scipy.special.stdtrit(1 / concentration - 1, (1 + LEVEL) / 2)) * error
    return mean - half, mean + half


def _adjusted_wald(values: Array, shares: Array, extra: tuple[float, ...]) -> tuple[float, float]:
    """Return the Wald interval of a weighted mean after adding documents of mean weight."""
    n = len(values)
    padded = np.concatenate([values, np.array(extra)])
    weights = np.concatenate([shares, np.full(len(extra), 1 / n)]) / (1 + len(extra) / n)
    mean = float(padded @ weights)
    error = math.sqrt(float(weights**2 @ (padded - mean) ** 2))
    half = float(scipy.special.ndtri((1 + LEVEL) / 2)) * error
    return mean - half, mean + half


ALPHA = 0.05
POWER = 0.8
MEANT = 0.05
"""The drop, a fraction, for which pages, terminals and plans name a number of documents."""


@dataclass(frozen=True)
class OutcomeVariance:
    """Variance of the change of one document's outcome under a removal.

    For 0/1 outcomes it is the share of documents that change, lost or won. This is the normal
    approximation of McNemar's test. Its variance is that share if losses and gains balance, and
    less by the square of the drop otherwise. A drop changes at least as many documents as it
    loses, so for a drop larger than the share, the share is the drop. The exact test needs a
    little more. For other outcomes it is the variance of the paired difference, for any mean.

    Attributes:
        variance: The share of documents that change, or the variance.
        binary: Whether outcomes are 0 or 1.

    References:
        O. S. Miettinen, Biometrics 24 (1968) 339-352. R. J. Connor, Biometrics 43 (1987) 207-211.

    Examples:
        Half of the documents are lost, a fifth is won (S.-C. Chow, J. Shao, H. Wang, Sample Size
        Calculations in Clinical Research, example 6.4.3).

        >>> OutcomeVariance(0.7, binary=True).documents(0.3)
        59
    """

    variance: float
    binary: bool

    def documents(self, change: float, tests: int = 1) -> int:
        """Count the documents that reveal a change.

        Args:
            change: A drop or an increase, above 0.
            tests: Number of simultaneous tests, each at the level `ALPHA` / `tests`.

        Returns:
            The smallest such number.
        """
        return math.ceil(self._product(change, tests) / change**2)

    def change(self, documents: int, tests: int = 1) -> float | None:
        """Return the smallest change that a number of documents reveals.

        Args:
            documents: Number of documents, one or more.
            tests: Number of simultaneous tests, each at the level `ALPHA` / `tests`.

        Returns:
            The change; None if not even the loss of every document is revealed.
        """
        if not self.binary:
            return math.sqrt(self._product(0, tests) / documents)

        def excess(change: float) -> float:
            return documents * change**2 - self._product(change, tests)

        if excess(1) < 0:
            return None
        # Search above 0, because at 0 nothing changes and nothing is revealed.
        return float(scipy.optimize.brentq(excess, 1e-9, 1, xtol=1e-12))

    def _product(self, change: float, tests: int) -> float:
        """Return the number of documents that reveal a change, times its square."""
        level, power = map(float, scipy.special.ndtri([1 - ALPHA / (2 * tests), POWER]))
        if not self.binary:
            return (level + power) ** 2 * self.variance
        share = max(self.variance, change)
        return float((level * math.sqrt(share) + power * math.sqrt(share - change**2)) ** 2)


def documents_needed(
    variances: Sequence[OutcomeVariance], tests: int, benchmarks: int = 1, change: float = MEANT
) -> int:
    """Count the documents of each benchmark that reveal a mean change under half of some removals.

    Args:
        variances: Variances of the removals, at least one.
        tests: Number of removals that are tested together.
        benchmarks: Number of benchmarks in the mean, all with equally many documents.
        change: The change.

    Returns:
        The number, rounded to two digits.

    Examples:
        >>> documents_needed([OutcomeVariance(0.2, binary=True)], tests=30)
        1300
    """
    middle = median(variance.documents(change, tests) for variance in variances)
    needed = math.ceil(middle / benchmarks)
    return round(needed, 2 - len(str(needed)))


UNRELATED = OutcomeVariance(0.5, binary=True)
"""Assumption before anything is measured: two unrelated models, each right half of the time.

A removal changes fewer outcomes than that.
"""
