"""Measure a model on a benchmark's documents under the ablations that a search requests."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tracker.analysis.aligned import AlignedOutcomes
from tracker.analysis.metrics import DocumentMetric
from tracker.analysis.paired import PairedOutcomes
from tracker.benchmarks.base import Benchmark
from tracker.benchmarks.benchmark import choose_metric, open_benchmark
from tracker.engine.forward.streams import StreamPlan, plan_streams
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.cache import Checks
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger
from tracker.measuring.fill import CellWork, fill_cell, open_store, refuse_changed_tokens
from tracker.measuring.job import Job, Options
from tracker.measuring.meter import DocumentKey, Meter, Model, open_model
from tracker.measuring.observing import DocumentMap, Observations, ObserveDocument, observe_cell
from tracker.measuring.prepare import find_cell
from tracker.measuring.progress import Progress
from tracker.models.parts.anatomy import find_search_parts
from tracker.models.sources import ModelSource, find_model
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.config import CellRequest, ModelSpec
from tracker.schema.identities import BenchmarkIdentity
from tracker.schema.kinds import COMPONENTS, NUMBERED_COMPONENTS
from tracker.schema.search_parts import SearchParts
from tracker.schema.views import View
from tracker.stats.arrays import Array

_COLUMNS = ["task", "doc", "ablation", "gold", "rolling", "loglikelihoods"]


def plan_with_baseline(ablations: Iterable[Ablation], n_layers: int) -> StreamPlan:
    """Plan a shared forward pass of the intact model and its ablations."""
    return plan_streams(list(dict.fromkeys((INTACT, *ablations))), n_layers)


def engine_passes(ablations: Iterable[Ablation], n_layers: int) -> float:
    """Return the cost of one shared forward pass for the intact model and its ablations.

    The unit of the cost is one forward pass of the intact model alone.
    """
    return plan_with_baseline(ablations, n_layers).layer_passes / n_layers


@dataclass
class ModelCache:
    """Cache of loaded models and of opened (model, benchmark) pairs, shared by searches.

    The command `command` continues an interrupted search; empty for a sweep trial. `n_loaded`
    counts how often a model was loaded. `timings` contains layer times that are not stored yet.
    `cells` maps each request to its model and benchmark.
    """

    ledger: Ledger
    options: Options
    progress: Progress
    command: Sequence[str] = ()
    n_loaded: int = 0
    timings: dict[Path, dict[str, Any]] = field(default_factory=dict)
    cells: dict[CellRequest, OpenCell] = field(default_factory=dict)
    _model: Model | None = None

    def model(self, spec: ModelSpec) -> Model:
        """Load a model, or return it if it is already loaded."""
        if self._model is None or self._model.spec != spec:
            self._model = None  # frees the previous model before the next one comes
            self.progress.say(f"loading {spec}")
            self._model = open_model(spec, self.options)
            self.n_loaded += 1
        return self._model

    def source(self, spec: ModelSpec) -> ModelSource:
        """Find the files of a model."""
        return find_model(spec, self.options.trust_remote_code)

    def cell(self, request: CellRequest) -> OpenCell:
        """Open the model and benchmark of a request, or return them if they are already open."""
        return self.cells.setdefault(request, OpenCell(request, self))

    def keep_timings(self) -> None:
        """Store the layer times in `timings` in the results folder, and clear `timings`."""
        self.ledger.write_notes(self.timings)
        self.timings.clear()


_ARBITRARY_SETS = 3
_RemovalShape = tuple[int, ...]
_MANY_PARTS = 2


def _removal_shape(ablation: Ablation) -> _RemovalShape:
    """Return 0, 1 or 2 for each kind of parts: none, one or several changed parts."""
    counts = Counter(change.component for change in ablation.changes)
    return tuple(min(counts[component], _MANY_PARTS) for component in COMPONENTS)


def _draw_removals(parts: SearchParts, draw: random.Random) -> Iterator[Ablation]:
    """Draw random sets of parts for comparing the fast evaluation with really pruned models."""
    numbers = parts.numbers
    n = len(numbers)
    for size in sorted({min(size, n // 2) for size in (2, 3, n // 4, n // 2)} - {0, 1}):
        start = draw.randrange(n - size + 1)
        arbitrary_sets = (draw.sample(numbers, size) for _ in range(_ARBITRARY_SETS))
        for drawn_parts in (numbers[start : start + size], *arbitrary_sets):
            yield parts.removal(parts.filter_allowed(drawn_parts))


class OpenCell:
    """A model and a benchmark that are ready for measurements of ablations.

    Results that are stored in the ledger are not measured again. The model is loaded only if
    results are missing.
    """

    def __init__(self, request: CellRequest, cache: ModelCache) -> None:
        self.request = request
        self._cache = cache
        self._outcomes: dict[str, dict[Ablation, Array]] = {"accuracy": {}, "gold_logprob": {}}
        self._baselines: dict[str, PairedOutcomes] = {}
        self._checked_shapes: set[_RemovalShape] = set()

    @cached_property
    def _opened_benchmark(self) -> Benchmark:
        """Open the benchmark, and check that it has the requested metric."""
        benchmark = open_benchmark(self.request)
        choose_metric(benchmark.identity, self.request.metric)
        return benchmark

    @property
    def benchmark(self) -> BenchmarkIdentity:
        """The record that identifies the benchmark."""
        store = find_cell(self.request, self._cache.ledger).store
        return store.identity.benchmark if store is not None else self._opened_benchmark.identity

    def rows_hash(self, task: str) -> str:
        """Return a hash of a task's documents."""
        return self._opened_benchmark.rows_digest(task)

    @cached_property
    def _meter(self) -> Meter:
        """Load the model, and create the object that measures documents with this model."""
        benchmark, model = self._opened_benchmark, self._cache.model(self.request.model)
        return Meter([self.request], benchmark, model, self._cache.options)

    @cached_property
    def store(self) -> CellStore:
        """The ledger's folder for this model and benchmark; a missing folder is created."""
        lookup = find_cell(self.request, self._cache.ledger)
        if lookup.store is not None:
            choose_metric(lookup.store.identity.benchmark, self.request.metric)
            return lookup.store
        job = Job((lookup,), self._opened_benchmark)
        return open_store(job, self._meter.facts, self._cache.ledger)

    @property
    def progress(self) -> Progress:
        """The object to which progress is reported."""
        return self._cache.progress

    @property
    def layers(self) -> int:
        """The number of the model's layers."""
        return self.store.identity.model.layers

    @property
    def view(self) -> View:
        """The metric, documents and runs of the request."""
        return self.store.views.view_of(self.request)

    @property
    def higher_is_better(self) -> bool:
        """True if higher values of the metric are better, as for an accuracy."""
        task = self.store.identity.benchmark.tasks[0]
        return task.higher_is_better.get(self.view.metric, True)

    def measure(self, ablations: Sequence[Ablation], are_candidates: bool = False) -> None:
        """Measure the outcomes of all documents with the intact model and with each ablation.

        Args:
            ablations: The ablations.
            are_candidates: Whether a search will choose among the ablations. If True, the effect of
                floating-point rounding is not measured.
        """
        outcomes = self._outcomes["accuracy"]
        ablations = [a for a in dict.fromkeys((INTACT, *ablations)) if a not in outcomes]
        if not ablations:
            return
        extent, names = self.request.extent, [ablation.name for ablation in ablations]
        if not self.store.is_complete(extent, names):
            meter = self.open_meter(ablations, are_candidates)
            self.store.begin_search(self._cache.command)
            work = CellWork(self.store, meter.facts, self.progress, extent=extent, names=names)
            fill_cell(work, meter.measure, self.progress)
        measure = DocumentMetric(self.store, self.view.metric)
        columns = [*dict.fromkeys((*_COLUMNS, *measure.columns))]
        view = self.view.model_copy(update={"removed": (), "runs": ()})
        aligned = AlignedOutcomes(self.store, view, columns, ablations)
        self._baselines = {
            "accuracy": aligned.metric_outcomes(ablations),
            "gold_logprob": aligned.gold_outcomes(ablations),
        }
        for outcome, paired in self._baselines.items():
            self._outcomes[outcome] |= zip(ablations, paired.ablated.T, strict=True)

    def end(self) -> None:
        """Record in the ledger that the search is over."""
        if self._baselines:
            self.store.end_search(self._cache.command)

    def outcomes(self, ablations: Sequence[Ablation], outcome: str = "accuracy") -> PairedOutcomes:
        """Return the outcomes of documents under ablations, after measuring missing outcomes.

        Args:
            ablations: The ablations.
            outcome: Kind of outcome: `accuracy` for the requested metric, or `gold_logprob` for the
                log-probability of the right answer.

        Returns:
            The outcomes of the intact and the ablated models, in the order of the documents.
        """
        self.measure(ablations)
        outcomes = [self._outcomes[outcome][ablation] for ablation in ablations]
        return replace(self._baselines[outcome], ablated=np.stack(outcomes, axis=1))

    @property
    def documents(self) -> dict[str, tuple[int, ...]]:
        """Task → numbers of the task's documents that are measured, ascending."""
        documents = self.store.task_documents(self.request.extent)
        return {task: tuple(sorted(numbers)) for task, numbers in documents.items()}

    @property
    def document_keys(self) -> frozenset[DocumentKey]:
        """The measured documents as pairs of task and number."""
        return frozenset((task, n) for task, numbers in self.documents.items() for n in numbers)

    @property
    def n(self) -> int:
        """The number of requested documents."""
        extent, tasks = self.request.extent, self.benchmark.tasks
        return sum(len(extent.select(task.name, task.numbers)) for task in tasks)

    def observe(self, kind: str, start: Callable[[Engine], ObserveDocument]) -> Observations:
        """Measure quantities such as proxies on each document; store and return the values.

        The values are stored under the name `kind`. The function `start` builds the function that
        measures one document.
        """

        def open_engine() -> tuple[Engine, DocumentMap]:
            layers = [Ablation.from_changes(removed=[layer]) for layer in range(self.layers)]
            meter = self.open_meter(layers)
            return meter.engine, meter.documents

        return observe_cell(self.request, self.store, kind, start, open_engine, self.progress)

    def open_meter(self, ablations: Sequence[Ablation], are_candidates: bool = False) -> Meter:
        """Load the model, and return a meter: an object that evaluates ablations on documents.

        To save time, the meter shares computation between ablations, which could change results.
        The results are therefore compared with really pruned models, once for each kind of removal
        (e.g. one layer, several layers, heads). For ablations of several parts, random sets of
        parts are compared too.

        Args:
            ablations: The ablations to measure.
            are_candidates: Whether a search will choose among the ablations. If True, the effect of
                floating-point rounding is not measured.

        Returns:
            The meter for these ablations.
        """
        meter, say = self._meter, self.progress.say
        if not self._checked_shapes:
            refuse_changed_tokens(self.store, meter.facts, self.progress)
        if are_candidates:
            meter.repeated_keys = set()
        requested = dict.fromkeys((INTACT, *ablations))
        shapes = {_removal_shape(ablation) for ablation in requested}
        if not shapes <= self._checked_shapes:
            say(f"{self.request.benchmark}: checking results against pruned models")
            checked, drawn_sets = {INTACT: None}, dict[Ablation, None]()
            draw = random.Random(0)
            sets_by_kind = list[list[Ablation]]()
            for parts in self._parts_removed_together(requested):
                sets_by_kind.append(list(_draw_removals(parts, draw)))
                if parts.unit not in NUMBERED_COMPONENTS:
                    checked |= dict.fromkeys(parts.removal([part]) for part in parts.numbers)
            drawn_sets |= dict.fromkeys(chain.from_iterable(sets_by_kind))
            if any(sum(map(bool, shape)) > 1 for shape in shapes):  # several kinds together
                combinations = map(Ablation.combine, zip(*sets_by_kind, strict=False))
                drawn_sets |= dict.fromkeys(combinations)
            checked |= dict.fromkeys(a for a in requested if max(_removal_shape(a)) < _MANY_PARTS)
            meter.ablations = list(requested | drawn_sets)
            checks = Checks(self._cache.ledger.root)
            for line in meter.check(checks, list(checked | drawn_sets)):
                say(line)
            self._checked_shapes |= shapes
        meter.ablations = list(requested)
        return meter

    def _parts_removed_together(self, ablations: Iterable[Ablation]) -> Iterator[SearchParts]:
        """Yield each kind of parts (e.g. heads) of which at least one ablation removes several.

        Parts that an ablation only rounds to a format are not counted as removed.
        """
        source = self._cache.source(self.request.model)
        shapes = (_removal_shape(Ablation(a.changes.difference(a.roundings))) for a in ablations)
        for component, counts in zip(COMPONENTS, zip(*shapes, strict=True), strict=True):
            if max(counts) == _MANY_PARTS:
                yield find_search_parts(source, component)
