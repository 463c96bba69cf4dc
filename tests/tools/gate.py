"""Exact error rates of `tracker compare --within`, by enumerating all outcomes.

`python -m tests.tools.gate` prints, for several numbers of documents, margins and models, how often
a gate says "equivalent" (or better) at the margin's edge, and "worse" without any difference.
"""

from __future__ import annotations

import sys
from functools import cache
from typing import NamedTuple

import numpy as np
from scipy.stats import binom

from tracker.comparison import verdicts
from tracker.schema.estimates import Estimate
from tracker.stats.accuracy import accuracy_drop

NEGLIGIBLE = 1e-7
"""Total probability of the outcomes that are not enumerated."""


class Rates(NamedTuple):
    """Upper bounds of the family-wise error rates."""

    equivalent: float
    worse: float


@cache
def verdict(lost: int, won: int, documents: int, margin: float, family: int) -> str:
    """Return the verdict of the real code about one of `family` equal results."""
    first = np.zeros(documents)
    first[:lost] = 1
    second = np.zeros(documents)
    second[lost : lost + won] = 1
    drop = accuracy_drop(first, second)
    level = Estimate(None)
    row = verdicts.Difference(
        *("B", "parity", "acc", documents, level, level, won, lost),
        *(-drop, level),
        spread=float((first - second).std(ddof=1)),
    )
    return decide(row, margin, family)


def decide(row: verdicts.Difference, margin: float, family: int = 1) -> str:
    """Return the verdict on a difference that is one of `family` equal ones."""
    return next(verdicts._decide([row] * family, {verdicts.ALL_BENCHMARKS: margin})).verdict


def probability_of(
    words: set[str], documents: int, margin: float, family: int, share: float, drop: float
) -> float:
    """Return the probability of some verdicts; `share` is that of the changed documents."""
    lost_share, won_share = (share + drop) / 2, (share - drop) / 2
    most = int(binom.isf(NEGLIGIBLE, documents, share))
    total = 0.0
    for changed in range(int(binom.ppf(NEGLIGIBLE, documents, share)), most + 1):
        p_changed = binom.pmf(changed, documents, share)
        lost_p = lost_share / (lost_share + won_share)
        low, high = binom.ppf([NEGLIGIBLE, 1 - NEGLIGIBLE], changed, lost_p).astype(int)
        for lost in range(low, high + 1):
            if verdict(lost, changed - lost, documents, margin, family) in words:
                total += p_changed * binom.pmf(lost, changed, lost_p)
    return float(total)


def gate_rates(documents: int, margin: float, family: int, ratio: float) -> Rates:
    """Return the error rates of a gate over `family` comparisons.

    The share of changed documents is `ratio` times the margin. Each rate is the sum over the
    comparisons, which is the largest possible family-wise rate.
    """
    setting = (documents, margin, family, ratio * margin)
    passing = {"equivalent", "equivalent or better"}
    at_edge = probability_of(passing, *setting, drop=margin)
    return Rates(family * at_edge, family * probability_of({"worse"}, *setting, drop=0.0))


def main() -> None:
    """Print the table of error rates."""
    print_line = sys.stdout.write
    print_line(
        "| documents | margin (pp) | comparisons | false equivalent (%) | false worse (%) |\n"
    )
    print_line("|---|---|---|---|---|\n")
    for documents, margin, family in (
        (100, 0.05, 1),
        (277, 0.01, 1),
        (500, 0.02, 1),
        (500, 0.02, 10),
        (1000, 0.02, 4),
        (2000, 0.01, 2),
    ):
        rates = [gate_rates(documents, margin, family, ratio) for ratio in (1.01, 1.5, 2, 4, 8)]
        worst = [100 * max(column) for column in zip(*rates, strict=True)]
        print_line(
            f"| {documents} | {100 * margin:g} | {family} | {worst[0]:.1f} | {worst[1]:.1f} |\n"
        )


if __name__ == "__main__":
    main()
