"""Running cells here, in one process: each model is loaded once, each failure stays in its cell."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tracker.ablations import ablations_of
from tracker.benchmarks.benchmark import Benchmark, chosen_metric, open_benchmark
from tracker.config import CellRequest
from tracker.errors import RequestError, TrackerError, TrackingError
from tracker.ledger.store import CellStore, Ledger
from tracker.provenance import machine, package_versions
from tracker.records import CellRecord
from tracker.runner.derive import record_of
from tracker.runner.prepare import Asked, check_layers, check_range, look_up
from tracker.runner.progress import Progress
from tracker.runner.publish import Publisher

if TYPE_CHECKING:
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.models.load import LoadedModel

log = logging.getLogger(__name__)
_NO_RUNS: dict[str, Any] = {"layers": (), "components": (), "spans": (), "removed": ()}
"""What is removed does not change what a benchmark reads."""


@dataclass(frozen=True)
class Options:
    """How to run, as opposed to what.

    Attributes:
        device: `auto`, or a torch device.
        trust_remote_code: Whether code and pickles from a download may run.
        memory: Bytes that hidden states, keys and values may take; None = half of what is free.
    """

    device: str = "auto"
    trust_remote_code: bool = False
    memory: int | None = None


@dataclass
class Report:
    """What became of the cells.

    Attributes:
        cells: The finished cells' records, in the order of the request.
        failed: Cell title → what went wrong.
        unpublished: Cell title → why a backend does not have it.
        locations: Where the runs can be seen, by backend.
        models_loaded: How many times a model was loaded.
    """

    cells: list[CellRecord] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    unpublished: dict[str, str] = field(default_factory=dict)
    locations: dict[str, str] = field(default_factory=dict)
    models_loaded: int = 0

    @property
    def exit_code(self) -> int:
        """0 = all done, 1 = some of the work failed."""
        return 1 if self.failed or self.unpublished else 0


def run_cells(
    requests: Sequence[CellRequest],
    ledger: Ledger,
    publisher: Publisher,
    options: Options,
    progress: Progress,
) -> Report:
    """Measure and publish cells.

    Args:
        requests: The cells, equal models next to each other.
        ledger: The results folder.
        publisher: Hands finished cells to the tracking backends.
        options: How to run.
        progress: Told what happens.

    Returns:
        What became of them; a failed cell does not stop the others.

    Raises:
        RequestError: Something that was asked for does not exist or does not fit; nothing was
            computed or written.
    """
    asked = [look_up(request, ledger) for request in requests]
    todo = [cell for cell in asked if not cell.complete]
    for cell in asked:
        if cell.store is not None:
            chosen_metric(cell.store.identity.benchmark, cell.request.metric)
    benchmarks: dict[int, Benchmark] = {}
    if todo:
        progress.say("checking models and benchmarks")
        check_layers(todo, options.trust_remote_code)
        _check_device(options.device)
        benchmarks = _benchmarks(todo)
    report = Report()
    loaded: tuple[object, LoadedModel, RequestEncoder] | None = None
    for cell in asked:
        title = cell.request.title
        try:
            store = cell.store
            if not cell.complete:
                settings = cell.request.model_settings
                if loaded is None or loaded[0] != settings:
                    loaded = None  # frees the previous model before the next one comes
                    loaded = (settings, *_load(cell, options, progress))
                    report.models_loaded += 1
                store = _measure(
                    cell, benchmarks[id(cell)], loaded[1], loaded[2], ledger, options, progress
                )
            assert store is not None
            shown = store.ask(cell.request, publisher.project)
            record = record_of(store, cell.request)
        except Exception as error:
            # Whatever breaks one cell, the others go on; only a lone wrong request is refused.
            if isinstance(error, RequestError) and len(asked) == 1:
                raise
            log.debug("%s failed", title, exc_info=True)
            known = isinstance(error, TrackerError)
            report.failed[title] = str(error) if known else f"{type(error).__name__}: {error}"
            progress.finish()
            progress.say(f"{title} failed: {report.failed[title]}")
            continue
        report.cells.append(record)
        try:
            # A backend shows all that was asked of the cell, not only what was asked now.
            whole = record if shown == cell.request else record_of(store, shown)
            report.locations.update(publisher.publish(store, whole))
        except TrackingError as error:
            report.unpublished[title] = str(error)
            progress.say(f"{title} is measured but not published: {error}")
    return report


def _benchmarks(todo: Sequence[Asked]) -> dict[int, Benchmark]:
    """Find every benchmark and its data before a night is spent on half of them."""
    found: dict[int, Benchmark] = {}
    same: dict[CellRequest, Benchmark] = {}
    for cell in todo:
        settings = cell.request.model_copy(
            update={"model": "any", "revision": None, "dtype": "auto", "limit": None, **_NO_RUNS}
        )
        if settings not in same:
            same[settings] = open_benchmark(cell.request)
        chosen_metric(same[settings].identity, cell.request.metric)
        found[id(cell)] = same[settings]
    return found


def _check_device(name: str) -> None:
    from tracker.models.load import find_device

    find_device(name)


def _load(cell: Asked, options: Options, progress: Progress) -> tuple[LoadedModel, RequestEncoder]:
    from tracker.benchmarks.encoder import RequestEncoder
    from tracker.engine.memory import keep_freed_memory
    from tracker.models.load import load_model

    keep_freed_memory()
    progress.say(f"loading {cell.source.name}")
    loaded = load_model(cell.source, cell.request.dtype, options.device, options.trust_remote_code)
    return loaded, RequestEncoder(loaded.model, loaded.tokenizer)


def _measure(
    cell: Asked,
    benchmark: Benchmark,
    loaded: LoadedModel,
    encoder: RequestEncoder,
    ledger: Ledger,
    options: Options,
    progress: Progress,
) -> CellStore:
    """Compute what the cell lacks."""
    from tracker.engine.sweep import Engine
    from tracker.runner.fill import fill
    from tracker.runner.scorer import checked_scorer

    request = cell.request
    check_range(request, loaded.identity.layers)
    documents = benchmark.documents(encoder, request.limit)
    facts = {**package_versions(), **machine(), "device": str(loaded.device)}
    store = ledger.cell(loaded.identity, benchmark.identity, facts)
    ablations = ablations_of(request, loaded.identity.layers)
    names = [ablation.name for ablation in ablations]
    if not store.is_complete(request.limit, names):
        engine = Engine(loaded, encoder.max_length, memory=options.memory)
        progress.say(f"{request.benchmark}: checking that sharing is exact for this model")
        scorer, lost = checked_scorer(engine, loaded.tokenizer, documents, ablations)
        for line in lost:
            progress.say(f"{loaded.identity.name} is measured with less sharing: {line}")
        fill(store, benchmark, documents, scorer, ablations, request.limit, progress)
    # A hub model's commit is known only now that it is in the cache.
    key = cell.key or look_up(request, ledger).key
    if key:
        ledger.remember(key, store)
    return store
