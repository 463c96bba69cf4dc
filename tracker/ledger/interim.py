"""What the blocks that are in the ledger say already, while the rest of a cell is measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracker.core.ablations import INTACT, ablation_of
from tracker.core.estimates import Estimate
from tracker.core.records import RunIdentity
from tracker.core.views import View
from tracker.ledger.aligned import AlignedOutcomes
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import METRIC
from tracker.stats.accuracy import accuracy_drop, weights_by_task


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
    if view.until is not None:
        return _until_answered(store, view)
    metric = view.metric
    outcomes = AlignedOutcomes(
        store, view, ["task", "doc", "ablation", "proxy_tokens", METRIC + metric]
    )
    n = len(outcomes.tasks)
    if not n or outcomes.missing:
        return Interim(0, outcomes.wanted, 0, {})
    by_size = store.identity.benchmark.weight_by_size
    weights = weights_by_task(outcomes.tasks, by_size, outcomes.units(metric))
    before = outcomes.metric(INTACT, metric)
    drops = {}
    for run in outcomes.runs:
        after = outcomes.metric(outcomes.ablation(run), metric)
        pair = (before, after) if outcomes.higher_is_better(metric) else (after, before)
        drops[run] = accuracy_drop(*pair, weights)
    tokens = outcomes.of(INTACT)["proxy_tokens"].to_numpy(dtype=np.float64)
    return Interim(n, outcomes.wanted, int(tokens.sum()), drops)


def _until_answered(store: CellStore, view: View) -> Interim:
    """Estimate each run's drop from its own documents, without the interval of a single look."""
    column = METRIC + view.metric
    frame = store.read_documents(view.extent, ["task", "doc", "ablation", "proxy_tokens", column])
    if not len(frame):
        return Interim(0, None, 0, {})
    outcomes = frame.pivot(index=["task", "doc"], columns="ablation", values=column)
    intact = frame[frame["ablation"] == INTACT.name]
    by_size = store.identity.benchmark.weight_by_size
    drops = {}
    for run in view.runs:
        name = ablation_of(run, view.removed).name
        if name in outcomes:
            both = (outcomes[INTACT.name] - outcomes[name]).dropna()
            tasks = [str(task) for task in both.index.get_level_values("task")]
            drops[run] = Estimate(float(weights_by_task(tasks, by_size) @ both.to_numpy()))
    return Interim(len(intact), None, int(intact["proxy_tokens"].sum()), drops)
