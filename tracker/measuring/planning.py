"""Estimate the cost of an experiment with tokenizers, but without loading weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tracker.analysis.paired import spreads_of
from tracker.analysis.stopping import AnswerForecast, forecast_answer, refuse_unbounded
from tracker.core.config import CellRequest
from tracker.core.documents import Document
from tracker.core.errors import ModelError
from tracker.core.identities import HALF, BenchmarkIdentity
from tracker.core.records import AnswerRecord
from tracker.core.weight_formats import FORMATS
from tracker.ledger.blocks import BLOCK
from tracker.ledger.store import Ledger
from tracker.measuring.calibrate import computed_twice
from tracker.measuring.derive import answer_of, record_of
from tracker.measuring.prepare import CellLookup, check_layers, look_up
from tracker.measuring.progress import Progress
from tracker.models.sources import ModelSource, count_layers, stored_format
from tracker.stats.accuracy import UNRELATED, OutcomeVariance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from tracker.engine.plan import Cost
    from tracker.models.offloaded import Placement


IN_CHECK = 2
"""Number of times that the self-check reads offloaded weights: for masks and for scoring."""


@dataclass(frozen=True)
class PlannedReading:
    """Planned reading of offloaded weights.

    Attributes:
        placement: Places of the layers.
        times: Minimum number of times that they are read: for the self-check, and for each block of
            documents.
        rate: Measured reading rate in bytes per second; None if the files are not on this machine.
    """

    placement: Placement
    times: int
    rate: float | None

    @property
    def text(self) -> str:
        """The plan as a sentence."""
        resting, total = self.placement, self.times * self.placement.moving
        rate = ""
        if self.rate is not None:
            rate = f", {total / self.rate:,.0f} s at the {self.rate / 1e9:.1f} GB/s of here"
        return (
            f"{resting.total / 1e9:.1f} GB of weights do not fit into memory: "
            f"{len(resting.elsewhere)} layers ({resting.moving / 1e9:.1f} GB) rest elsewhere and "
            f"come past {self.times} times or more; that reads {total / 1e9:.0f} GB{rate}, most of "
            "it while other layers are computed"
        )


@dataclass(frozen=True)
class PlannedCell:
    """Planned cost of one cell.

    Attributes:
        request: The request of the cell.
        runs: Number of its tracked runs.
        measured: True if the ledger already has all of it.
        shared: True if it is another metric of an earlier cell, and is measured with that.
        cost: The work of the whole cell, measured or not.
        dtype: The data type of the computation, such as `bfloat16`.
        spread: Expected variance of a document's outcome under a removal; None for a loss that is
            not measured yet.
        observed: True if `spread` is that of the median measured removal; False if it is assumed.
        reading: The reading of offloaded weights; None if all fit.
        kept: The quantised format of the checkpoint; empty for none.
        answer: The current answer to the cell's question; None without a question or measurements.
        expected: The expected cost of the answer; None if it is known, or if too few documents are
            measured for a forecast.
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
    kept: str = ""
    answer: AnswerRecord | None = None
    expected: AnswerForecast | None = None

    @property
    def rounds_again(self) -> bool:
        """Return whether weights are rounded that the checkpoint keeps in fewer bits."""
        return bool(self.kept and {*self.request.changes.interventions} & {*FORMATS})


@dataclass(frozen=True)
class PlannedTexts:
    """A cell's tokenised documents, read without the model's weights.

    Attributes:
        benchmark: The benchmark of the documents.
        metric: The metric of the request.
        model: The model without its weights.
        documents: The documents, at least one.
        max_length: Maximum number of tokens of a request.
    """

    benchmark: BenchmarkIdentity
    metric: str
    model: PreTrainedModel
    documents: Sequence[Document]
    max_length: int

    @property
    def dtype(self) -> str:
        """The data type of the model's computation, such as `bfloat16`."""
        return str(self.model.dtype).removeprefix("torch.")


