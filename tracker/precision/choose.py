"""Which unit gets which format: the smallest sum of losses within a budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import optimize

from tracker.precision.budget import BitBudget, Choice, Unit, bits_of
from tracker.stats.arrays import Array


def least_loss(
    units: Sequence[Unit], formats: Sequence[str], losses: Array, budget: BitBudget
) -> Choice:
    """Give each unit a format so that the losses add up to the least that the budget allows.

    It is the multiple-choice knapsack problem, solved exactly by integer programming (scipy's
    `milp`, HiGHS). That losses add up is an assumption, which measured sets are held against.

    Args:
        units: The units.
        formats: The formats.
        losses: `[units, formats]`, what each costs alone; finite.
        budget: The bits; some choice is within it.

    Returns:
        Each unit's format; of two choices that cost the same the one of fewer bits.

    Examples:
        >>> units = [Unit(0, "a", ((32, 32),)), Unit(1, "a", ((32, 32),))]
        >>> losses = np.array([[0.0, 0.5], [0.0, 0.1]])
        >>> chosen = least_loss(units, ["q8_0", "q4_0"], losses, BitBudget("6.5bpw", 6.5, 0, 2048))
        >>> [*chosen.values()]
        ['q8_0', 'q4_0']
    """
    bits = np.array([[unit.bits(form) for form in formats] for unit in units])
    count, width = losses.shape
    one_each = np.kron(np.eye(count), np.ones(width))
    # Bits decide between choices of equal loss, and nothing else.
    tie = 1e-9 * (np.ptp(losses) or 1.0) / max(bits.sum(), 1.0)
    found = optimize.milp(
        (losses + tie * bits).ravel(),
        integrality=np.ones(count * width),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(bits.ravel()[None], ub=budget.bits * budget.weights),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    assert found.x is not None  # everything in the smallest format is within the budget
    picked = found.x.reshape(count, width).argmax(axis=1)
    return {unit: formats[place] for unit, place in zip(units, picked.tolist(), strict=True)}


def alike(units: Sequence[Unit], formats: Sequence[str], budget: BitBudget) -> Choice:
    """Give all units the one format that takes most of the budget."""
    every = [dict.fromkeys(units, form) for form in formats]
    return max(filter(budget.holds, every), key=bits_of)


ENDS = 2
"""So many layers at either end are kept in more bits, as tools do it by hand."""


def ends_kept(units: Sequence[Unit], formats: Sequence[str], budget: BitBudget) -> Choice | None:
    """Give the first and the last two layers the format of most bits, all others one that fits.

    The embedding and the head have that of most bits too. None where no format fits then.
    """
    layers = sorted({unit.layer for unit in units if not unit.is_end})
    kept = {*layers[:ENDS], *layers[-ENDS:]}
    most = max(formats, key=lambda form: sum(unit.bits(form) for unit in units))
    every: list[Choice] = [
        {unit: most if unit.is_end or unit.layer in kept else form for unit in units}
        for form in formats
    ]
    return max(filter(budget.holds, every), key=bits_of, default=None)
