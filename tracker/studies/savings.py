"""Study: estimate how many measurements of documents the stopping rule `until` saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import compress
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tracker.analysis.runs import finite_or_none
from tracker.analysis.stopping import check_bounded
from tracker.engine.forward.streams import count_unshared_computations, plan_streams
from tracker.ledger.blocks import schedule_blocks
from tracker.schema.changes import INTACT, Ablation, Change
from tracker.schema.config import CellRequest
from tracker.schema.errors import ExperimentError, RequestError
from tracker.schema.estimates import Estimate
from tracker.schema.findings import LineChart, line_chart
from tracker.schema.questions import Question, parse_question
from tracker.schema.tables import Column, Table, build_table
from tracker.stats.arrays import Array, Mask
from tracker.stats.resampling import SEED
from tracker.stats.stopping import MEAN_TOLERANCE, Race
from tracker.studies.base import Study, StudyContext, StudyResult, Subject, study_texts
from tracker.studies.registry import SavingsSettings

RANDOM_ORDERS = 200
"""Number of random orders of the documents in which each question is replayed."""
DESIGN_POWER = 0.8
"""Power of the design with a fixed number of documents."""
SAVINGS_TEXTS = study_texts("savings", orders=RANDOM_ORDERS)
_ANY_DEPTH = 10**6
"""Assumed number of layers of an unknown model, so that spans of any length are counted."""


class Savings(Study[SavingsSettings]):
    """Study that applies the stopping rule `until` to random orders of measured documents."""

    name = "savings"
    question = "How much computation does the stopping rule 'until' save?"
    texts = SAVINGS_TEXTS

    def __init__(self, settings: SavingsSettings) -> None:
        super().__init__(settings)
        try:
            self._questions = [parse_question(text) for text in settings.questions]
        except ValueError as error:
            raise RequestError(f"--question: {error}") from None

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterable[CellRequest]:
        """Check the `until` conditions against a request; return the request unchanged.

        RequestError is raised if a condition such as `top 3` needs more runs than the request has.
        """
        default = SavingsSettings.model_fields["questions"].default
        if self.settings.questions != default:
            runs = len(cell.valid_changes(_ANY_DEPTH))
            try:
                for question in self._questions:
                    question.check_runs(runs)
            except ValueError as error:
                raise RequestError(f"{cell.title}: --question: {error}") from None
        return [cell]

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Report how many documents and how much computation each `until` condition needs."""
        result, races = StudyResult(), []
        for subject in subjects:
            cell = read_documents(subject)
            if isinstance(cell, str):
                result.lack(subject.record.title, cell)
                continue
            orders = draw_orders(len(cell.drops))
            questions = [question for question in self._questions if question.fits(len(cell.runs))]
            replays = [replay_question(cell, question, orders) for question in questions]
            result.add(*_write_answers(cell, replays))
            result.add(savings_table(cell, replays), _bounds_table(cell, replays))
            result.add(_passes_chart(cell, replays))
            races += replays
        result.add(_write_errors(races) if races else "Nothing could be raced for.")
        return result


# Figures


@dataclass(frozen=True)
class MeasuredDocuments:
    """Drop of each document of a benchmark in each run, and the computation of the runs.

    Attributes:
        title: Title of the model and benchmark.
        runs: Change of the model (e.g. a removed layer) in each run.
        drops: `[documents, runs]`, weighted drop of each document; the mean over documents is the
            benchmark's drop.
        tasks: `[documents]`, the task of each document.
        counts: Task → number of its documents in the split, measured or not.
        reach: Largest possible absolute value of a document's weighted drop.
        passes: Function that returns the number of layers computed per token, given a mask of the
            undecided runs.
        everything: Number of layers computed per token if all runs are computed.
        plain: Number of layers computed per token if the intact model and each run are evaluated
            separately, as with lm-eval.
    """

    title: str
    runs: tuple[Change, ...]
    drops: Array
    tasks: tuple[str, ...]
    counts: Mapping[str, int]
    reach: float
    passes: Callable[[Mask], float]
    everything: float
    plain: float

    @property
    def population(self) -> int:
        """Number of documents in the split, measured or not."""
        return sum(self.counts.values())

    @property
    def measured_documents(self) -> str:
        """Text with the number of measured documents, such as `320 of 10,042 documents`."""
        measured = f"{len(self.drops):,} of " if len(self.drops) < self.population else ""
        return f"{measured}{self.population:,} documents"

    @property
    def still_open(self) -> str:
        """Text in place of a number of documents if the `until` condition was not decided."""
        return f"undecided after all {len(self.drops):,} measured documents"


