"""Agreement against numpy's correlation of the columns themselves, and a naive clustering."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tracker.stats.decisions import cluster_order, phi

DRAW = np.random.default_rng(3)


def counts(lost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the documents that each pair of ablations loses, and each ablation."""
    return (lost @ lost.T).astype(float), lost.sum(axis=1).astype(float)


def test_it_is_the_correlation_of_the_columns() -> None:
    lost = (DRAW.random((6, 80)) < np.linspace(0.05, 0.9, 6)[:, None]).astype(int)
    both, each = counts(lost)
    assert phi(both, each, 80) == pytest.approx(np.corrcoef(lost))


def test_losing_none_or_all_says_nothing() -> None:
    lost = np.array([[0, 0, 0], [1, 1, 1], [1, 0, 0]])
    found = phi(*counts(lost), 3)
    assert np.isnan(found[0]).all()
    assert np.isnan(found[1]).all()
    assert found[2, 2] == pytest.approx(1)


def average_linkage(agreement: np.ndarray, groups_left: int) -> set[frozenset[int]]:
    """Join the two groups whose members agree most on average, until so many are left."""
    groups = [frozenset([number]) for number in range(len(agreement))]

    def mean(pair: tuple[frozenset[int], frozenset[int]]) -> float:
        return float(np.mean([agreement[i, j] for i, j in itertools.product(*pair)]))

    while len(groups) > groups_left:
        best = max(itertools.combinations(groups, 2), key=mean)
        groups = [group for group in groups if group not in best] + [best[0] | best[1]]
    return set(groups)


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_a_naive_clustering_stand_together(seed: int) -> None:
    draw = np.random.default_rng(seed)
    base = draw.random((3, 60)) < 0.4
    lost = np.array([base[n % 3] ^ (draw.random(60) < 0.12) for n in range(9)]).astype(int)
    agreement = phi(*counts(lost), 60)
    order = cluster_order(agreement)
    assert sorted(order) == list(range(9))
    for groups_left in range(1, 9):
        for group in average_linkage(agreement, groups_left):
            places = sorted(order.index(member) for member in group)
            assert places == list(range(places[0], places[0] + len(group)))
