"""Study: compare pruning by measured accuracy with pruning by proxies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations, product
from typing import NamedTuple

import numpy as np

from tracker.schema.config import CellRequest, Changes, DocumentSpec
from tracker.schema.estimates import Estimate, FigureUnit
from tracker.schema.findings import LineChart
from tracker.schema.formats import points
from tracker.schema.prune_records import PruneRecord
from tracker.schema.records import CellRecord
from tracker.schema.tables import Column, RowType, Table, build_table
from tracker.search.cells import ModelCache
from tracker.search.conduct import SearchResults, run_searches
from tracker.search.planning import refuse_unsavable
from tracker.search.report import (
    SEARCH_TEXTS,
    StrategyResult,
    calibration_documents,
    cost_columns,
    frontier_chart,
    separate_steps,
    unsure_sentences,
)
from tracker.search.request import SearchRequest, build_search
from tracker.search.search import find_budget, refuse_mixed, refuse_unknown
from tracker.search.strategies import RANDOM_STRATEGY
from tracker.stats.accuracy import accuracy
from tracker.stats.effects import interactions
from tracker.stats.rank_agreement import rounded_values
from tracker.stats.resampling import SEED
from tracker.stats.support import average, decide_verdicts, holm, ranks_by_comparison, widen
from tracker.studies.base import SIGNIFICANT, Study, StudyContext, StudyResult, Subject, study_texts
from tracker.studies.registry import PruneSettings

OWN_TASK, ALL_TASKS, PLAIN_TEXT = "its own task", "all tasks", "plain text"
"""Calibration documents by which layers are chosen."""
COSINE_STRATEGIES = ("cosine_oneshot", "cosine")
"""Strategies that the paper compares with accuracy; the first strategy that was run is used."""
PRUNING_PAPER = "LLaMA3-8B, 25 % removed, in arXiv 2605.14075"
PAPER_SHARE = 0.25
PAPER_HOURS = 4.6
PAPER_LEVELS = {OWN_TASK: (0.6749, 0.5954), ALL_TASKS: (0.6504, 0.6010)}
PAPER_LEVELS |= {PLAIN_TEXT: (0.5023, 0.5969)}
"""The paper's mean test accuracies if accuracy and if cosine chooses; the plain text is C4."""
MAX_FACTOR = 1000
"""Factor of the test documents beyond which a required number is not reported."""
PRUNE_TEXTS = study_texts("prune", search=SEARCH_TEXTS, paper=PRUNING_PAPER, levels=PAPER_LEVELS)


class Method(NamedTuple):
    """Method of pruning: strategy (such as cosine), amount to remove, and calibration documents."""

    strategy: str
    amount: str
    calibration: str = OWN_TASK


@dataclass(frozen=True)
class PrunedBenchmark:
    """Benchmark on which the pruned models are tested.

    Attributes:
        unpruned: Test accuracy of the intact model.
        n: Number of test documents.
        metric: Name of the accuracy metric, for labels of tables.
        at_chance: Text for benchmarks on which the intact model's accuracy is not above chance;
            otherwise empty. Means leave out benchmarks with this text.
        available: Number of documents in the benchmark's split; 0 if unknown.
    """

    unpruned: Estimate
    n: int = 0
    metric: str = ""
    at_chance: str = ""
    available: int = 0


