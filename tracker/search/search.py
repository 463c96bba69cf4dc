"""Run one search: measure its calibration cells, block by block, until its budget is met.

The module also chooses the recommended set among the results of searches, by calibration documents
alone.

A budget of seconds depends on the duration of each layer, which is measured here.
"""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from tracker.benchmarks.benchmark import check_benchmark
from tracker.core.config import CellRequest
from tracker.core.errors import ExperimentError, TrackerError
from tracker.core.kinds import NUMBERED
from tracker.core.provenance import content_hash, machine
from tracker.core.prune_records import Calibrated, PruneCost, PruneStep
from tracker.core.search_parts import SearchParts
from tracker.ledger.files import read_note
from tracker.models.checkpoint import refuse_packed
from tracker.models.devices import describe, synchronize
from tracker.models.layers import find_layers
from tracker.models.load import LoadedModel, weightless
from tracker.models.parts.anatomy import search_parts
from tracker.models.sources import ModelSource, count_layers, read_config
from tracker.search.cells import Lender, OpenCell
from tracker.search.request import SearchRequest, deciding
from tracker.search.scores import Scores, Set
from tracker.search.settings import FREE, Budget, Constraints, budget, constraints_of
from tracker.search.strategies import NULL, STRATEGIES, Search

TOKENS = 128
"""Tokens of the text that is read in each pass."""
PASSES = 15
"""Number of passes for each layer's median; half as many run before, without measurement."""


def seconds_a_token(loaded: LoadedModel, lender: Lender) -> tuple[list[float], float]:
    """Measure the seconds per token of each layer, and of the whole model, on a long text.

    It is measured once per model, machine and device, and `Lender.keep_timings` writes it to the
    results folder, so that a continued search has the same budget.
    """
    identity = loaded.identity
    where = {**machine(), **describe(loaded.device), "threads": str(torch.get_num_threads())}
    name = content_hash([identity.fingerprint, identity.dtype, where])[:16]
    path = lender.ledger.root / "searches" / "timing" / f"{name}.json"
    timing = lender.timings.get(path) or read_note(path)
    if not timing:
        layers, whole = _measured(loaded)
        timing = {"model": identity.name, **where, "layers": layers, "whole": whole}
        lender.timings[path] = timing
    return [float(each) for each in timing["layers"]], float(timing["whole"])


@torch.inference_mode()
def _measured(loaded: LoadedModel) -> tuple[list[float], float]:
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device=loaded.device)
    rounds: list[list[float]] = []
    whole: list[float] = []
    with _timed(loaded.layers) as ticks:
        for _ in range(PASSES + PASSES // 2):
            ticks.clear()
            start = _now()
            loaded.model(input_ids=ids, use_cache=False)
            whole.append(_now() - start)
            rounds.append([end - begin for begin, end in zip(ticks[::2], ticks[1::2], strict=True)])
    layers = [statistics.median(each) / TOKENS for each in zip(*rounds[-PASSES:], strict=True)]
    return layers, statistics.median(whole[-PASSES:]) / TOKENS


@contextmanager
def _timed(layers: nn.ModuleList) -> Iterator[list[float]]:
    """Record the times at which each layer begins and ends."""
    ticks: list[float] = []

    def tick(*given: object) -> None:
        ticks.append(_now())

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.register_forward_pre_hook(tick))
            stack.enter_context(layer.register_forward_hook(tick))
        yield ticks


def _now() -> float:
    synchronize()
    return time.perf_counter()


FEWEST = 2
"""Minimum number of calibration documents for a comparison."""


@dataclass(frozen=True)
class Found:
    """Result of one draw of a search.

    Attributes:
        asked: The search.
        parts: The parts of the model that it may remove.
        draw: Number of the draw; None if the strategy does not draw.
        steps: Its steps, not tested yet.
        calibration: The documents that chose.
        cost: The cost of the search.
    """

    asked: SearchRequest
    parts: SearchParts
    draw: int | None
    steps: tuple[PruneStep, ...]
    calibration: tuple[Calibrated, ...]
    cost: PruneCost

    @property
    def removed(self) -> tuple[int, ...]:
        """The parts removed after the last step, ascending."""
        return self.steps[-1].removed

    def name(self, tests: str) -> str:
        """Return its name, unique among the searches of a results folder.

        `tests` is the key of the cell that tests it; it differs for another model at the same
        place.
        """
        asked = self.asked
        words = [
            str(asked.cell.model),
            str(asked.cell.benchmark),
            asked.strategy,
            self.draw,
            asked.asked,
        ]
        chose = [each.key for each in self.calibration]
        digest = content_hash([asked.identity, self.draw, tests, chose])[:8]
        readable = "-".join(re.sub(r"[^A-Za-z0-9_]+", "-", str(w)).strip("-") for w in words if w)
        return f"{readable[-100:].lstrip('-')}-{digest}"


