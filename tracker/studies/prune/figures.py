"""What the study `prune` computes: what models without layers answer, strategy by strategy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from tracker.core.estimates import Estimate
from tracker.core.prune_records import PruneRecord
from tracker.pruning.search.figures import Choices
from tracker.stats.combined import mean
from tracker.stats.interaction import interactions
from tracker.stats.multiple import holm
from tracker.stats.rank_agreement import rounded
from tracker.stats.resampling import SEED

OWN, TASKS, TEXT = "its own task", "all tasks", "plain text"
"""What documents chose."""
ACCURACY = "accuracy"
COSINES = ("cosine_oneshot", "cosine")
"""The strategies that the paper holds against accuracy, the first that is there."""


class Way(NamedTuple):
    """How layers are chosen, and how many."""

    strategy: str
    amount: str
    calibration: str = OWN


@dataclass
class Compared:
    """The prunings of one model over the benchmarks of a file.

    Attributes:
        title: The model, as people read it.
        layers: How many it has.
        unpruned: Of each benchmark the intact model's test accuracy.
        n: Of each benchmark how many test documents there are.
        metrics: Of each benchmark what is called accuracy.
        at_chance: Benchmarks that the intact model does not answer → why.
        found: What each way chose for each benchmark.
        failed: Ways that failed on a benchmark → why.
    """

    title: str
    layers: int
    unpruned: dict[str, Estimate] = field(default_factory=dict)
    n: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)
    at_chance: dict[str, str] = field(default_factory=dict)
    found: dict[tuple[Way, str], Choices] = field(default_factory=dict)
    failed: dict[tuple[Way, str], str] = field(default_factory=dict)

    @cached_property
    def ways(self) -> list[Way]:
        """Every way that was tried, in order."""
        return list(dict.fromkeys(way for way, _ in (*self.found, *self.failed)))

    @property
    def amounts(self) -> list[str]:
        """How much was to go, where something was found."""
        return list(dict.fromkeys(way.amount for way, _ in self.found))

    @property
    def benchmarks(self) -> list[str]:
        """All benchmarks."""
        return list(self.unpruned)

    @property
    def counted(self) -> list[str]:
        """The benchmarks over which means are taken."""
        return [name for name in self.unpruned if name not in self.at_chance]

    @property
    def over(self) -> str:
        """What `mean` is of, in a sentence."""
        some = self.counted
        return ", ".join(some) if len(some) < 2 else f"the mean of {len(some)} benchmarks"

    def strategies(self, amount: str, calibration: str = OWN) -> list[str]:
        """The strategies that were tried for an amount."""
        return [way.strategy for way in self.ways if way[1:] == (amount, calibration)]

    def mean(self, of: Callable[[str], Estimate]) -> Estimate:
        """Average a figure over the benchmarks that count; of a single one the figure itself.

        None where one of them has none: means of different benchmarks cannot be compared.
        """
        if not self.counted:
            return Estimate(None, reason="no benchmark is above chance unpruned")
        each = {name: of(name) for name in self.counted}
        for name, one in each.items():
            if one.value is None:
                return Estimate(None, reason=f"{name}: {one.reason}")
        first = next(iter(each.values()))
        return first if len(each) == 1 else mean(list(each.values()))

    @property
    def unpruned_mean(self) -> Estimate:
        """The intact model's mean test accuracy."""
        return self.mean(self.unpruned.__getitem__)

    def level(self, way: Way, benchmark: str) -> Estimate:
        """The test accuracy of a way on a benchmark."""
        if (one := self.found.get((way, benchmark))) is not None:
            return one.level
        return Estimate(None, reason=self.failed.get((way, benchmark), "it was not asked for"))

    def level_mean(self, way: Way) -> Estimate:
        """The mean test accuracy of a way."""
        return self.mean(lambda name: self.level(way, name))

    def at_mean(self, way: Way, removed: int) -> Estimate:
        """The mean test accuracy of a way with so many layers gone."""

        def at(name: str) -> Estimate:
            one = self.found.get((way, name))
            return one.at(removed) if one is not None else self.level(way, name)

        return self.mean(at)

    def apart(self, one: Way, other: Way, benchmark: str) -> Estimate:
        """How much more a way answers than another, on the same documents of a benchmark."""
        if benchmark in self.at_chance:
            return Estimate(None, reason=self.at_chance[benchmark])
        for way in (one, other):
            if (level := self.level(way, benchmark)).value is None:
                return level
        first, second = (self.found[way, benchmark] for way in (one, other))
        return first.above(second)

    def apart_mean(self, one: Way, other: Way) -> Estimate:
        """How much more a way answers than another on average, tested by the signs of documents."""
        found = self.mean(lambda name: self.apart(one, other, name))
        if found.value is None:
            return found
        pairs = [(self.found[one, name], self.found[other, name]) for name in self.counted]
        values = [(a.outcomes - b.outcomes) * a.weights for a, b in pairs]
        together = np.concatenate(values) / len(pairs)
        # Documents of equal weight are whole numbers then, of which the test is exact.
        scaled = rounded(together * len(together))
        (tested,) = interactions(scaled[:, None], seed=SEED)
        return Estimate(found.value, found.low, found.high, tested.p_value)

    def beside(self, amount: str) -> list[Beside]:
        """Hold accuracy against every other strategy, calibrated on each benchmark itself."""
        own = Way(ACCURACY, amount)
        if own not in self.ways:
            return []
        others = [Way(name, amount) for name in self.strategies(amount) if name != ACCURACY]
        return self._adjusted([(own, other) for other in others])

    def calibrated(self, amount: str) -> list[Beside]:
        """Hold accuracy against cosine, by what documents choose."""
        pairs = []
        for calibration in (OWN, TASKS, TEXT):
            there = self.strategies(amount, calibration)
            cosine = next((name for name in COSINES if name in there), None)
            if ACCURACY in there and cosine is not None:
                pairs.append((Way(ACCURACY, amount, calibration), Way(cosine, amount, calibration)))
        return self._adjusted(pairs)

    def _adjusted(self, pairs: Sequence[tuple[Way, Way]]) -> list[Beside]:
        found = [self.apart_mean(*pair) for pair in pairs]
        adjusted = holm([one.p_value for one in found])
        return [Beside(*pair, one, p) for pair, one, p in zip(pairs, found, adjusted, strict=True)]

    def searches(self, way: Way) -> list[PruneRecord]:
        """The searches of a way, each once, whichever benchmarks it served."""
        unique: dict[object, PruneRecord] = {}
        for (each, _), pruning in self.found.items():
            for record in pruning.records if each == way else ():
                chosen_by = tuple(one.model_dump_json() for one in record.calibration)
                unique.setdefault((chosen_by, record.draw), record)
        return list(unique.values())

    def share(self, amount: str) -> float:
        """Which share of the layers goes."""
        return self.removed(amount)[-1] / self.layers

    def removed(self, amount: str) -> list[int]:
        """How many layers go, ascending: one number where all layers have one size."""
        return sorted(
            {
                len(record.removed)
                for (way, _), pruning in self.found.items()
                for record in pruning.records
                if way.amount == amount
            }
        )


@dataclass(frozen=True)
class Beside:
    """One way held against another.

    Attributes:
        one: The way that is held against
        other: the other one.
        found: How much more it answers on average.
        p: The p-value of that after Holm over all that are held against each other; None without.
    """

    one: Way
    other: Way
    found: Estimate
    p: float | None