def texts_of(request: CellRequest, source: ModelSource) -> PlannedTexts:
    """Read a cell's documents; RequestError or ModelError if something of it cannot be had."""
    from tracker.benchmarks.benchmark import chosen_metric, open_benchmark
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.models.load import weightless

    benchmark = open_benchmark(request)
    metric = chosen_metric(benchmark.identity, request.metric)
    model, tokenizer = weightless(source, request.model.dtype)
    encoder = RequestEncoder(model, tokenizer, request.benchmark)
    documents = benchmark.documents(encoder, request.extent)
    if not documents:
        raise ModelError(f"{request.title} has no documents")
    return PlannedTexts(benchmark.identity, metric, model, documents, encoder.max_length)


def plan(
    requests: Sequence[CellRequest],
    ledger: Ledger,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[PlannedCell]:
    """Plan cells, one plan per cell; the ledger may have some of them already.

    `progress` receives a message for each cell. RequestError is raised if part of a request does
    not exist or does not fit the model.
    """
    cells = [look_up(request, ledger, trust_remote_code) for request in requests]
    check_layers(cells)
    # What is refused is so without torch.
    from tracker.engine.plan import cost
    from tracker.models.parts.anatomy import LayerAnatomy

    planned = []
    before: set[CellRequest] = set()
    for cell in cells:
        request = cell.request
        one = replace(request, metric=None)
        shared = one in before
        before.add(one)
        (progress or Progress()).step(f"planning {request.title}")
        texts = texts_of(request, cell.source)
        benchmark, metric = texts.benchmark, texts.metric
        if request.until is not None:
            refuse_unbounded(benchmark, metric)
        layers = count_layers(cell.source)
        ablations = request.ablations(layers)
        LayerAnatomy.of(texts.model).refuse_formats(ablations)
        found = cost(texts.model, texts.documents, ablations, texts.max_length)
        if texts.dtype in HALF:
            found = _with_second_times(found, texts, request.extent.seed)
        runs = len(request.valid_changes(layers))
        known = _observed_spread(cell, metric)
        is_loss = benchmark.tasks[0].higher_is_better.get(metric, True) is False
        spread = known or (None if is_loss else UNRELATED)
        answer = expected = None
        if cell.store is not None and request.until is not None:
            view = cell.store.views.of(request)
            answer = answer_of(cell.store, view)
            expected = None if cell.complete else forecast_answer(cell.store, view)
        planned.append(
            PlannedCell(
                *(request, runs, cell.complete, shared, found, texts.dtype, spread),
                observed=known is not None,
                reading=_reading(cell.source, texts),
                kept=stored_format(cell.source),
                answer=answer,
                expected=expected,
            )
        )
    return planned


def _reading(source: ModelSource, texts: PlannedTexts) -> PlannedReading | None:
    """Plan how the weights of a model are read, where it runs by default."""
    from tracker.models.load import find_device, resting
    from tracker.models.offloaded import read_rate

    placement = resting(source, lambda: texts.model, find_device("auto"))
    if placement is None:
        return None
    blocks = sum(-(-count // BLOCK) for count in Counter(d.task for d in texts.documents).values())
    files = [path for path in source.files() if path.suffix == ".safetensors"]
    return PlannedReading(placement, IN_CHECK + blocks, read_rate(files))


def _with_second_times(found: Cost, texts: PlannedTexts, seed: int) -> Cost:
    """Add the cost of documents that are computed twice, the second time as in lm-eval."""
    from tracker.engine.plan import reading

    places = computed_twice(texts.documents, seed)
    some = [each for each in texts.documents if (each.task, each.index) in places]
    if not some:
        return found
    read = reading(texts.model, some, texts.max_length).naive_tokens
    passes = read * found.layer_passes / found.tokens
    return replace(found, check_layer_passes=found.check_layer_passes + passes)


def _observed_spread(cell: CellLookup, metric: str) -> OutcomeVariance | None:
    """Return the median removal's variance of outcomes, in the view with the most documents."""
    if cell.store is None:
        return None
    views = [asked.view for asked in cell.store.views.asked({})]
    records = [record_of(cell.store, view) for view in views if view.metric == metric]
    best = max(records, key=lambda record: record.n, default=None)
    found = spreads_of(best.runs) if best else None
    return found[0] if found else None
