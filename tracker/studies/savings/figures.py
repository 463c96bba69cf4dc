"""What the study `savings` computes: races over random orders of measured outcomes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from tracker.core.ablations import INTACT, Ablation
from tracker.core.estimates import Estimate
from tracker.core.questions import Question
from tracker.core.records import RunIdentity
from tracker.engine.scoring.streams import plain_passes, plan_streams
from tracker.ledger.aligned import AlignedOutcomes
from tracker.ledger.blocks import BLOCK
from tracker.stats.resampling import SEED
from tracker.stats.sequential.confidence import MeanSequences
from tracker.stats.sequential.stopping import standing
from tracker.stats.sequential.top_k import SAME, SequentialTopK
from tracker.studies.base import Subject

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
ORDERS = 200
"""Random orders of the documents, each of which is raced through."""
POWER = 0.8
"""Of the design with a fixed number of documents."""
_AT_ONCE = 20
"""Orders whose bounds are drawn at once."""


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
    runs: tuple[RunIdentity, ...]
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

    def begun(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        """Say how many documents must be measured before each of an order can be looked at, anew.

        Tasks are measured in blocks of their own: the first of a block takes all of it.
        """
        seen: Counter[str] = Counter()
        found = np.zeros(len(order), dtype=np.int64)
        for place, document in enumerate(order):
            task = self.tasks[document]
            if seen[task] % BLOCK == 0:
                found[place] = min(BLOCK, self.counts[task] - seen[task])
            seen[task] += 1
        return found


def measured(subject: Subject) -> MeasuredDocuments:
    """Take a cell's outcomes."""
    outcomes = AlignedOutcomes(subject.store, subject.store.views.of(subject.request))
    runs = outcomes.runs
    ablations = [outcomes.ablation(run) for run in runs]
    scale = outcomes.weights * len(outcomes.tasks)
    layers = subject.record.model.layers
    passes = passes_of(ablations, layers)
    return MeasuredDocuments(
        subject.record.title,
        tuple(runs),
        outcomes.by_metric(ablations).drops * scale[:, None],
        tuple(outcomes.tasks),
        subject.store.counts(),
        float(scale.max()),
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
    """

    asked: Question
    documents: Array
    passes: Array
    answered: Mask
    wrong: Mask


def replayed(cell: MeasuredDocuments, asked: Question, orders: NDArray[np.int64]) -> Replayed:
    """Race through a cell's documents in each of some orders `[orders, documents]`.

    A look follows every block, and runs whose part is settled take no further part: what a `Race`
    does, without the bounds that its answer does not need.
    """
    race = _single_means if asked.count is None else _set
    looked, passed, answered, wrong = race(cell, asked, orders)
    known = answered if orders.shape[1] < cell.population else np.ones_like(answered)
    documents = np.where(known, looked / cell.population, np.inf)
    passes = np.where(known, passed / cell.population / cell.everything, np.inf)
    return Replayed(asked, documents, passes, answered, wrong)


def most(shares: Array, of: float) -> float:
    """Say how much some part `of` all orders took at most: the median at 0.5."""
    return float(np.quantile(shares, of, method="inverted_cdf"))


_Races = tuple[Array, Array, Mask, Mask]


def _set(cell: MeasuredDocuments, asked: Question, orders: NDArray[np.int64]) -> _Races:
    assert asked.count is not None
    values = cell.drops if asked.kind == "top" else -cell.drops
    documents, runs = values.shape
    means = values.mean(axis=0)
    last, slack = np.sort(means)[-asked.count], (asked.within or 0.0) + SAME
    looked, passed = np.zeros(len(orders)), np.zeros(len(orders))
    answered, wrong = np.zeros(len(orders), dtype=bool), np.zeros(len(orders), dtype=bool)
    for n, order in enumerate(orders):
        duels = SequentialTopK(
            cell.population,
            runs,
            asked.count,
            within=asked.within,
            level=asked.level,
            reach=cell.reach,
        )
        begun = cell.begun(order)
        while duels.open.any() and duels.seen < documents:
            block = slice(duels.seen, duels.seen + BLOCK)
            passed[n] += begun[block].sum() * cell.passes(duels.open)
            duels.look(values[order[block]])
        looked[n], answered[n] = begun[: duels.seen].sum(), not duels.open.any()
        left_out = ~duels.chosen & ~duels.open
        wrong[n] = (means[duels.chosen] < last - slack).any()
        wrong[n] |= (means[left_out] > last + slack).any()
    return looked, passed, answered, wrong


def _single_means(cell: MeasuredDocuments, asked: Question, orders: NDArray[np.int64]) -> _Races:
    parts = [
        _some_single_means(cell, asked, orders[start : start + _AT_ONCE])
        for start in range(0, len(orders), _AT_ONCE)
    ]
    looked, passed, answered, wrong = (np.concatenate(each) for each in zip(*parts, strict=True))
    return looked, passed, answered, wrong


def _some_single_means(
    cell: MeasuredDocuments, asked: Question, orders: NDArray[np.int64]
) -> _Races:
    """Race in several orders side by side: each mean is a series in each order."""
    documents, runs = cell.drops.shape
    bounds = MeanSequences(
        cell.population,
        len(orders) * runs,
        level=asked.level,
        together=runs,
        lowest=-cell.reach,
        highest=cell.reach,
        within=asked.within,
    )
    looked, passed = np.zeros(len(orders)), np.zeros(len(orders))
    begun = np.stack([cell.begun(order) for order in orders])
    stands = standing(asked.kind, bounds.low, bounds.high, asked.within)
    for start in range(0, documents, BLOCK):
        by_order = stands.open.reshape(-1, runs)
        going = by_order.any(axis=1)
        if not going.any():
            break
        block = cell.drops[orders[:, start : start + BLOCK]].transpose(1, 0, 2)
        for n in np.flatnonzero(going):
            new = begun[n, start : start + BLOCK].sum()
            looked[n] += new
            passed[n] += new * cell.passes(by_order[n])
        series = np.flatnonzero(stands.open)
        bounds.add(block.reshape(len(block), -1)[:, series], series)
        stands = standing(asked.kind, bounds.low, bounds.high, asked.within)
    means = np.tile(cell.drops.mean(axis=0), len(orders))
    if asked.kind == "drop":
        missed = (bounds.low > means + SAME) | (bounds.high < means - SAME)
    else:
        said = np.where(bounds.low > SAME, 1, np.where(bounds.high < -SAME, -1, 0))
        is_so = np.where(means > SAME, 1, np.where(means < -SAME, -1, 0))
        missed = ~stands.open & (said != is_so)
    is_open, is_wrong = stands.open.reshape(-1, runs), missed.reshape(-1, runs)
    return looked, passed, ~np.any(is_open, axis=1), np.any(is_wrong, axis=1)


@dataclass(frozen=True)
class Hardest:
    """What bounds a question's cost.

    Attributes:
        runs: Whose drop, or whose difference of two drops, is the hardest to know.
        distance: How exactly it must be known: for a set, how far the last one in and the first
            one out are apart, with what is tolerated; for a sign, the drop; else what is asked.
        sd: The standard deviation of a document's drop, or difference.
        documents: How many documents a test would need that looks once, at a number of documents
            that was right in advance, with the same confidence for all, and the power `POWER`.
    """

    runs: tuple[RunIdentity, ...]
    distance: float
    sd: float
    documents: Estimate


def hardest(cell: MeasuredDocuments, asked: Question) -> Hardest:
    """Find what bounds a question's cost."""
    drops, chance, runs = cell.drops, 1 - asked.level, cell.drops.shape[1]
    means, sds = drops.mean(axis=0), drops.std(axis=0)
    power = float(stats.norm.ppf(POWER))
    if asked.count is not None:
        order = np.argsort(-means if asked.kind == "top" else means, kind="stable")
        ends = order[asked.count - 1 : asked.count + 1]
        difference = drops[:, ends[0]] - drops[:, ends[1]]
        distance = abs(float(difference.mean())) + (asked.within or 0.0)
        sd, shared = float(difference.std()), asked.count * (runs - asked.count)
        reach = float(stats.norm.ppf(1 - chance / shared)) + power
    elif asked.kind == "drop":
        ends = np.array([np.argmax(sds)])
        distance, sd = asked.within or 0.0, float(sds[ends[0]])
        reach = float(stats.norm.ppf(1 - chance / (2 * runs)))
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            hard = np.where(sds > 0, sds / np.where(abs(means) > SAME, abs(means), np.nan), 0.0)
        ends = np.array([np.argmax(np.where(np.isnan(hard), np.inf, hard))])
        distance, sd = abs(float(means[ends[0]])), float(sds[ends[0]])
        reach = float(stats.norm.ppf(1 - chance / (2 * runs))) + power
    if distance <= SAME:
        tie = "two runs tie" if asked.count else "the drop is 0"
        documents = Estimate(None, reason=f"{tie}, which only all documents show")
    else:
        endless = (reach * sd / distance) ** 2
        documents = Estimate(float(math.ceil(endless / (1 + endless / cell.population))))
    return Hardest(tuple(cell.runs[n] for n in ends), distance, sd, documents)


def orders_of(documents: int) -> NDArray[np.int64]:
    """Draw random orders of so many documents."""
    generator = np.random.default_rng(SEED)
    return np.stack([generator.permutation(documents) for _ in range(ORDERS)])
