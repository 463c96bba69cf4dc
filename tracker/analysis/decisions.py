"""Derive decisions of the intact model and of every run, document by document.

An option's score is its log-likelihood, divided by its length if the metric does so. The option
with the largest score is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from tracker.ledger.outcomes import AGAIN
from tracker.ledger.texts import KeptText
from tracker.stats.arrays import Array
from tracker.stats.decisions import choices, margins, movement, shares, turning

Texts = Callable[[], Mapping[tuple[str, int], KeptText]]
"""Reads the texts of a cell's documents."""
_LENGTHS: dict[str, Callable[[str], int]] = {
    "acc_norm": len,
    "acc_bytes": lambda choice: len(choice.encode()),
}
"""Divisor that lm-eval applies to an option's log-likelihood, by metric."""


class OptionScores:
    """Options of documents, as scored by a metric.

    Args:
        rows: Rows of the documents, under any ablation.
        metric: The metric.
        texts: Texts of the documents; read only if the metric divides by the lengths of options.

    Attributes:
        counts: Number of options of each document.
        most: Largest number of options; 0 for open answers.
        gold: Number of each document's gold option; NaN if it has none.
        lengths: Divisor of each log-likelihood [documents, options]; NaN if unknown.
        why: Reason why a divisor is unknown; empty if all are known.
    """

    def __init__(self, rows: pd.DataFrame, metric: str, texts: Texts) -> None:
        name = metric.partition(",")[0]
        self.counts = rows["choices"].to_numpy(dtype=int)
        self.most = int(self.counts.max())
        gold = rows["gold"].to_numpy(dtype=np.float64)
        self.gold = np.where(gold < self.counts, gold, np.nan)  # also where there are no options
        self.lengths, self.why = np.ones((len(rows), self.most)), ""
        if name == "acc_mutual_info":
            self.lengths[:] = np.nan
            self.why = f"{metric} compares more than the options"
        if name in _LENGTHS:
            self.lengths[:] = np.nan
            known = texts()
            places = zip(rows["task"], rows["doc"], strict=True)
            for row, (task, doc) in enumerate(places):
                said = known[task, doc].text.choices if (task, doc) in known else ()
                if len(said) == self.counts[row]:
                    self.lengths[row, : len(said)] = [_LENGTHS[name](choice) for choice in said]
            if lacking := int(np.isnan(self.lengths[:, :1]).sum()):
                self.why = (
                    f"{metric} divides by the lengths of options, which are not known of {lacking} "
                    "documents"
                )

    def scores(self, loglikelihoods: Iterable[Sequence[float]]) -> Array:
        """Return the scores of options `[documents, options]`; NaN where a document has fewer."""
        found = np.full(self.lengths.shape, np.nan)
        counted = zip(loglikelihoods, self.counts, strict=True)
        values = np.concatenate([[], *(row[:count] for row, count in counted)])
        found[np.arange(found.shape[1]) < self.counts[:, None]] = values
        return found / self.lengths


class Chances(NamedTuple):
    """Chance that rounding changes the judgement of each document; None if unknown.

    In single precision there is neither: rounding decides next to nothing, and it is not measured.
    """

    chances: Array | None
    reason: str = ""


def judged(outcomes: AlignedOutcomes, ablation: Ablation, texts: Texts) -> Chances:
    """Compute how likely rounding changes the judgement of each document of an ablation.

    Args:
        outcomes: The documents.
        ablation: The ablation.
        texts: Texts of the documents; read only if the metric divides by the lengths of options.

    Returns:
        The probabilities, in the order of the documents.
    """
    if not outcomes.identity.model.is_half:
        return Chances(None)
    rows = outcomes.of(ablation)
    if AGAIN not in rows or rows[AGAIN].isna().all():
        return Chances(None, "none of these documents was computed twice")
    options = OptionScores(rows, outcomes.metric, texts)
    if not options.most:
        return Chances(None, "there are no options that a margin could lie between")
    if options.why:
        return Chances(None, options.why)
    scores = options.scores(rows["loglikelihoods"])
    if not np.array_equal(choices(scores) == options.gold, outcomes.values(ablation)):
        why = f"{outcomes.metric} is not whether the best option is the gold one"
        return Chances(None, why)
    twice = rows[AGAIN].notna().to_numpy()
    again = options.scores(rows[AGAIN].where(twice, rows["loglikelihoods"]))
    moved = movement(scores[twice], again[twice])
    if moved is None:
        return Chances(None, "what was computed twice came out the same, to the last bit")
    return Chances(turning(scores, options.gold, moved))


SHOWN = 30
"""Maximum number of lost documents, and of won ones, whose texts a record holds for a run."""
_CUT = 300
"""Maximum number of characters of a question in a record."""
_CHOICE_CUT = 200
"""Characters of an option, or of an answer."""


