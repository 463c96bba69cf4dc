"""Apply the stopping rule of the setting `until` to stored outcomes, block by block.

This module also chooses the next block of documents to measure, and computes interim estimates
during a measurement.
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
from tracker.analysis.metrics import DocumentMetric
from tracker.ledger.blocks import Block, schedule_blocks
from tracker.ledger.cells import CellStore
from tracker.schema.answers import open_runs_text
from tracker.schema.changes import INTACT, Ablation, Change
from tracker.schema.errors import ExperimentError, WorkError
from tracker.schema.estimates import Estimate
from tracker.schema.extent import ALL_DOCUMENTS, Extent, shuffle_documents
from tracker.schema.identities import BenchmarkIdentity
from tracker.schema.kinds import Action
from tracker.schema.questions import parse_question
from tracker.schema.records import AnswerRecord, RunAnswer
from tracker.schema.views import View
from tracker.stats.accuracy import weights_by_task
from tracker.stats.arrays import Array, Mask
from tracker.stats.stopping import Race, SmallestMean, forecast_race

CANDIDATE_QUESTION = "prune 1 within 1 pp"
"""Question that is answered when candidates are compared by accuracy."""
LOGPROB_TOLERANCE = 0.01
"""Largest cost in nats by which the winner may exceed the best, if candidates are compared by
log-probability.

