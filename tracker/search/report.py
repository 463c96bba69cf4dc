"""Report the results of searches in sentences, tables and a chart."""

from __future__ import annotations

import json
import shlex
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tracker.analysis.paired import PairedOutcomes
from tracker.schema.config import FIELDS_BY_KEY, CellRequest, CellSettings, ChangeGrid
from tracker.schema.errors import ExperimentError
from tracker.schema.estimates import Estimate, FigureUnit
from tracker.schema.extent import DEFAULT_SEED
from tracker.schema.findings import SEARCH_STUDY, FindingRecord, LineChart, line_chart
from tracker.schema.formats import NO_SCORE, count_text, join_words, metric_format, ties_text
from tracker.schema.grouping import group_by
from tracker.schema.kinds import NUMBERED_COMPONENTS
from tracker.schema.prune_records import HeldOutResult, PruneRecord, PruneStep
from tracker.schema.search_parts import MixedParts, unit_plural
from tracker.schema.tables import Column, RowType, Table, build_table
from tracker.schema.text_templates import TextTemplate
from tracker.search.accuracy_budget import TOLERANCE, AccuracyBudget
from tracker.search.search import Recommendation
from tracker.search.settings import format_layers
from tracker.search.strategies import RANDOM_STRATEGY
from tracker.stats.accuracy import accuracy, accuracy_drop
from tracker.stats.arrays import Array
from tracker.stats.support import widen

if TYPE_CHECKING:
    from tracker.search.request import SearchRequest


def test_outcome(step: PruneStep) -> HeldOutResult:
    """Return the result of one search step on the test documents."""
    assert step.test is not None  # a search is stored once its steps are tested
    return step.test


def final_outcome(record: PruneRecord) -> HeldOutResult:
    """Return the result on the test documents after the last step of a search."""
    return test_outcome(record.steps[-1])


@dataclass(frozen=True)
class TestedSearch:
    """Result of one random draw of a search, with the outcomes of the test documents.

    Attributes:
        request: The request of the search.
        record: The stored record of the search: settings, steps and cost.
        outcomes: Outcomes of the test documents after each step of the search; higher outcomes are
            better.
        run_requests: For each step, the request that measures the step as an ablation run; None if
            no ablation run can measure the step.
        shown: Index of the last step that is significantly within the budget of accuracy. The index
            is −1 if no step is significantly within the budget, and None without a budget of
            accuracy.
    """

    request: SearchRequest
    record: PruneRecord
    outcomes: PairedOutcomes
    run_requests: tuple[CellRequest | None, ...]
    shown: int | None = None

    @property
    def final_index(self) -> int:
        """The index of the step that gives the search's result.

        Without a budget of accuracy, the last step gives the result. Otherwise, the result is the
        last step that is significantly within the budget; −1 if no step is.
        """
        return len(self.record.steps) - 1 if self.shown is None else self.shown

    @property
    def final_step(self) -> PruneStep:
        """The step that gives the search's result; for the index −1, a step without removals."""
        index = self.final_index
        intact = PruneStep(removed=(), test=self.record.baseline)
        return intact if index < 0 else self.record.steps[index]

    @property
    def run_request(self) -> CellRequest | None:
        """The request for an ablation run of the model that results from the search.

        If no ablation run can measure this model, the request is for the last earlier step that an
        ablation run can measure; None if there is no such step.
        """
        return next(filter(None, reversed(self.run_requests[: self.final_index + 1])), None)

    def find_step(self, removed: Sequence[int]) -> int | None:
        """Return the index of the step after which exactly these parts are removed; else None.

        The result is also None for searches of the strategy `random`, which are never recommended.
        """
        steps = self.record.steps if self.request.strategy != RANDOM_STRATEGY else ()
        return next((n for n, step in enumerate(steps) if step.removed == removed), None)


Searches = Sequence[TestedSearch]
Labels = Mapping[str, str]