@dataclass(frozen=True)
class Decided:
    """Decision of one ablation on every document, in the order of the documents.

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
    texts: Sequence[KeptText | None]
    gold: Array
    options: int
    baseline: Decided
    runs: Sequence[tuple[Change, Decided]]
    binary: bool
    reasons: dict[str, str]
    missing: Sequence[tuple[str, int]] = ()

    def lost(self, run: Decided) -> np.ndarray:
        """Return a mask of the documents that a run scores lower than the intact model."""
        return run.score < self.baseline.score

    def won(self, run: Decided) -> np.ndarray:
        """Return a mask of the documents that a run scores higher than the intact model."""
        return run.score > self.baseline.score

    @property
    def public(self) -> bool:
        """True if all known texts may be published without asking."""
        return all(text.public for text in self.texts if text is not None)


def decisions(store: CellStore, view: View) -> Decisions | None:
    """Derive the decisions of each run of a view; None if no document is measured yet."""
    outcomes = AlignedOutcomes(store, view)
    if not outcomes.tasks:
        return None
    documents, kept = outcomes.documents, store.texts.read()
    texts = [kept.get(place) for place in documents]
    options = OptionScores(outcomes.of(INTACT), view.metric, lambda: kept)
    why = options.why
    if not options.most:
        why = "there are no options; the log-probability of the answer or text stands for it"
    reasons = {"margin": why} if why else {}
    if all(text is None for text in texts):
        reasons["texts"] = "what the documents say is not kept here"

    def decided(ablation: Ablation, score: Array) -> Decided:
        rows = outcomes.of(ablation)
        text = rows["text"].tolist() if "text" in rows else [None] * len(rows)
        if not options.most:
            return Decided(score, np.full(len(rows), np.nan), outcomes.gold(ablation), text)
        scores = options.scores(rows["loglikelihoods"])
        return Decided(score, choices(scores), margins(scores, options.gold), text)

    ablations = [outcomes.ablation(run) for run in outcomes.runs]
    paired = outcomes.by_metric(ablations).scores
    baseline = decided(INTACT, paired.baseline)
    runs = [
        (run, decided(ablation, score))
        for run, ablation, score in zip(outcomes.runs, ablations, paired.ablated.T, strict=True)
    ]
    scores = np.column_stack([paired.baseline, paired.ablated])
    binary = bool(np.isin(scores, (0, 1)).all())
    if not binary:
        reasons["agreement"] = f"{view.metric} is not right or wrong for every document"
    wanted = store.wanted(view.extent) if view.until is None else {}
    held = {*documents}
    missing = [(t, d) for t, docs in wanted.items() for d in docs if (t, d) not in held]
    gold, most = options.gold, options.most
    return Decisions(documents, texts, gold, most, baseline, runs, binary, reasons, missing)


def decisions_record(found: Decisions, shown: int = SHOWN) -> DecisionsRecord:
    """Sum decisions up: counts and shares of all documents, and the texts of those that matter.

    Args:
        found: The decisions.
        shown: Number of lost documents, and of won ones, to name for each run: those whose margin
            changes most.

    Returns:
        The record.
    """
    numbers: dict[int, int] = {}

    def changes(run: Decided) -> tuple[DecidedDocument, ...]:
        change = np.nan_to_num(run.margin - found.baseline.margin)
        chosen: list[DecidedDocument] = []
        for places, sign in ((found.lost(run), 1), (found.won(run), -1)):
            (which,) = np.nonzero(places)
            largest = which[np.argsort(sign * change[which], kind="stable")][:shown]
            chosen += [
                DecidedDocument(
                    document=numbers.setdefault(int(place), len(numbers)),
                    choice=_number(run.choice[place]),
                    margin=_figure(run.margin[place]),
                    text=_cut(run.text[place]),
                )
                for place in largest
            ]
        return tuple(chosen)

    runs = tuple(
        RunDecisions(
            run=run,
            lost=int(found.lost(decided).sum()),
            won=int(found.won(decided).sum()),
            margins=_quartiles(decided.margin),
            options=_shares(decided.choice, found.options),
            named_lost=min(shown, int(found.lost(decided).sum())),
            named=changes(decided),
        )
        for run, decided in found.runs
    )
    compared = {
        run.layer: found.lost(decided)
        for run, decided in found.runs
        if run.kind == WHOLE_LAYER and found.binary
    }
    return DecisionsRecord(
        n=len(found.documents),
        right=int((found.baseline.score > 0).sum()) if found.binary else 0,
        margins=_quartiles(found.baseline.margin),
        options=_shares(found.baseline.choice, found.options),
        gold=_shares(found.gold, found.options),
        documents=tuple(_document(found, place) for place in numbers),
        runs=runs,
        compared=tuple(compared),
        both=tuple(tuple(int((a & b).sum()) for b in compared.values()) for a in compared.values()),
        public=found.public,
        reasons=found.reasons,
    )


def _document(found: Decisions, place: int) -> ShownDocument:
    task, doc = found.documents[place]
    kept, base = found.texts[place], found.baseline
    text = DocumentText("") if kept is None else kept.text
    return ShownDocument(
        task=task,
        doc=doc,
        question=None if kept is None else _cut(text.question.strip()),
        choices=tuple(_cut(choice.strip(), _CHOICE_CUT) or "" for choice in text.choices),
        answer=_cut(text.answer, _CHOICE_CUT),
        gold=_number(found.gold[place]),
        choice=_number(base.choice[place]),
        margin=_figure(base.margin[place]),
        text=_cut(base.text[place]),
    )


def _cut(text: str | None, longest: int = _CUT) -> str | None:
    """Shorten a long text in the middle, because a prompt ends with its question."""
    if not isinstance(text, str) or len(text) <= longest:
        return text if isinstance(text, str) else None
    return f"{text[: longest // 2].rstrip()} … {text[-longest // 2 :].lstrip()}"


def _number(value: float) -> int | None:
    return None if np.isnan(value) else int(value)


def _figure(value: float) -> float | None:
    return float(f"{value:.4g}") if np.isfinite(value) else None


def _quartiles(values: Array) -> tuple[float, float, float] | None:
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, middle, high = np.quantile(known, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def _shares(taken: Array, options: int) -> tuple[float, ...]:
    found = shares(taken, options)
    return () if np.isnan(found).any() else tuple(float(share) for share in found)
