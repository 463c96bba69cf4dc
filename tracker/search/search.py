"""Run one search: choose parts to remove by measurements on calibration documents.

If several searches chose different sets of parts, the module can recommend one set. If the amount
to remove is given in seconds, the module times each layer.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from tracker.benchmarks.benchmark import check_benchmark
from tracker.engine.scoring.score import find_cache_argument
from tracker.ledger.files import read_note
from tracker.models.checkpoint import check_plain_weights, find_removable_counts
from tracker.models.devices import describe_device, synchronize
from tracker.models.layers import find_layers
from tracker.models.load import LoadedModel, build_for_planning, build_hollow
from tracker.models.narrowed import narrowed_copies
from tracker.models.parts.anatomy import find_search_parts
from tracker.models.parts.sublayers import Sublayers
from tracker.models.sources import ModelSource, count_layers, count_parts, read_config
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.config import CellRequest
from tracker.schema.errors import ExperimentError, TrackerError
from tracker.schema.kinds import NUMBERED_COMPONENTS, UNITS
from tracker.schema.provenance import content_hash, describe_machine
from tracker.schema.prune_records import CalibrationSet, PruneCost, PruneStep
from tracker.schema.search_parts import MixedParts, SearchParts, unit_plural
from tracker.search.accuracy_budget import AccuracyBudget, refuse_untestable
from tracker.search.cells import ModelCache, OpenCell
from tracker.search.request import SearchRequest, deciding_request
from tracker.search.scores import PartSet, Scores
from tracker.search.settings import (
    TIMED,
    Budget,
    Constraints,
    UniformKind,
    build_budget,
    resolve_constraints,
)
from tracker.search.strategies import RANDOM_STRATEGY, STRATEGIES, Search

TIMING_TOKENS = 128
"""Number of tokens that the model reads in each timed pass."""
TIMING_PASSES = 15
"""Number of timed passes for each layer's median; half as many warm-up passes run first."""


def seconds_per_token(
    loaded: LoadedModel, cache: ModelCache, is_decoding: bool = False, removed: Ablation = INTACT
) -> tuple[list[float], float]:
    """Return each layer's and the whole model's computing time per token, in seconds.

    By default, the timed forward pass reads a prompt; if `is_decoding` is true, it writes one token
    after a prompt. If parts are named in `removed`, the model without these parts is timed. The
    times are stored for each model, machine and device, and used again.
    """
    identity = loaded.identity
    hardware = {**describe_machine(), **describe_device(loaded.device)}
    hardware["threads"] = str(torch.get_num_threads())
    if is_decoding:
        hardware["pass"] = "decoding"
    if removed != INTACT:
        hardware["removed"] = removed.name
    name = content_hash([identity.fingerprint, identity.dtype, hardware])[:16]
    path = cache.ledger.root / "searches" / "timing" / f"{name}.json"
    timing = cache.timings.get(path) or read_note(path)
    if not timing:
        if removed != INTACT:
            narrow, _ = narrowed_copies(loaded.model, removed)
            loaded = replace(loaded, model=narrow, layers=find_layers(narrow))
        layers, model_seconds = _time_layers(loaded, is_decoding)
        timing = {"model": identity.name, **hardware, "layers": layers, "whole": model_seconds}
        cache.timings[path] = timing
    return [float(layer_seconds) for layer_seconds in timing["layers"]], float(timing["whole"])