The tolerance corresponds to a right answer that is 1 % less likely.
"""
PILOT_DOCUMENTS = 32
"""Number of documents that must be measured before the cost of an answer is forecast."""


@dataclass(frozen=True)
class InterimEstimates:
    """Progress of a running measurement, with interim estimates of the drops.

    Attributes:
        documents: Number of documents that are measured in all requested runs. With a stopping rule
            (`until`), number of documents that are measured in the intact model.
        requested: Number of requested documents; None if a stopping rule (`until`) decides when to
            stop.
        tokens: Number of tokens of the measured documents, as in `CellRecord.tokens`.
        drops: Change that a run makes → interim estimate of the run's drop.
    """

    documents: int
    requested: int | None
    tokens: int
    drops: dict[Change, Estimate]


def interim_estimates(store: CellStore, view: View) -> InterimEstimates:
    """Estimate each run's drop from the documents that are measured so far.

    Args:
        store: Stored outcomes of one model on one benchmark.
        view: View that selects the documents, runs and metric.

    Returns:
        The interim estimates. Without a stopping rule, drops are estimated once all runs have
        outcomes.
    """
    columns = ["task", "doc", "ablation", "proxy_tokens"]
    columns += DocumentMetric(store, view.metric).columns
    outcomes = AlignedOutcomes(store, view, columns)
    if view.until is not None:
        return _interim_stopping_estimates(outcomes, view)
    n = len(outcomes.tasks)
    if not n or outcomes.missing:
        return InterimEstimates(0, outcomes.n_requested, 0, {})
    paired = outcomes.metric_outcomes([outcomes.ablation(run) for run in outcomes.runs])
    drops = {run: paired.drop(index) for index, run in enumerate(outcomes.runs)}
    return InterimEstimates(n, outcomes.n_requested, int(outcomes.tokens.sum()), drops)


def _interim_stopping_estimates(outcomes: AlignedOutcomes, view: View) -> InterimEstimates:
    """Estimate each run's drop so far, in a measurement with a stopping rule.

    The estimate covers all documents on which the run is measured. It has no confidence interval.
    """
    intact = outcomes.restrict(None, [])
    if not intact.tasks:
        return InterimEstimates(0, None, 0, {})
    drops = {}
    for run in view.runs:
        aligned = outcomes.restrict(None, [run])
        if aligned.runs:
            drop = aligned.metric_outcomes([aligned.ablation(run)]).drop(0)
            drops[run] = Estimate(drop.value)
    return InterimEstimates(len(intact.tasks), None, int(intact.tokens.sum()), drops)


def check_bounded(benchmark: BenchmarkIdentity, metric: str, key: str = "until") -> None:
    """Raise ExperimentError unless a metric is a mean of values between 0 and 1.

    The error message names `key`, the setting that needs the metric.
    """
    task = benchmark.tasks[0]
    if task.all_metrics.get(metric) != "mean" or not task.higher_is_better.get(metric, True):
        raise ExperimentError(
            f"'{key}' needs a metric that is a mean of outcomes between 0 and 1, such as acc; "
            f"{metric} of {benchmark.name} is not such a metric. Leave '{key}' out, or change "
            "'metric'"
        )


class RacedFigure(NamedTuple):
    """Statistic of each document that a stopping rule evaluates, e.g. the document's accuracy.

    Attributes:
        columns: Names of the outcome columns to read.
        compute: Function that computes the statistic from outcome rows.
        failure_reason: Function that explains why a statistic is not usable; "" if all are usable.
            Its argument is an array `[documents, models]`, with the intact model first.
    """

    columns: Sequence[str]
    compute: Callable[[pd.DataFrame], Array]
    failure_reason: Callable[[Array], str]


def bounded_metric(store: CellStore, metric: str, key: str = "until") -> RacedFigure:
    """Prepare a metric for a stopping rule, which needs values between 0 and 1.

    Args:
        store: Stored outcomes of one model on one benchmark.
        metric: Metric of the cell's benchmark.
        key: Name of the setting that needs the stopping rule, for error messages.

    Returns:
        Functions that compute the metric of each document and check the values.

    Raises:
        ExperimentError: The metric is not a mean of values between 0 and 1.
    """
    check_bounded(store.identity.benchmark, metric, key)

    def failure_reason(outcomes: Array) -> str:
        is_wrong = ~((outcomes >= 0) & (outcomes <= 1))
        if not is_wrong.any():
            return ""
        if measure.reason:
            return f"'{key}' cannot be answered: {measure.reason}. Leave '{key}' out"
        return (
            f"'{key}' needs outcomes between 0 and 1, but {metric} is {outcomes[is_wrong][0]:g} "
            f"for a document of {{task}}. Leave '{key}' out"
        )

    measure = DocumentMetric(store, metric)
    return RacedFigure(measure.columns, measure.values, failure_reason)


class BlockRace:
    """Sequential comparison (race) of ablations on blocks of documents.

    The stopping rule is evaluated on documents in one random order, block by block. Evaluation ends
    at the first block with missing outcomes. Later blocks are ignored, because their documents may
    not be a random sample.

    Attributes:
        rule: Stopping rule of the comparison.
        next_block: Next block to measure, and the ablations to measure on this block. None if all
            runs are decided or all documents are evaluated.
        looked: Number of documents that the stopping rule has evaluated.
        measured: Number of documents in all evaluated blocks; it can exceed `looked`.
        n_blocks: Number of blocks of documents that have been evaluated.
        order: All documents in the order of evaluation, each as task and number.
        population: Number of documents of the benchmark.
        base: Number of layer passes per token for the intact model and the extra ablations.
        costs: Number of additional layer passes per token for each run.
    """

    rule: Race | SmallestMean

    def __init__(
        self,
        store: CellStore,
        seed: int,
        ablations: Sequence[Ablation],
        extra_ablations: Sequence[Ablation],
        figure: RacedFigure,
    ) -> None:
        """Initialise the comparison, without evaluating any document.

        Args:
            store: Stored outcomes of one model on one benchmark.
            seed: Seed of the random document order.
            ablations: Ablations to compare.
            extra_ablations: Further ablations that are measured on each document.
            figure: Statistic of each document on which the comparison is based.
        """
        documents = store.task_documents(ALL_DOCUMENTS)
        self.population = sum(map(len, documents.values()))
        self.extent = Extent(sample=max(self.population, 1), seed=seed)
        self.looked = self.measured = self.n_blocks = self._passes = 0
        self.next_block: tuple[Block, tuple[str, ...]] | None = None
        self._store, self._extra_ablations, self._figure = store, extra_ablations, figure
        self._names = [ablation.name for ablation in ablations]
        layers = store.identity.model.layers
        self.costs = np.array([count_computed_layers(ablation, layers) for ablation in ablations])
        self.base = layers + sum(
            count_computed_layers(ablation, layers) for ablation in extra_ablations
        )
        self.order = shuffle_documents(seed, documents)
        tasks = [task for task, _ in self.order]
        self._turns = schedule_blocks(tasks, store.counts(), seed)
        self._drops: dict[tuple[str, int], np.ndarray] = {}
        weights = weights_by_task(tasks, store.identity.benchmark.weight_by_size)
        # Scale a drop by its document's weight, so that the mean of all is the benchmark's drop.
        self._scale = weights * self.population

    @property
    def contenders(self) -> str:
        """Description of the runs that are still undecided, for progress messages."""
        raise NotImplementedError

    @property
    def max_weight(self) -> float:
        """Largest weight of a document, relative to the mean weight."""
        return float(self._scale.max())

    @property
    def open(self) -> Mask:
        """Boolean mask of the runs that are still undecided."""
        return self.rule.open

    def advance(self) -> None:
        """Apply the stopping rule to newly measured blocks of documents, in order.

        Evaluation ends at the first block with missing outcomes. Raises WorkError if a document's
        score is not usable.
        """
        while self.open.any() and self.n_blocks < len(self._turns):
            (block, n_documents, end), names = self._turns[self.n_blocks], self.needed_ablations
            documents = list(self._store.documents(block, self.extent))
            columns = ["task", "doc", "ablation", *self._figure.columns]
            frame = self._store.read_block(block, self.extent, columns)
            measured_keys = set(zip(frame["doc"], frame["ablation"], strict=True))
            if not measured_keys.issuperset(product(documents, names)):
                self.next_block = block, names
                return
            frame = frame.assign(figure=self._figure.compute(frame))
            table = frame.pivot(index="doc", columns="ablation", values="figure")
            values = table.reindex(index=documents, columns=[INTACT.name, *self._names])
            outcomes = values.to_numpy(dtype=np.float64)
            self.measured += n_documents
            self._passes += n_documents * (self.base + int(self.costs[self.open].sum()))
            if reason := self._figure.failure_reason(outcomes[:, np.isin(values.columns, names)]):
                raise WorkError(reason.format(task=block.task))
            drops = outcomes[:, :1] - outcomes[:, 1:]
            self._drops |= zip(((block.task, doc) for doc in documents), drops, strict=True)
            rows = [self._drops.pop(document) for document in self.order[self.looked : end]]
            self.rule.update(np.stack(rows) * self._scale[self.looked : end, None])
            self.looked = end
            self.n_blocks += 1
        self.next_block = None

    @property
    def remaining_blocks(self) -> list[Block]:
        """List of the blocks of documents that are not evaluated yet."""
        return [turn.block for turn in self._turns[self.n_blocks :]]

    @property
    def needed_ablations(self) -> tuple[str, ...]:
        """Names of the ablations that must be measured next."""
        names = (INTACT.name, *(ablation.name for ablation in self._extra_ablations))
        return (*names, *compress(self._names, self.open))

    def measured_documents(self, n_looked: np.ndarray) -> np.ndarray:
        """Count the documents to measure until the stopping rule can use `n_looked` documents.

        The count can exceed `n_looked`, because documents are measured in whole blocks.
        """
        starts = [0, *(turn.end for turn in self._turns[:-1])]
        totals = np.cumsum([0, *(turn.size for turn in self._turns)])
        return np.asarray(totals[np.searchsorted(starts, n_looked, side="left")])


class CellRace(BlockRace):
    """Sequential comparison of a model's runs with the stopping rule `until`.

    Attributes:
        race: State of the comparison, with bounds on the mean drop of each compared run.
    """

    def __init__(self, store: CellStore, view: View) -> None:
        """Initialise the comparison, and evaluate the documents that are already measured.

        Args:
            store: Stored outcomes of one model on one benchmark.
            view: View that defines the metric and the stopping rule (`until`).

        Raises:
            ExperimentError: The metric is not bounded by 0 and 1, or the rule in `until` needs a
                different number of runs.
            WorkError: A document has no usable score.
        """
        assert view.until is not None
        self._until = view.until
        ablations = [Ablation.from_changes(run, removed=view.removed) for run in view.until.runs]
        extra_ablations = [Ablation.from_changes(removed=view.removed)] if view.removed else []
        figure = bounded_metric(store, view.metric)
        super().__init__(store, view.until.seed, ablations, extra_ablations, figure)
        try:
            # Two drops of a document share the intact outcome, which is between 0 and 1.
            self.race = self.rule = Race(
                view.until.parsed_question, self.population, len(ablations), self.max_weight
            )
        except ValueError as error:
            raise ExperimentError(f"'until': {error}") from None
        self.advance()

    @property
    def contenders(self) -> str:
        """Description of the runs that are still undecided, for progress messages."""
        return open_runs_text(self.record())

    def record(self) -> AnswerRecord:
        """Return the current result of the stopping rule, with the bounds of each run's drop."""
        bounds, race = self.race.bounds, self.race
        # A drop is between -1 and 1, regardless of its documents' weights.
        low, high = bounds.low.clip(-1, 1), bounds.high.clip(-1, 1)
        return AnswerRecord(
            question=self._until.question,
            level=self._until.parsed_question.level,
            seed=self._until.seed,
            looked=self.looked,
            measured=self.measured,
            population=self.population,
            over=self.next_block is None,
            passes=self._passes,
            passes_of=self.population * (self.base + int(self.costs.sum())),
            runs=tuple(
                RunAnswer(
                    change=run,
                    n=int(race.seen[index]),
                    low=float(low[index]),
                    high=float(high[index]),
                    open=bool(race.open[index]),
                    chosen=bool(race.chosen[index]),
                )
                for index, run in enumerate(self._until.runs)
            ),
        )


