"""What to know before a figure is believed: other versions, devices, missing documents."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.answers import interval_name
from tracker.records import (
    NOT_MEASURED,
    CellRecord,
)
from tracker.reporting.formats import (
    counted,
    defined,
    measure_of,
)
from tracker.reporting.wording import run_list


def provenance_notes(cells: Sequence[CellRecord]) -> list[str]:
    """Name the cells that were not measured by the same versions and devices throughout.

    Args:
        cells: The cells.

    Returns:
        One sentence for each.
    """
    found = ((cell, cell.reasons.get("provenance")) for cell in cells)
    return [f"{cell.title}: {why}.{_mismatched(cell)}" for cell, why in found if why]


def _mismatched(cell: CellRecord) -> str:
    """Say which drops compare what was measured differently; begins with a space."""
    which = [run for run in cell.runs if "provenance" in run.reasons]
    if not which:
        return f" Each {measure_of(cell).change} compares what was measured alike."
    return f" Baseline and ablation differ in this for {run_list(which, cell)}."


def looks_note(cell: CellRecord) -> str:
    """Say what the figures of a cell rest on whose documents are as many as an answer takes.

    Args:
        cell: The cell.

    Returns:
        Some sentences; none where its documents are as many as were asked for.
    """
    if not cell.is_raced:
        return ""
    reason = cell.reasons["n"]
    return (
        f"{reason[:1].upper()}{reason[1:]}. Each run’s figures rest on its own documents, and its "
        f"interval is a {interval_name(cell)}, which holds at every look and for all runs "
        "together; what holds for one look is left out. The baseline, the proxies and the "
        f"correlations rest on the {counted(cell.n, 'document')} that all runs share. Without "
        "‘until’ the same experiment measures the rest."
    )


def warnings(cell: CellRecord) -> tuple[str, ...]:
    """Say what a reader must know before trusting the cell's numbers.

    Args:
        cell: The cell.

    Returns:
        One sentence for each: missing runs, several versions or devices, undefined values of the
        cell, a weak baseline.
    """
    found = []
    if cell.missing:
        found.append(f"Incomplete: {run_list(cell.missing, cell)}: {NOT_MEASURED}.")
    for field, reason in cell.reasons.items():
        if field == "n" and cell.is_raced:
            found.append(looks_note(cell))
            continue
        if field == "n":
            found.append(f"Incomplete: {reason}.")
            continue
        if field == "baseline_low":
            continue  # said with the documents
        if field == "provenance":
            found.append(f"{reason[:1].upper()}{reason[1:]}.{_mismatched(cell)}")
            continue
        if field == "chance_accuracy" and not cell.higher_is_better:
            continue  # a loss has none, and nothing is wrong
        words = (field[:1].upper() + field[1:]).replace("_", " ")
        found.append(f"{words} is undefined: {reason}.")
    chance = cell.chance_accuracy
    if chance is None:
        return tuple(found)
    if defined(cell.baseline_accuracy) and cell.baseline_accuracy <= chance:
        found.append("The intact model is at or below chance: its layers have little to lose.")
    elif defined(cell.baseline_low) and cell.baseline_low <= chance:
        found.append(
            "The 95 % interval of the baseline reaches down to chance: the drops say little."
        )
    return tuple(found)
