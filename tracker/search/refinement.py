"""Better choices by measuring whole ones: what sums of losses cannot know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tracker.core.estimates import Estimate
from tracker.ledger.paired import PairedOutcomes
from tracker.search.assignment import swaps
from tracker.search.bit_budgets import BitBudget, Choice
from tracker.stats.arrays import Array
from tracker.stats.support import together

SWAPS = 32
"""So many changed choices are measured in a round, as streams of one evaluation."""
Measure = Callable[[Sequence[Choice]], PairedOutcomes]
"""What the documents come to under some choices, each as a whole."""


@dataclass(frozen=True)
class Refined:
    """Where rounds of swaps ended.

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
