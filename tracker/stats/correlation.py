"""Correlate a proxy with the accuracy drop over layers.

The layers are the sample: one proxy value and one accuracy drop each. Ties and coefficients are
those of `rank_agreement`.
"""

from __future__ import annotations

import numpy as np

from tracker.core.estimates import Estimate
from tracker.stats.arrays import Array, Numbers, divided
from tracker.stats.rank_agreement import (
    Coefficient,
    midranks,
    rounded,
    row_coefficients,
    surrogate_series,
)
from tracker.stats.resampling import bias_corrected_interval

DRAWS = 4999
"""Number of surrogates for each series that is redrawn."""
_DEALT = 1_000_000
"""Number of values that are permuted at once."""


def correlate(
    proxy: Array,
    drop: Array,
    *,
    coefficient: Coefficient,
    resampled: tuple[Array, Array] | None = None,
    within: Numbers | None = None,
    what: str = "layer",
    surrogates: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """Correlate a proxy with the accuracy drop over layers, or over parts of them.

    The interval and the p-value answer different questions. The interval keeps the layers and
    resamples the documents: it shows how far measurement noise moves the coefficient (see
    `bias_corrected_interval`). The p-value tests that the two series are unrelated, but each as
    smooth over depth as observed. It keeps one series and redraws the other with the same values
    and smoothness (`surrogate_series`). It is the share of redrawn series that correlate as
    strongly in either direction, (k + 1) / (m + 1) for k of m. Each series is redrawn in turn, and
    the larger p-value is returned. The test is therefore valid if one of the two series satisfies
    the assumptions of `surrogate_series`.

    Shuffling the layers freely calls two unrelated AR(1) series of 30 layers with the
    autocorrelation 0.9 significant at 5 % in two of five cases. This test stays at 5 % (up to 7 %
    for Pearson). It finds a true correlation of independent layers nearly as often as the free
    shuffle. Random walks are smoother than its assumption allows (6 to 10 %).

    For parts of layers, such as experts, the p-value tests that proxy and drop are unrelated within
    a layer. It permutes the proxies of each layer among its own parts, which have no order. It is
    twice the smaller share of permutations with a coefficient as high, or as low. Differences
    between layers are the same in all permutations, so the test is valid for any differences
    between layers.

    Args:
        proxy: `[layers]`, larger = the layer changes more; NaN where undefined.
        drop: `[layers]`, the accuracy drop of the same layers; NaN where undefined.
        coefficient: One of `COEFFICIENTS`.
        resampled: Both from the same resampled documents, `[resamples, layers]` each, or `[1,
            layers]` for one that is held fixed. None = no interval.
        within: `[parts]`, the layer of each part; None where the sample is whole layers.
        what: Name of a sample's element, for messages.
        surrogates: Number of series to draw in place of each, or of permutations.
        seed: Seed of these series.

    Returns:
        The coefficient, clipped interval and p-value; the value is None with a reason for fewer
        than three layers, a NaN, or an input that is the same in every layer.

    References:
        M. G. Kendall, Biometrika 33 (1945) 239-251 (tau-b). B. Phipson, G. K. Smyth, Statistical
        Applications in Genetics and Molecular Biology 9 (2010) 39 (why k + 1). For the p-value see
        `surrogate_series`.

    Examples:
        >>> proxy, drop = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.1, 0.3, 0.2, 0.4])
        >>> correlation = correlate(proxy, drop, coefficient="kendall")
        >>> round(correlation.value, 4), round(correlation.p_value, 2)
        (0.6667, 0.37)
    """
    x, y = rounded(proxy), rounded(drop)
    series = (("the proxy", x), ("the accuracy drop", y))
    if reason := _undefined(3, "a correlation", *series, what=what):
        return Estimate(None, reason=reason)
    (value,) = row_coefficients(x[None], y[None], coefficient).tolist()
    low = high = None
    if resampled is not None:
        rows = row_coefficients(*resampled, coefficient)
        low, high = bias_corrected_interval(value, rows, -1, 1)
    if coefficient == "spearman":
        # Ranks move with their layers: ranking once is ranking every order.
        x, y, coefficient = midranks(x), midranks(y), "pearson"
    if within is None:
        p_value = _surrogate_p(x, y, abs(value), coefficient, surrogates, seed)
    else:
        p_value = _dealt_p(x, y, value, coefficient, within, surrogates, seed)
    return Estimate(value, low, high, p_value)


def correlation_difference(
    one: tuple[Array, Array],
    other: tuple[Array, Array],
    drop: tuple[Array, Array],
    coefficient: Coefficient,
) -> Estimate:
    """Estimate by how much one proxy correlates better with the accuracy drop than another.

    Both use the same layers and resampled documents, so common noise cancels. As in `correlate`,
    the interval keeps the layers and resamples the documents.

    Args:
        one: A proxy `[layers]`, and from resampled documents `[resamples, layers]`.
        other: Another one, from the same resampled documents.
        drop: The accuracy drop, from the same resampled documents.
        coefficient: One of `COEFFICIENTS`.

    Returns:
        Coefficient of `one` minus coefficient of `other`; None with a reason if one of them is
        undefined.

    Examples:
        >>> drop, same = np.array([0.0, 0.1, 0.2]), np.array([[0.0, 0.1, 0.2]] * 9)
        >>> up, down = (drop, same), (-drop, -same)
        >>> found = correlation_difference(up, down, (drop, same), "kendall")
        >>> round(found.value, 9), round(found.low, 9), round(found.high, 9)
        (2.0, 2.0, 2.0)
    """
    values, rows = [], []
    for value, resampled in (one, other):
        x, y = rounded(value), rounded(drop[0])
        if reason := _undefined(3, "a correlation", ("the proxy", x), ("the accuracy drop", y)):
            return Estimate(None, reason=reason)
        values.append(float(row_coefficients(x[None], y[None], coefficient)[0]))
        rows.append(row_coefficients(resampled, drop[1], coefficient))
    difference = values[0] - values[1]
    return Estimate(difference, *bias_corrected_interval(difference, rows[0] - rows[1], -2, 2))


def partial_correlate(
    first: Array,
    second: Array,
    given: Array,
    *,
    resampled: tuple[Array, Array, Array] | None = None,
    surrogates: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """Correlate the ranks of two series over layers, a third one held fixed.

    Spearman's partial coefficient: the linear part of the third series' ranks is removed from both
    ranks first. Interval and p-value are as in `correlate`. The interval resamples the documents.
    The p-value redraws one of the two residuals as a series of the same smoothness
    (`surrogate_series`), removes the linear part again, and takes the larger p-value of the two. A
    third series with a nonlinear relation to both ranks is removed only in part.

    Args:
        first: `[layers]`; NaN where undefined.
        second: `[layers]`.
        given: `[layers]`, series that is held fixed.
        resampled: The three from the same resampled documents, each `[resamples, layers]` or
            `[1, layers]`; None = no interval.
        surrogates: Number of series to draw in place of each.
        seed: Seed of these series.

    Returns:
        The coefficient; the value is None with a reason for fewer than four
        layers, a NaN, a series that is the same in every layer, or one whose ranks are those of
        the third, forwards or backwards.

    References:
        M. G. Kendall, Biometrika 32 (1942) 277-283 (partial rank correlation). D. Freedman,
        D. Lane, Journal of Business & Economic Statistics 1 (1983) 292-298 (residuals redrawn).

    Examples:
        >>> first, second = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])
        >>> given = np.array([1.0, 2, 3, 5, 4])
        >>> round(partial_correlate(first, second, given, surrogates=99).value, 4)
        0.7456
    """
    x, y, z = rounded(first), rounded(second), rounded(given)
    named = (("a series", series) for series in (x, y, z))
    if reason := _undefined(4, "a partial correlation", *named):
        return Estimate(None, reason=reason)
    (value,) = _partial_rows(x[None], y[None], z[None]).tolist()
    if not np.isfinite(value):
        return Estimate(None, reason="a series has the ranks of what is held fixed")
    low = high = None
    if resampled is not None:
        low, high = bias_corrected_interval(value, _partial_rows(*resampled), -1, 1)
    about = midranks(z)
    one, other = (_without(midranks(series)[None], about)[0] for series in (x, y))
    p_value = _surrogate_p(one, other, abs(value), "pearson", surrogates, seed, about)
    return Estimate(value, low, high, p_value)


def _partial_rows(x: Array, y: Array, z: Array) -> Array:
    """Compute Spearman's partial coefficient of each row of two tables, given that of a third."""
    xy, xz, yz = (row_coefficients(*pair, "spearman") for pair in ((x, y), (x, z), (y, z)))
    left = (1 - xz**2) * (1 - yz**2)
    return divided(xy - xz * yz, np.sqrt(np.where(left > 1e-12, left, 0)))


def _without(rows: Array, about: Array) -> Array:
    """Return the residuals of rows after removing their linear part in a series."""
    centred = about - about.mean()
    rows = rows - rows.mean(axis=1, keepdims=True)
    return np.asarray(rows - np.outer(rows @ centred, centred) / (centred @ centred))


def _undefined(
    fewest: int, figure: str, *series: tuple[str, Array], what: str = "layer"
) -> str | None:
    """Return the reason why a figure of named series is undefined; None if it is defined."""
    n = len(series[0][1])
    if n < fewest:
        return f"{n} {what}{'' if n == 1 else 's'}, and {figure} needs at least {fewest}"
    for name, values in series:
        if missing := int((~np.isfinite(values)).sum()):
            return f"{name} is undefined in {missing} of {n} {what}s"
        if np.ptp(values) == 0:
            return f"{name} is the same in all {n} {what}s"
    return None


def _dealt_p(
    x: Array,
    y: Array,
    value: float,
    coefficient: Coefficient,
    within: Numbers,
    draws: int,
    seed: int,
) -> float:
    """Return the p-value of a coefficient under permutations of a series within its groups."""
    generator = np.random.default_rng(seed)
    by_group = np.argsort(within, kind="stable")
    higher = lower = 0
    for first in range(0, draws, step := max(1, _DEALT // len(x))):
        rows = min(step, draws - first)
        dealt = np.empty((rows, len(x)))
        keys = within + generator.random((rows, len(x)))
        dealt[:, by_group] = x[np.argsort(keys, axis=1)]
        found = row_coefficients(dealt, y[None], coefficient)
        higher += int((found >= value - 1e-9).sum())
        lower += int((found <= value + 1e-9).sum())
    return min(1.0, 2 * (min(higher, lower) + 1) / (draws + 1))


def _surrogate_p(
    x: Array,
    y: Array,
    observed: float,
    coefficient: Coefficient,
    surrogates: int,
    seed: int,
    about: Array | None = None,
) -> float:
    """Redraw each of two series, without the linear part of a third, and return the p-value."""
    as_strong = 0
    for kept, redrawn in ((x, y), (y, x)):
        drawn = surrogate_series(redrawn, surrogates, seed)
        others = drawn if about is None else _without(drawn, about)
        by_chance = np.abs(row_coefficients(kept[None], others, coefficient))
        as_strong = max(as_strong, int((by_chance >= observed - 1e-9).sum()))
    return (as_strong + 1) / (surrogates + 1)
