"""Test budgets, and the choices within them, by hand and by trying all."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from tracker.schema.errors import RequestError
from tracker.search.formats import (
    BitBudget,
    FormatUnit,
    bits_per_weight,
    find_swaps,
    minimize_loss,
    parse_budget,
)

FORMATS = ("q4_0", "q5_1", "q8_0")
UNITS = [FormatUnit(layer, name, ((32, 64), (64, 32))) for layer in range(3) for name in "ab"]


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("6bpw", 6),
        ("6.25 bpw", 6.25),
        ("118784 bytes", None),
        ("0.114 MB", 5.97),
        ("30 % bytes", 6),
    ],
)
def test_a_budget_is_read(text: str, bits: float | None) -> None:
    """The units have 24,576 weights, all else takes 95,232 bytes, and the whole 98,304 more."""
    arguments = (text, UNITS, 95_232, 0 if "%" not in text else 378_880, FORMATS)
    if bits is None:
        with pytest.raises(RequestError, match=r"invalid budget .*; expected e\.g\. 4\.5bpw"):
            parse_budget(*arguments)
        return
    assert parse_budget(*arguments).bits == pytest.approx(bits, rel=0.03)


def test_too_small_budgets_are_refused() -> None:
    with pytest.raises(RequestError, match="4bpw is too small: with q4_0 in every linear map, the"):
        parse_budget("4bpw", UNITS, 0, 0, FORMATS)
    with pytest.raises(RequestError, match=r"int4_g128 rounds blocks of 128 weights.* has 64"):
        parse_budget("5bpw", UNITS, 0, 0, ("int4_g128", "q8_0"))


@pytest.mark.parametrize("seed", range(6))
def test_least_loss_equals_exhaustive_search(seed: int) -> None:
    generator = random.Random(seed)
    sizes = [generator.choice([32, 64, 128]) for _ in range(5)]
    units = [FormatUnit(n, "a", ((size, 32),)) for n, size in enumerate(sizes)]
    losses = np.array([[generator.uniform(-0.1, 1) for _ in FORMATS] for _ in units])
    budget = BitBudget("", generator.uniform(4.6, 8), 0, sum(unit.n_weights for unit in units))
    chosen = minimize_loss(units, FORMATS, losses, budget)
    products = itertools.product(FORMATS, repeat=5)
    choices = [dict(zip(units, forms, strict=True)) for forms in products]

    def loss(choice) -> float:
        return sum(losses[n, FORMATS.index(choice[unit])] for n, unit in enumerate(units))

    allowed_choices = [choice for choice in choices if bits_per_weight(choice) <= budget.bits]
    assert bits_per_weight(chosen) <= budget.bits
    assert loss(chosen) == pytest.approx(min(map(loss, allowed_choices)))


@pytest.mark.parametrize("seed", range(6))
def test_swaps_stay_within_the_budget(seed: int) -> None:
    generator = random.Random(seed)
    units = [FormatUnit(n, "a", ((generator.choice([32, 64, 96]), 32),)) for n in range(9)]
    losses = np.array([[generator.uniform(-0.1, 1) for _ in FORMATS] for _ in units])
    budget = BitBudget("", generator.uniform(4.8, 7.5), 0, sum(unit.n_weights for unit in units))
    start = minimize_loss(units, FORMATS, losses, budget)
    swapped = find_swaps(start, FORMATS, losses, budget, 8)
    assert 0 < len(swapped) <= 8
    assert len({tuple(choice.values()) for choice in swapped}) == len(swapped)
    for choice in swapped:
        assert [*choice] == units
        assert budget.holds(choice)
        added_bits = {unit: unit.bits(choice[unit]) - unit.bits(start[unit]) for unit in units}
        assert sum(bits > 0 for bits in added_bits.values()) == 1
