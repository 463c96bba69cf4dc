"""Estimate the cost of an experiment by tokenising its documents, without loading weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tracker.analysis.paired import variance_summary
from tracker.analysis.stopping import AnswerForecast, check_bounded, forecast_answer
from tracker.ledger.blocks import BLOCK_SIZE
from tracker.ledger.store import Ledger
from tracker.measuring.calibrate import repeated_documents
from tracker.measuring.derive import derive_answer, derive_record
from tracker.measuring.prepare import CellLookup, check_layers, find_cell
from tracker.measuring.progress import Progress
from tracker.models.sources import ModelSource, count_layers, stored_format
from tracker.schema.config import CellRequest
from tracker.schema.documents import Document
from tracker.schema.errors import ModelError
from tracker.schema.identities import HALF_PRECISION, BenchmarkIdentity
from tracker.schema.records import AnswerRecord
from tracker.schema.weight_formats import FORMATS
from tracker.stats.accuracy import UNRELATED_VARIANCE, OutcomeVariance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tracker.engine.plan import Cost
    from tracker.models.offloaded import Placement


CHECK_READS = 2
"""Number of times that the self-check reads offloaded weights: once for masks, once to score."""


@dataclass(frozen=True)
class PlannedReading:
    """Expected time for reading offloaded weights from memory or disk.

    Attributes:
        placement: The offloaded layers and their size in bytes.
        n_reads: Minimum number of times that the offloaded weights are read.
        rate: Measured reading rate in bytes per second; None if the files are not on this machine.
    """

    placement: Placement
    n_reads: int
    rate: float | None

    @property
    def text(self) -> str:
        """Description of the offloaded weights and of the time to read them."""
        layers, size = self.placement.offloaded_layers, self.placement.offloaded_bytes
        total, rate = self.n_reads * size, self.rate
        seconds = f", {total / rate:,.0f} s at {rate / 1e9:.1f} GB/s" if rate is not None else ""
        return (
            f"{self.placement.total_bytes / 1e9:.1f} GB of weights do not fit into memory. "
            f"{len(layers)} layers ({size / 1e9:.1f} GB) are offloaded and read at least "
            f"{self.n_reads} times. This reads {total / 1e9:.0f} GB in total{seconds}, mostly "
            "while other layers are computed"
        )


@dataclass(frozen=True)
class PlannedCell:
    """Planned cost of one cell, i.e. of one model on one benchmark.

    Attributes:
        request: The request of the cell.
        runs: Number of runs of the cell.
        measured: True if the ledger already has all outcomes of the cell.
        shared: True if the cell differs from an earlier cell only in its metric, so that measuring
            it costs nothing.
        cost: The cost of measuring the whole cell, including outcomes that are already in the
            ledger.
        dtype: The data type of the computation, such as `bfloat16`.
        spread: Expected variance (over documents) of the effect of a removal. None if the metric is
            a loss and no removal is measured yet.
        observed: True if `spread` comes from measured removals; False if it is an assumption.
        reading: Time for reading offloaded weights; None if all weights fit on the device.
        stored_format: The quantised format of the checkpoint's weights; empty if they are not
            quantised.
        answer: The current result of the `until` setting; None without the setting or without
            outcomes.
        forecast: Expected number of documents until the `until` setting stops the measurement; None
            if the measurement has stopped, or if no forecast is possible yet.
    """

    request: CellRequest
    runs: int
    measured: bool
    shared: bool
    cost: Cost
    dtype: str
    spread: OutcomeVariance | None
    observed: bool
    reading: PlannedReading | None = None
    stored_format: str = ""
    answer: AnswerRecord | None = None
    forecast: AnswerForecast | None = None

    @property
    def rounds_again(self) -> bool:
        """True if some runs quantise weights that are already quantised in the checkpoint."""
        return bool(self.stored_format and {*self.request.changes.interventions} & {*FORMATS})


@dataclass(frozen=True)
class PlannedTexts:
    """Tokenised documents of a benchmark for one model, read without loading its weights.

    Attributes:
        benchmark: The benchmark of the documents.
        metric: The requested metric, or the benchmark's own metric.
        model: The model without its weights.
        documents: The tokenised documents; there is at least one.
        max_length: Maximum number of tokens of a context and its continuation together.
    """

    benchmark: BenchmarkIdentity
    metric: str
    model: PreTrainedModel
    documents: Sequence[Document]
    max_length: int

    @property
    def dtype(self) -> str:
        """Data type of the model's computation, such as `bfloat16`."""
        return str(self.model.dtype).removeprefix("torch.")


