"""The power of paired comparisons, against the literature and against drawn outcomes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tracker.stats.accuracy import MEANT, OutcomeVariance, documents_needed, drop_sd


@pytest.mark.parametrize(
    ("lost", "won", "documents"),
    [
        # Chow, Shao & Wang, Sample Size Calculations in Clinical Research, example 6.4.3.
        (0.5, 0.2, 59),
        # The example that the calculators after Connor (1987, page 209) give.
        (0.45, 0.05, 23),
    ],
)
def test_the_literature(lost: float, won: float, documents: int) -> None:
    spread = OutcomeVariance(lost + won, binary=True)
    assert spread.documents(lost - won) == documents
    assert spread.change(documents) <= lost - won < spread.change(documents - 1)


@pytest.mark.parametrize(("documents", "share"), [(200, 0.2), (1000, 0.2), (150, 0.5)])
def test_drawn_outcomes_are_found_as_often_as_said(documents: int, share: float) -> None:
    drop = OutcomeVariance(share, binary=True).change(documents)
    dice = np.random.default_rng(0)
    cells = [(share + drop) / 2, (share - drop) / 2, 1 - share]
    lost, won, _ = dice.multinomial(documents, cells, size=20_000).T
    found = np.abs(lost - won) / np.sqrt(lost + won) > stats.norm.ppf(0.975)
    assert found.mean() == pytest.approx(0.8, abs=0.015)


def test_drawn_losses_are_found_as_often_as_said() -> None:
    """Differences with long tails, whose mean is near enough to normal."""
    documents, sd = 150, 0.5
    increase = OutcomeVariance(sd**2, binary=False).change(documents)
    drawn = np.random.default_rng(0).laplace(0, sd / 2**0.5, size=(10_000, documents))
    p = stats.ttest_1samp(drawn + increase, 0, axis=1).pvalue
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.02)


def test_a_drop_changes_what_it_loses() -> None:
    """Of 100 documents of which one changes, a drop of 3 points would still lose three."""
    rare = OutcomeVariance(0.01, binary=True)
    assert rare.documents(MEANT) == OutcomeVariance(MEANT, binary=True).documents(MEANT)
    smallest = rare.change(100)
    assert OutcomeVariance(smallest, binary=True).change(100) == pytest.approx(smallest)
    assert rare.change(3) is None


def test_a_mean_over_benchmarks_takes_a_part_of_each() -> None:
    """Against drawn outcomes of two benchmarks, whose mean drop is tested with 29 others."""
    drop, share = 0.05, 0.2
    of_each = documents_needed([OutcomeVariance(share, binary=True)] * 3, 30, 2, drop)
    dice = np.random.default_rng(0)
    cells = [(share + drop) / 2, (share - drop) / 2, 1 - share]
    lost, won, _ = dice.multinomial(2 * of_each, cells, size=20_000).T
    revealed = np.abs(lost - won) / np.sqrt(lost + won) > stats.norm.ppf(1 - 0.025 / 30)
    assert revealed.mean() == pytest.approx(0.8, abs=0.025)


def test_the_docs_name_the_documents_of_the_function() -> None:
    page = (Path(__file__).parents[2] / "docs" / "decide.md").read_text()
    rows = re.findall(r"^\| (\d+) pp \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    assert len(rows) == 4
    spread = OutcomeVariance(0.105, binary=True)
    for drop, *counts in rows:
        needed = [documents_needed([spread], 30, k, int(drop) / 100) for k in (1, 2)]
        assert [int(count.replace(",", "")) for count in counts] == needed


def test_the_spread_of_drops() -> None:
    before, after = np.array([1.0, 1, 0, 0, 1]), np.array([1.0, 0, 0, 1, 0])
    assert drop_sd(before, after).value == pytest.approx(np.std(before - after, ddof=1))
    # A document that weighs nothing is none, and a task's few documents make a mean less sure.
    weights = np.array([0.25, 0.25, 0.25, 0.25, 0.0])
    four = np.std((before - after)[:4], ddof=1)
    assert drop_sd(before, after, weights).value == pytest.approx(four * (5 / 4) ** 0.5)
    assert drop_sd(before[:1], after[:1]).reason == "one document has no spread"
    assert drop_sd(np.array([1.0, np.nan]), np.zeros(2)).reason == (
        "1 of 2 documents has no finite score"
    )
