"""Study: compare pruning by measured accuracy with pruning by proxies, and its cost."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import numpy as np

from tracker.core.config import CellRequest, Changes, Documents
from tracker.core.estimates import Estimate, Unit
from tracker.core.findings import LineChart
from tracker.core.formats import points
from tracker.core.prune_records import PruneRecord
from tracker.core.records import CellRecord
from tracker.core.tables import Column, Row, Table, table
from tracker.search.cells import Lender
from tracker.search.conduct import Pursued, pursue
from tracker.search.planning import refuse_unsavable
from tracker.search.report import (
    COST,
    Choices,
    calibration_documents,
    cost_columns,
    frontier,
    separated,
    unsure_sentence,
)
from tracker.search.request import SearchRequest, search_of
from tracker.search.search import budget_of, refuse_mixed, refuse_unknown
from tracker.search.strategies import NULL
from tracker.stats.accuracy import accuracy
from tracker.stats.effects import interactions
from tracker.stats.rank_agreement import rounded
from tracker.stats.resampling import SEED
from tracker.stats.support import between, holm, mean, together, verdicts
from tracker.studies.base import (
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    Subject,
    study_texts,
)
from tracker.studies.registry import PruneSettings

OWN, TASKS, TEXT = "its own task", "all tasks", "plain text"
"""Documents that choose the layers."""
ACCURACY = "accuracy"
COSINES = ("cosine_oneshot", "cosine")
"""The strategies that the paper holds against accuracy, the first that is there."""


class Way(NamedTuple):
    """Strategy, amount and calibration of a pruning."""

    strategy: str
    amount: str
    calibration: str = OWN


@dataclass(frozen=True)
class PrunedBenchmark:
    """Test documents of a benchmark.

    Attributes:
        unpruned: Test accuracy of the intact model.
        n: Number of test documents.
        metric: Metric that is called accuracy.
        at_chance: Reason why the intact model cannot answer it; empty if it can.
        available: Number of documents available for tests; 0 if unknown.
    """

    unpruned: Estimate
    n: int = 0
    metric: str = ""
    at_chance: str = ""
    available: int = 0


@dataclass
class Prunings:
    """Prunings of one model over the benchmarks of a file.

    Attributes:
        title: Label of the model.
        layers: Number of its layers.
        benchmarks: All benchmarks.
        found: Prunings that each way chose for each benchmark.
        failed: Ways that failed on a benchmark → reason.
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
        """Amounts to remove, where something was found."""
        return list(dict.fromkeys(way.amount for way, _ in self.found))

    @property
    def counted(self) -> list[str]:
        """The benchmarks over which means are taken."""
        return [name for name, benchmark in self.benchmarks.items() if not benchmark.at_chance]

    @property
    def over(self) -> str:
        """Words for the benchmarks that `mean` averages."""
        some = self.counted
        return ", ".join(some) if len(some) < 2 else f"the mean of {len(some)} benchmarks"

    def strategies(self, amount: str, calibration: str = OWN) -> list[str]:
        """Return the strategies that were tried for an amount."""
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
        """Return the test accuracy of a way on a benchmark, or with `removed` layers removed.

        If `way` is None, return that of the intact model.
        """
        if way is None:
            return self.benchmarks[benchmark].unpruned
        if (choices := self.found.get((way, benchmark))) is None:
            return Estimate(None, reason=self.failed.get((way, benchmark), "it was not asked for"))
        return choices.level if removed is None else choices.at(removed)

    def level_mean(self, way: Way | None, removed: int | None = None) -> Estimate:
        """Return the mean test accuracy of a way over the benchmarks."""
        return self.mean(lambda name: self.level(way, name, removed))

    def apart(self, one: Way, other: Way, benchmark: str) -> Estimate:
        """Compare two ways on the same documents of a benchmark."""
        if why := self.benchmarks[benchmark].at_chance:
            return Estimate(None, reason=why)
        for way in (one, other):
            if (level := self.level(way, benchmark)).value is None:
                return level
        return self.found[one, benchmark].above(self.found[other, benchmark])

    def apart_mean(self, one: Way, other: Way) -> Estimate:
        """Compare two ways on average, tested by the signs of documents."""
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
        """Compare accuracy with every other strategy, calibrated on each benchmark itself."""
        own = Way(ACCURACY, amount)
        if own not in self.ways:
            return []
        others = [Way(name, amount) for name in self.strategies(amount) if name != ACCURACY]
        return self._adjusted([(own, other) for other in others])

    def calibrated(self, amount: str) -> list[Contrast]:
        """Compare accuracy with cosine, for each kind of calibration documents."""
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
        """Compute the possible ranks of strategies by mean test accuracy, 1 = the most.

        Strategies are calibrated on each benchmark itself. Random draws, which are the reference,
        and strategies without a mean are left out.
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
        """Factor by which every benchmark has more test documents."""
        counted = [self.benchmarks[name] for name in self.counted]
        return min((one.available / one.n for one in counted if one.available), default=math.inf)

    def searches(self, way: Way) -> list[PruneRecord]:
        """Return the distinct searches of a way, over all benchmarks."""
        unique: dict[object, PruneRecord] = {}
        for (tried, _), choices in self.found.items():
            for record in choices.records if tried == way else ():
                chosen_by = tuple(part.model_dump_json() for part in record.calibration)
                unique.setdefault((chosen_by, record.draw), record)
        return list(unique.values())

    def removed(self, amount: str) -> list[int]:
        """Return the numbers of removed layers, ascending; only one if layers have equal size."""
        some = (choices for (way, _), choices in self.found.items() if way.amount == amount)
        return sorted({len(record.removed) for choices in some for record in choices.records})

    def removal(self, amount: str) -> str:
        """Return the removed amount, such as `25 % removed (8 of 32 layers)`."""
        counts = self.removed(amount)
        layers = "–".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        return f"{amount} removed ({layers} of {self.layers} layers)"


@dataclass(frozen=True)
class Contrast:
    """Comparison of two ways of pruning.

    Attributes:
        one: First way.
        other: Way that is subtracted.
        difference: Mean difference of their accuracies; its interval, unlike its p-value, is
            simultaneous for all comparisons.
        p: p-value of the difference after Holm over all comparisons; None if there is none.
    """

    one: Way
    other: Way
    difference: Estimate
    p: float | None

    @property
    def sign(self) -> int:
        """Sign of the difference: 1 significantly more, −1 less, 0 where neither is shown.

        Both the interval and the test must show it.
        """
        return 0 if self.p is None or self.p >= SIGNIFICANT else self.difference.side()

    @property
    def settled_by(self) -> float | None:
        """Factor of test documents that would show such a difference; None without one."""
        value, low, high = self.difference.value, self.difference.low, self.difference.high
        if not value or low is None or high is None:
            return None
        return ((high - low) / 2 / value) ** 2


def compared(pursued: Pursued, text: str | None) -> list[Prunings]:
    """Group the searches by model; `text` is the plain text to calibrate on."""
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
    """Return a search's request without the benchmark of its cell."""
    return replace(asked.cell, benchmark=asked.cell.benchmark.named("any"))


