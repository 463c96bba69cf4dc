"""Checking everything that was asked for, before anything is computed or written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tracker.benchmarks.benchmark import check_benchmark, data_stamp
from tracker.core.ablations import ablations_of, removals
from tracker.core.config import CellRequest
from tracker.core.errors import ExperimentError, UnreachableError
from tracker.core.provenance import package_versions
from tracker.core.records import RunIdentity
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.ledger.views import request_key
from tracker.measuring.derive import answer_of
from tracker.models.sources import ModelSource, count_layers, find_model


@dataclass(frozen=True)
class CellLookup:
    """A cell that was asked for, with what can be known of it without loading anything.

    Attributes:
        request: What was asked for.
        source: Where the model is.
        key: Under which the ledger remembers the request; None when the hub's commit is unknown.
        store: The cell, where the ledger knows it already.
        complete: Whether nothing of it is missing.
    """

    request: CellRequest
    source: ModelSource
    key: str | None
    store: CellStore | None
    complete: bool


def look_up(request: CellRequest, ledger: Ledger) -> CellLookup:
    """Look a cell up in the ledger, without loading torch, the model or the benchmark."""
    source = find_model(request.model, request.revision, request.model_args)
    data, stamp = data_stamp(request), source.stamp()
    key = None if stamp is None else request_key(request, stamp, data, package_versions())
    store = ledger.find(key) if key else None
    complete = store is not None and _is_complete(store, request)
    return CellLookup(request, source, key, store, complete)


def depth_in(ledger: Ledger, trust_remote_code: bool) -> Callable[[CellRequest], int]:
    """Count the layers of a request's model; what the ledger knows is not looked up again."""

    def depth(request: CellRequest) -> int:
        asked = look_up(request.model_copy(update={"until": None}), ledger)
        if asked.store is not None:
            return asked.store.identity.model.layers
        return count_layers(asked.source, trust_remote_code)

    return depth


def _is_complete(store: CellStore, request: CellRequest) -> bool:
    answer = answer_of(store, store.views.of(request))
    if answer is not None:
        return answer.over
    ablations = ablations_of(request, store.identity.model.layers)
    return store.is_complete(request.extent, [ablation.name for ablation in ablations])


def widened(
    request: CellRequest,
    ledger: Ledger,
    trust_remote_code: bool,
    sweep: Callable[[], CellRequest | None],
) -> tuple[CellRequest, str | None]:
    """Widen a trial's request to what its cell is asked for, which costs little more than one run.

    That is what its sweep asks, or every layer of the model where nobody knows. Once the trial's
    own run is measured, it is what was asked of the cell before, and nothing more is measured.

    A grid holds every combination of its values, also those that are no run: a span that reaches
    beyond the last layer, a layer that is removed already. They are no mistake.

    Args:
        request: A request for one run.
        ledger: The results folder; what it knows of the model is not looked up again.
        trust_remote_code: Whether code from the download may run.
        sweep: Asks for the cell as the sweep asks for it; None where nobody knows. It may take
            seconds, and is called only where something is to be measured.

    Returns:
        The same request for more runs, and why what was asked for is no run; None where it is one.

    Raises:
        ExperimentError: A layer is out of range, or the trial asks a question and nobody knows of
            which runs.
    """
    asked = look_up(request.model_copy(update={"until": None}), ledger)
    store, whole = asked.store, asked.request
    layers = store.identity.model.layers if store else count_layers(asked.source, trust_remote_code)
    _check_bounds(request, layers)
    why = None if any(removals(request, layers)) else no_run(request, layers)
    before = asked_before(request, store)
    if store is not None and before is not None and _is_complete(store, before):
        return before, why
    if store is not None and asked.complete:
        # Also where it asks a question: all documents answer that.
        known = _with_runs(whole, store.views.shown_in(whole).runs)
        return known if _is_complete(store, known) else whole, why
    cell = sweep() if why is None else None
    if cell is None and why is None and request.until is not None:
        raise ExperimentError(
            f"'until': {request.until!r} asks about all runs of a benchmark, and a trial is one; "
            "which others there are says its sweep, and that cannot be read here. Give the "
            "experiment file to tracker run, or leave 'until' out of it"
        )
    if cell is None:
        return request.model_copy(update={"layers": tuple(range(layers))}), why
    fitting = tuple(layer for layer in cell.layers if layer < layers)
    more = {name: getattr(cell, name) for name in ("components", "spans", "interventions", "only")}
    return request.model_copy(update={**more, "layers": fitting}), why