@dataclass(frozen=True)
class GoalResult:
    """Searches with the same goal (e.g. removing 8 layers), and their recommendation.

    Attributes:
        searches: The tested searches.
        recommendation: The recommended set of parts, or the reason why there is none.
    """

    searches: Searches
    recommendation: Recommendation

    @property
    def record(self) -> PruneRecord:
        """The record of the first search."""
        return self.searches[0].record

    @property
    def budget(self) -> AccuracyBudget | None:
        """The largest acceptable loss of accuracy; None if an amount ends the searches."""
        return self.searches[0].request.accuracy_budget

    def find_steps(self, removed: Sequence[int]) -> list[tuple[TestedSearch, int]]:
        """Find the search steps after which exactly the given parts are removed.

        The method returns pairs of a search and the index of its step. Random searches are
        excluded.
        """
        indices = [(search, search.find_step(removed)) for search in self.searches]
        return [(search, index) for search, index in indices if index is not None]

    def text(self, labels: Labels | None = None) -> str:
        """Describe the recommended model in one paragraph.

        Args:
            labels: Dict from the names of the searches to labels; None for default labels.

        Returns:
            A text that names the model, its size, and its loss with an interval, or the reason why
            no model is recommended.
        """
        records = [search.record for search in self.searches]
        names = labels or _search_labels(records)
        recommendation = self.recommendation
        removed, estimated = recommendation.removed, recommendation.estimated
        estimated = estimated if estimated != removed else ()

        def choice(parts: Sequence[int]) -> tuple[PruneStep, list[str]]:
            steps = self.find_steps(parts)
            search, index = steps[0]
            return search.record.steps[index], [names[search.record.name] for search, _ in steps]

        runner_up = recommendation.step.runner_up if recommendation.step else None
        rivals = [r for r in records if r.removed == runner_up and r.strategy != RANDOM_STRATEGY]
        return SEARCH_TEXTS.render(
            "recommendation",
            self.record,
            recommendation,
            chosen=choice(removed) if removed else None,
            estimate=choice(estimated) if estimated else None,
            budget=self.budget,
            margin=-self._excess_bounds(removed)[-1] if self.budget and removed else None,
            rivals=[names[record.name] for record in rivals],
            reason=None if removed else recommendation.reason or self.unshown_reason,
            needed=self._needed_text if self.budget and removed and estimated else "",
        )

    @property
    def unshown_reason(self) -> str:
        """Explanation why no model is recommended, with advice."""
        budget, n, recommendation = self.budget, self.record.baseline.n, self.recommendation
        if budget is not None and recommendation.nearest is not None:
            return SEARCH_TEXTS.render("unreached", recommendation.nearest, budget, n)
        if budget is not None and recommendation.estimated:
            return SEARCH_TEXTS.render("unshown", budget, n, self._needed_text)
        return recommendation.reason or NO_SCORE

    @property
    def _needed_text(self) -> str:
        """Advice on how many test documents could show that a model is within the budget.

        The model is the smallest model whose estimated loss is within the budget.
        """
        recommendation, budget = self.recommendation, self.budget
        assert budget is not None
        search, index = self.find_steps(recommendation.estimated)[0]
        if recommendation.n_needed is None:
            excess = budget.excess(search.outcomes, index).value or 0.0
            return SEARCH_TEXTS.render("never_shown", excess > -TOLERANCE)
        benchmark, n = search.record.benchmark, search.record.baseline.n
        if max(recommendation.n_needed, n + 1) > benchmark.documents:
            excess = max(self._excess_bounds(recommendation.estimated))
            option = budget.larger_option(excess, search.outcomes)
            return SEARCH_TEXTS.render("too_few", benchmark.documents, n, option)
        return SEARCH_TEXTS.render("raise_sample", benchmark.sample_size(recommendation.n_needed))

    def _excess_bounds(self, removed: Sequence[int]) -> list[float]:
        """Compute the upper interval end of loss minus budget for each step until `removed`.

        The last of these steps is the step after which exactly the parts in `removed` are removed.
        """
        assert self.budget is not None
        search, index = self.find_steps(removed)[0]
        excesses = [self.budget.excess(search.outcomes, k) for k in range(index + 1)]
        n_documents = [search.record.baseline.n] * len(excesses)
        bounds = widen(excesses, n_documents, self.recommendation.n_sets)
        return [bound.high or 0.0 for bound in bounds]