@dataclass
class Prunings:
    """Results of pruning one model by all methods, on all benchmarks of the experiment file.

    Attributes:
        title: Label of the model.
        layers: Number of the model's layers.
        benchmarks: Name of a benchmark → facts about the benchmark's test documents.
        choices: (method, benchmark) → results after removing the layers that the method chose.
        failed: (method, benchmark) → reason why the search for layers to remove failed.
    """

    title: str
    layers: int
    benchmarks: dict[str, PrunedBenchmark] = field(default_factory=dict)
    choices: dict[tuple[Method, str], StrategyResult] = field(default_factory=dict)
    failed: dict[tuple[Method, str], str] = field(default_factory=dict)

    @cached_property
    def methods(self) -> list[Method]:
        """All methods, in the order of their searches; methods without a result are last."""
        return list(dict.fromkeys(method for method, _ in (*self.choices, *self.failed)))

    @property
    def amounts(self) -> list[str]:
        """Amounts of layers to remove, such as `25 %`, for which at least one search succeeded."""
        return list(dict.fromkeys(method.amount for method, _ in self.choices))

    @property
    def counted(self) -> list[str]:
        """Benchmarks that are averaged: all except those where the intact model is at chance."""
        return [name for name, benchmark in self.benchmarks.items() if not benchmark.at_chance]

    @property
    def documents(self) -> int:
        """Number of test documents, summed over the averaged benchmarks (`counted`)."""
        return sum(self.benchmarks[name].n for name in self.counted)

    @property
    def benchmark_text(self) -> str:
        """Text that names the averaged benchmarks, such as "the mean of 3 benchmarks"."""
        names = self.counted
        return ", ".join(names) if len(names) < 2 else f"the mean of {len(names)} benchmarks"

    def select(self, amount: str, calibration: str = OWN_TASK) -> dict[str, Method]:
        """Return the methods with the given amount and calibration documents, by strategy."""
        return {m.strategy: m for m in self.methods if m[1:] == (amount, calibration)}

    def mean(self, figure_of: Callable[[str], Estimate]) -> Estimate:
        """Average a quantity, such as the test accuracy, over benchmarks.

        Args:
            figure_of: Function that takes the name of a benchmark and returns the quantity.

        Returns:
            The mean over the benchmarks in `counted`; undefined if any value is undefined.
        """
        figures = {name: figure_of(name) for name in self.counted}
        for name, figure in figures.items():
            if figure.value is None:
                return Estimate(None, reason=f"{name}: {figure.reason}")
        if not figures:
            return Estimate(None, reason="the unpruned model is above chance on no benchmark")
        return average([*figures.values()]) if len(figures) > 1 else figures[self.counted[0]]

    def level(self, method: Method | None, name: str, removed: int | None = None) -> Estimate:
        """Return the test accuracy on a benchmark after pruning by a method.

        Args:
            method: The method; None for the intact model.
            name: Name of the benchmark.
            removed: Number of layers to remove; None for all layers that the method chose.

        Returns:
            The accuracy, undefined if the search of the method failed.
        """
        if method is None:
            return self.benchmarks[name].unpruned
        if (choices := self.choices.get((method, name))) is None:
            return Estimate(None, reason=self.failed.get((method, name), "not requested"))
        return choices.level if removed is None else choices.accuracy_after(removed)

    def level_mean(self, method: Method | None, removed: int | None = None) -> Estimate:
        """Return the test accuracy after pruning by a method, averaged over benchmarks."""
        return self.mean(lambda name: self.level(method, name, removed))

    def compare(self, method: Method, reference: Method, name: str) -> Estimate:
        """Estimate the test accuracy of `method` minus that of `reference`, on benchmark `name`."""
        if reason := self.benchmarks[name].at_chance:
            return Estimate(None, reason=reason)
        for level in (self.level(method, name), self.level(reference, name)):
            if level.value is None:
                return level
        return self.choices[method, name].difference_from(self.choices[reference, name])

    def compare_means(self, method: Method, reference: Method) -> Estimate:
        """Estimate the difference of two methods in mean accuracy, with a sign-flip p-value."""
        difference = self.mean(lambda name: self.compare(method, reference, name))
        if difference.value is None:
            return difference
        pairs = [(self.choices[method, n], self.choices[reference, n]) for n in self.counted]
        values = np.concatenate([(a.outcomes - b.outcomes) * a.weights for a, b in pairs])
        # Documents of equal weight are whole numbers then, of which the test is exact.
        scaled = rounded_values(values / len(pairs) * len(values))
        (sign_test,) = interactions(scaled[:, None], seed=SEED)
        return replace(difference, p_value=sign_test.p_value)

    def accuracy_contrasts(self, amount: str) -> list[Contrast]:
        """Compare pruning by accuracy with other strategies, calibrated on the same benchmark."""
        methods = self.select(amount)
        measured = methods.pop("accuracy", None)
        return self._contrasts([(measured, m) for m in methods.values()] if measured else [])

    def calibration_contrasts(self, amount: str) -> list[Contrast]:
        """Compare pruning by accuracy and by cosine score, for each kind of calibration documents.

        Plain text is one kind of calibration documents. `amount` is the share of layers to remove,
        such as `25 %`.
        """
        pairs = []
        for calibration in (OWN_TASK, ALL_TASKS, PLAIN_TEXT):
            methods = self.select(amount, calibration)
            cosines = [methods[name] for name in COSINE_STRATEGIES if name in methods]
            if "accuracy" in methods and cosines:
                pairs.append((methods["accuracy"], cosines[0]))
        return self._contrasts(pairs)

    def _contrasts(self, pairs: Sequence[tuple[Method, Method]]) -> list[Contrast]:
        """Compare pairs of methods; adjust intervals and p-values for the number of comparisons."""
        differences = [self.compare_means(*pair) for pair in pairs]
        estimates = widen(differences, [self.documents] * len(pairs))
        p_values = holm([difference.p_value for difference in differences])
        rows = zip(pairs, estimates, p_values, strict=True)
        return [Contrast(*pair, estimate, p) for pair, estimate, p in rows]

    def strategy_ranks(self, amount: str) -> dict[str, tuple[int, int]]:
        """Rank the strategies by mean test accuracy; the highest accuracy has rank 1.

        Returns the best and the worst possible rank of each strategy, by the strategy's name. The
        random strategy is left out. Only searches calibrated on the tested benchmark count.
        """
        methods = [m for m in self.select(amount).values() if m.strategy != RANDOM_STRATEGY]
        methods = [m for m in methods if self.level_mean(m).value is not None]
        pairs = list(combinations(range(len(methods)), 2))
        differences = [self.compare_means(methods[i], methods[j]) for i, j in pairs]
        estimates = widen(differences, [self.documents] * len(pairs))
        better = np.zeros((len(methods), len(methods)), dtype=bool)
        for (i, j), verdict in zip(pairs, decide_verdicts(estimates), strict=True):
            better[i, j], better[j, i] = verdict == "costs", verdict == "helps"
        return dict(zip([m.strategy for m in methods], ranks_by_comparison(better), strict=True))

    @property
    def max_factor(self) -> float:
        """Largest factor by which the number of test documents can be increased.

        The factor is the smallest ratio of available to measured documents of a benchmark.
        """
        benchmarks = [self.benchmarks[name] for name in self.counted]
        return min((b.available / b.n for b in benchmarks if b.available), default=math.inf)

    def searches(self, method: Method) -> list[PruneRecord]:
        """Return the records of a method's searches on all benchmarks, without duplicates.

        A search that several benchmarks use is listed once.
        """
        unique: dict[object, PruneRecord] = {}
        for name in self.benchmarks:
            choices = self.choices.get((method, name))
            for record in choices.records if choices else ():
                chosen_by = tuple(part.model_dump_json() for part in record.calibration)
                unique.setdefault((chosen_by, record.draw), record)
        return list(unique.values())

    def removed_counts(self, amount: str) -> list[int]:
        """List how many layers the searches with the given amount removed, ascending."""
        choices = [c for (method, _), c in self.choices.items() if method.amount == amount]
        return sorted({len(record.removed) for c in choices for record in c.records})

    def removed_share(self, amount: str) -> str:
        """Return the removed amount as text, such as `25 % removed (8 of 32 layers)`."""
        counts = self.removed_counts(amount)
        layers = "–".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        return f"{amount} removed ({layers} of {self.layers} layers)"


