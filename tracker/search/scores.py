"""Score sets of removed parts on calibration documents.

All scores are losses: a smaller score is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tracker.analysis.stopping import CandidateRace
from tracker.engine.observers.layer_proxies import measure_state_changes, output_proxies
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.shards import DocumentArrays
from tracker.measuring.meter import DocumentKey
from tracker.measuring.observing import ObserveDocument
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.documents import Document
from tracker.schema.errors import CellError
from tracker.schema.estimates import Estimate
from tracker.schema.proxies import PROXIES, proxy_cost
from tracker.schema.prune_records import PruneCost, PruneStep
from tracker.schema.search_parts import SearchParts
from tracker.search.cells import OpenCell, engine_passes
from tracker.stats.accuracy import mean_interval
from tracker.stats.arrays import Array, token_means
from tracker.stats.rank_agreement import rounded_values
from tracker.stats.support import widen

PartSet = tuple[int, ...]
"""Numbers of parts that are removed together, ascending, as `SearchParts` numbers them."""

NO_FINITE_SCORE = (
    "no removal has a finite score on all calibration documents; use another strategy, or dtype: "
    "{value: float32}"
)
"""Error messages if no removals can be compared."""
_DIRECTION_PROXIES = ("cosine_score", "relative_update", "angular_distance")
"""Proxies that one observation measures and stores together."""


def add_parts(removed: PartSet, *parts: int) -> PartSet:
    """Return the sorted numbers in `removed` together with the numbers `parts`."""
    return tuple(sorted((*removed, *parts)))


@dataclass(frozen=True)
class Losses:
    """Loss of each document after the removal of each of several sets of parts.

    Attributes:
        sets: The sets of removed parts.
        values: Losses `[documents, sets]`.
        weights: Weights of documents `[documents]`, summing to 1.
        tie_breakers: A second loss of each set, used only for sets of equal loss.
        is_binary: True if all losses are whole numbers, as for right or wrong answers.
    """

    sets: Sequence[PartSet]
    values: Array
    weights: Array
    tie_breakers: Array
    is_binary: bool = False

    @property
    def means(self) -> Array:
        """The weighted mean loss of each set; infinite if the loss of a document is not finite."""
        return np.nan_to_num(rounded_values(self.weights @ self.values), nan=np.inf)

    @property
    def order(self) -> list[int]:
        """The indices of the sets of removed parts, by ascending loss.

        Sets with equal losses are ordered by `tie_breakers`; then, sets with later parts come
        first.
        """
        ties = np.nan_to_num(rounded_values(self.tie_breakers), nan=np.inf)
        later_first = ([-part for part in reversed(part_set)] for part_set in self.sets)
        keys = list(zip(self.means, ties, later_first, strict=True))
        return sorted(range(len(keys)), key=keys.__getitem__)

    def per_added_size(self, sizes: Array) -> Losses:
        """Return the added loss per added size of each set, relative to the first set.

        `sizes` contains the total size of the parts in each set. The first set contains the parts
        that are removed already; the result omits this set.
        """
        prices = np.asarray(sizes[1:]) - sizes[0]
        values = (self.values[:, 1:] - self.values[:, :1]) / prices
        tie_breakers = (self.tie_breakers[1:] - self.tie_breakers[0]) / prices
        return Losses(self.sets[1:], values, self.weights, tie_breakers)

    def choose_step(self, removed: PartSet | None, order: Sequence[int] | None = None) -> PruneStep:
        """Choose the set with the smallest loss, and compare this set with the second-best set.

        Args:
            removed: The parts that earlier steps removed, which every set contains; None if there
                are no such parts.
            order: Indices of the sets to compare, in ascending order of loss; None for all sets.

        Returns:
            The search step that removes the best set, with the result of the comparison.

        Raises:
            CellError: No loss is finite.
        """
        best, *others = self.order if order is None else order
        means = self.means
        if not math.isfinite(means[best]):
            raise CellError(NO_FINITE_SCORE)
        chosen = self.sets[best]
        added = [] if removed is None else sorted(set(chosen) - set(removed))
        layer = added[0] if len(added) == 1 else None
        step = PruneStep(removed=chosen, layer=layer, score=float(means[best]))
        if not others or not math.isfinite(means[others[0]]):
            return step.model_copy(update={"reasons": {"margin": "no other removal was possible"}})
        second, n = others[0], len(self.values)
        differences = self.values[:, second] - self.values[:, best]
        extremes = (1.0, -1.0) if self.is_binary else ()
        mean = float(means[second] - means[best])
        # It is the best of many: the intervals beside all others hold simultaneously.
        margin = Estimate(mean, *mean_interval(differences, self.weights, extremes))
        (margin,) = widen([margin], [n], len(others))
        updates: dict[str, object] = {"runner_up": self.sets[second], "margin": margin}
        if mean and margin.low is not None and margin.high is not None and margin.low <= 0:
            half_width = (margin.high - margin.low) / 2
            updates["separates"] = math.ceil(n * (half_width / mean) ** 2)
        return step.model_copy(update=updates)


class Scores:
    """Scorer of sets of removed parts on calibration benchmarks.

    All benchmarks have equal weight. The parts that can be removed are numbered by `parts`.
    """

    def __init__(self, cells: Sequence[OpenCell], parts: SearchParts) -> None:
        self.cells = cells
        self.parts = parts
        self.layers = parts.layers
        self.evaluated: set[Ablation] = set()
        self._passes = self._evaluations = 0.0
        self._seconds = 0.0
        self._observed: set[str] = set()
        self._race_documents: dict[str, set[DocumentKey]] = {}

    @property
    def documents(self) -> int:
        """The total number of calibration documents over all benchmarks."""
        return sum(cell.n for cell in self.cells)

    def ablation(self, removed: PartSet) -> Ablation:
        """Return the ablation that removes a set of parts."""
        return self.parts.removal(removed)

    def losses(self, outcome: str, sets: Sequence[PartSet]) -> Losses:
        """Measure the loss of each document after the removal of each set of parts.

        The loss is the drop of `outcome`: `accuracy`, or `gold_logprob`, which is the
        log-probability of the right answer.
        """
        ablations = [self.ablation(part_set) for part_set in sets]
        missing = [ablation for ablation in ablations if ablation not in self.evaluated]
        for cell in self.cells:
            if missing or not self.evaluated:
                self._add_passes(cell, engine_passes(missing, self.layers))
            cell.measure(ablations, are_candidates=True)
        self.evaluated |= {INTACT, *ablations}

        def drops(name: str) -> tuple[Array, Array]:
            outcomes = [cell.outcomes(ablations, name) for cell in self.cells]
            return _stack_documents([(paired.drops, paired.weights) for paired in outcomes])

        values, weights = drops(outcome)
        other_values, other_weights = drops("gold_logprob" if outcome == "accuracy" else "accuracy")
        is_binary = bool((values == np.rint(values)).all())
        return Losses(sets, values, weights, other_weights @ other_values, is_binary)

    def proxy(self, name: str, removed: PartSet, spans: Sequence[range] | None = None) -> Losses:
        """Score each layer or span of layers by a proxy, in the model without the layers `removed`.

        Args:
            name: Name of the proxy, such as `angular_distance`.
            removed: The layers that earlier steps removed.
            spans: The candidates: ranges of positions among the remaining layers. None means that
                each remaining layer is a candidate.

        Returns:
            The value of the proxy for each document and candidate; smaller values are better.
        """
        losses = [self._measure_proxy(cell, name, removed, spans) for cell in self.cells]
        sets = self.candidate_sets(removed, spans)
        return Losses(sets, *_stack_documents(losses), np.zeros(len(sets)))

    def candidate_sets(self, removed: PartSet, spans: Sequence[range] | None) -> list[PartSet]:
        """List the possible sets of removed layers after the next step of a search.

        A set contains the layers in `removed` and one remaining layer. If `spans` is given, a set
        contains `removed` and the remaining layers at the positions of one span.
        """
        layers = [layer for layer in range(self.layers) if layer not in removed]
        if spans is None:
            return [add_parts(removed, layer) for layer in layers]
        return [add_parts(removed, *(layers[n] for n in span)) for span in spans]

    def _add_passes(self, cell: OpenCell, n_passes: float) -> None:
        """Add forward passes over the documents of one benchmark to the cost."""
        self._passes += n_passes * cell.n / self.documents

    def _measure_proxy(
        self, cell: OpenCell, name: str, removed: PartSet, spans: Sequence[range] | None
    ) -> tuple[Array, Array]:
        """Measure a proxy of each layer or span of layers on one benchmark.

        Returns the mean over each document's tokens, `[documents, candidates]`, and the documents'
        weights, `[documents]`. A candidate is a layer or a span. The arguments are explained at
        `proxy`.
        """
        observation = "turning" if name in _DIRECTION_PROXIES else name.replace("_", "-")
        suffix = f"-without-{'-'.join(map(str, removed))}" if removed else ""
        kind = f"{observation}-1{suffix}"
        sums = cell.observe(kind, partial(_build_observer, name=name, removed=removed)).arrays
        n_layers = self.layers - len(removed)
        if (key := f"{cell.store.identity.key}/{kind}") not in self._observed:
            self._observed.add(key)
            cost = proxy_cost(name, n_layers, is_shared=True)
            self._add_passes(cell, cost * n_layers / self.layers)
            self._seconds += float(sums["seconds"].sum())
        n_tokens = sums["tokens" if PROXIES[name].observe else "predicted"]
        spans = [range(n, n + 1) for n in range(n_layers)] if spans is None else spans
        starts, ends = [span.start for span in spans], [span.stop - 1 for span in spans]
        columns = (starts, ends) if name == "angular_distance" else (starts,)
        means = token_means(sums[name][:, *columns], n_tokens)
        if name == "gate_gradient":
            # The magnitude per document, so that opposite signs do not cancel.
            return np.abs(means), np.full(len(means), 1 / len(means))
        return means, n_tokens / n_tokens.sum()

    def record_race(
        self, race: CandidateRace, candidates: Sequence[Ablation], references: Sequence[Ablation]
    ) -> None:
        """Add the documents and the cost of a race (`rescoring: race`) to those of the search.

        Args:
            race: The finished race.
            candidates: Ablations that the race compared.
            references: Other ablations that the race measured on each document.
        """
        (cell,) = self.cells
        n_seen = race.rule.seen
        n_measured = race.measured_documents(n_seen)
        ends = sorted(set(n_measured.tolist()))
        for begin, end in zip([0, *ends], ends, strict=False):
            remaining = [c for c, n in zip(candidates, n_measured, strict=True) if n >= end]
            n_passes = engine_passes([*references, *remaining], self.layers)
            self._passes += n_passes * (end - begin) / cell.n
        self._evaluations += float(n_measured.sum()) / cell.n + (not self._evaluations)
        n_documents = dict.fromkeys((INTACT, *references), int(n_seen.max()))
        n_documents |= zip(candidates, n_seen.tolist(), strict=True)
        for ablation, n in n_documents.items():
            self._race_documents.setdefault(ablation.name, set()).update(race.order[:n])

    def choosing_documents(self, cell: OpenCell) -> dict[str, tuple[int, ...]]:
        """Return the numbers of the documents that the search used, for each task.

        The numbers are ascending. With `rescoring: race`, a search uses only some of the documents.
        """
        if not self._race_documents:
            return cell.documents
        chosen: dict[str, list[int]] = {}
        for task, number in sorted(set().union(*self._race_documents.values())):
            chosen.setdefault(task, []).append(number)
        return {task: tuple(numbers) for task, numbers in chosen.items()}

    def cost(self) -> PruneCost:
        """Return the cost so far: numbers of evaluations, forward passes and seconds."""
        n_observed = len(self._observed) / max(1, len(self.cells))
        seconds = self._seconds
        if self.evaluated or self._race_documents:
            names = [ablation.name for ablation in self.evaluated]
            for cell in self.cells:
                measured = self._race_documents | dict.fromkeys(names, cell.document_keys)
                seconds += cell.store.seconds(measured)
        evaluations = len(self.evaluated) + n_observed + self._evaluations
        return PruneCost(evaluations=evaluations, passes=self._passes, seconds=seconds)


def _stack_documents(parts_of_cells: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Concatenate the documents of benchmarks that have equal weights.

    Args:
        parts_of_cells: For each benchmark, the values `[documents, columns]` and the weights
            `[documents]`.

    Returns:
        The values and the weights of all documents. The weights of each benchmark have the same
        sum.
    """
    values = np.concatenate([values for values, _ in parts_of_cells])
    return values, np.concatenate([weights / len(parts_of_cells) for _, weights in parts_of_cells])


def _build_observer(engine: Engine, name: str, removed: PartSet) -> ObserveDocument:
    """Build a function that measures a proxy on one document.

    The proxy is measured in the model without the layers in `removed`.
    """
    import time

    sharing = engine.sharing
    n_layers = len(engine.loaded.layers)
    if removed:
        engine = engine.ablate(Ablation.from_changes(removed=removed)).with_sharing(sharing)
    positions = [n for n in range(n_layers) if n not in removed]
    if len(engine.loaded.layers) < n_layers:
        positions = list(range(len(positions)))
    # Otherwise layers that cannot be cut have stayed in place, and pass on their input.
    measure: Callable[[Document], Mapping[str, object]] = partial(measure_state_changes, engine)
    if not PROXIES[name].observe:
        measure = partial(output_proxies, engine, only=name)

    def watch(document: Document) -> DocumentArrays:
        start = time.perf_counter()
        arrays = {key: np.asarray(value) for key, value in measure(document).items()}
        for key, array in arrays.items():
            arrays[key] = array[np.ix_(*[positions] * array.ndim)] if array.ndim else array
        return {**arrays, "seconds": np.asarray(time.perf_counter() - start)}

    return watch
