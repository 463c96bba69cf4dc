"""Test choices, margins, agreement and rounding against plain loops and drawn scores."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tracker.stats.decisions import (
    MIN_FLIP_CHANCE,
    choose_options,
    cluster_order,
    count_undecided,
    flip_probabilities,
    margins,
    option_shares,
    phi,
    relative_rounding_error,
    rounding_shift,
)

MISSING = math.nan
DRAW = np.random.default_rng(5)


def draw_scores(documents: int = 300, options: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Scores with ties, of documents that have one to five options, and their gold ones."""
    scores = np.round(DRAW.normal(size=(documents, options)), 1)
    counts = DRAW.integers(1, options + 1, documents)
    scores[np.arange(options) >= counts[:, None]] = MISSING
    gold = (DRAW.random(documents) * counts).astype(int).astype(float)
    gold[::7] = MISSING
    return scores, gold


def test_a_worked_example() -> None:
    scores = np.array([[-3.0, -1.0, -2.0], [-1.0, -1.0, MISSING], [-4.0, -2.5, -9.0]])
    assert choose_options(scores).tolist() == [1, 0, 1]
    assert margins(scores, np.array([1, 1, 0])).tolist() == [1.0, 0.0, -1.5]
    assert option_shares(choose_options(scores), 3).tolist() == pytest.approx([1 / 3, 2 / 3, 0])
    assert option_shares(np.array([2, MISSING, 0, 2, 2]), 4).tolist() == [0.25, 0, 0.75, 0]


def test_the_first_of_the_best_is_taken_as_lm_eval_does() -> None:
    scores, _ = draw_scores()
    for row, option in zip(scores, choose_options(scores), strict=True):
        assert option == np.argmax(row[~np.isnan(row)])


def test_margins_are_those_of_a_plain_loop() -> None:
    scores, gold = draw_scores()
    for row, gold_option, margin in zip(scores, gold, margins(scores, gold), strict=True):
        options = [score for score in row if score == score]
        if gold_option != gold_option or len(options) == 1:
            assert math.isnan(margin)
            continue
        gold_score = options.pop(int(gold_option))
        assert margin == pytest.approx(gold_score - max(options))
        # It is positive exactly where the gold option is the only best one.
        assert (margin > 0) == (gold_score > max(options))


