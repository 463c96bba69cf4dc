"""P-values of several tests at once."""

from __future__ import annotations

from collections.abc import Sequence


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust p-values by Holm's method: called significant below α, one in all is wrong with at
    most the probability α.

    It assumes nothing of how the tests depend on each other.

    Args:
        p_values: One a test; None for a test that could not be made, which does not count.

    Returns:
        The adjusted p-values, at most 1, in the same order; None stays None.

    References:
        S. Holm, Scandinavian Journal of Statistics 6 (1979) 65-70.

    Examples:
        >>> holm([0.01, 0.04, None, 0.03])
        [0.03, 0.06, None, 0.06]
    """  # fmt: skip
    made = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    least = 0.0
    for rank, (p, place) in enumerate(made):
        least = max(least, min(1.0, p * (len(made) - rank)))
        adjusted[place] = least
    return adjusted