def read_documents(subject: Subject) -> MeasuredDocuments | str:
    """Read the measured drop of each document in each run.

    Returns a text with the reason if the stopping rule `until` does not support the results.
    """
    metric = subject.view.metric
    try:
        check_bounded(subject.store.identity.benchmark, metric)
    except ExperimentError:
        return f"{metric} is not a mean of outcomes between 0 and 1; set 'metric', e.g. to acc"
    outcomes = subject.outcomes()
    runs, tasks = tuple(outcomes.runs), tuple(outcomes.tasks)
    if not tasks or not runs:
        return "no document was measured with every change of the model"
    ablations = [outcomes.ablation(run) for run in runs]
    scale = outcomes.weights * len(tasks)
    drops, reach = outcomes.metric_outcomes(ablations).drops * scale[:, None], float(scale.max())
    if not (np.abs(drops) <= reach).all():
        return f"{metric} of a document is not between 0 and 1"
    layers = subject.record.model.layers
    passes = layers_counter(ablations, layers)
    figures = (runs, drops, tasks, subject.store.counts(), reach, passes)
    everything = passes(np.ones(len(runs), dtype=bool))
    plain = sum(count_unshared_computations([INTACT, *ablations], layers)) / 2
    return MeasuredDocuments(subject.record.title, *figures, everything, plain)


def layers_counter(ablations: Sequence[Ablation], layers: int) -> Callable[[Mask], float]:
    """Build a function that counts the layers computed per token for some ablations.

    The function takes a mask over `ablations`. The intact model is always counted too.
    """

    def count(open_ablations: Iterable[Ablation]) -> float:
        return plan_streams([INTACT, *open_ablations], layers).layer_passes

    baseline = count([])
    single = np.array([count([ablation]) - baseline for ablation in ablations])
    if baseline + single.sum() == count(ablations):
        # No two ablations share an extra stream, so their passes add up for any subset.
        return lambda mask: float(baseline + single[mask].sum())
    count_masked = cache(lambda mask: count(compress(ablations, mask)))
    return lambda mask: count_masked(tuple(mask.tolist()))


@dataclass(frozen=True)
class CostBound:
    """Minimum number of documents that are needed to decide an `until` condition.

    Attributes:
        distance: Size of the difference that the measurement must detect. For `top` and `prune`:
            the tolerance plus the difference in drop between two runs, the last chosen run and the
            first run that is not chosen. For `sign`: the absolute value of the drop that is hardest
            to distinguish from 0. For `drop`: the requested precision.
        sd: Standard deviation, over documents, of the drop or of the difference of two drops to
            which `distance` refers.
        documents: Sample size that a test with a fixed number of documents needs for the same
            confidence.
    """

    distance: float
    sd: float
    documents: Estimate


@dataclass(frozen=True)
class QuestionReplay:
    """Results of applying one `until` condition to many random orders of the documents.

    Attributes:
        question: The `until` condition, such as `top 3`.
        documents: `[orders]`, share of the split's documents that were measured until the rule
            stopped; infinite if the rule did not stop.
        passes: `[orders]`, share of the total computation until the rule stopped; infinite if the
            rule did not stop.
        answered: `[orders]`, whether the condition was decided on the measured documents.
        wrong: `[orders]`, whether the decisions contradict the means over all measured documents.
        bound: Lower bound of the number of documents that the condition needs.
    """

    question: Question
    documents: Array
    passes: Array
    answered: Mask
    wrong: Mask
    bound: CostBound

    def fewer(self, cell: MeasuredDocuments) -> float:
        """Return the computation of lm-eval as a multiple of the computation with `until`."""
        return cell.plain / cell.everything / cost_quantile(self.passes)

    @property
    def hardest(self) -> str:
        """Text that describes the drop (or difference of drops) that needs the most documents."""
        # Write a distance, which may be a small part of a point.
        distance = f"{100 * self.bound.distance:.2g} pp"
        if self.question.count is not None:
            return (
                f"the difference of {distance} between the last chosen run and the first run that "
                "is not chosen"
            )
        if self.question.kind == "drop":
            return f"the drop that varies most over documents and has to be known within {distance}"
        return f"the drop of {distance} that is hardest to distinguish from 0"


