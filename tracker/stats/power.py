"""How small a change so many documents reveal, and how many documents reveal a change.

A change is revealed where a two-sided test of the paired outcomes at the level `ALPHA` finds it
with the probability `POWER`. Both answers rest on how much the outcome of one document changes,
which is observed in a cell, or assumed before there is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import scipy  # what takes long to import comes when it is used

ALPHA = 0.05
POWER = 0.8
MEANT = 0.05
"""The drop, a fraction, for which pages, terminals and plans name a number of documents."""


@dataclass(frozen=True)
class OutcomeVariance:
    """How much the outcome of one document changes under a removal.

    Of outcomes that are 0 or 1 it is the share of documents that change, lost or won: McNemar's
    test in the normal approximation, whose variance is that share where nothing is lost on balance,
    and less by the square of the drop where something is. A drop changes at least as many documents
    as it loses, so for a larger drop than the share, the share is the drop. The exact test that
    goes with a drop asks for a little more. Of any other outcomes it is the variance of the paired
    difference, whatever its mean.

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
        """Say how many documents reveal a change.

        Args:
            change: A drop or an increase, above 0.
            tests: How many tests are made at once, each at the level `ALPHA` / `tests`.

        Returns:
            The smallest such number.
        """
        return math.ceil(self._product(change, tests) / change**2)

    def change(self, documents: int, tests: int = 1) -> float | None:
        """Say which change so many documents reveal.

        Args:
            documents: How many, one or more.
            tests: How many tests are made at once, each at the level `ALPHA` / `tests`.

        Returns:
            The smallest such change; None where not even the loss of every document is revealed.
        """
        if not self.binary:
            return math.sqrt(self._product(0, tests) / documents)

        def excess(change: float) -> float:
            return documents * change**2 - self._product(change, tests)

        if excess(1) < 0:
            return None
        # Above 0: there, nothing changes and nothing is revealed.
        return float(scipy.optimize.brentq(excess, 1e-9, 1, xtol=1e-12))

    def _product(self, change: float, tests: int) -> float:
        """How many documents reveal a change, times its square."""
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
        variances: Those of the removals, at least one.
        tests: How many removals are tested together.
        benchmarks: Over how many benchmarks the change is averaged, all with as many documents.
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
"""What to assume before anything is measured: two models that are both right half of the time and
have nothing to do with each other. A removal leaves more of a model than that."""
