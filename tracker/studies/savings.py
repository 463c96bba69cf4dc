"""Study: measure how many documents `until` saves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tracker.analysis.stopping import refuse_unbounded
from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.config import CellRequest
from tracker.core.errors import ExperimentError, RequestError
from tracker.core.estimates import Estimate
from tracker.core.findings import LineChart
from tracker.core.formats import defined
from tracker.core.questions import Question, question
from tracker.core.tables import Column, Table, table
from tracker.engine.forward.streams import plain_passes, plan_streams
from tracker.ledger.blocks import turns
from tracker.stats.arrays import Array, Mask
from tracker.stats.resampling import SEED
from tracker.stats.stopping import SAME, Race
from tracker.studies.base import Study, StudyContext, StudyResult, Subject, study_texts
from tracker.studies.layout import line_chart
from tracker.studies.registry import SavingsSettings

ORDERS = 200
"""Random orders of the documents, each of which is raced through."""
POWER = 0.8
"""Power of the design with a fixed number of documents."""
TEXTS = study_texts("savings", orders=ORDERS)
_ANY_MODEL = 10**6
"""Layers, before it is known how many a model has: spans that it is too short for count too."""


class Savings(Study[SavingsSettings]):
    """Replays how 'until' would have ended a cell."""

    name = "savings"
    question = "How much less has to be measured where a question is enough?"
    texts = TEXTS

    def __init__(self, settings: SavingsSettings) -> None:
        super().__init__(settings)
        try:
            self._questions = [question(text) for text in settings.questions]
        except ValueError as error:
            raise RequestError(f"--question: {error}") from None

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterable[CellRequest]:
        """Return the cell; raise RequestError if it cannot answer a named question."""
        default = SavingsSettings.model_fields["questions"].default
        if self.settings.questions != default:
            runs = len(cell.valid_changes(_ANY_MODEL))
            try:
                for question in self._questions:
                    question.refuse(runs)
            except ValueError as error:
                raise RequestError(f"{cell.title}: --question: {error}") from None
        return [cell]

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Answer with the cost of each question, and its lower bound."""
        result = StudyResult()
        races: list[Replay] = []
        for subject in subjects:
            cell = measured_documents(subject)
            if isinstance(cell, str):
                result.lack(subject.record.title, cell)
                continue
            orders = orders_of(len(cell.drops))
            fitting = [question for question in self._questions if question.fits(len(cell.runs))]
            replays = [replay(cell, question, orders) for question in fitting]
            result.add(_cheapest(cell, replays), _dearest(cell, replays))
            result.add(savings_table(cell, replays), bounds_table(cell, replays))
            result.add(passes_chart(cell, replays))
            races += replays
        result.add(_errors(races) if races else "Nothing could be raced for.")
        return result


# Figures


