"""The share of a loss that is won back, by hand, by simulation, and where it means nothing."""

from __future__ import annotations

import numpy as np
import pytest

from tracker.stats.resampling import resampled_means
from tracker.stats.support import recovered


def test_worked_by_hand():
    lost, left = np.array([0.3, 0.1]), np.array([0.05, 0.05])
    drawn = np.tile(lost, (40, 1)) * np.linspace(0.5, 1.5, 40)[:, None]
    found = recovered(lost, left, drawn, np.tile(left, (40, 1)))
    assert found.value == pytest.approx(0.75)
    ends = np.quantile(1 - 0.1 / drawn.sum(1), [0.025, 0.975])
    assert [found.low, found.high] == pytest.approx(ends)
    # A stand-in may do worse than nothing.
    assert recovered(lost, 2 * lost, drawn, 2 * drawn).value == pytest.approx(-1)


@pytest.mark.parametrize("lost", [0.0, -0.1, 0.01])
def test_a_loss_that_may_be_nothing_cannot_be_won_back(lost):
    draw = np.random.default_rng(0)
    drawn = lost + 0.05 * draw.standard_normal((400, 2))
    found = recovered(np.full(2, lost), np.zeros(2), drawn, 0 * drawn)
    assert found.value is None
    assert found.reason == "removals cost nothing here that these documents could show"

    undefined = recovered(np.array([np.nan]), np.zeros(1), drawn, drawn)
    assert undefined.reason == "a drop is not a finite number"


def test_the_interval_covers_what_more_documents_would_give():
    """Paired 0/1 outcomes of three layers, dear and cheap, as a benchmark of 150 documents."""
    draw = np.random.default_rng(7)
    right, wrong_removed, wrong_stand_in = 0.6, (0.5, 0.2, 0.05), (0.3, 0.1, 0.05)
    truth = 1 - sum(wrong_stand_in) / sum(wrong_removed)
    held = tried = 0
    for _ in range(300):
        before = draw.random((150, 1)) < right
        shock = draw.random((150, 3))
        lost = before & (shock < np.array(wrong_removed))
        left = before & (shock < np.array(wrong_stand_in))
        drawn = [resampled_means(x.astype(float), 400, 3) for x in (lost, left)]
        found = recovered(lost.mean(0), left.mean(0), *drawn)
        if found.value is not None:
            tried += 1
            held += found.low <= truth <= found.high
    assert tried == 300
    assert held / tried > 0.91
