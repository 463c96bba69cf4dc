"""Derive the decisions of the intact model and of each run: which option each document gets.

An option's score is its log-likelihood, divided by its length if the metric does so. The option
with the largest score is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import NamedTuple

import numpy as np
import pandas as pd

from tracker.analysis.aligned import AlignedOutcomes
from tracker.core.changes import INTACT, WHOLE_LAYER, Ablation, Change
from tracker.core.decision_records import (
    DecidedDocument,
    DecisionsRecord,
    RunDecisions,
    ShownDocument,
)
from tracker.core.documents import DocumentText
from tracker.core.views import View
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import REPEATED_COLUMN
from tracker.ledger.texts import StoredText
from tracker.stats.arrays import Array
from tracker.stats.decisions import (
    choose_options,
    count_undecided,
    flip_probabilities,
    margins,
    option_shares,
    rounding_movement,
)

TextReader = Callable[[], Mapping[tuple[str, int], StoredText]]
"""Function that reads the texts of a cell's documents."""
_LENGTH_FUNCTIONS: dict[str, Callable[[str], int]] = {
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode()),
}
"""Metric → function that returns lm-eval's divisor of an option's log-likelihood."""


class OptionScores:
    """Options of each document, with the scores by which a metric chooses between options.

    Args:
        rows: Rows of the documents, under any ablation.
        metric: The metric.
        texts: Texts of the documents; read only if the metric divides by the lengths of options.

    Attributes:
        counts: Number of options of each document.
        max_options: Largest number of options; 0 for open answers.
        gold: Number of each document's gold option; NaN if it has none.
        lengths: `[documents, options]`, divisor of each log-likelihood; NaN if unknown.
        reason: Reason why a divisor is unknown; empty if all are known.
    """

    def __init__(self, rows: pd.DataFrame, metric: str, texts: TextReader) -> None:
        name = metric.partition(",")[0]
        self.counts = rows["choices"].to_numpy(dtype=int)
        self.max_options = int(self.counts.max())
        gold = rows["gold"].to_numpy(dtype=np.float64)
        self.gold = np.where(gold < self.counts, gold, np.nan)  # also where there are no options
        self.lengths, self.reason = np.ones((len(rows), self.max_options)), ""
        if name == "acc_mutual_info":
            self.lengths[:] = np.nan
            self.reason = f"{metric} compares more than the options"
        if length := _LENGTH_FUNCTIONS.get(name):
            self.lengths[:] = np.nan
            known_texts = texts()
            for row, key in enumerate(zip(rows["task"], rows["doc"], strict=True)):
                options = known_texts[key].text.choices if key in known_texts else ()
                if len(options) == self.counts[row]:
                    self.lengths[row, : len(options)] = list(map(length, options))
            if n_missing := int(np.isnan(self.lengths[:, :1]).sum()):
                lengths = f"the lengths of options, which are unknown for {n_missing} documents"
                self.reason = f"{metric} divides by {lengths}"

    def scores(self, loglikelihoods: Iterable[Sequence[float]]) -> Array:
        """Compute the scores of options `[documents, options]` from log-likelihoods.

        NaN where a document has fewer options than others.
        """
        table = np.full(self.lengths.shape, np.nan)
        documents = zip(loglikelihoods, self.counts, strict=True)
        values = np.concatenate([[], *(row[:count] for row, count in documents)])
        table[np.arange(table.shape[1]) < self.counts[:, None]] = values
        return table / self.lengths


class RoundingRisk(NamedTuple):
    """Probability for each document that rounding changes whether its answer counts as right.

    In single precision both fields are empty: rounding decides almost nothing and is not measured.
    """

    chances: Array | None
    reason: str = ""

    @property
    def n_undecided(self) -> int | None:
        """Number of documents whose judgement is within rounding; None if unknown."""
        return None if self.chances is None else count_undecided(self.chances)


def rounding_risk(outcomes: AlignedOutcomes, ablation: Ablation, texts: TextReader) -> RoundingRisk:
    """Compute for each document the probability that rounding changes its judgement.

    Args:
        outcomes: The documents.
        ablation: The ablation.
        texts: Texts of the documents; read only if the metric divides by the lengths of options.

    Returns:
        The probabilities, in the order of the documents.
    """
    if not outcomes.identity.model.is_half:
        return RoundingRisk(None)
    rows = outcomes.rows(ablation)
    if REPEATED_COLUMN not in rows or rows[REPEATED_COLUMN].isna().all():
        return RoundingRisk(None, "none of these documents was computed twice")
    options = OptionScores(rows, outcomes.metric, texts)
    if not options.max_options:
        return RoundingRisk(None, "the documents have no answer options")
    if options.reason:
        return RoundingRisk(None, options.reason)
    scores = options.scores(rows["loglikelihoods"])
    if not np.array_equal(choose_options(scores) == options.gold, outcomes.values(ablation)):
        reason = f"{outcomes.metric} does not score whether the best option is the gold option"
        return RoundingRisk(None, reason)
    is_repeated = rows[REPEATED_COLUMN].notna().to_numpy()
    repeats = options.scores(rows[REPEATED_COLUMN].where(is_repeated, rows["loglikelihoods"]))
    movement = rounding_movement(scores[is_repeated], repeats[is_repeated])
    if movement is None:
        return RoundingRisk(None, "repeated computations agree to the last bit")
    return RoundingRisk(flip_probabilities(scores, options.gold, movement))