def refuse_unknown(searches: Sequence[SearchRequest], lender: Lender) -> None:
    """Refuse models, layers and benchmarks that are not there, and models that are never saved.

    It is done before anything is measured, and raises RequestError.
    """
    tried: set[ModelSource] = set()
    for asked in searches:
        source = lender.source(asked.cell.model)
        if asked.unit == "layer" and source not in tried:
            tried.add(source)
            refuse_packed(source)
        stays_of(asked, lender)
        for request in (*asked.calibration(), asked.test()):
            check_benchmark(request.benchmark)


def refuse_mixed(
    searches: Sequence[SearchRequest], lender: Lender, cells: dict[CellRequest, OpenCell]
) -> None:
    """Refuse searches whose calibration documents are test documents too.

    Halves are drawn task by task, so those of two tasks over the same rows overlap. Benchmarks are
    opened for this check, so that other problems with them are reported before measurement too.

    Args:
        searches: The searches.
        lender: Loads the model; not used for that here.
        cells: The cells opened so far, to which the others are added.

    Raises:
        ExperimentError: Some documents would both choose and test.
        BenchmarkError: A benchmark cannot be read, or has no such parts.
    """
    pairs = {}
    for asked in searches:
        requests = (*asked.calibration(), asked.test())
        *own, test = (cells.setdefault(each, OpenCell(each, lender)) for each in requests)
        tested = {task.name for task in test.benchmark.tasks}
        for cell in own:
            names = {task.name for task in cell.benchmark.tasks}
            if len(names | tested) > 1:
                pairs[cell.request, test.request] = (asked, cell, names, test, tested)
    for asked, cell, names, test, tested in pairs.values():
        rows = {name: test.rows(name) for name in sorted(tested)}
        for name in sorted(names):
            digest = cell.rows(name)
            also = next((t for t, d in rows.items() if t != name and d == digest), None)
            if also is not None:
                raise ExperimentError(
                    f"{asked.title}: {name}, which calibrates, and {also}, which tests, have "
                    "the same documents, and halves are drawn task by task, so that some would "
                    f"choose and be tested; calibrate and test on {also} alone, or calibrate "
                    "on other documents"
                )


def budget_of(asked: SearchRequest, lender: Lender) -> Budget:
    """Return the budget of a search; ExperimentError where nothing would go, or everything."""
    cell, measure = asked.cell, asked.amount.measure
    source = lender.source(cell.model)
    within = stays_of(asked, lender)  # what is wrong with it is said before anything is timed
    parts: SearchParts | None = None
    if measure == "seconds":
        each, total = seconds_a_token(lender.model(cell.model).loaded, lender)
    elif measure == "parts":
        parts = search_parts(source, asked.unit)
        total = float(len(parts.numbers))
        each = [1.0] * parts.total
    else:
        model, _ = weightless(source, cell.model.dtype)
        size = 1 if measure == "parameters" else int(model.dtype.itemsize)
        layers = find_layers(model)
        each = [float(size * sum(p.numel() for p in one.parameters())) for one in layers]
        total = float(size * model.num_parameters())
    return budget(asked.word, asked.amount, each, total, asked.title, within, parts)


def stays_of(request: SearchRequest, lender: Lender) -> Constraints:
    """Find what must stay of a search's model; ExperimentError for a layer that is not there."""
    source = lender.source(request.cell.model)
    if not request.stays:
        return FREE
    total = count_layers(source)
    config = partial(read_config, source)
    try:
        return constraints_of(request.protect, request.among, request.at_least, total, config)
    except ExperimentError as error:
        raise ExperimentError(f"{request.title}: {error}") from None


