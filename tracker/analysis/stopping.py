"""Apply the stopping rules of `until` to stored outcomes, block by block in random order.

Also choose the next block, and report interim estimates while the cell is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress, product
from typing import NamedTuple

import numpy as np
import pandas as pd

from tracker.analysis.aligned import AlignedOutcomes, gold_logprobs
from tracker.core.answers import contending
from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.errors import ExperimentError, WorkError
from tracker.core.estimates import Estimate
from tracker.core.extent import ALL, Extent, shuffled
from tracker.core.identities import BenchmarkIdentity
from tracker.core.kinds import Action
from tracker.core.questions import question
from tracker.core.records import AnswerRecord, RunAnswer
from tracker.core.views import View
from tracker.ledger.blocks import Block, turns
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import METRIC
from tracker.stats.accuracy import weights_by_task
from tracker.stats.arrays import Array, Mask
from tracker.stats.stopping import Race, SmallestMean, forecast

QUESTION = "prune 1 within 1 pp"
"""Question that a race of candidates by accuracy answers."""
WITHIN = 0.01
"""Tolerance of a race by log-probability, in nats: the winner's excess cost over the best.

It corresponds to a right answer that is 1 % less likely.
"""
PILOT = 32
"""Documents that must be measured before the cost of an answer is forecast."""


@dataclass(frozen=True)
class Interim:
    """Progress of a view of a cell.

    Attributes:
        documents: Documents that are measured under all shown runs. If a question decides, the
            documents that are measured under the intact model.
        wanted: Requested documents; None if a question decides.
        tokens: Tokens of these documents, counted as in `CellRecord.tokens`.
        drops: Run → its drop on these documents.
    """

    documents: int
    wanted: int | None
    tokens: int
    drops: dict[Change, Estimate]


def interim_estimates(store: CellStore, view: View) -> Interim:
    """Estimate each run's drop from the blocks that are measured so far.

    Args:
        store: The cell on disk.
        view: The requested view.

    Returns:
        The estimates; empty if a run has no document.
    """
    columns = ["task", "doc", "ablation", "proxy_tokens", METRIC + view.metric]
    outcomes = AlignedOutcomes(store, view, columns)
    if view.until is not None:
        return _until_answered(outcomes, view)
    n = len(outcomes.tasks)
    if not n or outcomes.missing:
        return Interim(0, outcomes.wanted, 0, {})
    paired = outcomes.by_metric([outcomes.ablation(run) for run in outcomes.runs])
    drops = {run: paired.drop(place) for place, run in enumerate(outcomes.runs)}
    return Interim(n, outcomes.wanted, int(outcomes.tokens.sum()), drops)


def _until_answered(outcomes: AlignedOutcomes, view: View) -> Interim:
    """Estimate each run's drop from its own documents, without fixed-sample intervals."""
    intact = outcomes.of_documents(None, [])
    if not intact.tasks:
        return Interim(0, None, 0, {})
    drops = {}
    for run in view.runs:
        alone = outcomes.of_documents(None, [run])
        if alone.runs:
            drops[run] = Estimate(alone.by_metric([alone.ablation(run)]).drop(0).value)
    return Interim(len(intact.tasks), None, int(intact.tokens.sum()), drops)


def refuse_unbounded(benchmark: BenchmarkIdentity, metric: str, key: str = "until") -> None:
    """Raise ExperimentError for a metric whose outcomes are not between 0 and 1.

    `key` is the setting that requires bounded outcomes.
    """
    task = benchmark.tasks[0]
    if task.metrics.get(metric) != "mean" or not task.higher_is_better.get(metric, True):
        raise ExperimentError(
            f"'{key}' needs a metric that is a mean of outcomes between 0 and 1, such as acc; "
            f"{metric} of {benchmark.name} is none. Leave '{key}' out, or name another "
            "'metric'"
        )


class RacedFigure(NamedTuple):
    """The figure of an outcome that decides a race.

    Attributes:
        columns: Columns to read.
        of: Computes the figure of each row.
        why_not: Explains why a document's figures (the intact model's first) cannot decide; "" if
            they can.
    """

    columns: Sequence[str]
    of: Callable[[pd.DataFrame], Array]
    why_not: Callable[[Array], str]