MAX_SHOWN_DOCUMENTS = 30
"""Maximum number of lost documents, and of won documents, with texts in a run's record."""
_QUESTION_LENGTH = 300
"""Maximum number of characters of a question in a record."""
_CHOICE_LENGTH = 200
"""Maximum number of characters of an option or answer in a record."""


@dataclass(frozen=True)
class ModelDecisions:
    """Decisions of a model on every document under one ablation, in the order of the documents.

    Attributes:
        score: Metric, with the sign that makes larger values better.
        choice: Number of the chosen option; NaN without options.
        margin: Score of the gold option minus that of the best other option, in nats (or nats per
            character or byte, where the metric divides by length). Without options, the gold
            answer's log-probability. NaN if undefined.
        text: Generated text; None if nothing is generated.
    """

    score: Array
    choice: Array
    margin: Array
    text: Sequence[str | None]


@dataclass(frozen=True)
class Decisions:
    """Decisions of every run of a view, on the documents that all runs share.

    Attributes:
        documents: Task and number of each document.
        texts: Text of each document; None if unknown, or not to be shown.
        gold: Number of each document's gold option; NaN if it has none.
        options: Largest number of options; 0 for open answers.
        baseline: Decisions of the intact model.
        runs: Runs with their decisions.
        binary: Whether every document is either right or wrong.
        reasons: Reasons why `texts`, `margin` or `agreement` are missing.
        missing: Requested documents that are not measured; empty if a question decides.
    """

    documents: Sequence[tuple[str, int]]
    texts: Sequence[StoredText | None]
    gold: Array
    options: int
    baseline: ModelDecisions
    runs: Sequence[tuple[Change, ModelDecisions]]
    binary: bool
    reasons: dict[str, str]
    missing: Sequence[tuple[str, int]] = ()

    def lost_documents(self, run: ModelDecisions) -> np.ndarray:
        """Return a mask of the documents whose score is lower in a run than in the intact model."""
        return run.score < self.baseline.score

    def won_documents(self, run: ModelDecisions) -> np.ndarray:
        """Return a mask of the documents whose score is higher in a run than intact."""
        return run.score > self.baseline.score

    @property
    def public(self) -> bool:
        """True if all known texts may be published without asking."""
        return all(text.public for text in self.texts if text is not None)


def derive_decisions(store: CellStore, view: View) -> Decisions | None:
    """Derive the decisions of each run of a view; None if no document is measured."""
    outcomes = AlignedOutcomes(store, view)
    if not outcomes.tasks:
        return None
    documents, known_texts = outcomes.documents, store.texts.read()
    texts = [known_texts.get(document) for document in documents]
    options = OptionScores(outcomes.rows(INTACT), view.metric, lambda: known_texts)
    reason = options.reason
    if not options.max_options:
        reason = "there are no options; the log-probability of the answer or text is shown instead"
    reasons = {"margin": reason} if reason else {}
    if all(text is None for text in texts):
        reasons["texts"] = "the texts of the documents are not stored"

    def decide(ablation: Ablation, score: Array) -> ModelDecisions:
        rows = outcomes.rows(ablation)
        text = rows["text"].tolist() if "text" in rows else [None] * len(rows)
        if not options.max_options:
            undefined = np.full(len(rows), np.nan)
            return ModelDecisions(score, undefined, outcomes.gold_logprobs(ablation), text)
        scores = options.scores(rows["loglikelihoods"])
        return ModelDecisions(score, choose_options(scores), margins(scores, options.gold), text)

    ablations = [outcomes.ablation(run) for run in outcomes.runs]
    paired = outcomes.metric_outcomes(ablations).scores
    baseline = decide(INTACT, paired.baseline)
    runs = [
        (run, decide(ablation, score))
        for run, ablation, score in zip(outcomes.runs, ablations, paired.ablated.T, strict=True)
    ]
    scores = np.column_stack([paired.baseline, paired.ablated])
    binary = bool(np.isin(scores, (0, 1)).all())
    if not binary:
        reasons["agreement"] = f"{view.metric} is not 0 or 1 for every document"
    requested = store.task_documents(view.extent) if view.until is None else {}
    requested_keys = chain.from_iterable(product([task], docs) for task, docs in requested.items())
    measured_keys = {*documents}
    missing = [key for key in requested_keys if key not in measured_keys]
    gold, max_options = options.gold, options.max_options
    return Decisions(documents, texts, gold, max_options, baseline, runs, binary, reasons, missing)


