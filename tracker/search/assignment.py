"""Choose which unit gets which format: the smallest sum of losses within a budget, then swaps.

Swaps are measured as a whole: what sums of losses cannot know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy import optimize

from tracker.analysis.paired import PairedOutcomes
from tracker.core.estimates import Estimate
from tracker.search.bit_budgets import BitBudget, Choice, Unit, bits_of
from tracker.stats.arrays import Array
from tracker.stats.support import together


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


class _Move(NamedTuple):
    """One unit in another format: how many bits it takes more then, and loses more alone."""

    unit: Unit
    form: str
    bits: float
    loss: float


def swaps(
    choice: Choice, formats: Sequence[str], losses: Array, budget: BitBudget, most: int
) -> list[Choice]:
    """Give one unit a format of no fewer bits, and others fewer so that the budget still holds.

    The sums of losses say what is tried first, and what pays: the unit that loses least of those
    that are enough alone, or several that lose least a bit. Before a unit pays in the same format
    again every raise was tried, so that a unit of which the sums are wrong spoils few swaps.

    Args:
        choice: The choice that is changed; its units in the order of `losses`.
        formats: The formats.
        losses: `[units, formats]`, what each costs alone; finite.
        budget: The bits.
        most: So many are made at most.

    Returns:
        The changed choices, all within the budget.

    Examples:
        >>> units = [Unit(layer, "a", ((32, 32),)) for layer in range(3)]
        >>> losses = np.array([[0.0, 0.5], [0.0, 0.1], [0.0, 0.2]])
        >>> within = BitBudget("6bpw", 6, 0, 3072)
        >>> chosen = dict(zip(units, ["q8_0", "q4_0", "q4_0"]))
        >>> [[*each.values()] for each in swaps(chosen, ["q8_0", "q4_0"], losses, within, 2)]
        [['q4_0', 'q4_0', 'q8_0'], ['q4_0', 'q8_0', 'q4_0']]
    """
    moves = [
        _Move(unit, form, unit.bits(form) - unit.bits(now), float(own[place] - own[at]))
        for (unit, now), own in zip(choice.items(), losses, strict=True)
        for at in [formats.index(now)]
        for place, form in enumerate(formats)
        if form != now
    ]
    ups = sorted((move for move in moves if move.bits >= 0), key=lambda move: move.loss)
    downs = [move for move in moves if move.bits < 0]
    room = budget.bits * budget.weights * (1 + 1e-12)
    room -= sum(unit.bits(form) for unit, form in choice.items())
    found: list[Choice] = []
    payers: dict[_Move, set[_Move]] = {}
    before = -1
    while len(found) > before:
        before, paid = len(found), set[_Move]()
        for up in ups:
            left = [move for move in downs if move not in paid | payers.get(up, set())]
            paying = _paying(up, left, up.bits - room)
            if paying is None or (not paying and up in payers):
                continue
            paid.update(paying)
            payers.setdefault(up, set()).update(paying)
            found.append({**choice, **{move.unit: move.form for move in (up, *paying)}})
            if len(found) == most:
                return found
    return found


def _paying(up: _Move, downs: Sequence[_Move], over: float) -> list[_Move] | None:
    """Take moves that release so many bits; None where they cannot."""
    paying: list[_Move] = []
    while over > 0:
        changed = {up.unit, *(move.unit for move in paying)}
        left = [move for move in downs if move.unit not in changed]
        if not left:
            return None
        enough = [move for move in left if move.bits <= -over]
        paying.append(
            min(enough, key=lambda move: move.loss)
            if enough
            else min(left, key=lambda move: -move.loss / move.bits)
        )
        over += paying[-1].bits
    return paying


SWAPS = 32
"""So many changed choices are measured in a round, as streams of one evaluation."""
Measure = Callable[[Sequence[Choice]], PairedOutcomes]
"""What the documents come to under some choices, each as a whole."""


@dataclass(frozen=True)
class Refined:
    """Result of rounds of swaps.

    Attributes:
        choice: The choice.
        tried: How many swaps were measured.
        gains: By how much less each that was kept costs than the choice before it; with intervals
            that hold for all swaps of its round at once.
    """

    choice: Choice
    tried: int
    gains: tuple[Estimate, ...]


def refined(
    start: Choice,
    formats: Sequence[str],
    losses: Array,
    budget: BitBudget,
    rounds: int,
    measure: Measure,
) -> Refined:
    """Swap formats while a swap is shown to cost less, each measured as a whole.

    Args:
        start: The choice to begin with; its units in the order of `losses`.
        formats: The formats.
        losses: `[units, formats]`, what each costs alone, which says what is tried.
        budget: The bits.
        rounds: So many are made at most.
        measure: Measures whole choices on the documents that choose.

    Returns:
        The choice that no swap of the last round is shown to beat on these documents, or that of
        the last round there was.
    """
    choice, tried, gains = start, 0, list[Estimate]()
    for _ in range(rounds):
        rivals = swaps(choice, formats, losses, budget, SWAPS)
        if not rivals:
            break
        tried += len(rivals)
        paired = measure([choice, *rivals])
        kept = [apart(paired, place, 0) for place in range(1, len(rivals) + 1)]
        wide = together(kept, [len(paired.weights)] * len(kept), len(kept))
        shown = [n for n, each in enumerate(wide) if each.low is not None and each.low > 0]
        if not shown:
            break
        best = max(shown, key=lambda n: wide[n].value or 0.0)
        choice = rivals[best]
        gains.append(wide[best])
    return Refined(choice, tried, tuple(gains))


def apart(paired: PairedOutcomes, place: int, other: int) -> Estimate:
    """Estimate by how much the one keeps more than the other, of the same documents."""
    return replace(
        paired, baseline=paired.ablated[:, place], ablated=paired.ablated[:, [other]]
    ).drop(0)
