"""Does pruning by measured accuracy beat pruning by proxies, and what does it cost?"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from tracker.core.config import CellRequest, Changes, Documents
from tracker.core.estimates import Estimate, Unit
from tracker.core.findings import LineChart
from tracker.core.formats import (
    counted,
    level_text,
    listed,
    p_value,
    points,
    three_digits,
    two_digits,
    with_interval,
)
from tracker.core.tables import Column, Row, Table, table
from tracker.search.cells import Lender
from tracker.search.conduct import pursue
from tracker.search.planning import refuse_unsavable
from tracker.search.report import (
    COST,
    calibration_documents,
    cost_columns,
    frontier,
    separated,
    unsure_sentence,
)
from tracker.search.request import SearchRequest, search_of
from tracker.search.search import budget_of, refuse_mixed, refuse_unknown
from tracker.studies.base import (
    SIGNIFICANT,
    Study,
    StudyContext,
    StudyResult,
    Subject,
)
from tracker.studies.prune.figures import (
    ACCURACY,
    COSINES,
    OWN,
    TASKS,
    TEXT,
    Contrast,
    Prunings,
    Way,
    compared,
)
from tracker.studies.registry import PruneSettings

ELSEWHERE = (ACCURACY, *COSINES)
"""Strategies that are calibrated on other documents than the benchmark's own too."""
PAPER = "LLaMA3-8B, 25 % removed, in arXiv 2605.14075"
PAPER_SHARE = 0.25
PAPER_HOURS = 4.6
PAPER_LEVELS = {OWN: (0.6749, 0.5954), TASKS: (0.6504, 0.6010), TEXT: (0.5023, 0.5969)}
"""Mean test accuracies there, chosen by accuracy and by cosine; the plain text is C4."""
_MANY = 1000
"""So many times as many test documents nobody has."""


