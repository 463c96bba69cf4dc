"""What to know before a figure is believed: other versions, devices, missing documents."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.analysis.layer_figures import sure
from tracker.core.answers import interval_name
from tracker.core.formats import counted, defined, measure_of
from tracker.core.provenance import WEIGHTS
from tracker.core.records import NOT_MEASURED, CellRecord
from tracker.core.text import capital
from tracker.core.weight_formats import FORMATS
from tracker.report.wording import run_list, second_rounding


def provenance_notes(cells: Sequence[CellRecord]) -> list[str]:
    """Name the cells that were not measured by the same versions and devices throughout.

    Args:
        cells: The cells.

    Returns:
        One sentence for each.
    """
    found = ((cell, cell.mismatch) for cell in cells)
    return [f"{cell.title}: {why}.{_mismatched(cell)}" for cell, why in found if why]


def _mismatched(cell: CellRecord) -> str:
    """Say which drops compare what was measured differently; begins with a space."""
    which = [run.change for run in cell.runs if run.mismatch]
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
    if not cell.is_raced or not cell.unfinished:
        return ""
    return (
        f"{capital(cell.unfinished)}. Each run’s figures rest on its own documents. Its interval "
        f"is a {interval_name(cell)}, which holds at every look and for all runs together. "
        "What holds for one look is left out. The baseline, the proxies and the "
        f"correlations rest on the {counted(cell.n, 'document')} that all runs share. Without "
        "‘until’ the same experiment measures the rest."
    )


def rounding_note(cell: CellRecord) -> str:
    """Say how many documents half precision decides by rounding, and what that moves.

    Args:
        cell: The cell.

    Returns:
        Some sentences; none in single precision.
    """
    dtype, count, moved = cell.model.dtype, cell.baseline_rounded, cell.baseline_rounding
    measure = measure_of(cell)
    if count is None or moved is None:
        why = cell.reasons.get("baseline_rounded") if cell.higher_is_better else None
        return f"How many documents {dtype} decides by rounding is not known: {why}." if why else ""
    of = f"{count:,} of {cell.n:,} documents"
    text = f"{dtype} decides up to {of} of the intact model by rounding."
    if count:
        text += (
            " Computed in another way, such as another batch size of lm-eval, some of these are "
            f"judged otherwise: the baseline moves by up to {measure.write(moved)} {measure.unit} "
            "(95 %)."
        )
    rounded = {run.rounded for run in cell.runs if run.rounded is not None}
    if rounded:
        span = " to ".join(f"{number:,}" for number in sorted({min(rounded), max(rounded)}))
        text += f" Under the runs it decides up to {span}."
    shown = [run for run in cell.runs if run.rounded is not None and sure(run.drop)]
    # No larger than what rounding moves.
    small = [
        run.change for run in shown if abs(run.drop.value or 0.0) <= (run.drop_rounding or 0.0)
    ]
    if small:
        text += (
            f" What {run_list(small, cell)} {'cost' if len(small) > 1 else 'costs'} is no more "
            "than rounding moves, whatever the interval over documents says."
        )
    return f"{text} ‘dtype: float32’ leaves next to nothing to rounding."


def second_rounding_note(cell: CellRecord) -> str:
    """Say which error is measured where weights are rounded that were rounded before.

    Args:
        cell: The cell.

    Returns:
        A sentence; empty where no weights are rounded, or none were before.
    """
    kept = cell.provenance.get(WEIGHTS)
    if kept is None or not any(run.change.intervention in FORMATS for run in cell.runs):
        return ""
    return second_rounding(cell.model.name, kept)


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
    if cell.unfinished:
        found.append(looks_note(cell) or f"Incomplete: {cell.unfinished}.")
    # The first two are said with the documents, and with what rounding decides.
    elsewhere = {"baseline_low", "baseline_rounded", *cell.NOTES}
    if not cell.higher_is_better:
        elsewhere.add("chance_accuracy")  # a loss has none, and nothing is wrong
    found += [
        f"{capital(figure).replace('_', ' ')} is undefined: {reason}."
        for figure, reason in cell.all_reasons.items()
        if figure not in elsewhere
    ]
    if cell.mismatch:
        found.append(f"{capital(cell.mismatch)}.{_mismatched(cell)}")
    if cell.unsaved:
        found.append(f"{capital(cell.unsaved)}.")
    found += filter(None, (rounding_note(cell), second_rounding_note(cell)))
    chance = cell.chance_accuracy
    if chance is None:
        return tuple(found)
    if defined(cell.baseline.value) and cell.baseline.value <= chance:
        found.append("The intact model is at or below chance: its layers have little to lose.")
    elif defined(cell.baseline.low) and cell.baseline.low <= chance:
        found.append(
            "The 95 % interval of the baseline reaches down to chance: the drops say little."
        )
    return tuple(found)