def bounded(benchmark: BenchmarkIdentity, metric: str, key: str = "until") -> RacedFigure:
    """Build the figure that lets a metric decide a race.

    Args:
        benchmark: The benchmark.
        metric: Metric of the benchmark.
        key: Setting that requires the race.

    Returns:
        The figure.

    Raises:
        ExperimentError: Outcomes of the metric are not between 0 and 1.
    """
    refuse_unbounded(benchmark, metric, key)

    def why_not(outcomes: Array) -> str:
        wrong = ~((outcomes >= 0) & (outcomes <= 1))
        if not wrong.any():
            return ""
        return (
            f"'{key}' cannot be answered: {metric} is {outcomes[wrong][0]:g} for a document of "
            f"{{task}}, and not between 0 and 1. Leave '{key}' out"
        )

    column = METRIC + metric
    return RacedFigure([column], lambda frame: frame[column].to_numpy(dtype=np.float64), why_not)


class BlockRace:
    """A race that a cell's outcomes decide, identical in every process and after a kill.

    All documents of the benchmark have one random order, in which every prefix is stratified by
    task. The race is evaluated after every block, up to the first missing document. Blocks lack
    only the runs that are still open. Other outcomes of later documents are ignored, because
    selection may be the reason why they exist.

    Attributes:
        deciding: Stopping rule that evaluates the documents.
        lacking: Next block to measure, and its ablations; None once the question is answered, or
            all documents are evaluated. Later blocks may be measured earlier with the same
            ablations; runs that are decided meanwhile are then measured in vain.
        looked: Number of evaluated documents.
        measured: Number of documents that had to be measured for that. It can be larger, because
            blocks are measured whole, and other tasks of a group come later in the order.
        done: Number of evaluated blocks.
        order: All documents, as task and number, in the order of evaluation.
        population: Number of documents of the benchmark.
        base: Layers that a token passes in the streams that are always measured.
        costs: `[runs]`, additional layers that it passes in each run.
    """

    deciding: Race | SmallestMean

    def __init__(
        self,
        store: CellStore,
        seed: int,
        ablations: Sequence[Ablation],
        beneath: Sequence[Ablation],
        figure: RacedFigure,
    ) -> None:
        """Start before the first document.

        Args:
            store: The cell.
            seed: Seed of the order of the documents.
            ablations: Ablations that the question is about.
            beneath: Further ablations that are measured on each document.
            figure: Figure of the outcomes that decides.
        """
        every = store.wanted(ALL)
        self.population = sum(map(len, every.values()))
        self.extent = Extent(sample=max(self.population, 1), seed=seed)
        self.looked = self.measured = self.done = self._passes = 0
        self.lacking: tuple[Block, tuple[str, ...]] | None = None
        self._store, self._beneath, self._figure = store, beneath, figure
        self._names = [ablation.name for ablation in ablations]
        layers = store.identity.model.layers
        self.costs = np.array([passes(ablation, layers) for ablation in ablations])
        self.base = layers + sum(passes(ablation, layers) for ablation in beneath)
        self.order = shuffled(seed, every)
        tasks = [task for task, _ in self.order]
        self._turns = turns(tasks, store.counts(), seed)
        self._drops: dict[tuple[str, int], np.ndarray] = {}
        weights = weights_by_task(tasks, store.identity.benchmark.weight_by_size)
        # Scale a drop by its document's weight, so that the mean of all is the benchmark's drop.
        self._scale = weights * self.population

    @property
    def contenders(self) -> str:
        """The runs that are still open, in words."""
        raise NotImplementedError

    @property
    def most(self) -> float:
        """The largest weight of a document, relative to a plain mean."""
        return float(self._scale.max())

    @property
    def open(self) -> Mask:
        """The mask `[runs]` of runs that are not decided."""
        return self.deciding.open

    def advance(self) -> None:
        """Evaluate the blocks that were measured since the last call, up to the first gap.

        Raises WorkError if a document has no score that could decide.
        """
        while self.open.any() and self.done < len(self._turns):
            (block, size, end), names = self._turns[self.done], self.needed
            documents = list(self._store.documents(block, self.extent))
            columns = ["doc", "ablation", *self._figure.columns]
            frame = self._store.read_block(block, self.extent, columns)
            present = set(zip(frame["doc"], frame["ablation"], strict=True))
            if not present.issuperset(product(documents, names)):
                self.lacking = block, names
                return
            frame = frame.assign(figure=self._figure.of(frame))
            table = frame.pivot(index="doc", columns="ablation", values="figure")
            values = table.reindex(index=documents, columns=[INTACT.name, *self._names])
            outcomes = values.to_numpy(dtype=np.float64)
            self.measured += size
            self._passes += size * (self.base + int(self.costs[self.open].sum()))
            if why := self._figure.why_not(outcomes[:, np.isin(values.columns, names)]):
                raise WorkError(why.format(task=block.task))
            drops = outcomes[:, :1] - outcomes[:, 1:]
            self._drops |= zip(((block.task, doc) for doc in documents), drops, strict=True)
            taken = [self._drops.pop(place) for place in self.order[self.looked : end]]
            self.deciding.look(np.stack(taken) * self._scale[self.looked : end, None])
            self.looked = end
            self.done += 1
        self.lacking = None

    @property
    def left(self) -> list[Block]:
        """The blocks that are not evaluated yet, in their order."""
        return [turn.block for turn in self._turns[self.done :]]

    @property
    def needed(self) -> tuple[str, ...]:
        """The names of the ablations that are still measured: baseline, further ones, open runs."""
        always = (INTACT.name, *(ablation.name for ablation in self._beneath))
        return (*always, *compress(self._names, self.open))

    def measured_for(self, looked: np.ndarray) -> np.ndarray:
        """Return how many documents must be measured before as many as given can be evaluated."""
        begins = [0, *(turn.end for turn in self._turns[:-1])]
        begun = np.cumsum([0, *(turn.size for turn in self._turns)])
        return np.asarray(begun[np.searchsorted(begins, looked, side="left")])


