"""Finds pairs of models that can be compared layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from tracker.analysis.comparable import models_of, setting
from tracker.analysis.labels import benchmark_labels, model_labels
from tracker.analysis.layer_figures import sure
from tracker.core.estimates import Estimate
from tracker.core.formats import Measure, measure_of
from tracker.core.records import CellRecord, RunRecord
from tracker.stats.combined import difference
from tracker.stats.support import together

MOST = 10
"""So many pairs are shown at most."""


@dataclass(frozen=True)
class SharedBenchmark:
    """Two models on one benchmark of `n` documents each.

    Attributes:
        differences: Layer → drop of the one minus drop of the other, a fraction or the loss's unit.
        shown: The layers whose difference is shown not to be 0, with 95 % confidence for all layers
            and benchmarks of the pair.
    """

    benchmark: str
    n: int
    differences: dict[int, Estimate]
    shown: frozenset[int]

    def difference(self, layer: int) -> Estimate:
        """Find the difference of a layer, or why there is none."""
        nothing = Estimate(None, reason="not measured in both models")
        return self.differences.get(layer, nothing)


@dataclass(frozen=True)
class Pair:
    """Two models with as many layers, on the benchmarks that they share in one unit.

    `other` is the label of the model that is subtracted.
    """

    one: str
    other: str
    measure: Measure
    comparisons: tuple[SharedBenchmark, ...]

    @property
    def layers(self) -> list[int]:
        """The layers that some benchmark compares."""
        return sorted({layer for shared in self.comparisons for layer in shared.differences})


def pairs_of(cells: Sequence[CellRecord]) -> tuple[list[Pair], int]:
    """Pair up models with as many layers that share a benchmark, documents and settings alike.

    The first pairs (at most `MOST`), in the order of the page, and how many there are in all.
    Accuracies and losses of the same two models are pairs of their own.
    """
    groups = models_of(cells)
    labels = model_labels([group[0].model for group in groups])
    known = [{setting(cell): cell for cell in group if cell.whole_layers} for group in groups]
    found: list[Pair] = []
    total = 0
    for i, j in combinations(range(len(groups)), 2):
        shared = [key for key in known[i] if key in known[j]]
        if groups[i][0].model.layers != groups[j][0].model.layers or not shared:
            continue
        mine = [known[i][key] for key in shared]
        measures = list(dict.fromkeys(measure_of(cell) for cell in mine))
        total += len(measures)
        if len(found) >= MOST:
            continue
        names = benchmark_labels(mine)
        for measure in measures:
            here = [
                (name, cell, known[j][key], compare(cell, known[j][key]))
                for key, cell, name in zip(shared, mine, names, strict=True)
                if measure_of(cell) == measure
            ]
            family = sum(len(differences) for *_, differences in here)
            comparisons = []
            for name, one, other, differences in here:
                wide = compare(one, other, family)
                shown = frozenset(layer for layer in wide if sure(wide[layer]))
                comparisons.append(SharedBenchmark(name, one.n, differences, shown))
            found.append(Pair(labels[i], labels[j], measure, tuple(comparisons)))
    return found[:MOST], total


def compare(one: CellRecord, other: CellRecord, family: int = 1) -> dict[int, Estimate]:
    """Subtract the accuracy drops of another model (or precision) from those of one.

    Both have as many layers; the differences are of the whole layers that both measured. A family
    of their intervals holds at once.
    """
    theirs = other.runs_of()

    def wide(run: RunRecord) -> Estimate:
        return together([run.drop], [run.n], family)[0]

    return {
        run.change.layer: difference(wide(run), wide(theirs[run.change.layer]))
        for run in one.whole_layers
        if run.change.layer in theirs
    }