def _way(asked: SearchRequest, text: str | None) -> Way:
    calibration = OWN
    if asked.calibrate:
        calibration = TEXT if asked.calibrate == (text,) else TASKS
    return Way(asked.strategy, asked.remove or "", calibration)


def _at_chance(cell: CellRecord) -> str:
    """Return that a model has nothing to lose on the test documents; empty where it has."""
    level, chance = cell.baseline.value, cell.chance_accuracy
    if level is None or chance is None or not math.isfinite(chance) or level > chance + 1e-9:
        return ""
    return f"unpruned it is at {points(level)} %, not above chance, {points(chance)} %"


ELSEWHERE = (ACCURACY, *COSINES)
"""Strategies that are calibrated on other documents than the benchmark's own too."""
PAPER = "LLaMA3-8B, 25 % removed, in arXiv 2605.14075"
PAPER_SHARE = 0.25
PAPER_HOURS = 4.6
PAPER_LEVELS = {OWN: (0.6749, 0.5954), TASKS: (0.6504, 0.6010), TEXT: (0.5023, 0.5969)}
"""Mean test accuracies there, chosen by accuracy and by cosine; the plain text is C4."""
_MANY = 1000
"""Factor of the test documents beyond which a required number is not reported."""
TEXTS = study_texts("prune", cost=COST, paper=PAPER, paper_levels=PAPER_LEVELS)


