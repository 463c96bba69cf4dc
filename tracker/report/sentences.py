"""Sentences about leaderboards: which layers matter, and how well the proxies find them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from tracker.core.formats import counted, defined, points, two_digits
from tracker.core.proxies import PROXIES
from tracker.core.records import CellRecord
from tracker.report.leaderboard.proxies import Agreement


def agreement_sentence(found: Agreement) -> str:
    """Say how well one proxy orders the layers, with chance beside it.

    Args:
        found: What was counted.

    Returns:
        The median Spearman and its range; the share of ranks that differ, and the share
        that two random orders would give.
    """
    name = PROXIES[found.proxy].label
    values = found.spearman
    if not values:
        says = f"The {name}: no rank correlation with the accuracy drop is defined"
    elif len(values) == 1:
        says = f"The {name}: Spearman {two_digits(values[0])} (one measurement)"
    else:
        says = (
            f"The {name}: median Spearman {two_digits(median(values))} over {len(values)} "
            f"measurements ({two_digits(min(values))} to {two_digits(max(values))})"
        )
    return f"{says}; {_differ(found)}."


def compared_sentence(cells: Sequence[CellRecord]) -> str:
    """Say what was answered both ways while it was measured, and how far the answers differ.

    Args:
        cells: The cells of a page.

    Returns:
        A sentence.
    """
    compared = sum(cell.compared for cell in cells)
    if not compared:
        return (
            "Nothing that is shown here was answered again on a really pruned model: other "
            "ablations were drawn for that."
        )
    largest = max(cell.compared_difference or 0.0 for cell in cells)
    unsteady = sum(cell.compared_unsteady for cell in cells)
    without = sum(not cell.compared for cell in cells)
    text = (
        f"{counted(compared, 'answer')} to documents drawn at random and to the longest were asked "
        f"again of a really pruned model: log-likelihoods differ by at most {largest:.1e} nats."
    )
    if unsteady:
        why = "the model is discontinuous there"
        if any(cell.compared_unsteady and cell.model.is_half for cell in cells):
            why = f"half precision rounds coarsely, or {why}"
        text += f" {unsteady} of them differ by more than rounding should: {why}, in lm-eval too."
    if without:
        text += f" Of {counted(without, 'measurement')} none was drawn."
    return text


def _differ(found: Agreement) -> str:
    if not defined(found.differ) or not defined(found.chance):
        return "ranks cannot be compared"
    return (
        f"exact ranks differ for {points(found.differ)} % of the layers, those of two random "
        f"orders for {points(found.chance)} %"
    )