def replay_question(
    cell: MeasuredDocuments, question: Question, orders: NDArray[np.int64]
) -> QuestionReplay:
    """Simulate a measurement with an `until` condition in each of the given document orders."""
    answered, wrong = np.zeros((2, len(orders)), dtype=bool)
    documents, shares = np.full((2, len(orders)), np.inf)
    for index, order in enumerate(orders):
        race = Race(question, cell.population, len(cell.runs), cell.reach)
        seen, measured, passes = 0, 0, 0.0
        for block in schedule_blocks([cell.tasks[document] for document in order], cell.counts):
            if race.is_answered:
                break
            measured += block.size
            passes += block.size * cell.passes(race.open)
            race.update(cell.drops[order[seen : block.end]])
            seen = block.end
        answered[index] = race.is_answered
        wrong[index] = _is_contradicted(cell, question, race)
        if answered[index] or len(order) == cell.population:
            documents[index] = measured / cell.population
            shares[index] = passes / cell.population / cell.everything
    bound = question_bound(cell, question)
    return QuestionReplay(question, documents, shares, answered, wrong, bound)


def _is_contradicted(cell: MeasuredDocuments, question: Question, race: Race) -> bool:
    """Return whether a decision of the stopping rule disagrees with the means over all documents.

    `race` contains the decisions, which can rest on fewer documents.
    """
    means = cell.drops.mean(axis=0)
    if question.count is not None:
        values = means if question.kind == "top" else -means
        last = np.sort(values)[-question.count]
        slack = (question.within or 0.0) + MEAN_TOLERANCE
        excluded = ~race.chosen & ~race.open
        misses_member = (values[race.chosen] < last - slack).any()
        return bool(misses_member or (values[excluded] > last + slack).any())
    low, high = race.bounds.low, race.bounds.high
    if question.kind == "drop":
        return bool(((low > means + MEAN_TOLERANCE) | (high < means - MEAN_TOLERANCE)).any())
    return bool((~race.open & (_signs(low, high) != _signs(means, means))).any())


def _signs(low: Array, high: Array) -> NDArray[np.int64]:
    """Return the sign of each interval: 0 if the interval contains 0, else 1 or −1."""
    return np.where(low > MEAN_TOLERANCE, 1, np.where(high < -MEAN_TOLERANCE, -1, 0))


def cost_quantile(shares: Array, quantile: float = 0.5) -> float:
    """Return a quantile (default: the median) of a cost over all document orders."""
    return float(np.quantile(shares, quantile, method="inverted_cdf"))