def read_texts(request: CellRequest, source: ModelSource) -> PlannedTexts:
    """Tokenise the requested documents; raise RequestError or ModelError if reading fails."""
    from tracker.benchmarks.benchmark import choose_metric, open_benchmark
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.benchmarks.traces import Traces
    from tracker.models.load import build_for_planning

    benchmark = open_benchmark(request)
    metric = choose_metric(benchmark.identity, request.metric)
    model, tokenizer = build_for_planning(source, request.model.dtype)
    encoder = RequestEncoder(model, tokenizer, request.benchmark)
    documents = benchmark.documents(encoder, request.extent)
    if not documents:
        raise ModelError(f"{request.title} has no documents")
    if isinstance(benchmark, Traces):
        documents = benchmark.assume_longest_traces(documents)
    return PlannedTexts(benchmark.identity, metric, model, documents, encoder.max_length)


def plan_cells(
    requests: Sequence[CellRequest],
    ledger: Ledger,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[PlannedCell]:
    """Compute the planned cost of each request.

    Raises RequestError if a model, layer, benchmark or metric does not exist.
    """
    cells = [find_cell(request, ledger, trust_remote_code) for request in requests]
    check_layers(cells)
    # Invalid requests are rejected before torch is imported.
    from tracker.engine.plan import estimate_cost
    from tracker.models.parts.anatomy import LayerAnatomy

    planned, earlier = [], set[CellRequest]()
    for cell in cells:
        request = cell.request
        plain_request = replace(request, metric=None)
        shared = plain_request in earlier
        earlier.add(plain_request)
        (progress or Progress()).step(f"planning {request.title}")
        texts = read_texts(request, cell.source)
        benchmark, metric = texts.benchmark, texts.metric
        if request.until is not None:
            check_bounded(benchmark, metric)
        layers = count_layers(cell.source)
        ablations = request.ablations(layers)
        LayerAnatomy.of(texts.model).check_formats(ablations)
        parts = texts.model, texts.documents, ablations, texts.max_length
        reading = _plan_reading(cell.source, texts)
        cell_cost = estimate_cost(*parts, observe=request.observe, has_gradients=reading is None)
        if texts.dtype in HALF_PRECISION:
            cell_cost = _add_repeated_cost(cell_cost, texts, request.extent.seed)
        observed_spread = _median_variance(cell, metric)
        is_loss = benchmark.tasks[0].higher_is_better.get(metric, True) is False
        spread = observed_spread or (None if is_loss else UNRELATED_VARIANCE)
        answer = forecast = None
        if cell.store is not None and request.until is not None:
            view = cell.store.views.view_of(request)
            answer = derive_answer(cell.store, view)
            forecast = None if cell.complete else forecast_answer(cell.store, view)
        planned.append(
            PlannedCell(
                request,
                len(request.valid_changes(layers)),
                *(cell.complete, shared, cell_cost, texts.dtype, spread),
                observed=observed_spread is not None,
                reading=reading,
                stored_format=stored_format(cell.source),
                answer=answer,
                forecast=forecast,
            )
        )
    return planned


def _plan_reading(source: ModelSource, texts: PlannedTexts) -> PlannedReading | None:
    """Estimate the time to read weights that do not fit on the device.

    Returns None if all weights fit on the device.
    """
    from tracker.models.load import choose_placement, find_device
    from tracker.models.offloaded import measure_read_rate

    placement = choose_placement(source, lambda: texts.model, find_device("auto"))
    if placement is None:
        return None
    counts = Counter(document.task for document in texts.documents).values()
    blocks = sum(-(-count // BLOCK_SIZE) for count in counts)
    files = [path for path in source.files() if path.suffix == ".safetensors"]
    return PlannedReading(placement, CHECK_READS + blocks, measure_read_rate(files))


def _add_repeated_cost(cell_cost: Cost, texts: PlannedTexts, seed: int) -> Cost:
    """Return a cell's cost, plus the cost of scoring some documents a second time."""
    from tracker.engine.plan import count_work

    keys = repeated_documents(texts.documents, seed)
    documents = [document for document in texts.documents if document.key in keys]
    if not documents:
        return cell_cost
    n_tokens = count_work(texts.model, documents, texts.max_length).naive_tokens
    passes = n_tokens * cell_cost.layer_passes / cell_cost.tokens
    return replace(cell_cost, check_layer_passes=cell_cost.check_layer_passes + passes)


def _median_variance(cell: CellLookup, metric: str) -> OutcomeVariance | None:
    """Return the median, over stored runs, of the drop's variance over documents.

    Of several stored records, the record with the most documents is used. Returns None if no
    variance is stored.
    """
    if cell.store is None:
        return None
    views = [requested_view.view for requested_view in cell.store.views.read_requested({})]
    records = [derive_record(cell.store, view) for view in views if view.metric == metric]
    largest_record = max(records, key=lambda record: record.n, default=None)
    spreads = variance_summary(largest_record.runs) if largest_record else None
    return spreads[0] if spreads else None
