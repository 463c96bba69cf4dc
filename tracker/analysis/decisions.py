"""What the intact model and every run decide on each document of a view, and which it loses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracker.analysis.aligned import AlignedOutcomes
from tracker.analysis.options import OptionScores
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
from tracker.ledger.texts import KeptText
from tracker.stats.arrays import Array
from tracker.stats.decisions import choices, margins, shares

SHOWN = 30
"""Documents that a run loses, and as many that it wins, of which a record holds the texts."""
_CUT = 300
"""Characters of a question that a record holds."""
_CHOICE_CUT = 200
"""Characters of an option, or of an answer."""


@dataclass(frozen=True)
class Decided:
    """What one ablation makes of every document, in the documents' order.

    Attributes:
        score: The metric, as a figure of which more is better.
        choice: The number of the option that is taken; NaN where there are no options.
        margin: By how much the gold option beats the best other one, in nats (or nats a character
            or byte, where the metric divides by length); without options, the gold answer's
            log-probability. NaN where it is not defined.
        text: What is generated; None where nothing is.
    """

    score: Array
    choice: Array
    margin: Array
    text: Sequence[str | None]


@dataclass(frozen=True)
class Decisions:
    """What every run of a view decides, on the documents that all of them share.

    Attributes:
        documents: Task and number of each.
        texts: What each says; None where it is not known, or not to be shown.
        gold: The number of the gold option; NaN where there is none.
        options: How many options there are at most; 0 for open answers.
        baseline: The intact model.
        runs: The runs.
        binary: Whether every document is either right or wrong.
        reasons: Why there are no `texts`, `margin` or `agreement`.
        missing: Documents that were asked for and are not measured; none where a question decides.
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
        """Say which documents a run makes worse than the intact model does."""
        return run.score < self.baseline.score

    def won(self, run: Decided) -> np.ndarray:
        """Say which documents a run makes better."""
        return run.score > self.baseline.score

    @property
    def public(self) -> bool:
        """Whether every text that is known may be published unasked."""
        return all(text.public for text in self.texts if text is not None)


def decisions(store: CellStore, view: View) -> Decisions | None:
    """Derive what each run of a view decides; None where no document is measured yet."""
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
        shown: How many lost documents, and how many won ones, are named of each run: those whose
            margin changes most.

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
    """Leave the middle of a long text out: a prompt ends with what is asked."""
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
