"""Test budgets, and the choices within them, by hand and by trying all."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from tracker.core.errors import RequestError
from tracker.search.formats import BitBudget, Unit, bits_of, budget, least_loss, swaps

FORMATS = ("q4_0", "q5_1", "q8_0")
UNITS = [Unit(layer, name, ((32, 64), (64, 32))) for layer in range(3) for name in "ab"]


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
    asked = (text, UNITS, 95_232, 0 if "%" not in text else 378_880, FORMATS)
    if bits is None:
        with pytest.raises(RequestError, match=r"is no budget; write one of: 4\.5bpw"):
            budget(*asked)
        return
    assert budget(*asked).bits == pytest.approx(bits, rel=0.03)


def test_what_no_choice_is_within_is_refused_with_the_least_there_is() -> None:
    with pytest.raises(RequestError, match=r"4bpw is less than q4_0 takes everywhere: 4.5 bits"):
        budget("4bpw", UNITS, 0, 0, FORMATS)
    with pytest.raises(RequestError, match=r"int4_g128 keeps 128 inputs together.*rows of 64"):
        budget("5bpw", UNITS, 0, 0, ("int4_g128", "q8_0"))


@pytest.mark.parametrize("seed", range(6))
def test_the_least_loss_is_that_of_trying_every_choice(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.choice([32, 64, 128]) for _ in range(5)]
    units = [Unit(n, "a", ((size, 32),)) for n, size in enumerate(sizes)]
    losses = np.array([[draw.uniform(-0.1, 1) for _ in FORMATS] for _ in units])
    within = BitBudget("", draw.uniform(4.6, 8), 0, sum(unit.weights for unit in units))
    chosen = least_loss(units, FORMATS, losses, within)
    every = [dict(zip(units, some, strict=True)) for some in itertools.product(FORMATS, repeat=5)]

    def loss(choice) -> float:
        return sum(losses[n, FORMATS.index(choice[unit])] for n, unit in enumerate(units))

    fitting = [choice for choice in every if bits_of(choice) <= within.bits]
    assert bits_of(chosen) <= within.bits
    assert loss(chosen) == pytest.approx(min(map(loss, fitting)))


@pytest.mark.parametrize("seed", range(6))
def test_a_swap_raises_one_unit_and_lowers_others_within_the_budget(seed: int) -> None:
    draw = random.Random(seed)
    units = [Unit(n, "a", ((draw.choice([32, 64, 96]), 32),)) for n in range(9)]
    losses = np.array([[draw.uniform(-0.1, 1) for _ in FORMATS] for _ in units])
    within = BitBudget("", draw.uniform(4.8, 7.5), 0, sum(unit.weights for unit in units))
    start = least_loss(units, FORMATS, losses, within)
    found = swaps(start, FORMATS, losses, within, 8)
    assert 0 < len(found) <= 8
    assert len({tuple(choice.values()) for choice in found}) == len(found)
    for choice in found:
        assert [*choice] == units
        assert within.holds(choice)
        more = {unit: unit.bits(choice[unit]) - unit.bits(start[unit]) for unit in units}
        assert sum(bits > 0 for bits in more.values()) == 1
