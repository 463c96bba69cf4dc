"""Counting what an experiment will cost, with the tokenizers but without the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracker.ablations import ablations_of, removals
from tracker.config import CellRequest
from tracker.errors import ModelError
from tracker.ledger.store import Ledger
from tracker.measuring.prepare import check_layers, look_up
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
    """

    request: CellRequest
    runs: int
    measured: bool
    shared: bool
    cost: Cost


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
        chosen_metric(benchmark.identity, request.metric)
        layers = count_layers(cell.source, trust_remote_code)
        ablations = ablations_of(request, layers)
        model, tokenizer = weightless(cell.source, request.dtype, trust_remote_code)
        encoder = RequestEncoder(model, tokenizer, request)
        documents = benchmark.documents(encoder, request.extent)
        if not documents:
            raise ModelError(f"{request.title} has no documents")
        found = cost(model, documents, ablations, encoder.max_length)
        planned.append(
            PlannedCell(request, len(list(removals(request, layers))), cell.complete, shared, found)
        )
    return planned
