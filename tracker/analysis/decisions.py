"""Derive which answer option each model chooses for each document.

An option's score is its log-likelihood. Some metrics divide the log-likelihood by the option's
length. A model chooses the option with the largest score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import NamedTuple

import numpy as np

from tracker.analysis.aligned import AlignedOutcomes
from tracker.analysis.metrics import OptionScores, TextReader
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import METRIC_PREFIX, REPEATED_COLUMN
from tracker.ledger.texts import StoredText
from tracker.schema.changes import INTACT, WHOLE_LAYER, Ablation, Change
from tracker.schema.documents import DocumentText
from tracker.schema.identities import CUT_OFF
from tracker.schema.records import DecidedDocument, DecisionsRecord, RunDecisions, ShownDocument
from tracker.schema.views import View
from tracker.stats.arrays import Array
from tracker.stats.decisions import (
    choose_options,
    count_undecided,
    flip_probabilities,
    margins,
    option_shares,
    relative_rounding_error,
)


class RoundingRisk(NamedTuple):
    """Probability, for each document, that rounding makes a right answer wrong or vice versa.

    If `chances` is None, `reason` explains why. For models in single precision, `reason` is empty.
    """

    chances: Array | None
    reason: str = ""

    @property
    def n_undecided(self) -> int | None:
        """Number of answers that rounding errors could make right or wrong; None if unknown."""
        return None if self.chances is None else count_undecided(self.chances)


def rounding_risk(outcomes: AlignedOutcomes, ablation: Ablation, texts: TextReader) -> RoundingRisk:
    """Compute the probability that rounding changes whether each answer is right.

    Args:
        outcomes: Outcomes of the documents.
        ablation: Ablation under which the answers were computed.
        texts: Function that reads the documents' texts.

    Returns:
        The probabilities in the order of the documents, or the reason why they are unknown.
    """
    if not outcomes.identity.model.is_half:
        return RoundingRisk(None)
    rows = outcomes.rows(ablation)
    if REPEATED_COLUMN not in rows or rows[REPEATED_COLUMN].isna().all():
        return RoundingRisk(
            None, "rounding errors are unknown, because no document was evaluated twice"
        )
    options = OptionScores(rows, outcomes.metric, texts)
    if not options.max_options:
        return RoundingRisk(None, "the documents have no answer options")
    if options.reason:
        return RoundingRisk(None, options.reason)
    scores = options.scores(rows["loglikelihoods"])
    if not np.array_equal(choose_options(scores) == options.gold, outcomes.values(ablation)):
        reason = f"{outcomes.metric} is not the accuracy of the option with the highest score"
        return RoundingRisk(None, reason)
    is_repeated = rows[REPEATED_COLUMN].notna().to_numpy()
    repeats = options.scores(rows[REPEATED_COLUMN].where(is_repeated, rows["loglikelihoods"]))
    movement = relative_rounding_error(scores[is_repeated], repeats[is_repeated])
    if movement is None:
        return RoundingRisk(None, "repeated computations gave exactly the same values")
    return RoundingRisk(flip_probabilities(scores, options.gold, movement))


MAX_SHOWN_DOCUMENTS = 30
"""Maximum number of lost documents, and of won documents, with texts in a run's record."""
_QUESTION_LENGTH = 300
"""Maximum number of characters of a question in a record."""
_CHOICE_LENGTH = 200
"""Maximum number of characters of an option or answer in a record."""


@dataclass(frozen=True)
class ModelDecisions:
    """Answers that the model chooses under one ablation, with one item per document.

    Attributes:
        score: Metric of each document, negated for a loss, so that larger values are better.
        choice: Index of the chosen option; NaN for a document without options.
        margin: Score of the gold option minus the score of the best other option, in nats (or nats
            per character or byte). For a document without options, the margin is the
            log-probability of the gold answer. An undefined margin is NaN.
        text: Generated text of each document; None if the task generates no text.
        cut: Share of each document's generated texts that were cut off at the token limit; NaN if
            unknown.
    """

    score: Array
    choice: Array
    margin: Array
    text: Sequence[str | None]
    cut: Array

    @property
    def cut_share(self) -> float | None:
        """Share of all generated texts that were cut off at the token limit; None if unknown."""
        return _rounded_figure(float(self.cut.mean()))


