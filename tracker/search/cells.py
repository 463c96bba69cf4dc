"""Cells whose documents are measured under any removals, as a search needs them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from tracker.analysis.aligned import AlignedOutcomes
from tracker.analysis.paired import PairedOutcomes
from tracker.benchmarks.base import Benchmark
from tracker.benchmarks.benchmark import chosen_metric, open_benchmark
from tracker.core.changes import INTACT, Ablation
from tracker.core.config import CellRequest, ModelSpec
from tracker.core.identities import BenchmarkIdentity
from tracker.core.kinds import COMPONENTS, NUMBERED
from tracker.core.search_parts import SearchParts
from tracker.core.views import View
from tracker.engine.forward.streams import StreamPlan, plan_streams
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.cache import Checks
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import METRIC
from tracker.ledger.store import Ledger
from tracker.measuring.fill import CellWork, fill, open_store, refuse_other_tokens
from tracker.measuring.job import Job, Options
from tracker.measuring.meter import Meter, Model, Place, open_model
from tracker.measuring.observing import Documents, Observe, Observed, observe
from tracker.measuring.prepare import look_up
from tracker.measuring.progress import Progress
from tracker.models.parts.anatomy import search_parts
from tracker.models.sources import ModelSource, find_model
from tracker.stats.arrays import Array

_COLUMNS = ["task", "doc", "ablation", "gold", "rolling", "loglikelihoods"]


def planned(ablations: Iterable[Ablation], layers: int) -> StreamPlan:
    """Plan one engine call for some ablations and the baseline of a model with `layers` layers."""
    return plan_streams(list(dict.fromkeys((INTACT, *ablations))), layers)


@dataclass
class Lender:
    """Load each model once and report the progress of the cells that use it.

    `typed` is the command, without the results folder, that continues an interrupted search, empty
    for a trial; `loaded` counts how often a model was loaded; `timings` are notes not yet written
    to the results folder.
    """

    ledger: Ledger
    options: Options
    progress: Progress
    typed: Sequence[str] = ()
    loaded: int = 0
    timings: dict[Path, dict[str, Any]] = field(default_factory=dict)
    _model: Model | None = None

    def model(self, spec: ModelSpec) -> Model:
        """Load a model, or return the one that is loaded."""
        if self._model is None or self._model.spec != spec:
            self._model = None  # frees the previous model before the next one comes
            self.progress.say(f"loading {spec}")
            self._model = open_model(spec, self.options)
            self.loaded += 1
        return self._model

    def source(self, spec: ModelSpec) -> ModelSource:
        """Find a model, trusted as the options have it."""
        return find_model(spec, self.options.trust_remote_code)

    def keep_timings(self) -> None:
        """Write what was timed to the results folder, once nothing can be refused any more."""
        self.ledger.keep_notes(self.timings)
        self.timings.clear()


_ANY = 3
_Shape = tuple[int, ...]
_SEVERAL = 2


def _shape(ablation: Ablation) -> _Shape:
    """Return the shape of a removal: none, one, or `_SEVERAL` for each of `COMPONENTS`."""
    count = Counter(change.component for change in ablation.changes)
    return tuple(min(count[component], _SEVERAL) for component in COMPONENTS)


def _drawn(parts: SearchParts, draw: random.Random) -> Iterator[Ablation]:
    """Draw sets of parts.

    For each of some sizes, up to half of all parts, one set is contiguous and three are arbitrary.
    """
    total = len(parts.numbers)
    sizes = {min(size, total // 2) for size in (2, 3, total // 4, total // 2)} - {0, 1}
    for size in sorted(sizes):
        first = draw.randrange(total - size + 1)
        near = parts.numbers[first : first + size]
        for some in (near, *(draw.sample(parts.numbers, size) for _ in range(_ANY))):
            yield parts.without(parts.allowed(some))


def _each(parts: SearchParts) -> Iterator[Ablation]:
    return (parts.without([part]) for part in parts.numbers)


class OpenCell:
    """A cell whose documents are measured under any requested ablations.

    Results in the ledger are not measured again, and need no model. Measurements made here are not
    displayed or published.
    """

    def __init__(self, request: CellRequest, lender: Lender) -> None:
        self.request = request
        self._lender = lender
        self._known: dict[str, dict[Ablation, Array]] = {"accuracy": {}, "gold_logprob": {}}
        self._paired: dict[str, PairedOutcomes] = {}
        self._checked: set[_Shape] = set()

    @cached_property
    def _benchmark(self) -> Benchmark:
        benchmark = open_benchmark(self.request)
        chosen_metric(benchmark.identity, self.request.metric)
        return benchmark

    @property
    def benchmark(self) -> BenchmarkIdentity:
        """The benchmark, which is opened if the ledger does not hold the cell."""
        known = look_up(self.request, self._lender.ledger).store
        return known.identity.benchmark if known is not None else self._benchmark.identity

    def rows(self, task: str) -> str:
        """Return a hash of the scored split of a task."""
        return self._benchmark.rows(task)

    @cached_property
    def _meter(self) -> Meter:
        benchmark, model = self._benchmark, self._lender.model(self.request.model)
        return Meter([self.request], benchmark, model, self._lender.options)

    @cached_property
    def store(self) -> CellStore:
        """The cell in the ledger, created if it is new."""
        found = look_up(self.request, self._lender.ledger)
        if found.store is not None:
            chosen_metric(found.store.identity.benchmark, self.request.metric)
            return found.store
        job = Job((found,), self._benchmark)
        return open_store(job, self._meter.facts, self._lender.ledger)

    @property
    def progress(self) -> Progress:
        """The progress listener."""
        return self._lender.progress

    @property
    def layers(self) -> int:
        """The number of the model's layers."""
        return self.store.identity.model.layers

    @property
    def view(self) -> View:
        """The view of the intact model by the requested metric, on the requested documents."""
        return self.store.views.of(self.request)

    @property
    def higher_is_better(self) -> bool:
        """True for an accuracy or the like, False for a loss."""
        task = self.store.identity.benchmark.tasks[0]
        return task.higher_is_better.get(self.view.metric, True)

    def measure(self, ablations: Sequence[Ablation], candidates: bool = False) -> None:
        """Measure all documents under some ablations, besides the baseline.

        Args:
            ablations: The ablations.
            candidates: Whether most of them will be discarded, so that outcomes decided by rounding
                need no second measurement.
        """
        known = self._known["accuracy"]
        asked = [one for one in dict.fromkeys((INTACT, *ablations)) if one not in known]
        if not asked:
            return
        extent, names = self.request.extent, [one.name for one in asked]
        if not self.store.is_complete(extent, names):
            meter = self.opened(asked, candidates)
            self.store.begin_search(self._lender.typed)
            work = CellWork(self.store, meter.facts, self.progress, extent=extent, names=names)
            fill(work, meter.measure, self.progress)
        columns = [*_COLUMNS, METRIC + self.view.metric]
        view = self.view.model_copy(update={"removed": (), "runs": ()})
        lined_up = AlignedOutcomes(self.store, view, columns, asked)
        self._paired = {
            "accuracy": lined_up.by_metric(asked),
            "gold_logprob": lined_up.by_gold_logprob(asked),
        }
        for by, paired in self._paired.items():
            self._known[by] |= zip(asked, paired.ablated.T, strict=True)

    def end(self) -> None:
        """Record in the ledger that the search is over."""
        if self._paired:
            self.store.end_search(self._lender.typed)

    def paired(self, ablations: Sequence[Ablation], by: str = "accuracy") -> PairedOutcomes:
        """Return the outcomes under some ablations, measuring the missing ones.

        Args:
            ablations: The ablations.
            by: `accuracy`, the requested metric, or `gold_logprob`.

        Returns:
            The outcomes, in the documents' order.
        """
        self.measure(ablations)
        paired, known = self._paired[by], self._known[by]
        ablated = np.empty((len(paired.baseline), len(ablations)))
        for place, ablation in enumerate(ablations):
            ablated[:, place] = known[ablation]
        return replace(paired, ablated=ablated)

    @property
    def documents(self) -> dict[str, tuple[int, ...]]:
        """Task → the numbers of the documents that are measured, ascending."""
        wanted = self.store.wanted(self.request.extent)
        return {task: tuple(sorted(numbers)) for task, numbers in wanted.items()}

    @property
    def places(self) -> frozenset[Place]:
        """The documents as pairs of task and number."""
        return frozenset((task, n) for task, some in self.documents.items() for n in some)

    @property
    def n(self) -> int:
        """The number of documents that are measured; does not write to the ledger."""
        extent, tasks = self.request.extent, self.benchmark.tasks
        return sum(len(extent.of(task.name, task.numbers)) for task in tasks)

    def observe(self, kind: str, begin: Callable[[Engine], Observe]) -> Observed:
        """Observe figures other than outcomes on the intact model."""

        def opened() -> tuple[Engine, Documents]:
            meter = self.opened([Ablation.of(removed=[layer]) for layer in range(self.layers)])
            return meter.engine, meter.documents

        return observe(self.request, self.store, kind, begin, opened, self.progress)

    def opened(self, ablations: Sequence[Ablation], candidates: bool = False) -> Meter:
        """Open the meter of the baseline and some ablations; `candidates` is as for `measure`.

        Sharing is checked when a new kind of removal occurs: one layer, several, attentions, MLPs,
        heads, experts. For several parts it is also checked on random sets, because the check does
        not see later sets, which are watched while they are measured. For several layers, the
        miniature is checked for each layer alone and for the drawn sets, so that all cells and
        searches of a model share one verdict.
        """
        meter, facts = self._meter, self._meter.facts
        if not self._checked:
            refuse_other_tokens(self.store, facts, self.progress)
        if candidates:
            meter.twice = set()
        asked = dict.fromkeys((INTACT, *ablations))
        shapes = {_shape(one) for one in asked}
        if not shapes <= self._checked:
            self.progress.say(
                f"{self.request.benchmark}: checking that sharing is exact for this model"
            )
            several = [*self._several(shapes)]
            draw = random.Random(0)
            sets = dict.fromkeys(one for parts in several for one in _drawn(parts, draw))
            meter.ablations = list(asked | sets)
            each = (one for parts in several if parts.unit not in NUMBERED for one in _each(parts))
            alone = (one for one in asked if max(_shape(one)) < _SEVERAL)
            typical = dict.fromkeys((INTACT, *each, *alone)) | sets
            for line in meter.check(Checks(self._lender.ledger.root), list(typical)):
                self.progress.say(line)
            self._checked |= shapes
        meter.ablations = list(asked)
        return meter

    def _several(self, shapes: Collection[_Shape]) -> Iterator[SearchParts]:
        """Find the parts of which several are removed, of each component."""
        source = self._lender.source(self.request.model)
        for component, most in zip(COMPONENTS, map(max, zip(*shapes, strict=True)), strict=True):
            if most == _SEVERAL:
                yield search_parts(source, component)

    def passes(self, ablations: Sequence[Ablation]) -> float:
        """Return the cost of one engine call with the baseline, in passes of the intact model."""
        return planned(ablations, self.layers).layer_passes / self.layers