@dataclass(frozen=True)
class Contrast:
    """Mean difference in test accuracy between two methods of pruning.

    Attributes:
        method: The method from whose accuracy the reference's accuracy is subtracted.
        reference: The method with which `method` is compared.
        difference: Mean accuracy difference over benchmarks. Its interval is adjusted for the
            number of comparisons, but its p-value is not.
        p: p-value of the difference, adjusted by Holm's method; None if there is no p-value.
    """

    method: Method
    reference: Method
    difference: Estimate
    p: float | None

    @property
    def sign(self) -> int:
        """Sign of the difference: 1 = positive, −1 = negative, 0 = not significant.

        Significant: the interval excludes 0, and the adjusted p-value is below 0.05.
        """
        return 0 if self.p is None or self.p >= SIGNIFICANT else self.difference.side()


def group_searches(outcome: SearchResults, text: str | None) -> list[Prunings]:
    """Group the results of searches by model.

    Args:
        outcome: The results of the searches.
        text: Benchmark name of the plain text on which some searches were calibrated; None without
            a plain text.

    Returns:
        The results of each model.
    """
    groups: dict[object, Prunings] = {}
    cells = {cell.record_key: cell for cell in outcome.outcome.cells}
    for search in outcome.searches:
        request, record, answered = search.request, search.record, search.outcomes
        benchmark = request.cell.benchmark
        shots = "" if benchmark.num_fewshot is None else f", {benchmark.num_fewshot}-shot"
        prunings = Prunings(record.model.name + shots, record.model.layers)
        prunings = groups.setdefault(_model_request(request), prunings)
        if str(benchmark) not in prunings.benchmarks:
            cell = next((cells[key] for key in record.rests_on if key in cells), None)
            figures = ("", 0) if cell is None else (_chance_reason(cell), cell.benchmark.documents)
            level = accuracy(answered.baseline, answered.weights)
            tests = PrunedBenchmark(level, record.baseline.n, record.metric, *figures)
            prunings.benchmarks[str(benchmark)] = tests
        key = _method(request, text), str(benchmark)
        draws = prunings.choices.get(key, StrategyResult((), ()))
        outcomes = (*draws.paired_outcomes, answered)
        prunings.choices[key] = StrategyResult((*draws.records, record), outcomes)
    for request, reason in outcome.failed.items():
        if of_model := groups.get(_model_request(request)):
            key = _method(request, text), str(request.cell.benchmark)
            of_model.failed[key] = reason
    return list(groups.values())