@dataclass(frozen=True)
class AnswerForecast:
    """Simulated forecast of how many documents a stopping rule (`until`) will need.

    Attributes:
        measured: Number of measured documents that the simulations resample.
        documents: Number of documents measured until the rule stops (median, 90 % quantile).
        share: Share of the full computing cost that is needed until the rule stops (median, 90 %
            quantile).
        open: Share of the simulations in which the rule is still undecided after all documents.
    """

    measured: int
    documents: tuple[int, int]
    share: tuple[float, float]
    open: float


def forecast_answer(store: CellStore, view: View) -> AnswerForecast | None:
    """Forecast how many documents a stopping rule needs, and what share of the full cost.

    Returns None if too few documents are measured for a forecast.
    """
    assert view.until is not None
    columns = ["task", "doc", "ablation", *DocumentMetric(store, view.metric).columns]
    outcomes = AlignedOutcomes(store, view, columns)
    n_measured, counts, pilot = len(outcomes.tasks), store.counts(), Counter(outcomes.tasks)
    if n_measured < PILOT_DOCUMENTS or outcomes.missing or pilot.keys() < counts.keys():
        return None
    tasks = [task for task, count in counts.items() for _ in range(count)]
    n_documents = len(tasks)
    weights = weights_by_task(tasks, store.identity.benchmark.weight_by_size) * n_documents
    task_weights = dict(zip(tasks, weights, strict=True))
    ablations = [outcomes.ablation(run) for run in view.until.runs]
    document_weights = np.array([task_weights[task] for task in outcomes.tasks])
    drops = outcomes.metric_outcomes(ablations).drops * document_weights[:, None]
    # A pilot has as many documents of each task, and the order has each task in proportion.
    chances = np.array([counts[task] / pilot[task] for task in outcomes.tasks]) / n_documents
    limit, question = float(weights.max()), view.until.parsed_question
    races = forecast_race(question, drops, n_documents, max_value=limit, chances=chances)
    race = CellRace(store, view)
    documents = race.measured_documents(races.looked)
    passes = documents * race.base + race.measured_documents(races.seen) @ race.costs
    shares = passes / (n_documents * (race.base + race.costs.sum()))
    quantiles = (0.5, 0.9)
    usual, high = np.quantile(documents, quantiles, method="higher").astype(int).tolist()
    usual_share, high_share = np.quantile(shares, quantiles).tolist()
    still_open = float(1 - races.answered.mean())
    return AnswerForecast(n_measured, (usual, high), (usual_share, high_share), still_open)


