"""Which of the sets that searches chose is recommended: calibration documents alone say so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracker.core.config import CellRequest
from tracker.core.errors import TrackerError
from tracker.core.prune_records import Calibrated, PruneStep
from tracker.pruning.search.cells import Lender, OpenCell
from tracker.pruning.search.request import deciding
from tracker.pruning.search.scores import Scores, Set
from tracker.pruning.search.search import Found, calibrated
from tracker.pruning.search.strategies import NULL


@dataclass(frozen=True)
class Recommended:
    """The set that is recommended, of those that searches with one goal chose.

    Attributes:
        removed: The set; empty where none is recommended.
        of: How many different sets there were to choose from.
        step: What it loses on the documents that decided, the runner-up, and whether they tell the
            two apart; None where there was nothing to decide.
        decided_on: Which documents these were; None likewise.
        reason: Why nothing is recommended; empty where something is.
    """

    removed: Set = ()
    of: int = 0
    step: PruneStep | None = None
    decided_on: Calibrated | None = None
    reason: str = ""


def recommended(
    found: Sequence[Found], lender: Lender, cells: dict[CellRequest, OpenCell]
) -> Recommended:
    """Choose among what searches with one goal found, by what it costs calibration documents.

    Random draws are what the others are held against, and never recommended. Where the others all
    chose one set, nothing is measured.

    Args:
        found: The searches.
        lender: Who loads the model.
        cells: The cells that were opened so far, which get the one that decides.

    Returns:
        What is recommended, or why nothing is.
    """
    sets = list(dict.fromkeys(one.removed for one in found if one.asked.strategy != NULL))
    if not sets:
        return Recommended(reason="random draws say what chance leaves")
    if len(sets) == 1:
        return Recommended(sets[0], 1)
    asked = [one.asked for one in found]
    request = deciding(asked)
    lender.progress.say(f"{request.title}: which of {len(sets)} sets costs least")
    cell = cells.setdefault(request, OpenCell(request, lender))
    try:
        step = Scores([cell], asked[0].unit, cell.layers).losses("accuracy", sets).step(None)
    except TrackerError as error:
        return Recommended(of=len(sets), reason=str(error))
    return Recommended(step.removed, len(sets), step, calibrated(cell, cell.documents))
