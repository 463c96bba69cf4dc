"""What the study `savings` computes: races over random orders of measured outcomes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.errors import ExperimentError
from tracker.core.estimates import Estimate
from tracker.core.questions import Question
from tracker.engine.scoring.streams import plain_passes, plan_streams
from tracker.ledger.blocks import turns
from tracker.ledger.early_stopping import refuse_unbounded
from tracker.stats.arrays import Array, Mask
from tracker.stats.resampling import SEED
from tracker.stats.sequential.stopping import Race
from tracker.stats.sequential.top_k import SAME
from tracker.studies.base import Subject

ORDERS = 200
"""Random orders of the documents, each of which is raced through."""
POWER = 0.8
"""Of the design with a fixed number of documents."""


@dataclass(frozen=True)
class MeasuredDocuments:
    """The documents of a cell that are measured under all runs.

    Attributes:
        title: Its name.
        runs: The runs.
        drops: `[documents, runs]`, each document's drops by its weight, so that a plain mean over
            all is the benchmark's drop.
        tasks: `[documents]`, the task of each.
        counts: Documents of each task in the split, which may be more than are measured.
        reach: How large such a drop can be.
        passes: Which runs are open → the layer passes of a token, the baseline's with theirs.
        everything: The same for all runs.
        plain: The same for the baseline and all runs one after the other, as lm-eval runs them.
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


def measured(subject: Subject) -> MeasuredDocuments | str:
    """Take a cell's outcomes, or say why they cannot be raced for."""
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
    """Say how many layers a token passes under the baseline and any of some ablations."""

    def planned(some: Sequence[Ablation]) -> float:
        return plan_streams([INTACT, *some], layers).layer_passes

    baseline = planned([])
    alone = np.array([planned([one]) - baseline for one in ablations])
    if baseline + alone.sum() == planned(ablations):
        # No two ablations share a stream of their own, so that no fewer of them do.
        return lambda some: float(baseline + alone[some].sum())

    @cache
    def together(some: tuple[bool, ...]) -> float:
        return planned([one for one, is_open in zip(ablations, some, strict=True) if is_open])

    return lambda some: together(tuple(some.tolist()))


@dataclass(frozen=True)
class Replayed:
    """A question, raced for in many orders: `[orders]` each.

    Attributes:
        asked: The question.
        documents: The share of the split's documents that had to be measured; infinite where the
            question was open when the measured ones ended before the split did.
        passes: The share of the layer passes that this took; infinite likewise.
        answered: Whether it was answered, at the latest by all measured documents.
        wrong: Whether what was said by then contradicts all measured documents.
        bound: What bounds the question's cost.
    """

    asked: Question
    documents: Array
    passes: Array
    answered: Mask
    wrong: Mask
    bound: Hardest


def replayed(cell: MeasuredDocuments, asked: Question, orders: NDArray[np.int64]) -> Replayed:
    """Race through a cell's documents in each of some orders `[orders, documents]`, as `until`."""
    answered, wrong = np.zeros((2, len(orders)), dtype=bool)
    documents, passed = np.full((2, len(orders)), np.inf)
    for n, order in enumerate(orders):
        race = Race(asked, cell.population, len(cell.runs), cell.reach)
        looked, measured, passes = 0, 0, 0.0
        for turn in turns([cell.tasks[document] for document in order], cell.counts):
            if race.standing.answered:
                break
            measured += turn.size
            passes += turn.size * cell.passes(race.standing.open)
            race.look(cell.drops[order[looked : turn.end]])
            looked = turn.end
        answered[n], wrong[n] = race.standing.answered, _contradicts(cell, asked, race)
        if answered[n] or len(order) == cell.population:
            documents[n] = measured / cell.population
            passed[n] = passes / cell.population / cell.everything
    return Replayed(asked, documents, passed, answered, wrong, hardest(cell, asked))


def _contradicts(cell: MeasuredDocuments, asked: Question, race: Race) -> bool:
    """Whether what a race has said contradicts all measured documents."""
    means, standing = cell.drops.mean(axis=0), race.standing
    if asked.count is not None:
        values = means if asked.kind == "top" else -means
        last, slack = np.sort(values)[-asked.count], (asked.within or 0.0) + SAME
        left_out = ~standing.chosen & ~standing.open
        missed = (values[standing.chosen] < last - slack).any()
        return bool(missed or (values[left_out] > last + slack).any())
    low, high = race.bounds.low, race.bounds.high
    if asked.kind == "drop":
        return bool(((low > means + SAME) | (high < means - SAME)).any())
    said = np.where(low > SAME, 1, np.where(high < -SAME, -1, 0))
    is_so = np.where(means > SAME, 1, np.where(means < -SAME, -1, 0))
    return bool((~standing.open & (said != is_so)).any())


def most(shares: Array, of: float) -> float:
    """Say how much some part `of` all orders took at most: the median at 0.5."""
    return float(np.quantile(shares, of, method="inverted_cdf"))


@dataclass(frozen=True)
class Hardest:
    """What bounds a question's cost.

    Attributes:
        distance: How exactly it must be known: for a set, how far the last one in and the first
            one out are apart, with what is tolerated; for a sign, the drop; else what is asked.
        sd: The standard deviation of a document's drop, or difference.
        documents: How many documents a test would need that looks once, at a number of documents
            that was right in advance, with the same confidence for all, and the power `POWER`.
    """

    distance: float
    sd: float
    documents: Estimate


def hardest(cell: MeasuredDocuments, asked: Question) -> Hardest:
    """Find what bounds a question's cost."""
    drops, runs = cell.drops, cell.drops.shape[1]
    means, sds = drops.mean(axis=0), drops.std(axis=0)
    power, comparisons = float(stats.norm.ppf(POWER)), 2 * runs
    if asked.count is not None:
        order = np.argsort(-means if asked.kind == "top" else means, kind="stable")
        ends = order[asked.count - 1 : asked.count + 1]
        difference = drops[:, ends[0]] - drops[:, ends[1]]
        distance = abs(float(difference.mean())) + (asked.within or 0.0)
        sd, comparisons = float(difference.std()), asked.count * (runs - asked.count)
    elif asked.kind == "drop":
        power = 0.0
        distance, sd = asked.within or 0.0, float(sds.max())
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            hard = np.where(sds > 0, sds / np.where(abs(means) > SAME, abs(means), np.nan), 0.0)
        place = int(np.argmax(np.where(np.isnan(hard), np.inf, hard)))
        distance, sd = abs(float(means[place])), float(sds[place])
    if distance <= SAME:
        tie = "two runs tie" if asked.count else "the drop is 0"
        documents = Estimate(None, reason=f"{tie}, which only all documents show")
    else:
        reach = float(stats.norm.ppf(1 - (1 - asked.level) / comparisons)) + power
        endless = (reach * sd / distance) ** 2
        documents = Estimate(float(math.ceil(endless / (1 + endless / cell.population))))
    return Hardest(distance, sd, documents)


def orders_of(documents: int) -> NDArray[np.int64]:
    """Draw random orders of so many documents."""
    generator = np.random.default_rng(SEED)
    return np.stack([generator.permutation(documents) for _ in range(ORDERS)])