class Prune(Study[PruneSettings]):
    """Prunes by each strategy, on each benchmark of a file, by several calibrations."""

    name = "prune"
    question = "Does pruning by measured accuracy beat pruning by proxies, and what does it cost?"
    intact = True
    layers = 1
    chooses = True
    assumptions = (
        "What chose and what tests are different documents. Calibrated on all tasks: as many "
        "documents of each benchmark of the file as of one; each benchmark's loss counts alike.",
        "Accuracy: Wilson's interval. Differences of two prunings on one benchmark: paired "
        "documents (Bonett and Price 2012); means over benchmarks, whose documents differ, by the "
        "method of variance estimates recovery (Donner and Zou 2012). Intervals say what other "
        "test documents would give; the benchmarks, the calibration documents and what these "
        "chose are held fixed.",
        "Tests: sign flips of the documents' differences, as if each were as likely to be x as −x; "
        f"called significant where p, adjusted by Holm (1979), is below {100 * SIGNIFICANT:.0f} %, "
        "and the interval that holds for all comparisons at once (Bonferroni) is on one side of 0. "
        "A strategy leaves the most where it is so beside every other one but random, which is "
        "never called best.",
        "A strategy that draws at random counts, document by document, by the mean of its draws.",
        f"{COST} Every candidate is scored again after each removal.",
    )

    @property
    def _text(self) -> str | None:
        """The plain text to calibrate on, as a benchmark."""
        return None if self.settings.text is None else f"corpus:{self.settings.text}"

    def requests(self, context: StudyContext) -> list[CellRequest]:
        """Return requests for each layer's removal, a greedy search's first step.

        RequestError where the settings are no search's, before anything is measured.
        """
        requests, trust = super().requests(context), context.options.trust_remote_code
        lender = Lender(context.ledger, context.options, context.progress)
        for cell in requests:
            searches = self._searches(cell, [cell])
            refuse_unknown(searches, trust)
            budgets = {search.remove: budget_of(search, lender) for search in searches}
            refuse_unsavable(searches, [budgets[search.remove] for search in searches], trust)
        searches = [s for cell in requests for s in self._searches(cell, requests)]
        refuse_mixed(searches, lender, {})
        return requests

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterator[CellRequest]:
        """Yield the cell's whole layers, on the documents that choose."""
        yield cell.on("calibration").with_changes(layers=cell.changes.whole_layers)

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Search, test what was chosen, and set the strategies beside each other."""
        result, cells = StudyResult(), []
        for subject in subjects:
            if subject.record.higher_is_better:
                cells.append(subject.request)
            else:
                reason = "its metric is a loss, which has no mean with accuracies"
                result.lack(subject.record.title, reason)
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
        if ACCURACY not in self.settings.strategy:
            result.lacking.append("differences to pruning by accuracy; add --strategy accuracy")
        elif self._text is None:
            result.lacking.append(
                "calibration on plain text; give a .txt file, documents between blank lines, or a "
                ".jsonl file: --text FILE"
            )
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
            calibration = pair.one.calibration
            on = "" if calibration == OWN else f", calibrated on {calibration}"
            paper = f" {paper_sentence(pair)}" if amount == nearest else ""
            yield f"With {amount} removed{on}, {verdict_of(pair, group.growth)}.{paper}"
        # Where the calibration documents were too few to choose by accuracy.
        if searches := group.searches(Way(ACCURACY, amount)):
            for sentence in unsure_sentence(searches, "what accuracy chose", " a benchmark"):
                yield f"With {amount} removed, {sentence}"


def _against_cosine(group: Prunings, amount: str) -> list[Contrast]:
    """List what accuracy is held against: cosine, then the same by other documents."""
    beside = group.beside(amount)
    same_documents = [pair for name in COSINES for pair in beside if pair.other.strategy == name][
        :1
    ]
    return same_documents + [
        pair for pair in group.calibrated(amount) if pair.one.calibration != OWN
    ]


def best_sentence(group: Prunings, amount: str) -> str:
    """Return which strategy leaves the most, where comparisons with all others show it."""
    sentence = f"{group.title}, {group.removal(amount)}"
    ranks = group.places(amount)
    if not ranks:
        every = (group.level_mean(Way(name, amount)) for name in group.strategies(amount))
        reason = next((level.reason for level in every if level.reason), "all draw at random")
        return f"{sentence}: no strategy can be judged ({reason})."
    levels = {name: group.level_mean(Way(name, amount)) for name in ranks}
    first = [name for name, (best, _) in ranks.items() if best == 1]
    if len(first) == 1:
        most = f" the most of {len(ranks)} strategies," if len(ranks) > 1 else ""
        best = f"{first[0]} leaves{most} a test accuracy of {level_text(levels[first[0]], '%')}"
    else:
        candidates = "each of them" if len(first) == len(ranks) else listed(first, "or")
        values = [level.value or 0.0 for level in levels.values()]
        best = (
            f"which of {len(ranks)} strategies leaves the most is open, it may be {candidates}; "
            f"they leave test accuracies of {points(min(values))} to {points(max(values))} %"
        )
    unpruned = level_text(group.level_mean(None), "%")
    sentence += f", {group.over}: {best}; unpruned {unpruned}."
    if beside := group.beside(amount):
        won, lost = (
            ", ".join(pair.other.strategy for pair in beside if pair.sign == sign)
            for sign in (1, -1)
        )
        sentence += f" Accuracy is significantly better than {won or 'no other'}"
        sentence += f", and significantly worse than {lost}." if lost else "."
    return sentence


def verdict_of(pair: Contrast, growth: float) -> str:
    """Return which of two ways answers more: `accuracy beats cosine by 3.1 pp (1.0 to 5.2)`."""
    one, other, difference = pair.one.strategy, pair.other.strategy, pair.difference
    if difference.value is None:
        return f"{one} and {other} cannot be compared ({difference.reason})"
    p = f"; p = {p_value(pair.p)} after Holm" if pair.p is not None else ""
    if pair.sign < 0:
        one, other, difference = other, one, -difference
    by = with_interval(difference, points, " pp")
    if pair.sign:
        return f"{one} beats {other} by {by}{p}"
    more, times = "", pair.settled_by or 0.0
    if 1 < times < _MANY:
        more = f"; about {three_digits(times)} times as many test documents would tell"
        more += ", more than there are" if times > growth else ""
    return f"{one} and {other} are not told apart, their difference is {by}{p}{more}"


def paper_sentence(pair: Contrast) -> str:
    """Return whether a difference has the sign of the paper's."""
    accuracy, cosine = PAPER_LEVELS[pair.one.calibration]
    theirs = f"{two_digits(100 * accuracy)} against {two_digits(100 * cosine)} % ({PAPER})"
    if pair.sign == 0:
        return f"The paper has {theirs}; these documents neither agree nor contradict."
    agrees = (pair.sign > 0) == (accuracy > cosine)
    return f"This {'agrees with' if agrees else 'contradicts'} the paper: {theirs}."


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
    group: Prunings,
    unit: Unit,
    of: Callable[[Row, str], Estimate],
    mean: Callable[[Row], Estimate],
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
    measured = ", ".join(
        f"{name} {benchmark.metric} (n = {benchmark.n:,})"
        for name, benchmark in group.benchmarks.items()
    )
    left_out = [
        f"{name} is left out of means and differences: {benchmark.at_chance}"
        for name, benchmark in group.benchmarks.items()
        if benchmark.at_chance
    ]
    drawn = {
        way.strategy: f"{way.strategy}: the mean of {counted(len(choices.records), 'draw')}"
        for (way, _), choices in group.found.items()
        if way.amount == amount and len(choices.records) > 1
    }
    return table(
        f"{group.title}: test accuracy, {group.removal(amount)}, each benchmark pruned for by "
        "its own calibration documents",
        [strategy, *_with_mean(group, "percent", group.level, group.level_mean)],
        [None, *(Way(name, amount) for name in group.strategies(amount))],
        f"Test documents: {measured}.",
        *left_out,
        *drawn.values(),
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
            f"p: of the difference on {group.over}, by sign flips of the test documents, "
            "adjusted over the rows. Intervals of the mean hold for all rows at once "
            "(Bonferroni), those of a benchmark each for itself.",
        )


def _p(row: Contrast) -> Estimate:
    return Estimate(row.p, reason=row.difference.reason)


def _calibrations(group: Prunings, amount: str) -> Iterator[Table]:
    pairs = group.calibrated(amount)
    if not any(pair.one.calibration != OWN for pair in pairs):
        return
    theirs = ", ".join(
        f"on {name} {100 * accuracy:.2f} and {100 * cosine:.2f}"
        for name, (accuracy, cosine) in PAPER_LEVELS.items()
    )
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
        f"{PAPER}: {theirs} %, by accuracy and by cosine; plain text there is C4.",
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
        "Means of the searches: one a benchmark and draw, or one for all of them. "
        "Evaluations and passes are of all of a search's calibration documents; not told "
        "apart: steps at which these do not separate the choice from the runner-up.",
        f"{PAPER}, by accuracy: 228 evaluations in about {PAPER_HOURS} h, another model "
        "on another machine.",
    )


def charts_of(group: Prunings) -> Iterator[LineChart]:
    """Yield the chart of what is left of the accuracy, the more layers go, a line a strategy."""
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