def _model_request(request: SearchRequest) -> object:
    """Return a key that is equal for requests that differ only in the benchmark."""
    return replace(request.cell, benchmark=request.cell.benchmark.renamed("any"))


def _method(request: SearchRequest, text: str | None) -> Method:
    calibration = OWN_TASK
    if request.calibrate:
        calibration = PLAIN_TEXT if request.calibrate == (text,) else ALL_TASKS
    return Method(request.strategy, request.remove or "", calibration)


def _chance_reason(cell: CellRecord) -> str:
    """Return a text if the intact model's accuracy is not above chance, else an empty text."""
    level, chance = cell.baseline.value, cell.chance_accuracy
    if level is None or chance is None or not math.isfinite(chance) or level > chance + 1e-9:
        return ""
    value = f"{points(level)} %"
    return f"the unpruned model's accuracy of {value} is not above chance ({points(chance)} %)"


class Prune(Study[PruneSettings]):
    """Study that compares pruning strategies, for several choices of calibration documents."""

    name = "prune"
    question = "Is pruning by measured accuracy better than pruning by proxies, and at what cost?"
    intact = True
    layers = 1
    chooses = True
    texts = PRUNE_TEXTS

    @property
    def _text(self) -> str | None:
        """The benchmark name of the plain text for calibration; None without a plain text."""
        return None if self.settings.text is None else f"corpus:{self.settings.text}"

    def requests(self, context: StudyContext) -> list[CellRequest]:
        """Return requests that measure the removal of each single layer.

        Every greedy search begins with these removals. Raises RequestError if a search has invalid
        settings.
        """
        requests = super().requests(context)
        lender = ModelCache(context.ledger, context.options, context.progress)
        for cell in requests:
            searches = self._searches(cell, [cell])
            refuse_unknown(searches, lender)
            budgets = {search.remove: find_budget(search, lender) for search in searches}
            refuse_unsavable(searches, [budgets[search.remove] for search in searches], lender)
        refuse_mixed([s for cell in requests for s in self._searches(cell, requests)], lender)
        return requests

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterator[CellRequest]:
        """Yield the request to remove each layer alone, measured on the calibration documents."""
        yield cell.on_part("calibration").with_changes(layers=cell.changes.whole_layers)

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Search for layers to remove, test the pruned models, and compare the strategies."""
        result, requests = StudyResult(), []
        for subject in subjects:
            if subject.record.higher_is_better:
                requests.append(subject.request)
            else:
                result.lack(subject.record.title, *PRUNE_TEXTS.render_all("is_a_loss"))
        if not requests:
            result.add("No benchmark of the experiment file has an accuracy.")
            return result
        typed = context.input.command_arguments
        command = [*self.command, *typed, *self.settings.command_options()] if typed else []
        lender = ModelCache(context.ledger, context.options, context.progress, command)
        searches = [search for cell in requests for search in self._searches(cell, requests)]
        outcome = run_searches(searches, lender, context.publisher)
        result.ran = outcome.outcome
        result.rests_on = [key for record in outcome.records for key in record.rests_on]
        for prunings in group_searches(outcome, self._text):
            result.add(*write_answers(prunings), *build_tables(prunings), *build_charts(prunings))
        result.lacking += PRUNE_TEXTS.render_all("lacking", self.settings)
        return result

    def _searches(self, cell: CellRequest, cells: Sequence[CellRequest]) -> list[SearchRequest]:
        """List the searches for layers to remove, tested on one benchmark.

        Args:
            cell: The model and the benchmark.
            cells: All models and benchmarks of the experiment file. Some searches are calibrated on
                all benchmarks of the model.

        Returns:
            The searches.
        """
        settings, documents = self.settings, cell.documents
        plain = replace(cell, documents=DocumentSpec(seed=documents.seed), changes=Changes())
        name = str(cell.benchmark)
        alike = [c for c in cells if replace(c, benchmark=c.benchmark.renamed(name)) == cell]
        tasks = tuple(dict.fromkeys(str(c.benchmark) for c in alike))
        calibrations = [tasks] if len(tasks) > 1 else []
        calibrations += [(self._text,)] if self._text is not None else []
        strategies = dict.fromkeys(settings.strategy)
        # Only accuracy and cosine are calibrated on other documents than the benchmark's own.
        recalibrated = [s for s in strategies if s in ("accuracy", *COSINE_STRATEGIES)]
        methods = [*product(strategies, [()]), *product(recalibrated, calibrations)]
        sample = documents.sample
        sizes = {"sample": sample, "test_sample": settings.test_sample or sample}
        return [
            build_search(plain, {"strategy": strategy, "remove": amount, "calibrate": by, **sizes})
            for amount, (strategy, by) in product(settings.remove, methods)
        ]


# Sentences


def write_answers(group: Prunings) -> Iterator[str]:
    """Yield sentences that answer the study's question for one model.

    The sentences name the best strategy, and compare pruning by accuracy with pruning by cosine
    score.
    """
    shares = {amount: group.removed_counts(amount)[-1] / group.layers for amount in group.amounts}
    paper_amount = min(shares, key=lambda amount: abs(shares[amount] - PAPER_SHARE))
    for amount in group.amounts:
        yield best_sentence(group, amount)
        for pair in _cosine_contrasts(group, amount) if group.counted else []:
            paper = paper_sentence(pair) if amount == paper_amount else ""
            verdict = write_verdict(pair, group.max_factor)
            yield PRUNE_TEXTS.render("against_cosine", amount, pair, verdict, paper)
        # Where the calibration documents were too few to choose by accuracy.
        if searches := group.searches(Method("accuracy", amount)):
            for sentence in unsure_sentences(searches, "the choice by accuracy", " a benchmark"):
                yield f"With {amount} removed, {sentence}"


def _cosine_contrasts(group: Prunings, amount: str) -> list[Contrast]:
    """Compare pruning by accuracy and by cosine, for each kind of calibration documents in use."""
    contrasts = {pair.reference.strategy: pair for pair in group.accuracy_contrasts(amount)}
    by_cosine = [contrasts[name] for name in COSINE_STRATEGIES if name in contrasts]
    others = group.calibration_contrasts(amount)
    return by_cosine[:1] + [pair for pair in others if pair.method.calibration != OWN_TASK]


def best_sentence(group: Prunings, amount: str) -> str:
    """Write which strategy is best, or that no strategy is clearly best.

    `amount` is the share of removed layers, such as `25 %`.
    """
    ranks = group.strategy_ranks(amount)
    levels = {name: group.level_mean(method) for name, method in group.select(amount).items()}
    reason = next((level.reason for level in levels.values() if level.reason), "")
    levels = {name: levels[name] for name in ranks}
    best = [name for name, (rank, _) in ranks.items() if rank == 1]
    contrasts = group.accuracy_contrasts(amount) if ranks else []
    return PRUNE_TEXTS.render("best", group, amount, levels, best, contrasts, reason)


def write_verdict(pair: Contrast, max_factor: float) -> str:
    """Return text that names the better method, such as `accuracy beats cosine by 3.1 pp`.

    Args:
        pair: The two compared methods, with the difference of their accuracies.
        max_factor: Largest factor by which the number of test documents can be increased.

    Returns:
        The text.
    """
    names, difference = [pair.method.strategy, pair.reference.strategy], pair.difference
    if pair.sign < 0:
        names, difference = names[::-1], -difference
    # As many times the documents narrow the interval to half of the difference.
    value, ends = pair.difference.value, pair.difference.bounds
    factor = ((ends[1] - ends[0]) / 2 / value) ** 2 if value and ends else 0.0
    factor = factor if 1 < factor < MAX_FACTOR else 0.0
    return PRUNE_TEXTS.render("verdict", *names, difference, pair, factor, max_factor)


def paper_sentence(pair: Contrast) -> str:
    """Describe whether a difference of two methods has the same sign as in `PRUNING_PAPER`."""
    return PRUNE_TEXTS.render("paper_sentence", pair.sign, *PAPER_LEVELS[pair.method.calibration])


# Tables and charts


def build_tables(group: Prunings) -> Iterator[Table]:
    """Yield the tables of accuracies, differences and search costs for one pruned model."""
    for amount in group.amounts:
        yield _accuracy_table(group, amount)
        if group.counted:
            yield from _difference_tables(group, amount)
            yield from _calibration_tables(group, amount)
    yield _cost_table(group)


def _benchmark_columns(
    group: Prunings,
    unit: FigureUnit,
    figure: Callable[[RowType, str], Estimate],
    average: Callable[[RowType], Estimate],
) -> Iterator[Column[RowType]]:
    """Yield a table column for each benchmark, and a column for the mean over benchmarks.

    Args:
        group: The results of one model.
        unit: Unit of the values.
        figure: Function that returns the value for a row and the name of a benchmark.
        average: Function that returns the mean value for a row.

    Yields:
        The columns.
    """

    def column(name: str) -> Column[RowType]:
        return Column(name, unit, lambda row: figure(row, name))

    yield from map(column, group.benchmarks)
    none = Estimate(None, reason="the unpruned model is above chance on fewer than two benchmarks")
    yield Column("mean", unit, average if len(group.counted) > 1 else lambda row: none)


def _accuracy_table(group: Prunings, amount: str) -> Table:
    def strategy(method: Method | None) -> str:
        return method.strategy if method else "unpruned"

    counts = {m: len(choices.records) for (m, _), choices in group.choices.items()}
    draws = {m.strategy: n for m, n in counts.items() if m.amount == amount and n > 1}
    columns = _benchmark_columns(group, "percent", group.level, group.level_mean)
    return build_table(
        f"{group.title}: test accuracy, {group.removed_share(amount)}, layers chosen on "
        "calibration documents of the same benchmark",
        [Column("strategy", "text", strategy), *columns],
        [None, *group.select(amount).values()],
        *PRUNE_TEXTS.render_all("accuracy_notes", group.benchmarks, draws),
    )


_P_COLUMN: Column[Contrast] = Column(
    "p (Holm)", "p", lambda row: Estimate(row.p, reason=row.difference.reason)
)


def _difference_tables(group: Prunings, amount: str) -> Iterator[Table]:
    def difference(row: Contrast, name: str) -> Estimate:
        return group.compare(row.method, row.reference, name)

    if pairs := group.accuracy_contrasts(amount):
        yield build_table(
            f"{group.title}: gain in test accuracy from the strategy 'accuracy', compared with "
            f"each other strategy, {group.removed_share(amount)}",
            [
                Column("compared with", "text", lambda row: row.reference.strategy),
                *_benchmark_columns(group, "points", difference, lambda row: row.difference),
                _P_COLUMN,
            ],
            pairs,
            *PRUNE_TEXTS.render_all("difference_notes", group),
        )


def _calibration_tables(group: Prunings, amount: str) -> Iterator[Table]:
    pairs = group.calibration_contrasts(amount)
    if not any(pair.method.calibration != OWN_TASK for pair in pairs):
        return
    by_cosine = f"by {pairs[0].reference.strategy}"
    yield build_table(
        f"{group.title}: test accuracy for each kind of calibration documents, "
        f"{group.removed_share(amount)}, {group.benchmark_text}",
        [
            Column("calibrated on", "text", lambda row: row.method.calibration),
            Column("by accuracy", "percent", lambda row: group.level_mean(row.method)),
            Column(by_cosine, "percent", lambda row: group.level_mean(row.reference)),
            Column("difference", "points", lambda row: row.difference),
            _P_COLUMN,
        ],
        pairs,
        *PRUNE_TEXTS.render_all("calibration_notes"),
    )


def _cost_table(group: Prunings) -> Table:
    def unsure(method: Method) -> str | None:
        steps = separate_steps(group.searches(method))
        return f"{len(steps.unsure_steps)} of {steps.n_compared}" if steps.n_compared else None

    def documents(method: Method) -> float:
        return calibration_documents(group.searches(method))

    def calibration(method: Method) -> str:
        return method.calibration if documents(method) else "no documents"

    none = "no search step scored two layers on the same documents"
    columns: list[Column[Method]] = [
        Column("strategy", "text", lambda method: method.strategy),
        Column("amount", "text", lambda method: method.amount),
        Column("calibrated on", "text", calibration),
        Column("searches", "count", lambda method: len(group.searches(method))),
        Column("documents", "count", documents),
        *cost_columns(group.searches),
        Column("choices not separated", "text", unsure, none),
    ]
    rows = [method for method in group.methods if group.searches(method)]
    notes = PRUNE_TEXTS.render_all("cost_notes", PAPER_HOURS)
    return build_table(f"{group.title}: cost of a search", columns, rows, *notes)


def build_charts(group: Prunings) -> Iterator[LineChart]:
    """Yield charts of test accuracy against the number of removed layers, one line per strategy."""
    if not group.counted:
        return

    def level(strategy: str, removed: int) -> Estimate:
        """Return a strategy's mean test accuracy after the removal of `removed` layers."""
        methods = [Method(strategy, amount) for amount in group.amounts]
        levels = [group.level_mean(method, removed) for method in methods]
        return next((level for level in levels if level.value is not None), levels[0])

    counts = range(max(max(group.removed_counts(amount)) for amount in group.amounts) + 1)
    names = dict.fromkeys(m.strategy for m in group.methods if m.calibration == OWN_TASK)
    levels: dict[str, dict[float, Estimate]] = {
        name: {count: level(name, count) for count in counts} for name in names
    }
    title = f"{group.title}: test accuracy by number of removed layers, {group.benchmark_text}"
    yield frontier_chart(title, "layers removed", "accuracy", levels)
