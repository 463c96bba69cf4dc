"""Find cells in the ledger, and check requests before results are computed or written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from tracker.analysis.stopping import check_bounded
from tracker.benchmarks.base import Benchmark
from tracker.benchmarks.benchmark import (
    check_benchmark,
    choose_metric,
    data_stamp,
    is_local,
    open_benchmark,
)
from tracker.core.config import CellRequest
from tracker.core.errors import ExperimentError, UnreachableError
from tracker.core.model_parts import ModelParts, PartsCounter, check_parts, fill_parts
from tracker.core.provenance import package_versions
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.ledger.views import request_key
from tracker.measuring.derive import derive_answer
from tracker.measuring.progress import Progress
from tracker.models.sources import ModelSource, count_parts, find_model


@dataclass(frozen=True)
class CellLookup:
    """A requested cell, with the facts that are known without loading a model or benchmark.

    Attributes:
        request: The request of the cell.
        source: The source of the model.
        key: The key of the request in the ledger; None if the hub's commit is unknown.
        store: The cell in the ledger; None if the ledger does not have the cell yet.
        complete: True if no requested outcome or answer is missing.
    """

    request: CellRequest
    source: ModelSource
    key: str | None
    store: CellStore | None
    complete: bool


def find_cell(request: CellRequest, ledger: Ledger, trust_remote_code: bool = False) -> CellLookup:
    """Find a cell in the ledger without loading torch, the model or the benchmark."""
    source = find_model(request.model, trust_remote_code)
    data, stamp = data_stamp(request.benchmark), source.stamp()
    key = None if stamp is None else request_key(request, stamp, data, package_versions())
    store = ledger.find(key) if key else None
    complete = store is not None and _is_complete(store, request)
    return CellLookup(request, source, key, store, complete)


def make_counter(ledger: Ledger, trust_remote_code: bool) -> PartsCounter:
    """Return a function that counts the parts of a request's model.

    The number of layers comes from the ledger if the ledger has the cell. A measured cell then
    needs no model, unless its request names heads, experts, linear maps or kinds of layers.
    """

    def count(request: CellRequest, kinds: Collection[str] = ()) -> ModelParts:
        cell = find_cell(replace(request, until=None), ledger, trust_remote_code)
        if cell.store is not None and not kinds and not request.changes.has_parts:
            return ModelParts(cell.store.identity.model.layers)
        return _count_requested(request, cell.source, kinds)

    return count


def _count_requested(
    request: CellRequest, source: ModelSource, kinds: Collection[str]
) -> ModelParts:
    """Count the parts of a model; count linear maps only if a request asks for all of them."""
    parts = count_parts(source, kinds)
    if not request.changes.lacks_maps:
        return parts
    from tracker.models.parts.anatomy import linear_map_shapes

    return parts._replace(maps=tuple(map(tuple, linear_map_shapes(source))))


def _is_complete(store: CellStore, request: CellRequest) -> bool:
    answer = derive_answer(store, store.views.view_of(request))
    if answer is not None:
        return answer.over
    ablations = request.ablations(store.identity.model.layers)
    return store.is_complete(request.extent, [ablation.name for ablation in ablations])


def widen_request(
    request: CellRequest,
    ledger: Ledger,
    trust_remote_code: bool,
    read_sweep: Callable[[], CellRequest | None],
) -> tuple[CellRequest, str | None]:
    """Extend a trial's request to all runs of its cell, which cost little more than one run.

    The runs are those of the trial's sweep, or every layer of the model if the sweep is unknown. If
    the trial's own run is measured, only earlier requested runs are used, and nothing is measured.

    A grid also contains invalid combinations, such as a span beyond the last layer or a layer that
    is already removed. Such combinations raise no error.

    Args:
        request: A request for one run.
        ledger: The results folder, which may know the number of layers.
        trust_remote_code: True if code from the download may run.
        read_sweep: Function that returns the sweep's request of the cell; None if it is unknown.
            The function may take seconds, and is called only if a run must be measured.

    Returns:
        The request for more runs, and the reason why the trial's change is invalid (None if the
        change is valid).

    Raises:
        ExperimentError: A layer is out of range, or the runs of the trial's question are unknown.
    """
    lookup = find_cell(replace(request, until=None), ledger)
    store, plain_request = lookup.store, lookup.request
    parts = make_counter(ledger, trust_remote_code)(request, ())
    layers = parts.layers
    check_parts(request, parts)
    reason = request.invalid_reason(request.changes.first_change, layers)
    earlier_request = find_earlier_request(request, store)
    if store is not None and earlier_request is not None and _is_complete(store, earlier_request):
        return earlier_request, reason
    if store is not None and lookup.complete:
        # This also holds for a request with a question: the complete cell answers the question.
        runs = store.views.display_view(plain_request).runs
        measured_request = plain_request.with_changes(runs) if runs else plain_request
        return measured_request if _is_complete(store, measured_request) else plain_request, reason
    cell = read_sweep() if reason is None else None
    if cell is None and reason is None and request.until is not None:
        raise ExperimentError(
            f"'until': '{request.until}' compares all runs of a benchmark, but a trial is a "
            "single run. The sweep of the trial lists the other runs, but it cannot be read here. "
            "Give the experiment file to tracker run, or leave 'until' out of the file"
        )
    changes = request.changes if cell is None else cell.changes
    layer_numbers = [n for n in range(layers) if cell is None or n in changes.layers]
    changes = changes.model_copy(update={"layers": tuple(layer_numbers)})
    return replace(request, changes=changes), reason


def find_earlier_request(request: CellRequest, store: CellStore | None) -> CellRequest | None:
    """Return the earlier request of a trial's cell with the same question, with all its runs.

    Returns None if all earlier requests have another question or lack the trial's run.
    """
    view = store.views.view_of(request) if store else None
    question = view.until if view else None
    if store is None or view is None or question is None:
        return None
    for earlier in (related.until for related in store.views.related_views(view)):
        if earlier is None or {*question.runs} - {*earlier.runs}:
            continue
        if (earlier.question, earlier.seed) == (question.question, question.seed):
            return request.with_changes(earlier.runs) if earlier.runs else request
    return None


def check_layers(cells: Sequence[CellLookup]) -> None:
    """Raise ExperimentError for a layer out of range; the message says the number of layers."""
    for cell in cells:
        check_range(cell.request, count_parts(cell.source))


def check_range(request: CellRequest, parts: ModelParts) -> None:
    """Raise ExperimentError for unknown layers or parts, and for requests without valid runs.

    A question that the number of valid runs cannot answer also raises ExperimentError.
    """
    check_parts(request, parts)
    layers = parts.layers
    runs = len(request.valid_changes(layers))
    if request.until is not None:
        try:
            request.until.check_runs(runs)
        except ValueError as error:
            raise ExperimentError(f"{request.title}: 'until': {error}") from None
    if not runs and any(request.changes.expand()):
        reason = request.invalid_reason(request.changes.first_change, layers)
        raise ExperimentError(
            f"{request.title}: none of the requested changes is possible ({reason})"
        )


def open_benchmarks(
    requests: Iterable[CellRequest], progress: Progress | None = None
) -> Iterator[Benchmark]:
    """Yield the benchmark of each request; open it once for requests with the same documents.

    RequestError is raised if a benchmark cannot be read, or does not support the metric or the
    question.
    """
    benchmarks: dict[object, Benchmark] = {}
    for request in requests:
        # The number of documents, the changes and the metric do not affect the benchmark's data.
        # The model does if a task generates its documents for a tokenizer, such as RULER's tasks.
        key = (request.benchmark, request.documents.part, request.documents.seed)
        benchmark = benchmarks.get(key) or benchmarks.get((key, request.model.model))
        if benchmark is None:
            (progress or Progress()).step(f"reading the documents of {request.benchmark}")
            benchmark = open_benchmark(request)
            is_specific = benchmark.is_model_specific
            benchmarks[(key, request.model.model) if is_specific else key] = benchmark
        metric = choose_metric(benchmark.identity, request.metric)
        if request.until is not None:
            check_bounded(benchmark.identity, metric)
        yield benchmark


def validate_requests(
    requests: Sequence[CellRequest],
    trust_remote_code: bool,
    kinds: Collection[str] = (),
    progress: Progress | None = None,
) -> tuple[int, list[str]]:
    """Check that requests exist and fit, without loading weights or downloading data.

    Args:
        requests: The requests; a request without layers means all layers of its model.
        trust_remote_code: True if code from the download may run.
        kinds: The kinds of layers, for requests without layers.
        progress: Receives messages about each step.

    Returns:
        The number of runs, and notes on unchecked parts. These are hub models whose configuration
        cannot be reached (all their runs are counted), and benchmarks whose documents are on the
        hub.

    Raises:
        RequestError: A model, a benchmark or a source of data is unknown; a layer is out of range;
            or a benchmark cannot be read or does not have the metric.
    """
    runs, notes, progress = 0, {}, progress or Progress()
    for request in requests:
        progress.step(f"reading the configuration of {request.model}")
        source = find_model(request.model, trust_remote_code)
        check_benchmark(request.benchmark)
        try:
            parts = _count_requested(request, source, kinds)
        except UnreachableError as error:
            notes[request.model.model] = str(error)
            layers = max(request.changes.layers, default=0) + max(request.changes.spans)
        else:
            request, layers = fill_parts(request, parts), parts.layers
            check_range(request, parts)
            ablations = request.ablations(layers)
            if any(ablation.roundings for ablation in ablations):
                from tracker.models.load import build_hollow
                from tracker.models.parts.anatomy import LayerAnatomy

                model = build_hollow(source, request.model.dtype)
                LayerAnatomy.of(model).check_formats(ablations)
            if request.benchmark.apply_chat_template:
                from tracker.benchmarks.encoder import RequestEncoder
                from tracker.models.load import build_for_planning

                spec = request.benchmark
                encoder = RequestEncoder(*build_for_planning(source, request.model.dtype), spec)
                encoder.check_chat_template(spec)
        runs += len(request.valid_changes(layers))
    return runs, [*notes.values(), *check_documents(requests, progress)]


def check_documents(requests: Sequence[CellRequest], progress: Progress) -> list[str]:
    """Check all benchmarks that are on this machine, as a run does before it measures.

    Returns notes on unchecked benchmarks. Raises RequestError in the same cases as
    `open_benchmarks`.
    """
    specs = dict.fromkeys(request.benchmark for request in requests)
    hub_specs = {spec: str(spec) for spec in specs if not is_local(spec)}
    local_requests = (request for request in requests if request.benchmark not in hub_specs)
    for _ in open_benchmarks(local_requests, progress):
        pass
    names = dict.fromkeys(hub_specs.values())
    if not names:
        return []
    return [f"documents and metrics of {', '.join(names)} on the hub (tracker plan reads them)"]