@dataclass(frozen=True)
class Decisions:
    """Answers that the intact model and all ablated models choose.

    Attributes:
        documents: Documents, each as task and number.
        texts: Text of each document; None if the text is unknown or must not be shown.
        gold: Index of each document's gold option; NaN if the document has no gold option.
        options: Largest number of options of a document; 0 if no document has options.
        baseline: Answers chosen by the intact model.
        runs: Pairs of a run's change and the answers that the changed model chooses.
        binary: Whether every document's score is 0 or 1 (wrong or right).
        reasons: Name (`texts`, `margin` or `agreement`) → reason why this information is missing.
        missing: Requested documents that are not measured, each as task and number.
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
        """Return a boolean mask of the documents whose score is lower than in the intact model."""
        return run.score < self.baseline.score

    def won_documents(self, run: ModelDecisions) -> np.ndarray:
        """Return a boolean mask of the documents whose score is higher than in the intact model."""
        return run.score > self.baseline.score

    @property
    def public(self) -> bool:
        """True if the stored texts of all documents are marked as public."""
        return all(text.public for text in self.texts if text is not None)


def derive_decisions(store: CellStore, view: View) -> Decisions | None:
    """Return the answers chosen in each requested run; None if no document is measured."""
    outcomes = AlignedOutcomes(store, view)
    if not outcomes.tasks:
        return None
    documents, known_texts = outcomes.documents, store.texts.read()
    texts = [known_texts.get(document) for document in documents]
    options = OptionScores(outcomes.rows(INTACT), view.metric, lambda: known_texts)
    reason = options.reason
    if not options.max_options:
        reason = (
            "the documents have no answer options; the log-probability of the answer or text is "
            "shown instead"
        )
    reasons = {"margin": reason} if reason else {}
    if all(text is None for text in texts):
        reasons["texts"] = "the texts of the documents are not stored"

    def decide(ablation: Ablation, score: Array) -> ModelDecisions:
        rows = outcomes.rows(ablation)
        text = rows["text"].tolist() if "text" in rows else [None] * len(rows)
        cut = rows.reindex(columns=[METRIC_PREFIX + CUT_OFF]).to_numpy(dtype=np.float64)[:, 0]
        if not options.max_options:
            undefined, margin = np.full(len(rows), np.nan), outcomes.gold_logprobs(ablation)
            return ModelDecisions(score, undefined, margin, text, cut)
        scores = options.scores(rows["loglikelihoods"])
        margin = margins(scores, options.gold)
        return ModelDecisions(score, choose_options(scores), margin, text, cut)

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
        reasons["agreement"] = f"{view.metric} has values other than 0 and 1"
    requested = store.task_documents(view.extent) if view.until is None else {}
    requested_keys = chain.from_iterable(product([task], docs) for task, docs in requested.items())
    measured_keys = {*documents}
    missing = [key for key in requested_keys if key not in measured_keys]
    gold, max_options = options.gold, options.max_options
    return Decisions(documents, texts, gold, max_options, baseline, runs, binary, reasons, missing)


def decisions_record(decisions: Decisions, max_shown: int = MAX_SHOWN_DOCUMENTS) -> DecisionsRecord:
    """Summarise how the answers change in each run.

    Args:
        decisions: Answers chosen by the intact model and in each run.
        max_shown: Maximum number of documents with a lower score, and with a higher score, to list
            for each run. Documents with the largest changes are listed.

    Returns:
        The record that report pages show.
    """
    numbers: dict[int, int] = {}
    runs: list[RunDecisions] = []
    losses: dict[int, np.ndarray] = {}
    for run, model in decisions.runs:
        is_lost, is_won = decisions.lost_documents(model), decisions.won_documents(model)
        is_cut = model.cut > decisions.baseline.cut
        change = np.nan_to_num(model.margin - decisions.baseline.margin)
        named = [*_lowest(change, is_lost, max_shown), *_lowest(-change, is_won, max_shown)]
        documents = tuple(
            DecidedDocument(
                document=numbers.setdefault(index, len(numbers)),
                choice=_optional_int(model.choice[index]),
                margin=_rounded_figure(model.margin[index]),
                text=_shorten(model.text[index]),
                cut=bool(is_cut[index]),
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
                cut=model.cut_share,
                lost_cut=int((is_lost & is_cut).sum()),
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
        cut=decisions.baseline.cut_share,
        public=decisions.public,
        reasons=decisions.reasons,
    )


def _lowest(values: Array, mask: np.ndarray, count: int) -> list[int]:
    """Return the indexes of the `count` lowest values that a mask selects.

    The index of the lowest value comes first.
    """
    indexes = np.flatnonzero(mask)
    lowest: list[int] = indexes[np.argsort(values[indexes], kind="stable")][:count].tolist()
    return lowest


def _shown_document(decisions: Decisions, index: int) -> ShownDocument:
    """Build the description of one document for report pages, with shortened texts."""
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
    """Cut the middle out of a long text."""
    if not isinstance(text, str) or len(text) <= max_length:
        return text if isinstance(text, str) else None
    return f"{text[: max_length // 2].rstrip()} … {text[-max_length // 2 :].lstrip()}"


def _optional_int(value: float) -> int | None:
    """Convert a number to an integer; return None for NaN."""
    return None if np.isnan(value) else int(value)


def _rounded_figure(value: float) -> float | None:
    """Round a number to four significant digits; return None if it is not finite."""
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _quartiles(values: Array) -> tuple[float, float, float] | None:
    """Return the three quartiles of all finite values; None if no value is finite."""
    finite_values = values[np.isfinite(values)]
    if not len(finite_values):
        return None
    low, median, high = np.quantile(finite_values, (0.25, 0.5, 0.75)).tolist()
    return low, median, high


def _option_shares(choices: Array, options: int) -> tuple[float, ...]:
    """Return the share of documents for which each option is chosen."""
    shares = option_shares(choices, options)
    return () if np.isnan(shares).any() else tuple(shares.tolist())