@dataclass(frozen=True)
class StrategyResult:
    """Results of one search strategy on one benchmark, with one result per random draw.

    Attributes:
        records: The stored records of the searches, one record per random draw.
        paired_outcomes: For each draw, the outcomes of the test documents after each step; higher
            outcomes are better.
    """

    records: tuple[PruneRecord, ...]
    paired_outcomes: tuple[PairedOutcomes, ...]

    @property
    def weights(self) -> Array:
        """The weights of the test documents."""
        return self.paired_outcomes[0].weights

    @property
    def outcomes(self) -> Array:
        """The outcome of each test document after the last step, averaged over draws."""
        final = [paired.ablated[:, -1] for paired in self.paired_outcomes]
        outcomes: Array = np.mean(final, axis=0)
        return outcomes

    @property
    def level(self) -> Estimate:
        """The accuracy on the test documents after the last step."""
        return accuracy(self.outcomes, self.weights)

    def accuracy_after(self, n_removed: int) -> Estimate:
        """Return the mean test accuracy over random draws, after the removal of `n_removed` parts.

        The value is None if a draw has no step after which exactly `n_removed` parts are removed.
        """
        outcomes = []
        for record, paired in zip(self.records, self.paired_outcomes, strict=True):
            counts = [0, *(len(step.removed) for step in record.steps)]
            if n_removed not in counts:
                return Estimate(None, reason="no step removes this number")
            step = counts.index(n_removed)
            outcomes.append(paired.ablated[:, step - 1] if step else paired.baseline)
        return accuracy(np.mean(outcomes, axis=0), self.weights)

    def difference_from(self, reference: StrategyResult) -> Estimate:
        """Estimate the test accuracy of this strategy minus the test accuracy of `reference`.

        Both strategies are tested on the same documents.
        """
        return accuracy_drop(self.outcomes, reference.outcomes, self.weights)


@dataclass(frozen=True)
class StepSeparation:
    """Counts of search steps with an unsure choice between the best and the second-best part.

    Attributes:
        n_compared: Number of steps with a second-best part.
        unsure_steps: Steps in which the best part is not significantly better than the second-best
            part.
    """

    n_compared: int
    unsure_steps: tuple[PruneStep, ...]

    @property
    def n_level(self) -> int:
        """The number of steps in which the two best parts have equal scores."""
        return sum(step.margin.value == 0 for step in self.unsure_steps)

    @property
    def needed_documents(self) -> int | None:
        """Estimated number of calibration documents that would make half of the unsure steps sure.

        The number is the median over the steps; None if no step has an estimate.
        """
        needed = [step.separates for step in self.unsure_steps if step.separates is not None]
        return statistics.median_high(needed) if needed else None


def separate_steps(searches: Sequence[PruneRecord]) -> StepSeparation:
    """Find search steps in which the best part is not significantly better than the second-best."""
    compared_steps = [s for search in searches for s in search.steps if s.margin.value is not None]
    unsure_steps = [s for s in compared_steps if s.margin.low is None or s.margin.low <= 0]
    return StepSeparation(len(compared_steps), tuple(unsure_steps))


def calibration_documents(searches: Sequence[PruneRecord]) -> float:
    """Return the mean number of calibration documents of searches."""
    return statistics.fmean(sum(cell.n for cell in search.calibration) for search in searches)


PRUNE_QUESTION = "What can be removed, and how accurate is the model afterwards?"


def build_finding(
    name: str, goals: Sequence[GoalResult], failures: Mapping[str, str]
) -> FindingRecord:
    """Build the report on the searches of an experiment file.

    Args:
        name: Name of the experiment file.
        goals: The searches and the recommendation for each goal.
        failures: Title of each failed search → reason of the failure.

    Returns:
        The report, with sentences, tables and charts.
    """
    # One model, one set of test documents and one unit share one table.
    groups = group_by(goals, lambda goal: goal.searches[0].request.goal[:2]).values()
    searches = [[search for goal in group for search in goal.searches] for group in groups]
    records = [[search.record for search in group] for group in searches]
    budgets = {record.budget for group in records for record in group}
    return FindingRecord(
        study=SEARCH_STUDY,
        experiment=name,
        command="tracker prune",
        question=PRUNE_QUESTION,
        answers=tuple(text for group in groups for text in _answer_sentences(group)),
        tables=tuple(
            table
            for pair in zip(searches, records, strict=True)
            for table in (_searches_table(pair[0]), _steps_table(pair[1]))
        ),
        charts=tuple(chart for group in records for chart in _frontier_charts(group)),
        lacking=tuple(f"{title}: {reason}" for title, reason in failures.items()),
        assumptions=tuple(SEARCH_TEXTS.render_all("assumptions", budgets)),
        rests_on=tuple(dict.fromkeys(c for group in records for r in group for c in r.rests_on)),
    )