class Prune(Study[PruneSettings]):
    """Prunes by each strategy, on each benchmark of a file, by several calibrations."""

    name = "prune"
    question = "Does pruning by measured accuracy beat pruning by proxies, and what does it cost?"
    intact = True
    layers = 1
    chooses = True
    texts = TEXTS

    @property
    def _text(self) -> str | None:
        """The plain text to calibrate on, as a benchmark."""
        return None if self.settings.text is None else f"corpus:{self.settings.text}"

    def requests(self, context: StudyContext) -> list[CellRequest]:
        """Return requests for each layer's removal, a greedy search's first step.

        RequestError where the settings are no search's, before anything is measured.
        """
        requests = super().requests(context)
        lender = Lender(context.ledger, context.options, context.progress)
        for cell in requests:
            searches = self._searches(cell, [cell])
            refuse_unknown(searches, lender)
            budgets = {search.remove: budget_of(search, lender) for search in searches}
            refuse_unsavable(searches, [budgets[search.remove] for search in searches], lender)
        searches = [s for cell in requests for s in self._searches(cell, requests)]
        refuse_mixed(searches, lender, {})
        return requests

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterator[CellRequest]:
        """Yield the cell's whole layers, on the documents that choose."""
        yield cell.on("calibration").with_changes(layers=cell.changes.whole_layers)

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Search, test the chosen layers, and compare the strategies."""
        result, cells = StudyResult(), []
        for subject in subjects:
            if subject.record.higher_is_better:
                cells.append(subject.request)
            else:
                result.lack(subject.record.title, *TEXTS.all("is_a_loss"))
        if not cells:
            result.add("No benchmark of the file has an accuracy.")
            return result
        searches = [search for cell in cells for search in self._searches(cell, cells)]
        typed = context.input.typed
        command = [*self.command, *typed, *self.settings.typed()] if typed else []
        lender = Lender(context.ledger, context.options, context.progress, command)
        pursued = pursue(searches, lender, context.publisher)
        result.ran = pursued.outcome
        result.rests_on = [place for record in pursued.records for place in record.rests_on]
        for group in compared(pursued, self._text):
            result.add(*answers_of(group), *tables_of(group), *charts_of(group))
        result.lacking += TEXTS.all("lacking", self.settings)
        return result

    def _searches(self, cell: CellRequest, cells: Sequence[CellRequest]) -> list[SearchRequest]:
        """List the searches for one benchmark, of a file with these cells."""
        seed = cell.documents.seed
        alone = replace(cell, documents=Documents(seed=seed), changes=Changes())
        same = [
            c for c in cells if replace(c, benchmark=c.benchmark.named(str(cell.benchmark))) == cell
        ]
        tasks = tuple(dict.fromkeys(str(c.benchmark) for c in same))
        elsewhere = [tasks] if len(tasks) > 1 else []
        elsewhere += [(self._text,)] if self._text is not None else []
        strategies = dict.fromkeys(self.settings.strategy)
        ways: list[tuple[str, tuple[str, ...]]] = [(name, ()) for name in strategies]
        ways += itertools.product([s for s in strategies if s in ELSEWHERE], elsewhere)
        samples = {
            "sample": cell.documents.sample,
            "test_sample": self.settings.test_sample or cell.documents.sample,
        }
        return [
            search_of(alone, {"strategy": name, "remove": amount, "calibrate": by, **samples})
            for amount, (name, by) in itertools.product(self.settings.remove, ways)
        ]


# Sentences


def answers_of(group: Prunings) -> Iterator[str]:
    """Yield which strategy is best, and whether accuracy beats cosine."""
    shares = {amount: group.removed(amount)[-1] / group.layers for amount in group.amounts}
    nearest = min(shares, key=lambda amount: abs(shares[amount] - PAPER_SHARE))
    for amount in group.amounts:
        yield best_sentence(group, amount)
        for pair in _against_cosine(group, amount) if group.counted else []:
            paper = paper_sentence(pair) if amount == nearest else ""
            yield TEXTS.one("against_cosine", amount, pair, verdict_of(pair, group.growth), paper)
        # Where the calibration documents were too few to choose by accuracy.
        if searches := group.searches(Way(ACCURACY, amount)):
            for sentence in unsure_sentence(searches, "what accuracy chose", " a benchmark"):
                yield f"With {amount} removed, {sentence}"


def _against_cosine(group: Prunings, amount: str) -> list[Contrast]:
    """List the contrasts of accuracy: with cosine, then with cosine by other documents."""
    beside = group.beside(amount)
    same_documents = [pair for name in COSINES for pair in beside if pair.other.strategy == name][
        :1
    ]
    return same_documents + [
        pair for pair in group.calibrated(amount) if pair.one.calibration != OWN
    ]


def best_sentence(group: Prunings, amount: str) -> str:
    """Return which strategy leaves the most, where comparisons with all others show it."""
    ranks = group.places(amount)
    every = {name: group.level_mean(Way(name, amount)) for name in group.strategies(amount)}
    reason = next((level.reason for level in every.values() if level.reason), "")
    levels = {name: every[name] for name in ranks}
    first = [name for name, (best, _) in ranks.items() if best == 1]
    beside = group.beside(amount) if ranks else []
    return TEXTS.one("best", group, amount, levels, first, beside, reason)


def verdict_of(pair: Contrast, growth: float) -> str:
    """Return which of two ways answers more: `accuracy beats cosine by 3.1 pp (1.0 to 5.2)`."""
    one, other, difference = pair.one.strategy, pair.other.strategy, pair.difference
    if pair.sign < 0:
        one, other, difference = other, one, -difference
    times = pair.settled_by or 0.0
    more = times if 1 < times < _MANY else None
    return TEXTS.one("verdict", one, other, difference, pair, more, growth)


def paper_sentence(pair: Contrast) -> str:
    """Return whether a difference has the sign of the paper's."""
    return TEXTS.one("paper_sentence", pair.sign, *PAPER_LEVELS[pair.one.calibration])


