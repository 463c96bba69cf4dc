"""Correlate a proxy with the accuracy drop over layers.

Each layer is one observation, with one proxy value and one accuracy drop. Ties and coefficients are
computed as in `rank_agreement`.
"""

from __future__ import annotations

import numpy as np

from tracker.schema.estimates import Estimate
from tracker.stats.arrays import Array, IntArray, chunk_sizes, safe_divide
from tracker.stats.rank_agreement import (
    Coefficient,
    midranks,
    rounded_values,
    row_coefficients,
    surrogate_series,
)
from tracker.stats.resampling import bias_corrected_interval

SURROGATES = 4999
"""Number of surrogate series that replace each of the two series."""
_VALUES_AT_ONCE = 1_000_000
"""Maximum number of values that are permuted at once."""


def correlate(
    proxy: Array,
    drop: Array,
    *,
    coefficient: Coefficient,
    resamples: tuple[Array, Array] | None = None,
    groups: IntArray | None = None,
    noun: str = "layer",
    surrogates: int = SURROGATES,
    seed: int = 0,
) -> Estimate:
    """Correlate a proxy with the accuracy drop over layers, or over parts such as experts.

    The interval is from a bootstrap over documents, and not over layers. The interval shows the
    effect of measurement noise (see `bias_corrected_interval`).

    The null hypothesis of the p-value is that proxy and drop are unrelated. For layers, the test
    replaces one series by random series that are equally smooth over depth (`surrogate_series`).
    Each of the two series is replaced in turn; the larger p-value is returned.

    Shuffled layers would give too many false positives, because neighbouring layers have similar
    values. At the level 5 %, the false positive rate of this function is 6 to 10 % for random
    walks.

    For parts of layers, such as experts, the test shuffles the proxies among the parts of each
    layer.

    Args:
        proxy: `[layers]`, the proxy; a larger value means that the layer changes more. NaN if
            undefined.
        drop: `[layers]`, the accuracy drop of the same layers; NaN if undefined.
        coefficient: Name of the correlation coefficient, one of `COEFFICIENTS`.
        resamples: Proxy and drop from the same resampled documents, each `[resamples, layers]`, or
            `[1, layers]` for a fixed series. None means no interval.
        groups: `[parts]`, the layer of each part; None for whole layers.
        noun: Name of an observation in messages, such as `layer`.
        surrogates: Number of random series for each of the two series, or number of permutations.
        seed: Seed of the random series or permutations.

    Returns:
        The coefficient with its interval, clipped to [-1, 1], and its p-value. The value is None
        with a reason for fewer than three layers, a NaN or a constant series.

    References:
        M. G. Kendall, Biometrika 33 (1945) 239-251 (tau-b). B. Phipson, G. K. Smyth, Statistical
        Applications in Genetics and Molecular Biology 9 (2010) 39 (p-values from random draws). See
        `surrogate_series` for the references of the p-value.

    Examples:
        >>> proxy, drop = np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.1, 0.3, 0.2, 0.4])
        >>> correlation = correlate(proxy, drop, coefficient="kendall")
        >>> round(correlation.value, 4), round(correlation.p_value, 2)
        (0.6667, 0.37)
    """
    x, y = rounded_values(proxy), rounded_values(drop)
    series = (("the proxy", x), ("the accuracy drop", y))
    if reason := _undefined_reason(3, "a correlation", *series, item=noun):
        return Estimate(None, reason=reason)
    (value,) = row_coefficients(x[None], y[None], coefficient).tolist()
    low = high = None
    if resamples is not None:
        rows = row_coefficients(*resamples, coefficient)
        low, high = bias_corrected_interval(value, rows, -1, 1)
    if coefficient == "spearman":
        # Ranks move with their layers: ranking once is ranking every order.
        x, y, coefficient = midranks(x), midranks(y), "pearson"
    if groups is None:
        p_value = _surrogate_p(x, y, abs(value), coefficient, surrogates, seed)
    else:
        p_value = _permutation_p(x, y, value, coefficient, groups, surrogates, seed)
    return Estimate(value, low, high, p_value)