def question_bound(cell: MeasuredDocuments, question: Question) -> CostBound:
    """Compute how many documents a test with a fixed sample size needs for an `until` condition."""
    drops, runs = cell.drops, cell.drops.shape[1]
    means, sds = drops.mean(axis=0), drops.std(axis=0)
    power, comparisons = float(stats.norm.ppf(DESIGN_POWER)), 2 * runs
    if question.count is not None:
        order = np.argsort(-means if question.kind == "top" else means, kind="stable")
        member, outsider = order[question.count - 1 : question.count + 1]
        difference = drops[:, member] - drops[:, outsider]
        distance = abs(float(difference.mean())) + (question.within or 0.0)
        sd, comparisons = float(difference.std()), question.count * (runs - question.count)
    elif question.kind == "drop":
        power = 0.0
        distance, sd = question.within or 0.0, float(sds.max())
    else:
        # The run whose sign needs most documents; a drop of 0 needs all.
        sizes = np.where(abs(means) > MEAN_TOLERANCE, abs(means), 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            hardness = np.where(sds > 0, sds / sizes, 0.0)
        hardest = int(np.argmax(hardness))
        distance, sd = abs(float(means[hardest])), float(sds[hardest])
    if distance <= MEAN_TOLERANCE:
        equality = "two drops are equal" if question.count else "the drop is 0"
        reason = f"only a measurement of all documents can show that {equality}"
        return CostBound(distance, sd, Estimate(None, reason=reason))
    width = float(stats.norm.ppf(1 - (1 - question.level) / comparisons)) + power
    n = (width * sd / distance) ** 2
    # The correction for a finite population.
    return CostBound(distance, sd, Estimate(float(math.ceil(n / (1 + n / cell.population)))))


def draw_orders(documents: int) -> NDArray[np.int64]:
    """Draw `RANDOM_ORDERS` random orders of document indices, as `[orders, documents]`."""
    generator = np.random.default_rng(SEED)
    return np.stack([generator.permutation(documents) for _ in range(RANDOM_ORDERS)])


# Sentences, tables and charts


def _write_answers(cell: MeasuredDocuments, replays: Sequence[QuestionReplay]) -> Iterator[str]:
    """Yield a sentence about the cheapest `until` condition, and one about the most expensive.

    An `until` condition states which question must be answered before a measurement stops.
    """
    cheapest = min(replays, key=lambda replay: cost_quantile(replay.passes))
    shares = [finite_or_none(cost_quantile(cheapest.passes, quantile)) for quantile in (0.5, 0.9)]
    yield SAVINGS_TEXTS.render("cheapest", cell, len(replays), cheapest, *shares)

    def cost(replay: QuestionReplay) -> tuple[float, float]:
        # Of the questions that stay open on all measured documents, choose the most expensive.
        return cost_quantile(replay.passes), replay.bound.documents.value or math.inf

    dearest = max(replays, key=cost)
    taken = finite_or_none(cost_quantile(dearest.documents) * cell.population)
    yield SAVINGS_TEXTS.render("dearest", cell, dearest, dearest.bound.documents, taken)


def _write_errors(replays: Sequence[QuestionReplay]) -> str:
    wrong = sum(int(replay.wrong.sum()) for replay in replays)
    worst = max(float(replay.wrong.mean()) for replay in replays)
    promised = max(1 - replay.question.level for replay in replays)
    return SAVINGS_TEXTS.render("errors", len(replays), wrong, worst, promised)


def savings_table(cell: MeasuredDocuments, replays: Sequence[QuestionReplay]) -> Table:
    """Build the table of the documents and the computation that each `until` condition needs."""
    reason = cell.still_open

    def share(label: str, figure: str, quantile: float) -> Column[QuestionReplay]:
        read = attrgetter(figure)
        return Column(label, "percent", lambda race: cost_quantile(read(race), quantile), reason)

    def early(race: QuestionReplay) -> float:
        return float((race.answered & (race.documents < 1)).mean())

    return build_table(
        f"{cell.title}: documents and computation that an answer to each question needs, "
        f"estimated from {cell.measured_documents}",
        [
            Column("question", "text", lambda race: str(race.question)),
            share("documents", "documents", 0.5),
            share("documents, nine of ten", "documents", 0.9),
            share("layer passes", "passes", 0.5),
            share("layer passes, nine of ten", "passes", 0.9),
            Column("fewer than lm-eval", "times", lambda race: race.fewer(cell) or None, reason),
            Column("answered before the end", "percent", early),
            Column("answered by the end", "percent", lambda race: float(race.answered.mean())),
            Column("wrong", "percent", lambda race: float(race.wrong.mean())),
            Column("promised", "percent", lambda race: 1 - race.question.level),
        ],
        replays,
        *SAVINGS_TEXTS.render_all("savings_notes"),
    )


def _bounds_table(cell: MeasuredDocuments, replays: Sequence[QuestionReplay]) -> Table:
    """Build the table of the drop that is hardest to measure, for each `until` condition."""

    def documents(race: QuestionReplay) -> float:
        return cost_quantile(race.documents) * cell.population

    return build_table(
        f"{cell.title}: the drop or difference of drops that is hardest to measure, by question",
        [
            Column("question", "text", lambda race: str(race.question)),
            Column("the hardest to know", "text", lambda race: race.hardest),
            Column("standard deviation of a document", "points", lambda race: race.bound.sd),
            Column("documents of one look", "count", lambda race: race.bound.documents),
            Column("documents of the race", "count", documents, cell.still_open),
        ],
        replays,
        *SAVINGS_TEXTS.render_all("bounds_notes", DESIGN_POWER),
    )


def _passes_chart(cell: MeasuredDocuments, replays: Sequence[QuestionReplay]) -> LineChart:
    """Chart how often a question is answered, by the share of computed layer passes.

    A line shows, for one question, the share of random document orders with an answer.
    """
    positions = range(0, 101, 2)
    lines = {}
    for race in replays:
        passes = 100 * np.where(race.answered, race.passes, np.inf)
        shares = [float((passes <= position + 1e-9).mean()) for position in positions]
        lines[str(race.question)] = shares
    x = "computed layer passes (100 %: every run is measured on every document)"
    axes = (x, f"answered, of {RANDOM_ORDERS} orders")
    title = f"{cell.title}: share of random document orders with an answered question"
    return line_chart(title, axes, "percent", positions, lines)