# Tables and charts


def tables_of(group: Prunings) -> Iterator[Table]:
    """Yield every table of the model."""
    for amount in group.amounts:
        yield _accuracies(group, amount)
        if group.counted:
            yield from _differences(group, amount)
            yield from _calibrations(group, amount)
    yield _costs(group)


def _with_mean(
    group: Prunings, unit: Unit, of: Callable[[Row, str], Estimate], mean: Callable[[Row], Estimate]
) -> Iterator[Column[Row]]:
    """Yield a column for each benchmark, and the mean."""

    def column(name: str) -> Column[Row]:
        return Column(name, unit, lambda row: of(row, name))

    yield from map(column, group.benchmarks)
    none = Estimate(None, reason="a mean needs two benchmarks that are above chance unpruned")
    yield Column("mean", unit, lambda row: mean(row) if len(group.counted) > 1 else none)


def _accuracies(group: Prunings, amount: str) -> Table:
    strategy: Column[Way | None] = Column(
        "strategy", "text", lambda way: way.strategy if way else "unpruned"
    )
    draws = {
        way.strategy: len(choices.records)
        for (way, _), choices in group.found.items()
        if way.amount == amount and len(choices.records) > 1
    }
    return table(
        f"{group.title}: test accuracy, {group.removal(amount)}, each benchmark pruned for by "
        "its own calibration documents",
        [strategy, *_with_mean(group, "percent", group.level, group.level_mean)],
        [None, *(Way(name, amount) for name in group.strategies(amount))],
        *TEXTS.all("accuracy_notes", group.benchmarks, draws),
    )