def search(
    asked: SearchRequest, within: Budget, lender: Lender, cells: dict[CellRequest, OpenCell]
) -> Iterator[Found]:
    """Choose the parts to remove, once per draw.

    Args:
        asked: The search.
        within: Its budget.
        lender: Loads the model.
        cells: The cells opened so far, which other searches may share.

    Yields:
        The result of each draw.

    Raises:
        ExperimentError: There are too few calibration documents.
        CellError: No removal has a finite score.
    """
    own = [cells.setdefault(each, OpenCell(each, lender)) for each in asked.calibration()]
    for cell in own:
        refuse_few(cell.request, cell.n)
    _refuse_mixtures(asked, own)
    lender.keep_timings()
    for draw in asked.draws_of:
        scores = Scores(own, within.parts_of(asked.unit))
        given = Search(scores, within, asked.cell.documents.seed, draw or 1, asked.rescored)
        steps = []
        for step in STRATEGIES[asked.strategy](given):
            steps.append(step)
            lender.progress.say(_said(asked, scores.parts, draw, step))
        calibration = tuple(calibrated(cell, scores.looked_at(cell)) for cell in own)
        yield Found(asked, scores.parts, draw, tuple(steps), calibration, scores.cost())


def refuse_few(request: CellRequest, documents: int) -> None:
    """Raise ExperimentError if there are too few calibration documents for a comparison."""
    if documents < FEWEST:
        raise ExperimentError(
            f"{request.title}: {documents} calibration document tells no layers apart; raise "
            f"'sample' to {FEWEST} at least, better 100"
        )


def _refuse_mixtures(asked: SearchRequest, cells: list[OpenCell]) -> None:
    """Raise ExperimentError for losses without a common mean: accuracies and nats."""
    kinds = {cell.higher_is_better for cell in cells}
    if len(kinds) > 1:
        names = ", ".join(str(cell.request.benchmark) for cell in cells)
        raise ExperimentError(
            f"{asked.title}: 'calibrate' mixes accuracies with losses of texts ({names}), which "
            "have no common mean; calibrate on the ones or on the others"
        )


def calibrated(cell: OpenCell, documents: dict[str, tuple[int, ...]]) -> Calibrated:
    """Return a record of the documents of a cell that choose: task → their numbers."""
    return Calibrated(
        key=cell.store.identity.key,
        benchmark=str(cell.request.benchmark),
        metric=cell.view.metric,
        n=sum(map(len, documents.values())),
        part=cell.request.documents.part,
        documents=documents,
    )


def _said(asked: SearchRequest, parts: SearchParts, draw: int | None, step: PruneStep) -> str:
    """Describe the removal of a step in one line; for many parts by their number."""
    name = asked.strategy if draw is None else f"{asked.strategy} {draw}"
    if asked.calibrate:
        name += f" calibrated on {', '.join(asked.calibrate)}"
    gone = parts.names(step.removed)
    what = f"removed together: {gone}"
    if step.layer is not None and parts.unit in NUMBERED:
        what = f"{asked.unit} {parts.name(step.layer)} goes, {len(step.removed)} in all"
    elif step.layer is not None:
        what = f"{asked.unit} {step.layer} goes; removed: {gone}"
    return f"{asked.cell.benchmark}, {name}: {what}"


@dataclass(frozen=True)
class Recommended:
    """The recommended set among those that searches with one goal chose.

    Attributes:
        removed: The set; empty if none is recommended.
        of: Number of different sets to choose from.
        step: Its loss on the deciding documents, the runner-up, and whether the documents separate
            the two; None if there was nothing to decide.
        decided_on: The deciding documents; None if there was nothing to decide.
        reason: Reason why nothing is recommended; empty otherwise.
    """

    removed: Set = ()
    of: int = 0
    step: PruneStep | None = None
    decided_on: Calibrated | None = None
    reason: str = ""


def recommended(
    found: Sequence[Found], lender: Lender, cells: dict[CellRequest, OpenCell]
) -> Recommended:
    """Recommend one of the sets of searches with one goal, by its loss on calibration documents.

    Random draws are the reference for the others, and never recommended. If the others all chose
    one set, nothing is measured.

    Args:
        found: The results of the searches.
        lender: Loads the model.
        cells: The cells opened so far, to which the deciding one is added.

    Returns:
        The recommendation, or the reason why there is none.
    """
    sets = list(dict.fromkeys(one.removed for one in found if one.asked.strategy != NULL))
    if not sets:
        return Recommended(reason="random draws say what chance leaves")
    if len(sets) == 1:
        return Recommended(sets[0], 1)
    request = deciding([result.asked for result in found])
    lender.progress.say(f"{request.title}: which of {len(sets)} sets costs least")
    cell = cells.setdefault(request, OpenCell(request, lender))
    try:
        step = Scores([cell], found[0].parts).losses("accuracy", sets).step(None)
    except TrackerError as error:
        return Recommended(of=len(sets), reason=str(error))
    return Recommended(step.removed, len(sets), step, calibrated(cell, cell.documents))
