"""Score sets of removals, and parts that could be removed next, on the calibration documents.

All scores are losses: the smaller, the better it is to remove.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from tracker.core.changes import INTACT, Ablation
from tracker.core.documents import Document
from tracker.core.errors import CellError
from tracker.core.estimates import Estimate
from tracker.core.proxies import PROXIES, passes
from tracker.core.prune_records import PruneCost, PruneStep
from tracker.core.search_parts import SearchParts
from tracker.engine.observers.layer_proxies import output_proxies, span_similarity
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.shards import Arrays
from tracker.measuring.meter import Place
from tracker.measuring.observing import Observe
from tracker.search.cells import OpenCell
from tracker.stats.accuracy import mean_interval
from tracker.stats.arrays import Array, per_token
from tracker.stats.rank_agreement import rounded
from tracker.stats.support import together

Set = tuple[int, ...]
"""Parts that are removed together, ascending, as `SearchParts` numbers them."""

NO_FINITE = (
    "no removal has a finite score on all calibration documents; take another strategy, or dtype: "
    "{value: float32}"
)
"""Reasons given if nothing can be compared."""
_TURNING = ("cosine_score", "relative_update", "angular_distance")
"""Proxies that are stored together, as one kind of observation."""


def grown(removed: Set, *parts: int) -> Set:
    """Return a set extended by some parts."""
    return tuple(sorted((*removed, *parts)))


@dataclass(frozen=True)
class Losses:
    """The losses of some sets, document by document.

    Attributes:
        sets: The sets of removed parts.
        values: Losses `[documents, sets]`.
        weights: Weights of documents `[documents]`, summing to 1.
        ties: Values that decide between sets of equal loss `[sets]`.
        binary: Whether a document's losses differ by whole numbers.
    """

    sets: Sequence[Set]
    values: Array
    weights: Array
    ties: Array
    binary: bool = False

    @property
    def means(self) -> Array:
        """The loss of each set; infinite if any document's loss is not finite."""
        return np.nan_to_num(rounded(self.weights @ self.values), nan=np.inf)

    @property
    def order(self) -> list[int]:
        """The indices of sets from the smallest loss to the largest.

        Equal losses are ordered by `ties`, then the set whose parts are later comes first.
        """
        ties = np.nan_to_num(rounded(self.ties), nan=np.inf)
        later = ([-part for part in reversed(each)] for each in self.sets)
        keys = list(zip(self.means, ties, later, strict=True))
        return sorted(range(len(keys)), key=keys.__getitem__)

    def step(self, before: Set | None, order: Sequence[int] | None = None) -> PruneStep:
        """Choose the best set, and estimate its margin over the runner-up.

        Raises CellError if no loss is finite. `before` is the set it extends; None if there is
        none.
        """
        best, *others = self.order if order is None else order
        means = self.means
        if not math.isfinite(means[best]):
            raise CellError(NO_FINITE)
        chosen = self.sets[best]
        added = None if before is None else next(iter(set(chosen) - set(before)))
        step = PruneStep(removed=chosen, layer=added, score=float(means[best]))
        if not others or not math.isfinite(means[others[0]]):
            return step.model_copy(update={"reasons": {"margin": "there was nothing else"}})
        second = others[0]
        apart = self.values[:, second] - self.values[:, best]
        extra = (1.0, -1.0) if self.binary else ()
        margin = float(means[second] - means[best])
        # It is the best of many: the intervals beside all others hold simultaneously.
        alone = Estimate(margin, *mean_interval(apart, self.weights, extra))
        (wide,) = together([alone], [len(apart)], len(others))
        found: dict[str, object] = {"runner_up": self.sets[second], "margin": wide}
        if margin and wide.low is not None and wide.high is not None and wide.low <= 0:
            half = (wide.high - wide.low) / 2
            found["separates"] = math.ceil(len(apart) * (half / margin) ** 2)
        return step.model_copy(update=found)