def correlation_difference(
    first_proxy: tuple[Array, Array],
    second_proxy: tuple[Array, Array],
    drop: tuple[Array, Array],
    coefficient: Coefficient,
    second_drop: tuple[Array, Array] | None = None,
) -> Estimate:
    """Estimate the difference between the correlations of two proxies with the accuracy drop.

    Both coefficients are computed from the same resampled documents, so common noise cancels.

    Args:
        first_proxy: Values of the first proxy `[layers]`, and values for resampled documents
            `[resamples, layers]`.
        second_proxy: Values of the second proxy in the same form.
        drop: The accuracy drop in the same form.
        coefficient: Name of the correlation coefficient, one of `COEFFICIENTS`.
        second_drop: Accuracy drop of the second proxy's layers; None if these are the same layers.

    Returns:
        The coefficient of `first_proxy` minus the coefficient of `second_proxy`. The value is None
        with a reason if a coefficient is undefined.

    Examples:
        >>> drop, resamples = np.array([0.0, 0.1, 0.2]), np.array([[0.0, 0.1, 0.2]] * 9)
        >>> rising, falling = (drop, resamples), (-drop, -resamples)
        >>> estimate = correlation_difference(rising, falling, rising, "kendall")
        >>> round(estimate.value, 9), round(estimate.low, 9), round(estimate.high, 9)
        (2.0, 2.0, 2.0)
    """
    values, rows = [], []
    pairs = (first_proxy, drop), (second_proxy, second_drop or drop)
    for (proxy, resamples), (drops, drop_resamples) in pairs:
        x, y = map(rounded_values, (proxy, drops))
        series = ("the proxy", x), ("the accuracy drop", y)
        if reason := _undefined_reason(3, "a correlation", *series):
            return Estimate(None, reason=reason)
        values.append(float(row_coefficients(proxy[None], drops[None], coefficient)[0]))
        rows.append(row_coefficients(resamples, drop_resamples, coefficient))
    difference = values[0] - values[1]
    return Estimate(difference, *bias_corrected_interval(difference, rows[0] - rows[1], -2, 2))


def partial_correlate(
    first_series: Array,
    second_series: Array,
    control: Array,
    *,
    resamples: tuple[Array, Array, Array] | None = None,
    surrogates: int = SURROGATES,
    seed: int = 0,
) -> Estimate:
    """Compute Spearman's partial coefficient of two series over layers.

    Linear regression removes the linear effect of `control` from the ranks of the two series. A
    nonlinear effect remains in part. The interval and the p-value are computed as in `correlate`,
    but the test uses the residuals.

    Args:
        first_series: `[layers]`, values of one series; NaN if undefined.
        second_series: `[layers]`, values of the other series; NaN if undefined.
        control: `[layers]`, values of the series whose effect is removed.
        resamples: Values of `first_series`, `second_series` and `control` for the same resampled
            documents, each `[resamples, layers]` or `[1, layers]`; None for no interval.
        surrogates: Number of random series for each of the two series.
        seed: Seed of the random series.

    Returns:
        The coefficient with its interval and p-value. The value is None with a reason for fewer
        than four layers, a NaN or a constant series. The value is also None if a series orders the
        layers like `control`, or in reverse.

    References:
        M. G. Kendall, Biometrika 32 (1942) 277-283 (partial rank correlation). D. Freedman, D.
        Lane, Journal of Business & Economic Statistics 1 (1983) 292-298 (permutation of residuals).

    Examples:
        >>> first, second = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])
        >>> control = np.array([1.0, 2, 3, 5, 4])
        >>> round(partial_correlate(first, second, control, surrogates=99).value, 4)
        0.7456
    """
    x, y, z = map(rounded_values, (first_series, second_series, control))
    series = (("a series", values) for values in (x, y, z))
    if reason := _undefined_reason(4, "a partial correlation", *series):
        return Estimate(None, reason=reason)
    (value,) = _partial_coefficients(x[None], y[None], z[None]).tolist()
    if not np.isfinite(value):
        reason = "one of the two variables has the order of the variable held fixed, or its reverse"
        return Estimate(None, reason=reason)
    low = high = None
    if resamples is not None:
        low, high = bias_corrected_interval(value, _partial_coefficients(*resamples), -1, 1)
    ranks = midranks(z)
    x, y = (_residuals(midranks(values)[None], ranks)[0] for values in (x, y))
    p_value = _surrogate_p(x, y, abs(value), "pearson", surrogates, seed, ranks)
    return Estimate(value, low, high, p_value)


