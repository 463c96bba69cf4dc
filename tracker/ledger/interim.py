"""What the blocks that are in the ledger say already, while the rest of a cell is measured."""

from __future__ import annotations

from dataclasses import dataclass

from tracker.core.estimates import Estimate
from tracker.core.records import RunIdentity
from tracker.core.views import View
from tracker.ledger.aligned import AlignedOutcomes
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import METRIC


@dataclass(frozen=True)
class Interim:
    """How far a view of a cell is.

    Attributes:
        documents: Documents that are measured under everything that is shown; of a cell that a
            question ends, under the intact model.
        wanted: Documents that were asked for; None where a question decides.
        tokens: Their tokens, as `CellRecord.tokens` counts them.
        drops: Run → its drop on these documents.
    """

    documents: int
    wanted: int | None
    tokens: int
    drops: dict[RunIdentity, Estimate]


def interim_estimates(store: CellStore, view: View) -> Interim:
    """Estimate each run's drop from what is measured.

    Args:
        store: The cell on disk.
        view: What was asked of it.

    Returns:
        The estimates; none where a run lacks every document.
    """
    columns = ["task", "doc", "ablation", "proxy_tokens", METRIC + view.metric]
    outcomes = AlignedOutcomes(store, view, columns)
    if view.until is not None:
        return _until_answered(outcomes, view)
    n = len(outcomes.tasks)
    if not n or outcomes.missing:
        return Interim(0, outcomes.wanted, 0, {})
    paired = outcomes.by_metric([outcomes.ablation(run) for run in outcomes.runs])
    drops = {run: paired.drop(place) for place, run in enumerate(outcomes.runs)}
    return Interim(n, outcomes.wanted, int(outcomes.tokens.sum()), drops)


def _until_answered(outcomes: AlignedOutcomes, view: View) -> Interim:
    """Estimate each run's drop from its own documents, without the interval of a single look."""
    intact = outcomes.of_documents(None, [])
    if not intact.tasks:
        return Interim(0, None, 0, {})
    drops = {}
    for run in view.runs:
        alone = outcomes.of_documents(None, [run])
        if alone.runs:
            drops[run] = Estimate(alone.by_metric([alone.ablation(run)]).drop(0).value)
    return Interim(len(intact.tasks), None, int(intact.tokens.sum()), drops)