@dataclass(frozen=True)
class MeasuredDocuments:
    """The documents of a cell that are measured under all runs.

    Attributes:
        title: Title of the cell.
        runs: The runs.
        drops: `[documents, runs]`, each document's drops scaled by its weight, so that their plain
            mean is the benchmark's drop.
        tasks: `[documents]`, the task of each.
        counts: Documents of each task in the split, which may be more than are measured.
        reach: Largest possible drop of a document.
        passes: Function of the mask of open runs that returns the layer passes of a token,
            including the baseline's.
        everything: Layer passes of a token if all runs are open.
        plain: Layer passes of a token for the baseline and all runs in turn, as in lm-eval.
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
        """Documents of the split."""
        return sum(self.counts.values())

    @property
    def extent(self) -> str:
        """The documents that were raced through, such as `320 of 10,042 documents`."""
        measured = f"{len(self.drops):,} of " if len(self.drops) < self.population else ""
        return f"{measured}{self.population:,} documents"

    @property
    def still_open(self) -> str:
        """Why a question has no figure that was open when the measured documents ended."""
        return f"open after all {len(self.drops):,} that are measured"


def measured_documents(subject: Subject) -> MeasuredDocuments | str:
    """Return a cell's outcomes, or why they cannot be raced for."""
    metric = subject.view.metric
    try:
        refuse_unbounded(subject.store.identity.benchmark, metric)
    except ExperimentError:
        return (
            f"{metric} is no mean of outcomes between 0 and 1; name another 'metric', such as acc"
        )
    outcomes = subject.outcomes()
    runs, tasks = tuple(outcomes.runs), tuple(outcomes.tasks)
    if not tasks or not runs:
        return "no document is measured under all runs"
    ablations = [outcomes.ablation(run) for run in runs]
    scale = outcomes.weights * len(tasks)
    drops, reach = outcomes.by_metric(ablations).drops * scale[:, None], float(scale.max())
    if not (np.abs(drops) <= reach).all():
        return f"{metric} of some document is not between 0 and 1"
    layers = subject.record.model.layers
    passes = passes_of(ablations, layers)
    return MeasuredDocuments(
        subject.record.title,
        runs,
        drops,
        tasks,
        subject.store.counts(),
        reach,
        passes,
        passes(np.ones(len(runs), dtype=bool)),
        sum(plain_passes([INTACT, *ablations], layers)) / 2,
    )


def passes_of(ablations: Sequence[Ablation], layers: int) -> Callable[[Mask], float]:
    """Return a function that counts the layers of a token under the baseline and open ablations."""

    def planned(open_ablations: Sequence[Ablation]) -> float:
        return plan_streams([INTACT, *open_ablations], layers).layer_passes

    baseline = planned([])
    alone = np.array([planned([one]) - baseline for one in ablations])
    if baseline + alone.sum() == planned(ablations):
        # No two ablations share a stream of their own, so that no fewer of them do.
        return lambda mask: float(baseline + alone[mask].sum())

    @cache
    def together(mask: tuple[bool, ...]) -> float:
        return planned(
            [ablation for ablation, is_open in zip(ablations, mask, strict=True) if is_open]
        )

    return lambda mask: together(tuple(mask.tolist()))


@dataclass(frozen=True)
class Bound:
    """Bound of a question's cost.

    Attributes:
        distance: Required precision: for a set, the distance between the last member and the first
            non-member, plus the tolerance; for a sign, the drop; else the requested precision.
        sd: Standard deviation of a document's drop, or difference.
        documents: Number of documents of a test with a single look at an optimal fixed size, the
            same simultaneous confidence, and the power `POWER`.
    """

    distance: float
    sd: float
    documents: Estimate


@dataclass(frozen=True)
class Replay:
    """Results of one question, raced in many orders of the documents: `[orders]` each.

    Attributes:
        question: Raced question.
        documents: Share of the split's documents that had to be measured; infinite if the question
            was open when the measured documents ended before the split did.
        passes: Share of the layer passes; infinite in the same case.
        answered: Whether it was answered, at the latest by all measured documents.
        wrong: Whether the answer contradicts that of all measured documents.
        bound: Bound of the question's cost.
    """

    question: Question
    documents: Array
    passes: Array
    answered: Mask
    wrong: Mask
    bound: Bound

    def fewer(self, cell: MeasuredDocuments) -> float:
        """Return how many times fewer layer passes than lm-eval's for the baseline and each run."""
        return cell.plain / cell.everything / most(self.passes, 0.5)

    @property
    def hardest(self) -> str:
        """The hardest figure to know; other documents would find it between other runs."""
        # Write a distance, which may be a small part of a point.
        distance = f"{100 * self.bound.distance:.2g} pp"
        if self.question.count is not None:
            return f"the last one in and the first one out, {distance} to tell apart"
        drop = "varies most" if self.question.kind == "drop" else "is the hardest to tell from 0"
        return f"the drop that {drop}, to be known by {distance}"


