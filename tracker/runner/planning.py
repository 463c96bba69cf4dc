"""Counting what an experiment will cost, with the tokenizers but without the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tracker.config import CellRequest
from tracker.errors import ModelError
from tracker.ledger.store import Ledger
from tracker.runner.prepare import check_layers, look_up


@dataclass(frozen=True)
class PlannedCell:
    """What one cell will cost; all counts are for the whole cell, measured or not.

    Attributes:
        request: The cell.
        runs: Tracked runs: one a layer.
        measured: Whether the ledger holds all of it already.
        documents: Documents.
        requests: (context, continuation) pairs.
        tokens: Tokens that the model reads, shared ones once.
        layer_passes: Tokens times layers passed, all ablations together.
        naive_layer_passes: The same for lm-eval run once per ablation.
        flops: Floating-point operations.
        naive_flops: The same for lm-eval run once per ablation.
        peak_bytes: Estimated peak memory.
        dtype: The numbers' type.
    """

    request: CellRequest
    runs: int
    measured: bool
    documents: int
    requests: int
    tokens: int
    layer_passes: int
    naive_layer_passes: int
    flops: float
    naive_flops: float
    peak_bytes: int
    dtype: str


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
        planned.append(
            PlannedCell(
                request=request,
                runs=len(request.layers),
                measured=cell.complete,
                documents=found.documents,
                requests=found.requests,
                tokens=found.tokens,
                layer_passes=found.layer_passes,
                naive_layer_passes=found.naive_layer_passes,
                flops=found.flops,
                naive_flops=found.naive_flops,
                peak_bytes=found.peak_bytes,
                dtype=str(model.dtype).removeprefix("torch."),
            )
        )
    return planned