def asked_before(request: CellRequest, store: CellStore | None) -> CellRequest | None:
    """Ask of a trial's cell what was asked of it before: its question, and all runs of this.

    None where that was another question, or not about the trial's run.
    """
    now = store.views.of(request).until if store else None
    if store is None or now is None:
        return None
    for before in (view.until for view in store.views.known(request)):
        alike = before and (before.question, before.seed) == (now.question, now.seed)
        if before and alike and {*now.runs} <= {*before.runs}:
            return _with_runs(request, before.runs)
    return None


def _with_runs(request: CellRequest, runs: Sequence[RunIdentity]) -> CellRequest:
    """Ask for just these runs."""
    only = tuple((*run.kind[:2], run.layer, run.intervention) for run in runs)
    if not only:
        return request
    components, spans, layers, interventions = (
        tuple(dict.fromkeys(each)) for each in zip(*only, strict=True)
    )
    asked = {"components": components, "spans": spans, "interventions": interventions}
    return request.model_copy(update={**asked, "layers": tuple(sorted(layers)), "only": only})


def no_run(request: CellRequest, layers: int) -> str:
    """Say why none of the layers that were asked for begins a run."""
    layer, span = request.layers[0], request.spans[0]
    if request.interventions[0] != "remove" and (request.components[0], span) != ("layer", 1):
        return f"{request.interventions[0]} is done to whole single layers"
    if layer + span > layers:
        return f"{span} layers from layer {layer} on reach beyond layer {layers - 1}, the last one"
    if not set(range(layer, layer + span)) & set(request.removed):
        return "no layer would be left"
    what = f"layer {layer}" if span == 1 else f"one of layers {layer} to {layer + span - 1}"
    return f"{what} is among the removed layers {', '.join(map(str, request.removed))}"


def check_layers(asked: Sequence[CellLookup], trust_remote_code: bool) -> None:
    """Raise ExperimentError for a layer out of range, saying how many layers the model has."""
    for cell in asked:
        check_range(cell.request, count_layers(cell.source, trust_remote_code))


def check_range(request: CellRequest, layers: int) -> None:
    """Raise ExperimentError where a layer is none of so many, nothing is left to remove, or what is
    left answers no question."""
    _check_bounds(request, layers)
    runs = len(list(removals(request, layers)))
    if request.question is not None:
        try:
            request.question.refuse(runs)
        except ValueError as error:
            raise ExperimentError(f"{request.title}: 'until': {error}") from None
    whole = "layer" in request.components and 1 in request.spans
    if request.layers and "remove" not in request.interventions and not whole:
        raise ExperimentError(
            f"{request.title}: {', '.join(request.interventions)} can be done to whole single "
            "layers alone; leave 'component' and 'span' out, or add 'remove' to 'intervention'"
        )
    if request.layers and not runs:
        raise ExperimentError(
            f"{request.title}: nothing is left to remove; every span of "
            f"{' or '.join(map(str, request.spans))} layers reaches beyond layer {layers - 1} or "
            "holds a layer of 'removed'"
        )


def _check_bounds(request: CellRequest, layers: int) -> None:
    beyond = [layer for layer in (*request.layers, *request.removed) if layer >= layers]
    if beyond:
        raise ExperimentError(
            f"layer {beyond[0]} is out of range: {request.model} has {layers} layers, "
            f"0 to {layers - 1}"
        )


def validate(requests: Sequence[CellRequest], trust_remote_code: bool) -> tuple[int, list[str]]:
    """Check that what was asked for exists, without loading weights or data.

    Args:
        requests: The cells; one that names no layers asks for all that its model has.
        trust_remote_code: Whether code from the download may run.

    Returns:
        How many runs there are, and what could not be checked: a hub model whose configuration
        cannot be reached from here or now, whose runs are counted as if all fitted.

    Raises:
        RequestError: A model, a benchmark or a source of data is unknown, or a layer is out of
            range.
    """
    runs, notes = 0, {}
    for request in requests:
        source = find_model(request.model, request.revision, request.model_args)
        check_benchmark(request)
        try:
            layers = count_layers(source, trust_remote_code)
        except UnreachableError as error:
            notes[request.model] = str(error)
            layers = max(request.layers, default=0) + max(request.spans)
        else:
            every = request.layers or tuple(range(layers))
            request = request.model_copy(update={"layers": every})
            check_range(request, layers)
        runs += len(list(removals(request, layers)))
    return runs, list(notes.values())