def replay(cell: MeasuredDocuments, question: Question, orders: NDArray[np.int64]) -> Replay:
    """Race through a cell's documents as `until` does, in given orders `[orders, documents]`."""
    answered, wrong = np.zeros((2, len(orders)), dtype=bool)
    documents, passed = np.full((2, len(orders)), np.inf)
    for n, order in enumerate(orders):
        race = Race(question, cell.population, len(cell.runs), cell.reach)
        looked, measured, passes = 0, 0, 0.0
        for turn in turns([cell.tasks[document] for document in order], cell.counts):
            if race.standing.answered:
                break
            measured += turn.size
            passes += turn.size * cell.passes(race.standing.open)
            race.look(cell.drops[order[looked : turn.end]])
            looked = turn.end
        answered[n], wrong[n] = race.standing.answered, _contradicts(cell, question, race)
        if answered[n] or len(order) == cell.population:
            documents[n] = measured / cell.population
            passed[n] = passes / cell.population / cell.everything
    return Replay(question, documents, passed, answered, wrong, bound_of(cell, question))


def _contradicts(cell: MeasuredDocuments, question: Question, race: Race) -> bool:
    """Check whether the answer of a race contradicts all measured documents."""
    means, standing = cell.drops.mean(axis=0), race.standing
    if question.count is not None:
        values = means if question.kind == "top" else -means
        last, slack = np.sort(values)[-question.count], (question.within or 0.0) + SAME
        left_out = ~standing.chosen & ~standing.open
        missed = (values[standing.chosen] < last - slack).any()
        return bool(missed or (values[left_out] > last + slack).any())
    low, high = race.bounds.low, race.bounds.high
    if question.kind == "drop":
        return bool(((low > means + SAME) | (high < means - SAME)).any())
    answer = np.where(low > SAME, 1, np.where(high < -SAME, -1, 0))
    truth = np.where(means > SAME, 1, np.where(means < -SAME, -1, 0))
    return bool((~standing.open & (answer != truth)).any())


def most(shares: Array, of: float) -> float:
    """Return a quantile of the costs of all orders: the median if `of` is 0.5."""
    return float(np.quantile(shares, of, method="inverted_cdf"))


def bound_of(cell: MeasuredDocuments, question: Question) -> Bound:
    """Compute the bound of a question's cost."""
    drops, runs = cell.drops, cell.drops.shape[1]
    means, sds = drops.mean(axis=0), drops.std(axis=0)
    power, comparisons = float(stats.norm.ppf(POWER)), 2 * runs
    if question.count is not None:
        order = np.argsort(-means if question.kind == "top" else means, kind="stable")
        ends = order[question.count - 1 : question.count + 1]
        difference = drops[:, ends[0]] - drops[:, ends[1]]
        distance = abs(float(difference.mean())) + (question.within or 0.0)
        sd, comparisons = float(difference.std()), question.count * (runs - question.count)
    elif question.kind == "drop":
        power = 0.0
        distance, sd = question.within or 0.0, float(sds.max())
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            hard = np.where(sds > 0, sds / np.where(abs(means) > SAME, abs(means), np.nan), 0.0)
        hardest = int(np.argmax(np.where(np.isnan(hard), np.inf, hard)))
        distance, sd = abs(float(means[hardest])), float(sds[hardest])
    if distance <= SAME:
        tie = "two runs tie" if question.count else "the drop is 0"
        documents = Estimate(None, reason=f"{tie}, which only all documents show")
    else:
        reach = float(stats.norm.ppf(1 - (1 - question.level) / comparisons)) + power
        endless = (reach * sd / distance) ** 2
        documents = Estimate(float(math.ceil(endless / (1 + endless / cell.population))))
    return Bound(distance, sd, documents)


def orders_of(documents: int) -> NDArray[np.int64]:
    """Draw random orders of a number of documents."""
    generator = np.random.default_rng(SEED)
    return np.stack([generator.permutation(documents) for _ in range(ORDERS)])


