"""Counting what an experiment will cost, with the tokenizers but without the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tracker.config import CellRequest
from tracker.errors import ModelError
from tracker.ledger.store import Ledger
from tracker.runner.prepare import check_layers, look_up

if TYPE_CHECKING:
    from tracker.engine.plan import Cost


@dataclass(frozen=True)
class PlannedCell:
    """What one cell will cost.

    Attributes:
        request: The cell; each of its layers is one tracked run.
        measured: Whether the ledger holds all of it already.
        cost: The work of the whole cell, measured or not.
    """

    request: CellRequest
    measured: bool
    cost: Cost


def plan(
    requests: Sequence[CellRequest], ledger: Ledger, trust_remote_code: bool = False
) -> list[PlannedCell]:
    """Plan cells.

    Args:
        requests: The cells.
        ledger: The results folder, which may hold some of them.
        trust_remote_code: Whether code from the download may run.

    Returns:
        One plan a cell.

    Raises:
        RequestError: Something that was asked for does not exist or does not fit.
    """
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.benchmarks.tasks import Benchmark, chosen_metric
    from tracker.engine.plan import cost
    from tracker.models.load import weightless

    asked = [look_up(request, ledger) for request in requests]
    check_layers(asked, trust_remote_code)
    planned = []
    for cell in asked:
        request = cell.request
        benchmark = Benchmark(request)
        chosen_metric(benchmark.identity, request.metric)
        model, tokenizer = weightless(cell.source, request.dtype, trust_remote_code)
        encoder = RequestEncoder(model, tokenizer)
        documents = benchmark.documents(encoder, request.limit)
        if not documents:
            raise ModelError(f"{request.title} has no documents")
        found = cost(model, documents, cell.ablations, encoder.max_length)
        planned.append(PlannedCell(request, cell.complete, found))
    return planned
