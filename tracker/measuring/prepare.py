"""Find cells in the ledger, and check requests before anything is computed or written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from tracker.analysis.stopping import refuse_unbounded
from tracker.benchmarks.base import Benchmark
from tracker.benchmarks.benchmark import (
    check_benchmark,
    chosen_metric,
    data_stamp,
    is_local,
    open_benchmark,
)
from tracker.core.config import CellRequest
from tracker.core.errors import ExperimentError, UnreachableError
from tracker.core.model_parts import Counting, ModelParts, check_parts, with_all_parts
from tracker.core.provenance import package_versions
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.ledger.views import request_key
from tracker.measuring.derive import answer_of
from tracker.measuring.progress import Progress
from tracker.models.sources import ModelSource, count_parts, find_model


@dataclass(frozen=True)
class CellLookup:
    """A requested cell, with everything known about it without loading anything.

    Attributes:
        request: The request.
        source: The source of the model.
        key: The request's key in the ledger; None if the hub's commit is unknown.
        store: The cell in the ledger; None if it is not there yet.
        complete: True if nothing of it is missing.
    """

    request: CellRequest
    source: ModelSource
    key: str | None
    store: CellStore | None
    complete: bool


def look_up(request: CellRequest, ledger: Ledger, trust_remote_code: bool = False) -> CellLookup:
    """Look a cell up in the ledger, without loading torch, the model or the benchmark."""
    source = find_model(request.model, trust_remote_code)
    data, stamp = data_stamp(request.benchmark), source.stamp()
    key = None if stamp is None else request_key(request, stamp, data, package_versions())
    store = ledger.find(key) if key else None
    complete = store is not None and _is_complete(store, request)
    return CellLookup(request, source, key, store, complete)


def counting_in(ledger: Ledger, trust_remote_code: bool) -> Counting:
    """Return a function that counts the parts of a request's model.

    The number of layers is taken from the ledger if the cell is there. So a measured cell does not
    need its model, unless its request names heads, experts, linear maps or kinds of layers.
    """

    def count(request: CellRequest, kinds: Collection[str] = ()) -> ModelParts:
        cell = look_up(replace(request, until=None), ledger, trust_remote_code)
        if cell.store is not None and not kinds and not request.changes.has_parts:
            return ModelParts(cell.store.identity.model.layers)
        return _counted(request, cell.source, kinds)

    return count


def _counted(request: CellRequest, source: ModelSource, kinds: Collection[str]) -> ModelParts:
    """Count the parts of a model; its linear maps, where a request asks for all of them."""
    parts = count_parts(source, kinds)
    if not request.changes.lacks_maps:
        return parts
    from tracker.models.parts.anatomy import linear_map_shapes

    return parts._replace(maps=tuple(map(tuple, linear_map_shapes(source))))


def _is_complete(store: CellStore, request: CellRequest) -> bool:
    answer = answer_of(store, store.views.of(request))
    if answer is not None:
        return answer.over
    ablations = request.ablations(store.identity.model.layers)
    return store.is_complete(request.extent, [ablation.name for ablation in ablations])


def widened(
    request: CellRequest,
    ledger: Ledger,
    trust_remote_code: bool,
    sweep: Callable[[], CellRequest | None],
) -> tuple[CellRequest, str | None]:
    """Extend a trial's request to all runs of its cell, which costs little more than one run.

    These are the runs of its sweep, or every layer of the model if the sweep is unknown. If the
    trial's own run is measured, they are the runs requested before, and nothing more is measured.

    A grid also contains invalid combinations, such as a span beyond the last layer or a layer that
    is already removed. They raise no error.

    Args:
        request: A request for one run.
        ledger: The results folder, which may know the number of layers.
        trust_remote_code: True if code from the download may run.
        sweep: Function that returns the sweep's request of the cell; None if it is unknown. It may
            take seconds, and is called only if something must be measured.

    Returns:
        The request for more runs, and the reason why the trial's change is invalid; None if it is
        valid.

    Raises:
        ExperimentError: A layer is out of range, or the runs of the trial's question are unknown.
    """
    asked = look_up(replace(request, until=None), ledger)
    store, whole = asked.store, asked.request
    parts = counting_in(ledger, trust_remote_code)(request, ())
    layers = parts.layers
    check_parts(request, parts)
    why = request.why_invalid(request.changes.single, layers)
    before = asked_before(request, store)
    if store is not None and before is not None and _is_complete(store, before):
        return before, why
    if store is not None and asked.complete:
        # Also with a question: all documents answer it.
        runs = store.views.shown_in(whole).runs
        known = whole.with_changes(runs) if runs else whole
        return known if _is_complete(store, known) else whole, why
    cell = sweep() if why is None else None
    if cell is None and why is None and request.until is not None:
        raise ExperimentError(
            f"'until': '{request.until}' asks about all runs of a benchmark, and a trial is one; "
            "which others there are says its sweep, and that cannot be read here. Give the "
            "experiment file to tracker run, or leave 'until' out of it"
        )
    changes = request.changes if cell is None else cell.changes
    fitting = [n for n in range(layers) if cell is None or n in changes.layers]
    changes = changes.model_copy(update={"layers": tuple(fitting)})
    return replace(request, changes=changes), why


def asked_before(request: CellRequest, store: CellStore | None) -> CellRequest | None:
    """Return the earlier request of a trial's cell with the same question, with all its runs.

    None means that there was another question, or one without the trial's run.
    """
    now = store.views.of(request).until if store else None
    if store is None or now is None:
        return None
    for before in (view.until for view in store.views.known(request)):
        alike = before and (before.question, before.seed) == (now.question, now.seed)
        if before and alike and {*now.runs} <= {*before.runs}:
            return request.with_changes(before.runs) if before.runs else request
    return None


def check_layers(cells: Sequence[CellLookup]) -> None:
    """Raise ExperimentError for a layer out of range, saying how many layers the model has."""
    for cell in cells:
        check_range(cell.request, count_parts(cell.source))


def check_range(request: CellRequest, parts: ModelParts) -> None:
    """Raise ExperimentError for unknown layers or parts, and for requests without valid runs.

    A question that the number of valid runs cannot answer raises it too.
    """
    check_parts(request, parts)
    layers = parts.layers
    runs = len(request.valid_changes(layers))
    if request.until is not None:
        try:
            request.until.refuse(runs)
        except ValueError as error:
            raise ExperimentError(f"{request.title}: 'until': {error}") from None
    if not runs and any(request.changes.expanded()):
        why = request.why_invalid(request.changes.single, layers)
        raise ExperimentError(f"{request.title}: nothing of what is asked for is a run ({why})")


def opened(
    requests: Iterable[CellRequest], progress: Progress | None = None
) -> Iterator[Benchmark]:
    """Yield the benchmark of each request, opened once for those with the same documents.

    RequestError is raised if one cannot be read, or does not support the metric or the question.
    """
    benchmarks: dict[object, Benchmark] = {}
    for request in requests:
        # Number of documents, changes and metric do not affect what a benchmark reads. The model
        # does if a task makes its documents, as RULER's do for a tokenizer.
        key = (request.benchmark, request.documents.part, request.documents.seed)
        benchmark = benchmarks.get(key) or benchmarks.get((key, request.model.model))
        if benchmark is None:
            (progress or Progress()).step(f"reading the documents of {request.benchmark}")
            benchmark = open_benchmark(request)
            benchmarks[(key, request.model.model) if benchmark.of_model else key] = benchmark
        identity = benchmark.identity
        metric = chosen_metric(identity, request.metric)
        if request.until is not None:
            refuse_unbounded(identity, metric)
        yield benchmark


def validate(
    requests: Sequence[CellRequest],
    trust_remote_code: bool,
    kinds: Collection[str] = (),
    progress: Progress | None = None,
) -> tuple[int, list[str]]:
    """Check that requests exist and fit, without loading weights or downloading data.

    Args:
        requests: The requests; one without layers means all layers of its model.
        trust_remote_code: True if code from the download may run.
        kinds: The kinds of layers, for requests without layers.
        progress: Receives messages about each step.

    Returns:
        The number of runs, and notes on everything that could not be checked: hub models whose
        configuration cannot be reached, whose runs are all counted; and benchmarks whose documents
        are on the hub.

    Raises:
        RequestError: A model, a benchmark or a source of data is unknown, a layer is out of range,
            or a benchmark cannot be read or does not have the metric.
    """
    runs, notes, progress = 0, {}, progress or Progress()
    for request in requests:
        progress.step(f"reading the configuration of {request.model}")
        source = find_model(request.model, trust_remote_code)
        check_benchmark(request.benchmark)
        try:
            parts = _counted(request, source, kinds)
        except UnreachableError as error:
            notes[request.model.model] = str(error)
            layers = max(request.changes.layers, default=0) + max(request.changes.spans)
        else:
            request, layers = with_all_parts(request, parts), parts.layers
            check_range(request, parts)
            ablations = request.ablations(layers)
            if any(ablation.rounded for ablation in ablations):
                from tracker.models.load import hollow
                from tracker.models.parts.anatomy import LayerAnatomy

                model = hollow(source, request.model.dtype)
                LayerAnatomy.of(model).refuse_formats(ablations)
            if request.benchmark.apply_chat_template:
                from tracker.benchmarks.encoder import RequestEncoder
                from tracker.models.load import weightless

                parts_of_model = weightless(source, request.model.dtype)
                RequestEncoder(*parts_of_model, request.benchmark).check_chat(request.benchmark)
        runs += len(request.valid_changes(layers))
    return runs, [*notes.values(), *check_documents(requests, progress)]


def check_documents(requests: Sequence[CellRequest], progress: Progress) -> list[str]:
    """Check the benchmarks that are on this machine, as a run does before it measures.

    Returns notes on those that could not be checked. Raises RequestError as `opened` does.
    """
    specs = [each.benchmark for each in requests]
    for _ in opened((each for each in requests if is_local(each.benchmark)), progress):
        pass
    names = dict.fromkeys(str(spec) for spec in specs if not is_local(spec))
    if not names:
        return []
    return [f"documents and metrics of {', '.join(names)}, on the hub; tracker plan reads them"]
