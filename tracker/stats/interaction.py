"""Whether what two removals cost together is the sum of what each costs alone.

The interaction of two layers is drop(both) − drop(first) − drop(second), from the same documents.
Above 0, together they cost more than the sum: alone each is stood in for, which is redundancy.
Below 0 they cost less: what the one loses is partly lost by the other already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from scipy import stats

from tracker.core.estimates import Estimate
from tracker.stats.accuracy import mean_interval
from tracker.stats.arrays import Array, Mask, divided
from tracker.stats.rank_agreement import rounded, row_coefficients
from tracker.stats.resampling import bias_corrected_interval

FLIPS = 19_999
_CHUNK = 4_000_000
"""Signs that are held in memory at once."""


def interactions(values: Array, weights: Array | None = None, seed: int = 0) -> list[Estimate]:
    """Estimate mean interactions from those of every document, and test that they are 0.

    Where all values are whole numbers, as from outcomes that are right or wrong, each lies in
    {−2, …, 2}. The interval is then a Wald interval after one document with +1 and one with −1 is
    added, as Bonett and Price (2012) do for paired proportions, and the test is exact. For other
    values it is the t interval, and the test draws its signs at random.

    The test is a sign-flip test: if a document's interaction is as likely to be x as −x, all signs
    of the values that are not 0 are equally likely, and p is the share of signs whose sum is as far
    from 0 as the one that was found (two-sided). Each document counts once whatever its weight. For
    values that average 0 without being symmetric it is not exact; drawn examples stay near 5 %
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
    """Draw signs for all pairs at once: p of each pair."""
    generator = np.random.default_rng(seed)
    documents = len(values)
    far = np.abs(values.sum(axis=0))
    # Equal sums may differ by rounding.
    bar = far - 1e-9 * np.abs(values).sum(axis=0)
    beyond = np.ones(values.shape[1])
    step = max(1, _CHUNK // max(documents, values.shape[1]))
    for start in range(0, FLIPS, step):
        size = (min(step, FLIPS - start), documents)
        signs = 2.0 * generator.integers(0, 2, size=size) - 1
        beyond += (np.abs(signs @ values) >= bar).sum(axis=0)
    return np.asarray(beyond / (FLIPS + 1))


def additivity(
    alone: Sequence[float] | Array,
    together: Sequence[float] | Array,
    resampled: tuple[Array, Array],
) -> tuple[Estimate, Estimate]:
    """Say how well the sums of two drops predict the joint drops, over pairs.

    R² is that of the sum itself as the prediction, 1 − Σ (joint − sum)² / Σ (joint − mean)²: no
    line is fitted, so it is 1 where drops add up, and below 0 where their mean predicts better. Sum
    and joint drop rest on the same documents, so noise that they share speaks for additivity.

    Args:
        alone: `[pairs]`, drop(first) + drop(second).
        together: `[pairs]`, drop(both).
        resampled: The same two from resampled documents, `[resamples, pairs]` each.

    Returns:
        Spearman's coefficient and R², each with the 95 % interval of `bias_corrected_interval`;
        None with a reason for fewer than three pairs, a NaN, or what is the same for all pairs.

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