NO_SIZE = "parameters of heads, experts and neurons are not counted"


def _metric_name(record: PruneRecord) -> str:
    """Return the name of a search's metric in sentences, such as `accuracy` or `loss`."""
    level = metric_format(record).level
    is_named = level != "accuracy" or record.metric == record.benchmark.primary_metric
    return level if is_named else record.metric


def _benchmark_name(record: PruneRecord) -> str:
    """Return the benchmark's name, with the split seed if it is not the default seed."""
    seed = record.benchmark.seed
    return record.benchmark.name + ("" if seed in (None, DEFAULT_SEED) else f" (seed {seed})")


def _bytes(record: PruneRecord, n_parameters: int) -> int:
    """Return the size in bytes of some parameters in the model's dtype."""
    return n_parameters * (2 if record.model.is_half else 4)


SEARCH_TEXTS = TextTemplate(
    "tracker.search",
    "search",
    numbered=NUMBERED_COMPONENTS,
    benchmark_name=_benchmark_name,
    format_layers=format_layers,
    metric_name=_metric_name,
    n_bytes=_bytes,
    ties_text=ties_text,
    unit_plural=unit_plural,
)


def _answer_sentences(goals: Sequence[GoalResult]) -> Iterator[str]:
    """Yield sentences that recommend a model for each goal and compare strategies."""
    labels = _search_labels([search.record for goal in goals for search in goal.searches])
    for goal in goals:
        yield f"{goal.text(labels)} {SEARCH_TEXTS.render('constraints', goal.record)}".strip()
        if goal.budget is None:
            best = [search for search, _ in goal.find_steps(goal.recommendation.removed)]
            yield from _compare_strategies(goal.searches, best)
        for search in goal.searches:
            for sentence in unsure_sentences([search.record], "the choice"):
                yield f"{labels[search.record.name]}: {sentence}"


def _compare_strategies(searches: Searches, best: Searches) -> Iterator[str]:
    """Yield sentences that compare the recommended model with results of usual strategies.

    The usual strategies remove layers by the cosine score or at random. The argument `best`
    contains the searches that chose the recommended model.
    """
    by_strategy = group_by((s for s in searches if s not in best), lambda s: s.request.strategy)
    names = ("cosine_oneshot", "cosine", RANDOM_STRATEGY)
    groups = [by_strategy[name] for name in names if name in by_strategy]
    differences = [Estimate(None) for _ in groups]
    if best:
        result = _strategy_result(best[:1])
        differences = [result.difference_from(_strategy_result(group)) for group in groups]
    n_documents = [group[0].record.baseline.n for group in groups]
    yield from map(_describe_strategy, groups, widen(differences, n_documents))


def _strategy_result(searches: Searches) -> StrategyResult:
    """Combine all random draws of one strategy into one result."""
    records = tuple(search.record for search in searches)
    return StrategyResult(records, tuple(search.outcomes for search in searches))


def _describe_strategy(searches: Searches, difference: Estimate) -> str:
    """Write a sentence that compares one strategy's results with the recommended model.

    Args:
        searches: The searches of the strategy.
        difference: Test accuracy of the recommended model minus test accuracy of the strategy.

    Returns:
        The sentence.
    """
    levels = [final_outcome(search.record).level.value for search in searches]
    mean = statistics.fmean(level or 0.0 for level in levels) if None not in levels else None
    figures = Estimate(mean), len(levels), difference
    return SEARCH_TEXTS.render("strategy", searches[0].record, *figures)


def unsure_sentences(records: Sequence[PruneRecord], choice: str, suffix: str = "") -> list[str]:
    """Write a sentence that counts the search steps with too few calibration documents.

    A step has too few calibration documents if the chosen part is not significantly better than the
    second-best part.

    Args:
        records: Records of the searches.
        choice: Words for the chosen part in the sentence, such as `the choice`.
        suffix: Words after the number of documents in the sentence.

    Returns:
        A list with the sentence, or an empty list if no step has too few documents.
    """
    documents = round(calibration_documents(records))
    return SEARCH_TEXTS.render_all("unsure", separate_steps(records), documents, choice, suffix)