class CellRace(BlockRace):
    """Race that answers the question of a view.

    Attributes:
        race: State of the race, with one mean for each run that the question is about.
    """

    def __init__(self, store: CellStore, view: View) -> None:
        """Evaluate the blocks that the cell already holds.

        Args:
            store: The cell.
            view: The view, with its metric and its question.

        Raises:
            ExperimentError: The metric has no bounds, or the question needs another number of runs.
            WorkError: A document has no score that could decide.
        """
        assert view.until is not None
        self._until = view.until
        ablations = [Ablation.of(run, removed=view.removed) for run in view.until.runs]
        beneath = [Ablation.of(removed=view.removed)] if view.removed else []
        figure = bounded(store.identity.benchmark, view.metric)
        super().__init__(store, view.until.seed, ablations, beneath, figure)
        try:
            # Two drops of a document share the intact outcome, which is between 0 and 1.
            race = Race(view.until.asked, self.population, len(ablations), self.most)
        except ValueError as error:
            raise ExperimentError(f"'until': {error}") from None
        self.race = self.deciding = race
        self.advance()

    @property
    def contenders(self) -> str:
        """The runs whose part of the answer is open, in words."""
        return contending(self.record())

    def record(self) -> AnswerRecord:
        """Return the current answer."""
        bounds, standing = self.race.bounds, self.race.standing
        # A drop is between -1 and 1, regardless of its documents' weights.
        low, high = bounds.low.clip(-1, 1), bounds.high.clip(-1, 1)
        return AnswerRecord(
            question=self._until.question,
            level=self._until.asked.level,
            seed=self._until.seed,
            looked=self.looked,
            measured=self.measured,
            population=self.population,
            over=self.lacking is None,
            passes=self._passes,
            passes_of=self.population * (self.base + int(self.costs.sum())),
            runs=tuple(
                RunAnswer(
                    change=run,
                    n=int(self.race.seen[place]),
                    low=float(low[place]),
                    high=float(high[place]),
                    open=bool(standing.open[place]),
                    chosen=bool(standing.chosen[place]),
                )
                for place, run in enumerate(self._until.runs)
            ),
        )


@dataclass(frozen=True)
class AnswerForecast:
    """Cost of an answer: the median, and what nine of ten simulations take at most.

    Attributes:
        measured: Documents that this is drawn from.
        documents: Of how many documents it will take.
        share: Of the layer passes of all documents.
        open: In which share of the simulations all documents leave it open.
    """

    measured: int
    documents: tuple[int, int]
    share: tuple[float, float]
    open: float