class Scores:
    """Scores of sets on the calibration cells of a search, and the cost of measuring them.

    All cells count equally, whatever their sizes. `parts` are the parts that may be removed.
    """

    def __init__(self, cells: Sequence[OpenCell], parts: SearchParts) -> None:
        self.cells = cells
        self.parts = parts
        self.layers = parts.layers
        self.evaluated: set[Ablation] = set()
        self._passes = self._evaluations = 0.0
        self._seconds = 0.0
        self._observed: set[str] = set()
        self._raced: dict[str, frozenset[Place]] = {}

    @property
    def documents(self) -> int:
        """The number of documents of all cells together."""
        return sum(cell.n for cell in self.cells)

    def ablation(self, removed: Set) -> Ablation:
        """Return the ablation of a set."""
        return self.parts.without(removed)

    def losses(self, by: str, sets: Sequence[Set]) -> Losses:
        """Score sets by their measured losses: `accuracy`, or `gold_logprob`."""
        ablations = [self.ablation(each) for each in sets]
        new = [one for one in ablations if one not in self.evaluated]
        for cell in self.cells:
            if new or not self.evaluated:
                self._passes += cell.passes(new) * cell.n / self.documents
            cell.measure(ablations, candidates=True)
        self.evaluated |= {INTACT, *ablations}
        chosen, other = (
            _stacked([(paired.drops, paired.weights) for paired in of_cells])
            for of_cells in (
                [cell.paired(ablations, which) for cell in self.cells]
                for which in (by, "gold_logprob" if by == "accuracy" else "accuracy")
            )
        )
        whole = bool((chosen[0] == np.rint(chosen[0])).all())
        return Losses(sets, *chosen, other[1] @ other[0], whole)

    def proxy(self, name: str, removed: Set, spans: Sequence[range] | None = None) -> Losses:
        """Score parts that could be removed next by a proxy, in the model without `removed`.

        Args:
            name: One of `PROXIES` that has a strategy, or `angular_distance`.
            removed: The layers removed so far.
            spans: Spans of layers that could be removed together, of the intact model; None = each
                layer alone.

        Returns:
            The losses; for `angular_distance` those of spans.
        """
        left = [layer for layer in range(self.layers) if layer not in removed]
        spans = [range(n, n + 1) for n in range(len(left))] if spans is None else spans
        found = [self._proxy(cell, name, removed, spans) for cell in self.cells]
        values, weights = _stacked(found)
        sets = [grown(removed, *(left[n] for n in span)) for span in spans]
        return Losses(sets, values, weights, np.zeros(len(sets)))

    def _proxy(
        self, cell: OpenCell, name: str, removed: Set, spans: Sequence[range]
    ) -> tuple[Array, Array]:
        """Return a proxy's mean in each document, and the documents' weights."""
        how = "turning" if name in _TURNING else name.replace("_", "-")
        without = f"-without-{'-'.join(map(str, removed))}" if removed else ""
        kind = f"{how}-1{without}"
        sums = cell.observe(kind, partial(_observer, name=name, removed=removed)).arrays
        if (key := f"{cell.store.identity.key}/{kind}") not in self._observed:
            self._observed.add(key)
            left = self.layers - len(removed)
            self._passes += (
                passes(name, left, shared=True) * left / self.layers * cell.n / self.documents
            )
            self._seconds += float(sums["seconds"].sum())
        counted = sums["tokens" if PROXIES[name].observe else "predicted"]
        starts, ends = [span.start for span in spans], [span.stop - 1 for span in spans]
        far = name == "angular_distance"
        means = per_token(sums[name][:, starts, ends] if far else sums[name][:, starts], counted)
        if name == "gate_gradient":
            # The magnitude per document, so that opposite signs do not cancel.
            return np.abs(means), np.full(len(means), 1 / len(means))
        return means, counted / counted.sum()

    def raced(
        self,
        cell: OpenCell,
        beneath: Sequence[Ablation],
        ablations: Sequence[Ablation],
        seen: NDArray[np.int64],
        took: NDArray[np.int64],
        order: Sequence[Place],
    ) -> None:
        """Record the candidates that a race measured on a cell, each on its number of documents.

        `beneath` is the removal that they have in common, by itself, if any. A race `took` more
        documents of a group than it looked at.
        """
        ends = sorted(set(took.tolist()))
        for before, end in zip([0, *ends], ends, strict=False):
            open_then = [one for one, n in zip(ablations, took, strict=True) if n >= end]
            self._passes += cell.passes([*beneath, *open_then]) * (end - before) / cell.n
        self._evaluations += float(took.sum()) / cell.n + (not self._evaluations)
        looked = dict.fromkeys((INTACT, *beneath), int(seen.max()))
        looked |= zip(ablations, seen.tolist(), strict=True)
        for one, n in looked.items():
            self._raced[one.name] = self._raced.get(one.name, frozenset()) | set(order[:n])

    def looked_at(self, cell: OpenCell) -> dict[str, tuple[int, ...]]:
        """Return the documents of a cell that chose: task → their numbers, ascending.

        A race uses only some of the documents.
        """
        if not self._raced:
            return cell.documents
        places = frozenset[Place]().union(*self._raced.values())
        tasks = dict.fromkeys(task for task, _ in sorted(places))
        return {task: tuple(sorted(n for one, n in places if one == task)) for task in tasks}

    def cost(self) -> PruneCost:
        """Return the cost so far."""
        names = [one.name for one in self.evaluated]
        seconds = 0.0
        if names or self._raced:
            seconds = sum(
                cell.store.seconds(self._raced | dict.fromkeys(names, cell.places))
                for cell in self.cells
            )
        return PruneCost(
            evaluations=len(self.evaluated)
            + len(self._observed) / max(1, len(self.cells))
            + self._evaluations,
            passes=self._passes,
            seconds=seconds + self._seconds,
        )


def _stacked(each: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Stack the documents of several cells, with equal weight for each cell."""
    values = np.concatenate([values for values, _ in each])
    return values, np.concatenate([weights / len(each) for _, weights in each])


def _observer(engine: Engine, name: str, removed: Set) -> Observe:
    """Build an observer of a proxy in a copy of the model that really lacks some layers."""
    import time

    sharing = engine.sharing
    layers = len(engine.loaded.layers)
    if removed:
        engine = engine.without(Ablation.of(removed=removed)).with_sharing(sharing)
    left = [n for n in range(layers) if n not in removed]
    # Layers that cannot be cut stay in place, and pass on their input.
    there = left if len(engine.loaded.layers) == layers else list(range(len(left)))
    watched: Callable[[Document], Mapping[str, object]] = (
        partial(span_similarity, engine)
        if PROXIES[name].observe
        else partial(output_proxies, engine, only=name)
    )

    def watch(document: Document) -> Arrays:
        start = time.perf_counter()
        found = {key: np.asarray(value) for key, value in watched(document).items()}
        cut = {
            key: value[np.ix_(*[there] * value.ndim)] if value.ndim else value
            for key, value in found.items()
        }
        return {**cut, "seconds": np.asarray(time.perf_counter() - start)}

    return watch