def cost_columns(select: Callable[[RowType], Sequence[PruneRecord]]) -> tuple[Column[RowType], ...]:
    """Build three table columns: mean evaluations, forward passes and seconds of searches.

    The function `select` returns the searches over which a table row is averaged.
    """
    reason = "nothing is removed"

    def column(name: str, unit: FigureUnit) -> Column[RowType]:
        def mean(row: RowType) -> Estimate:
            costs = [getattr(search.cost, name) for search in select(row)]
            return Estimate(statistics.fmean(costs) if costs else None, reason=reason)

        return Column(name, unit, mean)

    return (column("evaluations", "count"), column("passes", "times"), column("seconds", "count"))


def frontier_chart(
    title: str, x: str, quantity: str, levels: Mapping[str, Mapping[float, Estimate]]
) -> LineChart:
    """Draw each strategy's test accuracy or loss against the size of the model.

    Args:
        title: Title of the chart.
        x: Label of the axis of sizes.
        quantity: Name of the plotted values, such as `accuracy` or `loss`.
        levels: For each strategy, a dict from sizes to values.

    Returns:
        The chart.
    """
    sizes = sorted(set().union(*levels.values()))
    unit: FigureUnit = "score" if quantity == "loss" else "percent"
    lines = {name: map(line.get, sizes) for name, line in levels.items()}
    return line_chart(title, (x, f"test {quantity}"), unit, sizes, lines)


def _searches_table(searches: Searches) -> Table:
    """Build the table of searches: one row for the intact model, and one row per search."""
    records = [search.record for search in searches]
    record, labels = records[0], _search_labels(records)
    measure = metric_format(record)
    part = f" of the {record.part} part" if record.part else ""
    documents = count_text(record.baseline.n, "test document")

    def level(search: TestedSearch | None) -> Estimate:
        return (test_outcome(search.final_step) if search else record.baseline).level

    def drop(search: TestedSearch | None) -> Estimate:
        if search is None or not search.final_step.removed:
            return Estimate(None, reason="nothing is removed")
        return test_outcome(search.final_step).lost

    def names(search: TestedSearch | None) -> str:
        return record.parts.names(search.final_step.removed if search else ()) or "none"

    columns: tuple[Column[TestedSearch | None], ...] = (
        Column("strategy", "text", lambda row: labels[row.record.name] if row else "unpruned"),
        Column("amount", "text", lambda search: search.record.amount if search else "nothing"),
        Column("removed", "text", names),
        Column(f"test {measure.level}", measure.level_form, level, NO_SCORE),
        Column("lost", measure.form, drop, NO_SCORE),
        *cost_columns(lambda search: [search.record] if search else []),
    )
    calibrations = dict.fromkeys(_calibration_text(search) for search in records)
    return build_table(
        f"{record.model.name} · {_benchmark_name(record)}: results of pruning by each strategy, on "
        f"{documents}{part}",
        columns,
        [None, *searches],
        *SEARCH_TEXTS.render_all("part_name", record),
        *(f"calibration: {text}" for text in calibrations if text),
    )


def _calibration_text(record: PruneRecord) -> str:
    """Describe the calibration documents, e.g. `100 documents of arc_easy (calibration)`.

    The text is empty if the search used no documents.
    """
    return ", ".join(
        f"{count_text(cell.n, 'document')} of {cell.benchmark}"
        f"{f' ({cell.part})' if cell.part else ''}"
        for cell in record.calibration
    )


def _search_labels(records: Sequence[PruneRecord]) -> dict[str, str]:
    """Return a dict from the name of each search to a short label.

    A label is the name of the strategy. If several searches have the same strategy and amount, but
    different calibration documents or constraints, the label also names the documents or
    constraints.
    """
    labels = {}
    for group in group_by(records, lambda record: (record.label, record.amount)).values():
        texts = (_calibration_text, _constraints_text)
        differing = [text for text in texts if len(set(map(text, group))) > 1]
        for record in group:
            words = (record.label, *(text(record) for text in differing))
            labels[record.name] = ", ".join(filter(None, words))
    return labels