@torch.inference_mode()
def _time_layers(loaded: LoadedModel, is_decoding: bool) -> tuple[list[float], float]:
    """Measure the seconds per token of each layer and of the whole model."""
    ids = torch.zeros(1, TIMING_TOKENS, dtype=torch.long, device=loaded.device)
    settings: dict[str, Any] = {"use_cache": is_decoding}
    if is_decoding:
        name = find_cache_argument(loaded.model) or ""
        settings[name] = loaded.model(input_ids=ids, use_cache=True).get(name)
        if settings[name] is None:
            raise ExperimentError(
                f"{loaded.identity.name} has no cache of keys and values, so its latency cannot be "
                "timed; give the amount in '% seconds', '% parameters' or '% bytes'"
            )
        ids = ids[:, :1]
    layer_seconds, model_seconds = [], []
    ticks: list[float] = []

    def tick(*hook_arguments: object) -> None:
        ticks.append(_synchronized_time())

    with ExitStack() as stack:
        for layer in loaded.layers:
            stack.enter_context(layer.register_forward_pre_hook(tick))
            stack.enter_context(layer.register_forward_hook(tick))
        for _ in range(TIMING_PASSES + TIMING_PASSES // 2):
            ticks.clear()
            start = _synchronized_time()
            loaded.model(input_ids=ids, **settings)
            model_seconds.append(_synchronized_time() - start)
            # Each layer has two ticks: when it begins, and when it ends.
            layer_seconds.append(np.diff(ticks)[::2])
    layers = np.median(layer_seconds[-TIMING_PASSES:], axis=0) / ids.numel()
    return layers.tolist(), float(np.median(model_seconds[-TIMING_PASSES:])) / ids.numel()


def _synchronized_time() -> float:
    """Wait until the device has finished all its work, and return the time."""
    synchronize()
    return time.perf_counter()


MIN_DOCUMENTS = 2
"""Minimum number of calibration documents for a comparison."""


@dataclass(frozen=True)
class SearchDraw:
    """Result of a search, or of one random draw of a search.

    Attributes:
        request: The request of the search.
        parts: Numbering of the removable parts of the model.
        draw: Number of the random draw; None if the strategy does not draw at random.
        steps: Steps of the search, without results on test documents.
        calibration: The benchmarks and documents on which the search chose the parts.
        cost: The cost of all measurements of the search.
    """

    request: SearchRequest
    parts: SearchParts
    draw: int | None
    steps: tuple[PruneStep, ...]
    calibration: tuple[CalibrationSet, ...]
    cost: PruneCost

    @property
    def removed(self) -> tuple[int, ...]:
        """The numbers of all parts that are removed after the last step, ascending."""
        return self.steps[-1].removed

    @property
    def ablations(self) -> list[Ablation]:
        """For each step, the ablation that removes all parts in `step.removed`."""
        return [self.parts.removal(step.removed) for step in self.steps]

    def run_request(self, step: PruneStep) -> CellRequest | None:
        """Build the request that measures the model after a step as an ablation run.

        An ablation run can remove several layers, but only one head, expert or neuron. The result
        is None for a step after which several heads, experts or neurons are removed.
        """
        part = step.layer if step.layer is not None else max(step.removed)
        removed = tuple(layer for layer in step.removed if layer != part)
        if self.parts.unit != "layer" and removed:
            return None
        request = replace(self.request.test(), removed=removed)
        return request.with_changes(self.parts.removal([part]).changes)

    def name(self, test_key: str) -> str:
        """Return the unique name of this search and draw in a results folder.

        `test_key` is the ledger's key for the model and the test benchmark.
        """
        request, cell = self.request, self.request.cell
        words = (cell.model, cell.benchmark, request.strategy, self.draw, request.amount_text)
        names = [re.sub(r"[^A-Za-z0-9_]+", "-", str(word)).strip("-") for word in words if word]
        calibration = [calibrated.key for calibrated in self.calibration]
        digest = content_hash([request.identity, self.draw, test_key, calibration])[:8]
        return f"{'-'.join(names)[-100:].lstrip('-')}-{digest}"


def refuse_unknown(searches: Sequence[SearchRequest], cache: ModelCache) -> None:
    """Check that models, layers and benchmarks exist, and that the models can be saved.

    The function raises RequestError if a check fails, before anything is measured.
    """
    sources = [cache.source(search.cell.model) for search in searches]
    pairs = zip(sources, searches, strict=True)
    for source in dict.fromkeys(source for source, search in pairs if search.unit == "layer"):
        check_plain_weights(source)
    for search in searches:
        find_constraints(search, cache)
        for request in (*search.calibration(), search.test()):
            check_benchmark(request.benchmark)


def refuse_mixed(searches: Sequence[SearchRequest], cache: ModelCache) -> None:
    """Raise an error if a search calibrates and tests on some of the same documents.

    Each task is split into a calibration half and a test half separately. If two tasks contain the
    same documents, the calibration half of one task can therefore overlap with the test half of the
    other task.

    Args:
        searches: The searches.
        cache: Cache that opens the benchmarks; no model is loaded.

    Raises:
        ExperimentError: A calibration task and a different test task have the same documents.
        BenchmarkError: A benchmark cannot be read or split.
    """
    requests = dict.fromkeys(
        r for search in searches for r in (*search.calibration(), search.test())
    )
    names = {r: sorted(task.name for task in cache.cell(r).benchmark.tasks) for r in requests}
    pairs = {(c, search.test()): search for search in searches for c in search.calibration()}
    for (calibration, test), search in pairs.items():
        tasks, test_tasks = names[calibration], names[test]
        if len({*tasks, *test_tasks}) == 1:
            continue
        hashes = {name: cache.cell(test).rows_hash(name) for name in test_tasks}
        for task in tasks:
            digest = cache.cell(calibration).rows_hash(task)
            shared = [name for name in test_tasks if name != task and hashes[name] == digest]
            if shared:
                raise ExperimentError(
                    f"{search.title}: the calibration task {task} and the test task {shared[0]} "
                    "have the same documents. Calibration and test documents could overlap; "
                    f"calibrate and test on {shared[0]} alone, or calibrate on other documents"
                )


def find_budget(request: SearchRequest, cache: ModelCache) -> Budget:
    """Build the budget of a search: size to remove, sizes of the parts, and constraints.

    Raises ExperimentError if the requested amount is impossible.
    """
    cell, amount = request.cell, request.amount
    source = cache.source(cell.model)
    # Constraints that are wrong are reported before anything is timed.
    constraints = find_constraints(request, cache)
    parts: SearchParts | None = None
    block, kinds = None, list[UniformKind]()
    if request.is_mixed:
        model, _ = build_for_planning(source, cell.model.dtype)
        parts, kinds, sizes = _assign_part_numbers(request.unit, source, model)
        total = float(model.num_parameters())
        if amount is not None and amount.measure == "bytes":
            value = amount.value / (1 if amount.is_share else model.dtype.itemsize)
            amount = replace(amount, value=value, measure="parameters")
        elif amount is not None and amount.measure in TIMED:
            sizes, total = _time_parts(request, parts, kinds, cache)
    elif amount is None or amount.measure == "parts":
        parts = find_search_parts(source, request.unit)
        sizes, total = [1.0] * parts.total, float(len(parts.numbers))
        if request.uniform:
            block = _block_size(source, parts)
    elif amount.measure in TIMED:
        loaded, is_decoding = cache.model(cell.model).loaded, amount.measure == "latency"
        sizes, total = seconds_per_token(loaded, cache, is_decoding)
    else:
        model, _ = build_for_planning(source, cell.model.dtype)
        size = 1 if amount.measure == "parameters" else int(model.dtype.itemsize)
        sizes = [float(size * count) for count in _count_parameters(model, "layer")]
        total = float(size * model.num_parameters())
    if request.accuracy_budget is not None:
        refuse_untestable(cache.cell(request.test()), request.title)
    key, title = request.amount_key, request.title
    return build_budget(key, amount, sizes, total, title, constraints, parts, block, kinds)


def _block_size(source: ModelSource, parts: SearchParts) -> int:
    """Return the number of parts of a block: a layer, or heads that share keys and values.

    A uniform search removes equally many parts from each block.
    """
    counts, block = count_parts(source), parts.per_layer
    # Heads are removed evenly from the groups that share keys and values.
    if parts.unit == "head" and counts.kv_head:
        block //= counts.kv_head if counts.kv_head < block else 1
    return block


def _assign_part_numbers(
    units: str, source: ModelSource, model: Any
) -> tuple[MixedParts, list[UniformKind], list[float]]:
    """Assign numbers and blocks to the parts of several kinds, and count their parameters.

    Args:
        units: Kinds of parts, separated by commas, such as `layer,head`.
        source: Source of the model.
        model: The model, without weights.

    Returns:
        The numbering of all parts, the blocks of each kind other than whole layers, and the number
        of parameters of each part. A search removes equally many parts from each block.
    """
    parts = MixedParts.of([find_search_parts(source, unit) for unit in units.split(",")])
    assert isinstance(parts, MixedParts)
    kinds, sizes = list[UniformKind](), list[float]()
    for start, kind in zip(parts.starts, parts.kinds, strict=False):
        if kind.unit == "layer":
            sizes += _count_parameters(model, "layer")
            continue
        block = _block_size(source, kind)
        counts, size = find_removable_counts(source, kind.unit, block)
        first_parts = range(start, start + kind.total, block)
        blocks = (tuple(range(first, first + block)) for first in first_parts)
        layers = kind.used_layers or range(kind.layers)
        used = tuple(b for b in blocks if kind.layer_of(b[0] - start) in layers)
        kinds.append(UniformKind(used, counts))
        sizes += [size] * kind.total
    return parts, kinds, sizes


def _time_parts(
    request: SearchRequest, parts: MixedParts, kinds: Sequence[UniformKind], cache: ModelCache
) -> tuple[list[float], float]:
    """Measure how many seconds per token are saved by the removal of each part.

    For heads, experts or neurons, as many as possible are removed together. The saved time is
    divided by the number of removed parts.

    Args:
        request: The request of the search, with an amount in seconds or latency.
        parts: The numbering of all parts.
        kinds: The removable parts of each kind other than whole layers.
        cache: Cache that opens the model and stores the times.

    Returns:
        The seconds of each part, and the seconds of the whole model.

    Raises: ExperimentError: The removal of parts of one kind saves no time.
    """
    loaded = cache.model(request.cell.model).loaded
    is_decoding = request.amount is not None and request.amount.measure == "latency"
    layers, total = seconds_per_token(loaded, cache, is_decoding)
    sizes, uniform_kinds = list[float](), iter(kinds)
    for start, kind in zip(parts.starts, parts.kinds, strict=False):
        if kind.unit == "layer":
            sizes += layers
            continue
        uniform_kind = next(uniform_kinds)
        largest = [n for block in uniform_kind.blocks for n in block[: uniform_kind.counts[-1]]]
        removed = kind.removal(part - start for part in largest)
        saved = sum(layers) - sum(seconds_per_token(loaded, cache, is_decoding, removed)[0])
        if saved <= 0:
            raise ExperimentError(
                f"{request.title}: without {len(largest)} {unit_plural(kind.unit)}, the model is "
                f"not measurably faster; leave {kind.unit} out of 'unit', or give the amount in "
                "parameters"
            )
        sizes += [saved / len(largest)] * kind.total
    return sizes, total


def _count_parameters(model: Any, unit: str) -> list[float]:
    """Count the parameters of each layer, or of each layer's attention or MLP.

    The argument `unit` is `layer`, `attention` or `mlp`; for other units, the list is empty.
    """
    modules: list[nn.Module] = [*find_layers(model)]
    if unit not in UNITS:
        return []
    if unit != "layer":
        pairs = filter(None, map(Sublayers.first_and_last, modules))
        modules = [pair.module(unit) for pair in pairs]
    return [sum(p.numel() for p in module.parameters()) for module in modules]


def find_constraints(request: SearchRequest, cache: ModelCache) -> Constraints:
    """Return which layers must stay; raise ExperimentError for a layer that does not exist."""
    if not request.constraints_text:
        return Constraints()
    source = cache.source(request.cell.model)
    texts = request.protect, request.among, request.at_least
    try:
        return resolve_constraints(*texts, count_layers(source), partial(read_config, source))
    except ExperimentError as error:
        raise ExperimentError(f"{request.title}: {error}") from None


def run_search(request: SearchRequest, budget: Budget, cache: ModelCache) -> Iterator[SearchDraw]:
    """Run a search: choose the parts to remove, separately for each random draw.

    Args:
        request: The request of the search.
        budget: The budget of the search.
        cache: Cache that opens the model and the benchmarks.

    Yields:
        The result of each draw.

    Raises:
        ExperimentError: There are too few calibration documents.
        CellError: No removal has a finite score.
    """
    cells = [cache.cell(calibration) for calibration in request.calibration()]
    for cell in cells:
        refuse_few(cell.request, cell.n)
    _refuse_mixtures(request, cells)
    cache.keep_timings()
    seed, rescoring = request.cell.documents.seed, request.used_rescoring
    accuracy_budget = request.accuracy_budget
    deciding_cell = cache.cell(deciding_request([request]))
    model = build_hollow(cache.source(request.cell.model), request.cell.model.dtype)
    sizes, total = _count_parameters(model, request.unit), model.num_parameters()
    if request.is_mixed:
        sizes = _assign_part_numbers(request.unit, cache.source(request.cell.model), model)[2]
    counted = replace(budget, sizes=tuple(sizes))
    for draw in request.draw_numbers:
        scores = Scores(cells, budget.parts)
        # A budget of accuracy ends the search on calibration documents of the benchmark itself.
        is_extra = accuracy_budget is not None and cells != [deciding_cell]
        walk = Scores([deciding_cell], scores.parts) if is_extra else scores
        steps = []
        search = Search(scores, budget, seed, draw or 1, rescoring)
        for step in STRATEGIES[request.strategy](search):
            if len(counted.sizes) == scores.parts.total:
                remaining = total - round(counted.size_of(step.removed))
                step = step.model_copy(update={"parameters": remaining})
            if request.amount is not None and request.amount.measure in TIMED:
                seconds = budget.model_size - budget.size_of(step.removed)
                step = step.model_copy(update={"seconds": seconds})
            steps.append(step)
            cache.progress.say(_step_message(request, scores, draw, step))
            if accuracy_budget is not None and _is_over(accuracy_budget, walk, step.removed):
                break
        documents = {cell: scores.choosing_documents(cell) for cell in cells}
        if accuracy_budget is not None:
            documents[deciding_cell] = deciding_cell.documents
        records = tuple(calibration_record(*pair) for pair in documents.items())
        cost = scores.cost()
        if is_extra:
            cost = PruneCost(**{name: n + getattr(walk.cost(), name) for name, n in cost})
        yield SearchDraw(request, scores.parts, draw, tuple(steps), records, cost)


def _is_over(budget: AccuracyBudget, scores: Scores, removed: PartSet) -> bool:
    """Return whether the accuracy loss without these parts clearly exceeds the budget.

    The function measures the loss on calibration documents if the loss is not stored yet.
    """
    scores.losses("accuracy", [removed])
    (cell,) = scores.cells
    return budget.is_clearly_exceeded(cell.outcomes([scores.ablation(removed)]))


def refuse_few(request: CellRequest, n_documents: int) -> None:
    """Raise ExperimentError if there are fewer calibration documents than `MIN_DOCUMENTS`."""
    if n_documents < MIN_DOCUMENTS:
        raise ExperimentError(
            f"{request.title}: too few calibration documents ({n_documents}); raise 'sample' to "
            f"at least {MIN_DOCUMENTS}, better 100"
        )


def _refuse_mixtures(request: SearchRequest, cells: list[OpenCell]) -> None:
    """Raise ExperimentError if calibration benchmarks mix accuracies with losses of texts."""
    directions = {cell.higher_is_better for cell in cells}
    if len(directions) > 1:
        names = ", ".join(str(cell.request.benchmark) for cell in cells)
        raise ExperimentError(
            f"{request.title}: 'calibrate' mixes accuracies with losses of texts ({names}), "
            "which have no common mean; calibrate on one kind only"
        )


def calibration_record(cell: OpenCell, documents: dict[str, tuple[int, ...]]) -> CalibrationSet:
    """Build the stored record of the calibration documents from one benchmark.

    Args:
        cell: The model and the benchmark.
        documents: Task → numbers of its documents.

    Returns:
        The record.
    """
    return CalibrationSet(
        key=cell.store.identity.key,
        benchmark=str(cell.request.benchmark),
        metric=cell.view.metric,
        n=sum(map(len, documents.values())),
        part=cell.request.documents.part,
        documents=documents,
    )


def _step_message(request: SearchRequest, scores: Scores, draw: int | None, step: PruneStep) -> str:
    """Write a progress message about the parts that a search step removed."""
    name = request.strategy if draw is None else f"{request.strategy} {draw}"
    if request.calibrate:
        name += f" calibrated on {', '.join(request.calibrate)}"
    parts, unit = scores.parts, request.unit
    removed = parts.names(step.removed)
    text = f"removed together: {removed}"
    if isinstance(parts, MixedParts):
        text = f"{removed} removed"
    elif step.layer is not None and parts.unit in NUMBERED_COMPONENTS:
        text = f"removed {unit} {parts.name(step.layer)}; {len(step.removed)} removed so far"
    elif step.layer is not None:
        text = f"removed {unit} {step.layer}; removed so far: {removed}"
    return f"{request.cell.benchmark}, {name}: {text}"


RANDOM_REASON = "the strategy 'random' is only a reference, so random sets are never recommended"
"""Reason why searches of the strategy `random` alone recommend nothing."""


@dataclass(frozen=True)
class Recommendation:
    """Recommended set of parts to remove, from the results of several searches.

    Attributes:
        removed: The recommended set of removed parts; empty if nothing is recommended. With a
            budget of accuracy, no smaller model is significantly within the budget.
        n_sets: Number of different sets that the searches chose. With a budget of accuracy,
            `n_sets` is the number of searches.
        step: Comparison of the recommended and the second-best set; None if no sets were compared.
        decided_on: The documents on which sets were compared; None if no sets were compared.
        reason: Reason why nothing is recommended; empty otherwise.
        estimated: Removed parts of the smallest model whose estimated loss is within the budget of
            accuracy; empty without a budget of accuracy.
        n_needed: Number of test documents with which the model without `estimated` would probably
            be significantly within the budget; None if unknown.
        nearest: Command-line option for the smallest budget of accuracy that a tested set meets;
            None if a tested set meets the requested budget; empty if every tested set reduces the
            accuracy to 0.
    """

    removed: PartSet = ()
    n_sets: int = 0
    step: PruneStep | None = None
    decided_on: CalibrationSet | None = None
    reason: str = ""
    estimated: PartSet = ()
    n_needed: int | None = None
    nearest: str | None = None


def recommend_set(draws: Sequence[SearchDraw], cache: ModelCache) -> Recommendation:
    """Compare the sets of removed parts of several searches, and recommend the best set.

    All searches must have the same goal, such as removing 8 layers. The best set has the smallest
    loss on calibration documents. Sets of the strategy `random` are never recommended.

    Args:
        draws: The results of the searches.
        cache: Cache that opens the model and the calibration documents.

    Returns:
        The recommendation, or the reason why there is none.
    """
    chosen = (draw.removed for draw in draws if draw.request.strategy != RANDOM_STRATEGY)
    sets = list(dict.fromkeys(chosen))
    if not sets:
        return Recommendation(reason=RANDOM_REASON)
    if len(sets) == 1:
        return Recommendation(sets[0], 1)
    request = deciding_request([draw.request for draw in draws])
    cache.progress.say(f"{request.title}: comparing the losses of {len(sets)} removed sets")
    cell = cache.cell(request)
    try:
        step = Scores([cell], draws[0].parts).losses("accuracy", sets).choose_step(None)
    except TrackerError as error:
        return Recommendation(n_sets=len(sets), reason=str(error))
    return Recommendation(step.removed, len(sets), step, calibration_record(cell, cell.documents))
