"""Counting what an experiment will cost, with the tokenizers but without the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracker.ablations import ablations_of, removals
from tracker.config import CellRequest
from tracker.errors import ModelError
from tracker.ledger.spreads import spreads_of
from tracker.ledger.store import Ledger
from tracker.measuring.derive import record_of
from tracker.measuring.prepare import CellLookup, check_layers, look_up
from tracker.metrics.power import UNRELATED, Spread
from tracker.models.sources import count_layers

if TYPE_CHECKING:
    from tracker.engine.plan import Cost


@dataclass(frozen=True)
class PlannedCell:
    """What one cell will cost.

    Attributes:
        request: The cell.
        runs: How many tracked runs it has.
        measured: Whether the ledger holds all of it already.
        shared: Whether it is another metric of a cell that stands before it: measured with it.
        cost: The work of the whole cell, measured or not.
        spread: How much the outcome of a document is expected to change under a removal; None for
            a loss of which nothing is measured yet.
        observed: Whether that is what the median removal does that the ledger holds, and no
            assumption.
    """

    request: CellRequest
    runs: int
    measured: bool
    shared: bool
    cost: Cost
    spread: Spread | None
    observed: bool


def plan(
    requests: Sequence[CellRequest], ledger: Ledger, trust_remote_code: bool = False
) -> list[PlannedCell]:
    """Plan cells, one plan a cell; the ledger may hold some of them.

    RequestError if something that was asked for does not exist or does not fit.
    """
    from tracker.benchmarks.benchmark import chosen_metric, open_benchmark
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.engine.plan import cost
    from tracker.models.load import weightless

    asked = [look_up(request, ledger) for request in requests]
    check_layers(asked, trust_remote_code)
    planned = []
    before: set[CellRequest] = set()
    for cell in asked:
        request = cell.request
        one = request.model_copy(update={"metric": None})
        shared = one in before
        before.add(one)
        benchmark = open_benchmark(request)
        metric = chosen_metric(benchmark.identity, request.metric)
        layers = count_layers(cell.source, trust_remote_code)
        ablations = ablations_of(request, layers)
        model, tokenizer = weightless(cell.source, request.dtype, trust_remote_code)
        encoder = RequestEncoder(model, tokenizer, request)
        documents = benchmark.documents(encoder, request.extent)
        if not documents:
            raise ModelError(f"{request.title} has no documents")
        found = cost(model, documents, ablations, encoder.max_length)
        runs = len(list(removals(request, layers)))
        known = _observed_spread(cell, metric)
        is_loss = benchmark.identity.tasks[0].higher_is_better.get(metric, True) is False
        spread = known or (None if is_loss else UNRELATED)
        planned.append(
            PlannedCell(
                request, runs, cell.complete, shared, found, spread, observed=known is not None
            )
        )
    return planned


def _observed_spread(cell: CellLookup, metric: str) -> Spread | None:
    """Find what the median removal changes, in the view of the cell with the most documents."""
    if cell.store is None:
        return None
    views = [asked.view for asked in cell.store.views.asked({})]
    records = [record_of(cell.store, view) for view in views if view.metric == metric]
    best = max(records, key=lambda record: record.n, default=None)
    found = spreads_of(best.runs) if best else None
    return found[0] if found else None
