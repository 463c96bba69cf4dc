"""Figures of the study `prune`: what models without layers answer, strategy by strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import numpy as np

from tracker.core.estimates import Estimate
from tracker.core.formats import points
from tracker.core.prune_records import PruneRecord
from tracker.core.records import CellRecord
from tracker.search.conduct import Pursued
from tracker.search.report import Choices
from tracker.search.request import SearchRequest
from tracker.search.strategies import NULL
from tracker.stats.accuracy import accuracy
from tracker.stats.combined import mean
from tracker.stats.interaction import interactions
from tracker.stats.rank_agreement import rounded
from tracker.stats.resampling import SEED
from tracker.stats.support import between, holm, together, verdicts
from tracker.studies.base import SIGNIFICANT, side

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


@dataclass(frozen=True)
class PrunedBenchmark:
    """What the test documents of a benchmark are.

    Attributes:
        unpruned: The intact model's test accuracy.
        n: How many test documents there are.
        metric: What is called accuracy.
        at_chance: Why the intact model does not answer it; empty where it does.
        available: How many documents there are to test on; 0 where that is not known.
    """

    unpruned: Estimate
    n: int = 0
    metric: str = ""
    at_chance: str = ""
    available: int = 0


@dataclass
class Prunings:
    """The prunings of one model over the benchmarks of a file.

    Attributes:
        title: The model, as people read it.
        layers: How many it has.
        benchmarks: All benchmarks.
        found: What each way chose for each benchmark.
        failed: Ways that failed on a benchmark → why.
    """

    title: str
    layers: int
    benchmarks: dict[str, PrunedBenchmark] = field(default_factory=dict)
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
    def counted(self) -> list[str]:
        """The benchmarks over which means are taken."""
        return [name for name, benchmark in self.benchmarks.items() if not benchmark.at_chance]

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
        figures = {name: of(name) for name in self.counted}
        for name, figure in figures.items():
            if figure.value is None:
                return Estimate(None, reason=f"{name}: {figure.reason}")
        first, *others = figures.values()
        return mean([first, *others]) if others else first

    def level(self, way: Way | None, benchmark: str, removed: int | None = None) -> Estimate:
        """The test accuracy of a way on a benchmark, or with so many layers gone.

        Without a way it is that of the intact model.
        """
        if way is None:
            return self.benchmarks[benchmark].unpruned
        if (choices := self.found.get((way, benchmark))) is None:
            return Estimate(None, reason=self.failed.get((way, benchmark), "it was not asked for"))
        return choices.level if removed is None else choices.at(removed)

    def level_mean(self, way: Way | None, removed: int | None = None) -> Estimate:
        """The mean of these."""
        return self.mean(lambda name: self.level(way, name, removed))

    def apart(self, one: Way, other: Way, benchmark: str) -> Estimate:
        """How much more a way answers than another, on the same documents of a benchmark."""
        if why := self.benchmarks[benchmark].at_chance:
            return Estimate(None, reason=why)
        for way in (one, other):
            if (level := self.level(way, benchmark)).value is None:
                return level
        return self.found[one, benchmark].above(self.found[other, benchmark])

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
        return replace(found, p_value=tested.p_value)

    def beside(self, amount: str) -> list[Contrast]:
        """Hold accuracy against every other strategy, calibrated on each benchmark itself."""
        own = Way(ACCURACY, amount)
        if own not in self.ways:
            return []
        others = [Way(name, amount) for name in self.strategies(amount) if name != ACCURACY]
        return self._adjusted([(own, other) for other in others])

    def calibrated(self, amount: str) -> list[Contrast]:
        """Hold accuracy against cosine, by what documents choose."""
        pairs = []
        for calibration in (OWN, TASKS, TEXT):
            there = self.strategies(amount, calibration)
            cosine = next((name for name in COSINES if name in there), None)
            if ACCURACY in there and cosine is not None:
                pairs.append((Way(ACCURACY, amount, calibration), Way(cosine, amount, calibration)))
        return self._adjusted(pairs)

    def _adjusted(self, pairs: Sequence[tuple[Way, Way]]) -> list[Contrast]:
        found = [self.apart_mean(*pair) for pair in pairs]
        wide = together(found, [self.documents] * len(found))
        adjusted = holm([one.p_value for one in found])
        return [Contrast(*pair, one, p) for pair, one, p in zip(pairs, wide, adjusted, strict=True)]

    def places(self, amount: str) -> dict[str, tuple[int, int]]:
        """Strategy → between which ranks its mean test accuracy lies, all at once; 1 = the most.

        Calibrated on each benchmark itself. Without random draws, which the others are held
        against, and what has no mean.
        """
        ways = [Way(name, amount) for name in self.strategies(amount) if name != NULL]
        ways = [way for way in ways if self.level_mean(way).value is not None]
        places = list(combinations(range(len(ways)), 2))
        apart = [self.apart_mean(ways[one], ways[other]) for one, other in places]
        more = np.zeros((len(ways), len(ways)), dtype=bool)
        said = verdicts(together(apart, [self.documents] * len(apart)))
        for (one, other), verdict in zip(places, said, strict=True):
            more[one, other], more[other, one] = verdict == "costs", verdict == "helps"
        return dict(zip([way.strategy for way in ways], between(more), strict=True))

    @property
    def documents(self) -> int:
        """The test documents over which means are taken."""
        return sum(self.benchmarks[name].n for name in self.counted)

    @property
    def growth(self) -> float:
        """How many times as many test documents every benchmark has."""
        counted = [self.benchmarks[name] for name in self.counted]
        return min((one.available / one.n for one in counted if one.available), default=math.inf)

    def searches(self, way: Way) -> list[PruneRecord]:
        """The searches of a way, each once, whichever benchmarks it served."""
        unique: dict[object, PruneRecord] = {}
        for (tried, _), choices in self.found.items():
            for record in choices.records if tried == way else ():
                chosen_by = tuple(part.model_dump_json() for part in record.calibration)
                unique.setdefault((chosen_by, record.draw), record)
        return list(unique.values())

    def removed(self, amount: str) -> list[int]:
        """How many layers go, ascending: one number where all layers have one size."""
        some = (choices for (way, _), choices in self.found.items() if way.amount == amount)
        return sorted({len(record.removed) for choices in some for record in choices.records})

    def removal(self, amount: str) -> str:
        """Return how much goes, such as `25 % removed (8 of 32 layers)`."""
        counts = self.removed(amount)
        layers = "–".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        return f"{amount} removed ({layers} of {self.layers} layers)"


@dataclass(frozen=True)
class Contrast:
    """One way held against another.

    Attributes:
        one: The way that is held against the other.
        other: The other one.
        difference: How much more it answers on average; the interval, unlike its p-value, holds for
            all that are held against each other at once.
        p: The p-value of that after Holm over all that are held against each other; None without.
    """

    one: Way
    other: Way
    difference: Estimate
    p: float | None

    @property
    def sign(self) -> int:
        """Whether the one answers significantly more (1) or less (−1); 0 where neither is shown.

        Both the interval and the test must show it.
        """
        return 0 if self.p is None or self.p >= SIGNIFICANT else side(self.difference)

    @property
    def settled_by(self) -> float | None:
        """How many times as many test documents would show such a difference; None without one."""
        value, low, high = self.difference.value, self.difference.low, self.difference.high
        if not value or low is None or high is None:
            return None
        return ((high - low) / 2 / value) ** 2


def compared(pursued: Pursued, text: str | None) -> list[Prunings]:
    """Put together the searches of each model; `text` is the plain text to calibrate on."""
    groups: dict[object, Prunings] = {}
    cells = {cell.place: cell for cell in pursued.outcome.cells}
    for one in pursued.searched:
        asked, record, answered = one.asked, one.record, one.answered
        shots = asked.cell.benchmark.num_fewshot
        title = record.model.name + ("" if shots is None else f", {shots}-shot")
        group = groups.setdefault(_model_of(asked), Prunings(title, record.model.layers))
        way, name = _way(asked, text), str(asked.cell.benchmark)
        if name not in group.benchmarks:
            tested = next((cells[place] for place in record.rests_on if place in cells), None)
            group.benchmarks[name] = PrunedBenchmark(
                accuracy(answered.baseline, answered.weights),
                record.baseline.n,
                record.metric,
                "" if tested is None else _at_chance(tested),
                0 if tested is None else tested.benchmark.documents,
            )
        draws = group.found.get((way, name), Choices((), ()))
        group.found[way, name] = Choices((*draws.records, record), (*draws.answered, answered))
    for asked, why in pursued.failed.items():
        if _model_of(asked) in groups:
            groups[_model_of(asked)].failed[_way(asked, text), str(asked.cell.benchmark)] = why
    return list(groups.values())


def _model_of(asked: SearchRequest) -> object:
    """All that is asked of a search's cell but the benchmark."""
    return replace(asked.cell, benchmark=asked.cell.benchmark.named("any"))


def _way(asked: SearchRequest, text: str | None) -> Way:
    calibration = OWN
    if asked.calibrate:
        calibration = TEXT if asked.calibrate == (text,) else TASKS
    return Way(asked.strategy, asked.remove or "", calibration)


def _at_chance(cell: CellRecord) -> str:
    """Say that a model has nothing to lose on the test documents; empty where it has."""
    level, chance = cell.baseline.value, cell.chance_accuracy
    if level is None or chance is None or not math.isfinite(chance) or level > chance + 1e-9:
        return ""
    return f"unpruned it is at {points(level)} %, not above chance, {points(chance)} %"
