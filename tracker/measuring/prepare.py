"""Look up requested results in the ledger, and check requests before anything is measured."""

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
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.ledger.views import request_key
from tracker.measuring.derive import derive_answer
from tracker.measuring.progress import Progress
from tracker.models.sources import ModelSource, count_parts, find_model
from tracker.schema.config import CellRequest
from tracker.schema.errors import ExperimentError, UnreachableError
from tracker.schema.model_parts import ModelParts, PartsCounter, check_parts, fill_parts
from tracker.schema.provenance import package_versions


@dataclass(frozen=True)
class CellLookup:
    """A request for one model and benchmark, with the results that the ledger already stores.

    Attributes:
        request: The request, which names the model, the benchmark and the ablations.
        source: Where the model is loaded from, such as the hub or a folder.
        key: Key under which the ledger stores the results; None if the commit of the hub model is
            unknown.
        store: The stored results of this model and benchmark; None if the ledger has none yet.
        complete: True if the ledger stores all outcomes that the request needs.
    """

    request: CellRequest
    source: ModelSource
    key: str | None
    store: CellStore | None
    complete: bool


def find_cell(request: CellRequest, ledger: Ledger, trust_remote_code: bool = False) -> CellLookup:
    """Look up the stored results of a request, without loading the model or the benchmark."""
    source = find_model(request.model, trust_remote_code)
    data, stamp = data_stamp(request.benchmark), source.stamp()
    key = None if stamp is None else request_key(request, stamp, data, package_versions())
    store = ledger.find(key) if key else None
    complete = store is not None and _is_complete(store, request)
    return CellLookup(request, source, key, store, complete)


def with_clusters(requests: Sequence[CellRequest]) -> list[CellRequest]:
    """Add the cluster of each document to requests with the setting `cluster`.

    The clusters are read from a column of the benchmark's data. BenchmarkError is raised if the
    data lacks the column.
    """
    benchmarks = open_benchmarks(request for request in requests if request.clusters)
    return [
        replace(request, clusters=next(benchmarks).clusters(request.clusters.column))
        if request.clusters
        else request
        for request in requests
    ]


def make_counter(ledger: Ledger, trust_remote_code: bool) -> PartsCounter:
    """Return a function that counts the layers, heads and other parts of a request's model.

    If the model was measured before, the number of layers is read from the ledger.
    """

    def count(request: CellRequest, kinds: Collection[str] = ()) -> ModelParts:
        cell = find_cell(replace(request, until=None), ledger, trust_remote_code)
        if cell.store is not None and not kinds and not request.changes.has_parts:
            return ModelParts(cell.store.identity.model.layers)
        return _count_requested_parts(request, cell.source, kinds)

    return count


def _count_requested_parts(
    request: CellRequest, source: ModelSource, kinds: Collection[str]
) -> ModelParts:
    """Count the layers, heads and experts of a model.

    If the request asks for all linear maps, the result also lists the model's linear maps.
    """
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
    """Extend the request of one trial (a run of a sweep) to all ablations of the sweep.

    Measuring all ablations together costs little more than measuring one. If the sweep is unknown,
    all layers of the model are requested. If the trial's ablation is already measured, only
    ablations with stored results are requested.

    Args:
        request: The trial's request, which names one ablation.
        ledger: The results folder.
        trust_remote_code: Whether Python code that is downloaded with the model may run.
        read_sweep: Function that returns the sweep's request, or None if the sweep is unknown. It
            is called only if a run must be measured, because a call can take seconds.

    Returns:
        The extended request, and the reason why the trial's ablation is invalid (None if valid).
        Invalid ablations of other trials raise no error.

    Raises:
        ExperimentError: A layer is out of range, or the request has an `until` setting but the
            trial's sweep is unknown.
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
            "single run. The other runs are listed in the trial's sweep, which cannot be read "
            "here. Run the experiment file with tracker run, or leave 'until' out of the file"
        )
    changes = request.changes if cell is None else cell.changes
    layer_numbers = [n for n in range(layers) if cell is None or n in changes.layers]
    changes = changes.model_copy(update={"layers": tuple(layer_numbers)})
    return replace(request, changes=changes), reason


def find_earlier_request(request: CellRequest, store: CellStore | None) -> CellRequest | None:
    """Return the request with the runs of an earlier request that has the same `until` setting.

    Earlier requests that lack runs of `request` are ignored. Returns None if no earlier request
    remains, or if `request` has no `until` setting.
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
    """Raise ExperimentError if a request names a layer that its model does not have."""
    for cell in cells:
        check_possible(cell.request, count_parts(cell.source))


def check_possible(request: CellRequest, parts: ModelParts) -> None:
    """Raise ExperimentError if a model does not allow the requested ablations.

    Each requested layer and part must exist, and at least one ablation must be possible. If the
    request has an `until` setting, it must contain enough runs, e.g. more than 5 for `top 5`.
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
            f"{request.title}: none of the requested ablations is possible ({reason})"
        )


def open_benchmarks(
    requests: Iterable[CellRequest], progress: Progress | None = None
) -> Iterator[Benchmark]:
    """Open and yield the benchmark of each request.

    For requests with the same documents, the same `Benchmark` object is yielded. Raises
    RequestError if a benchmark cannot be read or lacks the requested metric.
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
        if request.clusters is not None:
            benchmark.clusters(request.clusters.column)
        if request.until is not None:
            check_bounded(benchmark.identity, metric)
        yield benchmark


def validate_requests(
    requests: Sequence[CellRequest],
    trust_remote_code: bool,
    kinds: Collection[str] = (),
    progress: Progress | None = None,
) -> tuple[int, list[str]]:
    """Check requests against their models and benchmarks, without loading weights or documents.

    Args:
        requests: The requests; a request without layers means all layers of its model.
        trust_remote_code: Whether Python code that is downloaded with the model may run.
        kinds: Kinds of layers to ablate if a request names no layers; all kinds if empty.
        progress: Receiver of a message about each step.

    Returns:
        The number of runs, and notes about models and benchmarks on the hub that were not checked.

    Raises:
        RequestError: A model, layer, benchmark, data source or metric does not exist, or a
            benchmark cannot be read.
    """
    runs, notes, progress = 0, {}, progress or Progress()
    for request in requests:
        progress.step(f"reading the configuration of {request.model}")
        source = find_model(request.model, trust_remote_code)
        check_benchmark(request.benchmark)
        try:
            parts = _count_requested_parts(request, source, kinds)
        except UnreachableError as error:
            notes[request.model.model] = str(error)
            layers = max(request.changes.layers, default=0) + max(request.changes.spans)
        else:
            request, layers = fill_parts(request, parts), parts.layers
            check_possible(request, parts)
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
    """Check the local benchmarks; return notes about hub benchmarks, which are not checked.

    Raises RequestError if a benchmark cannot be read or lacks the requested metric.
    """
    specs = dict.fromkeys(request.benchmark for request in requests)
    hub_specs = {spec: str(spec) for spec in specs if not is_local(spec)}
    local_requests = (request for request in requests if request.benchmark not in hub_specs)
    for _ in open_benchmarks(local_requests, progress):
        pass
    benchmarks = ", ".join(dict.fromkeys(hub_specs.values()))
    if not benchmarks:
        return []
    return [
        f"documents and metrics of {benchmarks} are on the hub; type tracker plan to check them"
    ]