def count_losses(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the documents that each pair of ablations loses, and each ablation."""
    return (losses @ losses.T).astype(float), losses.sum(axis=1).astype(float)


def test_it_is_the_correlation_of_the_columns() -> None:
    columns = (DRAW.random((6, 80)) < np.linspace(0.05, 0.9, 6)[:, None]).astype(int)
    joint_losses, losses = count_losses(columns)
    assert phi(joint_losses, losses, 80) == pytest.approx(np.corrcoef(columns))


def test_losing_none_or_all_says_nothing() -> None:
    columns = np.array([[0, 0, 0], [1, 1, 1], [1, 0, 0]])
    coefficients = phi(*count_losses(columns), 3)
    assert np.isnan(coefficients[0]).all()
    assert np.isnan(coefficients[1]).all()
    assert coefficients[2, 2] == pytest.approx(1)


def average_linkage(agreement: np.ndarray, n_groups: int) -> set[frozenset[int]]:
    """Join the two groups whose members agree most on average, until so many are left."""
    groups = [frozenset([number]) for number in range(len(agreement))]

    def mean(pair: tuple[frozenset[int], frozenset[int]]) -> float:
        return float(np.mean([agreement[i, j] for i, j in itertools.product(*pair)]))

    while len(groups) > n_groups:
        best = max(itertools.combinations(groups, 2), key=mean)
        groups = [group for group in groups if group not in best] + [best[0] | best[1]]
    return set(groups)


@pytest.mark.parametrize("seed", range(5))
def test_groups_of_a_naive_clustering_stand_together(seed: int) -> None:
    rng = np.random.default_rng(seed)
    patterns = rng.random((3, 60)) < 0.4
    columns = np.array([patterns[n % 3] ^ (rng.random(60) < 0.12) for n in range(9)]).astype(int)
    agreement = phi(*count_losses(columns), 60)
    order = cluster_order(agreement)
    assert sorted(order) == list(range(9))
    for groups_left in range(1, 9):
        for group in average_linkage(agreement, groups_left):
            positions = sorted(order.index(member) for member in group)
            assert positions == list(range(positions[0], positions[0] + len(group)))


DOCUMENTS, OPTIONS = 4000, 4
RELATIVE_NOISE = 0.01
"""By what share of itself each option moves, from what it is to what is computed."""


def add_rounding(exact: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return exact * (1 + RELATIVE_NOISE * rng.normal(size=exact.shape))


@pytest.fixture(scope="module")
def two_ways() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores computed in two ways, and gold options: some documents have fewer options."""
    rng = np.random.default_rng(7)
    exact = -rng.gamma(4, 3, size=(DOCUMENTS, 1)) + rng.normal(0, 1.5, size=(DOCUMENTS, OPTIONS))
    exact[: DOCUMENTS // 4, -1] = MISSING
    gold = rng.integers(0, OPTIONS - 1, DOCUMENTS).astype(float)
    return add_rounding(exact, rng), add_rounding(exact, rng), gold


def test_the_movement_is_found_from_a_few_documents(two_ways) -> None:
    """Both ways move, so that their difference moves by the root of two as much."""
    scores, repeats, _ = two_ways
    expected = math.sqrt(2) * RELATIVE_NOISE
    assert relative_rounding_error(scores, repeats) == pytest.approx(expected, rel=0.03)
    slices = (slice(start, start + 8) for start in range(0, DOCUMENTS, 8))
    movements = [relative_rounding_error(scores[rows], repeats[rows]) for rows in slices]
    assert np.quantile(movements, 0.05) > 0.6 * expected


def test_as_many_judgements_turn_round_as_are_expected_and_nearly_all_are_counted(two_ways) -> None:
    scores, repeats, gold = two_ways
    chances = flip_probabilities(scores, gold, relative_rounding_error(scores, repeats))
    is_flipped = (choose_options(scores) == gold) != (choose_options(repeats) == gold)
    assert is_flipped.sum() > 40, "there is something to count"
    assert chances.sum() == pytest.approx(is_flipped.sum(), rel=0.2)
    assert (chances[is_flipped] > MIN_FLIP_CHANCE).mean() > 0.95
    assert is_flipped.sum() < count_undecided(chances) < 6 * is_flipped.sum()


def test_accuracies_computed_in_two_ways_are_as_far_apart_as_is_said(two_ways) -> None:
    scores, repeats, gold = two_ways
    chances = flip_probabilities(scores, gold, relative_rounding_error(scores, repeats))
    accuracies = [(choose_options(table) == gold).reshape(40, 100) for table in (scores, repeats)]
    differences = accuracies[0].mean(axis=1) - accuracies[1].mean(axis=1)
    limits = [rounding_shift(row, np.full(100, 1 / 100)) for row in chances.reshape(40, 100)]
    assert (np.abs(differences) <= limits).sum() >= 36


@pytest.mark.parametrize(
    ("scores", "repeats"),
    [
        ([[-1.0, MISSING], [-2.0, MISSING]], [[-1.5, MISSING], [-2.5, MISSING]]),
        ([[-1.0, -2.0]], [[-1.0, -2.0]]),
        ([[0.0, 0.0]], [[0.0, 0.0]]),
        (np.empty((0, 4)), np.empty((0, 4))),
    ],
    ids=["one option each", "nothing has moved", "nothing to move", "no document"],
)
def test_no_movement_is_not_a_movement_of_zero(scores, repeats) -> None:
    assert relative_rounding_error(np.array(scores), np.array(repeats)) is None


def test_what_has_no_margin_has_no_chance() -> None:
    scores = np.array([[-1.0, -2.0], [-1.0, MISSING], [-3.0, -3.0]])
    chances = flip_probabilities(scores, np.array([MISSING, 0, 1]), 0.1)
    assert np.isnan(chances).tolist() == [True, True, False]
    assert chances[2] == 0.5, "a tie is decided by rounding alone"
    assert count_undecided(chances) == 1