def decisions_record(decisions: Decisions, max_shown: int = MAX_SHOWN_DOCUMENTS) -> DecisionsRecord:
    """Summarise decisions: counts, shares, and the most changed documents.

    Args:
        decisions: The decisions.
        max_shown: Number of lost documents, and of won documents, to name for each run. The
            documents whose margin changes most are named.

    Returns:
        The record.
    """
    numbers: dict[int, int] = {}
    runs: list[RunDecisions] = []
    losses: dict[int, np.ndarray] = {}
    for run, model in decisions.runs:
        is_lost, is_won = decisions.lost_documents(model), decisions.won_documents(model)
        change = np.nan_to_num(model.margin - decisions.baseline.margin)
        named = [*_lowest(change, is_lost, max_shown), *_lowest(-change, is_won, max_shown)]
        documents = tuple(
            DecidedDocument(
                document=numbers.setdefault(index, len(numbers)),
                choice=_optional_int(model.choice[index]),
                margin=_rounded_figure(model.margin[index]),
                text=_shorten(model.text[index]),
            )
            for index in named
        )
        runs.append(
            RunDecisions(
                run=run,
                lost=int(is_lost.sum()),
                won=int(is_won.sum()),
                margins=_quartiles(model.margin),
                options=_option_shares(model.choice, decisions.options),
                named_lost=min(max_shown, int(is_lost.sum())),
                named=documents,
            )
        )
        if run.kind == WHOLE_LAYER and decisions.binary:
            losses[run.layer] = is_lost
    return DecisionsRecord(
        n=len(decisions.documents),
        right=int((decisions.baseline.score > 0).sum()) if decisions.binary else 0,
        margins=_quartiles(decisions.baseline.margin),
        options=_option_shares(decisions.baseline.choice, decisions.options),
        gold=_option_shares(decisions.gold, decisions.options),
        documents=tuple(_shown_document(decisions, index) for index in numbers),
        runs=tuple(runs),
        compared=tuple(losses),
        both=tuple(tuple(int((a & b).sum()) for b in losses.values()) for a in losses.values()),
        public=decisions.public,
        reasons=decisions.reasons,
    )


def _lowest(values: Array, mask: np.ndarray, count: int) -> list[int]:
    """Return the indexes of the lowest values that a mask selects."""
    indexes = np.flatnonzero(mask)
    lowest: list[int] = indexes[np.argsort(values[indexes], kind="stable")][:count].tolist()
    return lowest


def _shown_document(decisions: Decisions, index: int) -> ShownDocument:
    """Return the entry of a document in a record, with shortened texts."""
    task, doc = decisions.documents[index]
    stored_text, baseline = decisions.texts[index], decisions.baseline
    text = DocumentText("") if stored_text is None else stored_text.text
    return ShownDocument(
        task=task,
        doc=doc,
        question=None if stored_text is None else _shorten(text.question.strip()),
        choices=tuple(_shorten(choice.strip(), _CHOICE_LENGTH) or "" for choice in text.choices),
        answer=_shorten(text.answer, _CHOICE_LENGTH),
        gold=_optional_int(decisions.gold[index]),
        choice=_optional_int(baseline.choice[index]),
        margin=_rounded_figure(baseline.margin[index]),
        text=_shorten(baseline.text[index]),
    )


def _shorten(text: str | None, max_length: int = _QUESTION_LENGTH) -> str | None:
    """Cut the middle of a long text; the end stays, because a prompt ends with the question."""
    if not isinstance(text, str) or len(text) <= max_length:
        return text if isinstance(text, str) else None
    return f"{text[: max_length // 2].rstrip()} … {text[-max_length // 2 :].lstrip()}"


def _optional_int(value: float) -> int | None:
    """Convert a number to an integer; None for NaN."""
    return None if np.isnan(value) else int(value)


def _rounded_figure(value: float) -> float | None:
    """Round a figure to four digits; None if it is not finite."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _quartiles(values: Array) -> tuple[float, float, float] | None:
    """Return the quartiles of the finite values; None if no value is finite."""
    finite_values = values[np.isfinite(values)]
    if not len(finite_values):
        return None
    low, median, high = np.quantile(finite_values, (0.25, 0.5, 0.75)).tolist()
    return low, median, high


def _option_shares(choices: Array, options: int) -> tuple[float, ...]:
    """Return the share of documents that choose each option; () if there are no options."""
    shares = option_shares(choices, options)
    return () if np.isnan(shares).any() else tuple(shares.tolist())