def _differences(group: Prunings, amount: str) -> Iterator[Table]:
    def apart(row: Contrast, name: str) -> Estimate:
        return group.apart(row.one, row.other, name)

    if pairs := group.beside(amount):
        yield table(
            f"{group.title}: by how much pruning by accuracy answers more, {group.removal(amount)}",
            [
                Column("than by", "text", lambda row: row.other.strategy),
                *_with_mean(group, "points", apart, lambda row: row.difference),
                Column("p (Holm)", "p", _p),
            ],
            pairs,
            *TEXTS.all("difference_notes", group),
        )


def _p(row: Contrast) -> Estimate:
    return Estimate(row.p, reason=row.difference.reason)


def _calibrations(group: Prunings, amount: str) -> Iterator[Table]:
    pairs = group.calibrated(amount)
    if not any(pair.one.calibration != OWN for pair in pairs):
        return
    by_other = f"by {pairs[0].other.strategy}"
    yield table(
        f"{group.title}: what calibrates, {group.removal(amount)}, {group.over}",
        [
            Column("calibrated on", "text", lambda row: row.one.calibration),
            Column("by accuracy", "percent", lambda row: group.level_mean(row.one)),
            Column(by_other, "percent", lambda row: group.level_mean(row.other)),
            Column("difference", "points", lambda row: row.difference),
            Column("p (Holm)", "p", _p),
        ],
        pairs,
        *TEXTS.all("calibration_notes"),
    )


def _costs(group: Prunings) -> Table:
    def unsure(way: Way) -> str | None:
        choices = separated(group.searches(way))
        return f"{len(choices.unsure)} of {choices.compared}" if choices.compared else None

    def documents(way: Way) -> float:
        return calibration_documents(group.searches(way))

    def calibrated(way: Way) -> str:
        return way.calibration if documents(way) else "no documents"

    nothing = "nothing was compared document by document"
    columns: list[Column[Way]] = [
        Column("strategy", "text", lambda way: way.strategy),
        Column("amount", "text", lambda way: way.amount),
        Column("calibrated on", "text", calibrated),
        Column("searches", "count", lambda way: len(group.searches(way))),
        Column("documents", "count", documents),
        *cost_columns(group.searches),
        Column("choices not told apart", "text", unsure, nothing),
    ]
    return table(
        f"{group.title}: what a search cost",
        columns,
        [way for way in group.ways if group.searches(way)],
        *TEXTS.all("cost_notes", PAPER_HOURS),
    )


def charts_of(group: Prunings) -> Iterator[LineChart]:
    """Yield charts of the remaining accuracy over the number of removed layers, by strategy."""
    if not group.counted:
        return
    most = max(count for amount in group.amounts for count in group.removed(amount))
    names = dict.fromkeys(way.strategy for way in group.ways if way.calibration == OWN)
    levels = {name: [_at(group, name, removed) for removed in range(most + 1)] for name in names}
    title = f"{group.title}: what is left, the more goes, {group.over}"
    yield frontier(title, "layer", True, levels)


def _at(group: Prunings, strategy: str, removed: int) -> Estimate:
    """Return the mean accuracy at a place, from the first amount that has it."""
    levels = [group.level_mean(Way(strategy, amount), removed) for amount in group.amounts]
    return next((level for level in levels if level.value is not None), levels[0])