def forecast_answer(store: CellStore, view: View) -> AnswerForecast | None:
    """Simulate what a view's question will take, from the documents that all its runs share."""
    assert view.until is not None
    outcomes = AlignedOutcomes(store, view, ["task", "doc", "ablation", METRIC + view.metric])
    measured, counts, pilot = len(outcomes.tasks), store.counts(), Counter(outcomes.tasks)
    if measured < PILOT or outcomes.missing or pilot.keys() < counts.keys():
        return None
    tasks = [task for task, count in counts.items() for _ in range(count)]
    weights = weights_by_task(tasks, store.identity.benchmark.weight_by_size) * len(tasks)
    scale = dict(zip(tasks, weights, strict=True))
    ablations = [outcomes.ablation(run) for run in view.until.runs]
    by_task = np.array([scale[task] for task in outcomes.tasks])
    drops = outcomes.by_metric(ablations).drops * by_task[:, None]
    most = float(weights.max())
    # A pilot has as many documents of each task, and the order has each task in proportion.
    chances = np.array([counts[task] / pilot[task] for task in outcomes.tasks]) / len(tasks)
    simulated = forecast(view.until.asked, drops, len(tasks), reach=most, chances=chances)
    race = CellRace(store, view)
    took = race.measured_for(simulated.looked)
    spent = took * race.base + race.measured_for(simulated.seen) @ race.costs
    share = spent / (len(tasks) * (race.base + race.costs.sum()))
    usual = (0.5, 0.9)
    middle, high = np.quantile(took, usual, method="higher")
    median, most_of_all = np.quantile(share, usual)
    return AnswerForecast(
        measured,
        (int(middle), int(high)),
        (float(median), float(most_of_all)),
        float(1 - simulated.answered.mean()),
    )


class CandidateRace(BlockRace):
    """Race between candidates: which ablation costs least, within a tolerance."""

    def __init__(
        self,
        store: CellStore,
        view: View,
        by: str,
        seed: int,
        ablations: Sequence[Ablation],
        beneath: Sequence[Ablation],
    ) -> None:
        """Evaluate the blocks that the cell already holds.

        Args:
            store: The cell.
            view: The view, with its metric.
            by: Criterion: `accuracy` (the view's metric) or `gold_logprob`.
            seed: Seed of the order of the documents.
            ablations: The candidates.
            beneath: Further ablations that are measured on each document.

        Raises:
            ExperimentError: The metric has no bounds.
            WorkError: A document has no score that could decide.
        """
        key, count = "rescoring: race", len(ablations)
        if by == "accuracy":
            figure = bounded(store.identity.benchmark, view.metric, key)
        else:
            figure = RacedFigure(["gold", "rolling", "loglikelihoods"], gold_logprobs, _no_gold)
        super().__init__(store, seed, ablations, beneath, figure)
        if by == "accuracy":
            self.deciding = Race(question(QUESTION), self.population, count, self.most)
        else:
            self.deciding = SmallestMean(self.population, count, within=WITHIN)
        self.advance()

    @property
    def contenders(self) -> str:
        """The number of candidates that are left, in words."""
        return f"{self.open.sum()} of {len(self._names)} candidates are left"

    @property
    def winners(self) -> list[int]:
        """The indexes of the cheapest candidates; several if they tie or the race ends open."""
        chosen = self.deciding.chosen
        places: list[int] = np.flatnonzero(chosen if chosen.any() else self.open).tolist()
        return places


def _no_gold(outcomes: Array) -> str:
    """Explain a missing gold log-probability of the intact model; return "" if there is none."""
    if np.isfinite(outcomes[:, 0]).all():
        return ""
    return (
        "a document of {task} has no finite log-probability of its right answer, by which "
        "'rescoring: race' could decide; write rescoring: {{value: full}}"
    )


def passes(ablation: Ablation, layers: int) -> int:
    """Count the layers that an ablation's stream computes after it leaves the intact stream."""
    actions = [ablation.at(layer).action for layer in range(layers)]
    changed = (layer for layer, action in enumerate(actions) if action is not Action.PASS)
    first = 0 if "embedding" in ablation.ends else next(changed, layers)
    again = sum(stretch.extra for stretch in ablation.repeated)
    return sum(action.enters for action in actions[first:]) + again