def _partial_coefficients(x: Array, y: Array, z: Array) -> Array:
    """Compute Spearman's partial coefficients of the rows of `x` and `y`, controlling for `z`."""
    xy, xz, yz = (row_coefficients(*pair, "spearman") for pair in ((x, y), (x, z), (y, z)))
    unexplained = (1 - xz**2) * (1 - yz**2)
    return safe_divide(xy - xz * yz, np.sqrt(np.where(unexplained > 1e-12, unexplained, 0)))


def _residuals(rows: Array, control: Array) -> Array:
    """Return the residuals of each row after a linear regression on the series `control`."""
    centred = control - control.mean()
    rows = rows - rows.mean(axis=1, keepdims=True)
    return np.asarray(rows - np.outer(rows @ centred, centred) / (centred @ centred))


def _undefined_reason(
    min_items: int, statistic: str, *series: tuple[str, Array], item: str = "layer"
) -> str | None:
    """Explain why a statistic is undefined: too few, missing or constant values.

    The message names the `statistic`, and the kind of observation (`item`). The function returns
    None if the statistic is defined.
    """
    n = len(series[0][1])
    if n < min_items:
        are = "is" if n == 1 else "are"
        return f"{statistic} needs at least {min_items} {item}s, but {n} {are} available"
    for series_name, values in series:
        if n_undefined := int(np.isnan(values).sum()):
            return f"{series_name} is undefined in {n_undefined} of {n} {item}s"
        if np.ptp(values) == 0:
            return f"{series_name} is the same in all {n} {item}s"
    return None


def _permutation_p(
    x: Array,
    y: Array,
    value: float,
    coefficient: Coefficient,
    groups: IntArray,
    n_draws: int,
    seed: int,
) -> float:
    """Return the two-sided p-value of a permutation test that shuffles `x` within each group.

    `value` is the observed coefficient of `x` and `y`.
    """
    rng = np.random.default_rng(seed)
    group_order = np.argsort(groups, kind="stable")
    n_higher = n_lower = 0
    for n_rows in chunk_sizes(n_draws, max(1, _VALUES_AT_ONCE // len(x))):
        permuted = np.empty((n_rows, len(x)))
        # Sorting random keys by group shuffles each group within its own layers.
        keys = groups + rng.random((n_rows, len(x)))
        permuted[:, group_order] = x[np.argsort(keys, axis=1)]
        coefficients = row_coefficients(permuted, y[None], coefficient)
        n_higher += int((coefficients >= value - 1e-9).sum())
        n_lower += int((coefficients <= value + 1e-9).sum())
    return min(1.0, 2 * (min(n_higher, n_lower) + 1) / (n_draws + 1))


def _surrogate_p(
    x: Array,
    y: Array,
    strength: float,
    coefficient: Coefficient,
    surrogates: int,
    seed: int,
    control: Array | None = None,
) -> float:
    """Return the p-value of a correlation, by comparison with equally smooth random series.

    The random series (`surrogate_series`) replace first `y`, then `x`; the result is the larger
    p-value. `strength` is the absolute value of the observed coefficient. If `control` is given,
    its linear effect on the random series is removed.
    """
    n_as_strong = 0
    for fixed_series, redrawn_series in ((x, y), (y, x)):
        rows = surrogate_series(redrawn_series, surrogates, seed)
        if control is not None:
            rows = _residuals(rows, control)
        coefficients = np.abs(row_coefficients(fixed_series[None], rows, coefficient))
        n_as_strong = max(n_as_strong, int((coefficients >= strength - 1e-9).sum()))
    return (n_as_strong + 1) / (surrogates + 1)


def resampled_spearman(x: Array, xs: Array, y: Array, ys: Array) -> Estimate:
    """Compute Spearman's coefficient of two series with a bootstrap interval.

    Args:
        x: `[items]`, first series.
        xs: `[resamples, items]`, first series in each resample of the documents.
        y: `[items]`, second series.
        ys: `[resamples, items]`, second series in the same resamples.

    Returns:
        The coefficient with its bias-corrected interval. The value is None if a series is constant
        or contains a NaN.
    """
    series = (("a series", rounded_values(values)) for values in (x, y))
    if reason := _undefined_reason(3, "a correlation", *series, item="item"):
        return Estimate(None, reason=reason)
    (value,) = row_coefficients(x[None], y[None], "spearman").tolist()
    return Estimate(
        value, *bias_corrected_interval(value, row_coefficients(xs, ys, "spearman"), -1, 1)
    )