def _constraints_text(record: PruneRecord) -> str:
    """Describe the constraints of a search in a few words, such as `among 8 to 24`."""
    among = "" if record.among is None else f"among {join_words(format_layers(record.among))}"
    protected = f"without {join_words(format_layers(record.protected))}" if record.protected else ""
    minimums = (f"{minimum} {kind} left" for kind, minimum in record.at_least.items())
    return ", ".join(filter(None, (among, protected, *minimums)))


NO_TIME = "time is estimated only in searches whose amount is in seconds or latency"
_TIME_NOTE = (
    "ms a token: estimated time per token in milliseconds, which is the measured time of the "
    "unpruned model minus the times of what is removed"
)


class _StepRow(NamedTuple):
    """Row of the table of steps; the first step of a search has number 1.

    The field `former` contains the parts that earlier steps removed.
    """

    search: str
    number: int
    step: PruneStep
    former: tuple[int, ...]


def _steps_table(records: Sequence[PruneRecord]) -> Table:
    """Build the table of steps: one row per step of each search."""
    record, labels = records[0], _search_labels(records)
    is_mixed = isinstance(record.parts, MixedParts)
    is_numbered = is_mixed or record.unit in NUMBERED_COMPONENTS

    def part(row: _StepRow) -> str | int | None:
        layer = row.step.layer
        if is_mixed:
            return record.parts.names({*row.step.removed}.difference(row.former))
        return record.parts.name(layer) if is_numbered and layer is not None else layer

    def score(row: _StepRow) -> Estimate:
        return Estimate(row.step.score, reason=row.step.reasons.get("score") or NO_SCORE)

    def margin(row: _StepRow) -> Estimate:
        reason = row.step.reasons.get("margin") or "nothing was compared"
        return replace(row.step.margin, reason=reason)

    def size(row: _StepRow) -> Estimate:
        count = row.step.parameters
        return Estimate(None if count is None else _bytes(record, count) / 1e6, reason=NO_SIZE)

    def time(row: _StepRow) -> float | None:
        return None if row.step.seconds is None else 1000 * row.step.seconds

    measure = metric_format(record)
    is_timed = any(step.seconds is not None for search in records for step in search.steps)
    change = "lost" if record.higher_is_better else "added"
    levels, drops = f"test {measure.level}", f"test {measure.level} {change}"
    part_name = "removed" if is_mixed else record.unit
    part_unit: FigureUnit = "text" if is_numbered else "count"
    columns: tuple[Column[_StepRow], ...] = (
        Column("strategy", "text", lambda row: row.search),
        Column("step", "count", lambda row: row.number),
        Column(part_name, part_unit, part, "all removals were chosen in a single step"),
        Column("score", "times", score),
        Column("runner-up worse by", "times", margin),
        Column(levels, measure.level_form, lambda row: test_outcome(row.step).level, NO_SCORE),
        Column(drops, measure.form, lambda row: test_outcome(row.step).lost, NO_SCORE),
        Column("parameters", "count", lambda row: row.step.parameters, NO_SIZE),
        Column("MB", "times", size),
        *[Column("ms a token", "times", time, NO_TIME)] * is_timed,
    )
    rows = [
        _StepRow(labels[s.name], n, step, s.steps[n - 2].removed if n > 1 else ())
        for s in records
        for n, step in enumerate(s.steps, 1)
    ]
    return build_table(
        f"{record.model.name} · {_benchmark_name(record)}: accuracy and size, step by step",
        columns,
        rows,
        "score: the quantity that the strategy minimises on the calibration documents"
        + f", per {'millisecond' if is_timed else 'million parameters'} saved" * is_mixed,
        *[_TIME_NOTE] * is_timed,
    )