class CandidateRace(BlockRace):
    """Sequential comparison that finds the ablation with the smallest loss.

    The loss of the chosen ablation may exceed the smallest loss by 1 pp of accuracy, or by 0.01
    nats of log-probability.
    """

    def __init__(
        self,
        store: CellStore,
        view: View,
        criterion: str,
        seed: int,
        ablations: Sequence[Ablation],
        extra_ablations: Sequence[Ablation],
    ) -> None:
        """Initialise the comparison, and evaluate the documents that are already measured.

        Args:
            store: Stored outcomes of one model on one benchmark.
            view: View that defines the metric.
            criterion: Criterion of the comparison: `accuracy` (the view's metric) or
                `gold_logprob`.
            seed: Seed of the random document order.
            ablations: Candidate ablations to compare.
            extra_ablations: Further ablations that are measured on each document.

        Raises:
            ExperimentError: The metric is not bounded by 0 and 1.
            WorkError: A document has no usable score.
        """
        by_accuracy, count = criterion == "accuracy", len(ablations)
        if by_accuracy:
            figure = bounded_metric(store, view.metric, "rescoring: race")
        else:
            columns = ["gold", "rolling", "loglikelihoods"]
            figure = RacedFigure(columns, gold_logprobs, _missing_gold_reason)
        super().__init__(store, seed, ablations, extra_ablations, figure)
        if by_accuracy:
            question = parse_question(CANDIDATE_QUESTION)
            self.rule = Race(question, self.population, count, self.max_weight)
        else:
            self.rule = SmallestMean(self.population, count, tolerance=LOGPROB_TOLERANCE)
        self.advance()

    @property
    def contenders(self) -> str:
        """Number of candidates that are not excluded yet, as text for progress messages."""
        return f"{self.open.sum()} of {len(self._names)} candidate ablations are left"

    @property
    def winners(self) -> list[int]:
        """Indexes of the chosen candidates; if none is chosen yet, of all undecided candidates."""
        is_chosen = self.rule.chosen
        indexes: list[int] = np.flatnonzero(is_chosen if is_chosen.any() else self.open).tolist()
        return indexes


def _missing_gold_reason(outcomes: Array) -> str:
    """Explain why gold log-probabilities are missing; return "" if none is missing."""
    if np.isfinite(outcomes[:, 0]).all():
        return ""
    return (
        "'rescoring: race' compares log-probabilities of right answers, but a document of {task} "
        "has no finite log-probability; write rescoring: {{value: full}}"
    )


def count_computed_layers(ablation: Ablation, layers: int) -> int:
    """Count the layers that are computed for each token under an ablation.

    Layers before the first changed layer are not counted, because the intact model computes them.
    Layers that are removed or replaced by fitted functions are not counted either. A repeated layer
    counts once per repetition. `layers` is the number of layers of the model.
    """
    actions = [ablation.at_layer(layer).action for layer in range(layers)]
    changed_layers = (layer for layer, action in enumerate(actions) if action is not Action.PASS)
    first_layer = 0 if "embedding" in ablation.outer_formats else next(changed_layers, layers)
    n_repeated = sum(stretch.extra for stretch in ablation.repetitions)
    return sum(action.runs_modules for action in actions[first_layer:]) + n_repeated