# Sentences, tables and charts


def _cheapest(cell: MeasuredDocuments, replays: Sequence[Replay]) -> str:
    """Describe the cost of the cheapest question."""
    cheapest = min(replays, key=lambda race: most(race.passes, 0.5))
    shares = (most(cheapest.passes, part) for part in (0.5, 0.9))
    return TEXTS.one("cheapest", cell, len(replays), cheapest, *map(_finite, shares))


def _dearest(cell: MeasuredDocuments, replays: Sequence[Replay]) -> str:
    """Describe the bound of the most expensive question."""
    # Of those that are open after all that are measured, the one that needs the most.
    dearest = max(
        replays, key=lambda race: (most(race.passes, 0.5), race.bound.documents.value or math.inf)
    )
    took = _finite(most(dearest.documents, 0.5) * cell.population)
    return TEXTS.one("dearest", cell, dearest, dearest.bound.documents, took)


def _finite(share: float) -> float | None:
    return share if defined(share) else None


def _errors(races: Sequence[Replay]) -> str:
    wrong = sum(int(race.wrong.sum()) for race in races)
    worst = max(float(race.wrong.mean()) for race in races)
    promised = max(1 - race.question.level for race in races)
    return TEXTS.one("errors", len(races), wrong, worst, promised)


def savings_table(cell: MeasuredDocuments, replays: Sequence[Replay]) -> Table:
    """Build the table of the cost of each question."""

    def share(label: str, shares: str, of: float) -> Column[Replay]:
        value = attrgetter(shares)
        return Column(label, "percent", lambda race: most(value(race), of), cell.still_open)

    def early(race: Replay) -> float:
        return float((race.answered & (race.documents < 1)).mean())

    return table(
        f"{cell.title}: what each question takes, by {cell.extent}",
        [
            Column("question", "text", lambda race: str(race.question)),
            share("documents", "documents", 0.5),
            share("documents, nine of ten", "documents", 0.9),
            share("layer passes", "passes", 0.5),
            share("layer passes, nine of ten", "passes", 0.9),
            Column("fewer than lm-eval", "times", lambda r: r.fewer(cell) or None, cell.still_open),
            Column("answered before the end", "percent", early),
            Column("answered by the end", "percent", lambda race: float(race.answered.mean())),
            Column("wrong", "percent", lambda race: float(race.wrong.mean())),
            Column("promised", "percent", lambda race: 1 - race.question.level),
        ],
        replays,
        *TEXTS.all("savings_notes"),
    )


def bounds_table(cell: MeasuredDocuments, replays: Sequence[Replay]) -> Table:
    """Build the table of the bound of each question."""

    def raced(race: Replay) -> float:
        return most(race.documents, 0.5) * cell.population

    return table(
        f"{cell.title}: what bounds each question",
        [
            Column("question", "text", lambda race: str(race.question)),
            Column("the hardest to know", "text", lambda race: race.hardest),
            Column("standard deviation of a document", "points", lambda race: race.bound.sd),
            Column("documents of one look", "count", lambda race: race.bound.documents),
            Column("documents of the race", "count", raced, cell.still_open),
        ],
        replays,
        *TEXTS.all("bounds_notes", POWER),
    )


def passes_chart(cell: MeasuredDocuments, replays: Sequence[Replay]) -> LineChart:
    """Build the chart of the share of orders that answer each question, by layer passes."""
    positions = range(0, 101, 2)

    def line(race: Replay) -> list[float]:
        passes = np.where(race.answered, race.passes, np.inf)
        return [float((100 * passes <= position + 1e-9).mean()) for position in positions]

    return line_chart(
        f"{cell.title}: how soon each question is answered",
        (
            "layer passes, % of those of all documents of the split and all runs",
            f"answered, of {ORDERS} orders",
        ),
        "percent",
        positions,
        {str(race.question): line(race) for race in replays},
    )