def _frontier_charts(records: Sequence[PruneRecord]) -> Iterator[LineChart]:
    """Yield charts of each strategy's test accuracy or loss after each step.

    The horizontal axis of the first chart is the number of parameters, or the number of removed
    parts if parameters are not counted. If times were measured, a second chart has the time per
    token as its horizontal axis.
    """
    record, labels = records[0], _search_labels(records)
    ascending = sorted(records, key=lambda search: len(search.removed))
    # Of several amounts of one strategy, the last has all steps.
    longest = {labels[search.name]: search for search in ascending}
    steps = [step for search in records for step in search.steps]
    measure = metric_format(record).level

    def draw(by: str, x: str, size: Callable[[PruneStep], float], *intact: float) -> LineChart:
        levels = {
            label: dict.fromkeys(intact, search.baseline.level)
            | {size(step): test_outcome(step).level for step in search.steps}
            for label, search in longest.items()
        }
        title = f"{record.model.name} · {_benchmark_name(record)}: {_metric_name(record)} by {by}"
        return frontier_chart(title, x, measure, levels)

    if all(step.parameters for step in steps):
        x, intact = f"million parameters, {_bytes(record, 1)} bytes each", record.model.parameters
        yield draw("size", x, lambda step: (step.parameters or 0) / 1e6, intact / 1e6)
    else:
        x = f"{unit_plural(record.unit)} removed"
        yield draw(x, x, lambda step: len(step.removed), 0)
    if steps and all(step.seconds for step in steps):
        x = "milliseconds per token"
        yield draw(x, x, lambda step: 1000 * (step.seconds or 0))


class SavableStep(NamedTuple):
    """Step of a search after which the model can be saved.

    Attributes:
        goal: The goal of the search.
        search: The search.
        step: The step.
        request: The request that tested the step.
    """

    goal: GoalResult
    search: TestedSearch
    step: PruneStep
    request: CellRequest

    def command(self, results: Path) -> str:
        """Return the command that saves the pruned model and verifies it on the test documents."""
        removal = self.search.record.parts.removal(self.step.removed)
        words = ",".join(map(str, (*removal.removed(), *removal.parts)))
        return save_command(["--remove", words, "--output", "lighter"], self.request, results)


def find_savable(goals: Sequence[GoalResult], is_significant: bool = True) -> SavableStep | None:
    """Find the first recommended model that can be saved.

    A model can be saved if whole layers, or equally many parts of each layer, are removed.

    Args:
        goals: The searches and the recommendation for each goal.
        is_significant: Whether the loss must be significantly within the budget of accuracy. If
            False, an estimated loss within the budget is enough.

    Returns:
        The search step that gives this model; None if no recommended model can be saved.
    """
    for goal in goals:
        recommendation = goal.recommendation
        removed = recommendation.removed if is_significant else recommendation.estimated
        for search, index in goal.find_steps(removed):
            step, request = search.record.steps[index], search.run_requests[index]
            if search.request.is_uniform:
                return SavableStep(goal, search, step, search.request.test())
            if search.request.unit == "layer" and request is not None:
                return SavableStep(goal, search, step, request)
    return None


def refuse_unreached(goals: Sequence[GoalResult]) -> None:
    """Raise ExperimentError if no tested set is within any of the budgets of accuracy."""
    if all(goal.recommendation.nearest is not None for goal in goals):
        raise ExperimentError(f"{goals[0].record.model.name}: {goals[0].unshown_reason}")


def unsaved_reason(goals: Sequence[GoalResult], results: Path) -> str:
    """Explain why no recommended model is saved.

    If a model's estimated loss is within the budget, the text includes the command that saves the
    model.
    """
    estimate = find_savable(goals, is_significant=False)
    if estimate is None:
        return "there is no recommended model to save"
    reason = estimate.goal.unshown_reason
    return f"{reason}. To save the model nevertheless, type: {estimate.command(results)}"


def save_command(change: Sequence[str], request: CellRequest, results: Path) -> str:
    """Return the command that saves a changed model and verifies it on documents.

    The argument `change` contains the options that change the model, such as `--remove`.
    """
    settings = request.settings
    words = ["tracker", "export", settings.model, "--dtype", settings.dtype, *change]
    for name in FIELDS_BY_KEY.values():
        value = getattr(settings, name)
        if name not in _SEPARATE_KEYS and value != CellSettings.model_fields[name].default:
            words += [f"--{name}", _format_option(value)]
    words += ["--results", str(results)] if results != Path("results") else []
    return shlex.join(words)


_SEPARATE_KEYS = {*ChangeGrid.model_fields, "model", "dtype", "removed"}


def _format_option(value: object) -> str:
    """Format the value of a setting as a command-line argument."""
    if isinstance(value, tuple):
        return str(value[0]) if len(value) == 1 else json.dumps(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
