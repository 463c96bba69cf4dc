"""Define records of documents with changed scores."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tracker.schema.changes import Change
from tracker.schema.identities import Record, SafeText

PRIVATE_TEXTS = (
    "the texts of your own task are not uploaded (use --publish-documents to upload them)"
)


class ShownDocument(Record):
    """A document whose score changes in some run, with the intact model's response."""

    task: str
    doc: int
    """The document's position in the task's split, 0-based."""
    question: SafeText | None
    """The question; None where the text is unknown or private."""
    choices: tuple[SafeText, ...]
    answer: SafeText | None
    """The gold answer where there are no options."""
    gold: int | None
    choice: int | None
    """The option that the intact model chooses, 0-based."""
    margin: float | None
    text: SafeText | None
    """The text that the intact model generates."""


class DecidedDocument(Record):
    """The ablated model's response to a document with a changed score."""

    document: int
    """The document's position in `DecisionsRecord.documents`."""
    choice: int | None
    margin: float | None
    text: SafeText | None
    cut: bool = Field(False, exclude_if=lambda cut: not cut)
    """True if the token limit ended the text."""


Quartiles = tuple[float, float, float]
"""Lower quartile, median, upper quartile."""


class RunDecisions(Record):
    """Numbers and examples of documents with changed scores in one run."""

    run: Change
    lost: int
    """Number of documents on which the run does worse than the intact model."""
    won: int
    margins: Quartiles | None
    options: tuple[float, ...]
    """Frequency with which the run chooses each option; empty without options."""
    named_lost: int
    """Number of lost documents in `named`; they are listed first."""
    named: tuple[DecidedDocument, ...]
    """The lost and won documents whose margin changes most."""
    cut: float | None = Field(None, exclude_if=lambda cut: cut is None)
    """Share of the generated texts that the token limit ended; None if unknown."""
    lost_cut: int = Field(0, exclude_if=lambda lost: not lost)
    """Number of lost documents of which the limit ends more texts than with the intact model."""

    def without_texts(self) -> RunDecisions:
        """Return a copy of the record without the texts that models generated."""
        documents = tuple(document.model_copy(update={"text": None}) for document in self.named)
        return self.model_copy(update={"named": documents})


class DecisionsRecord(Record):
    """The documents with changed scores, for one model and benchmark."""

    n: int
    """Number of documents."""
    right: int
    """Number of correct answers of the intact model; 0 for metrics without correct answers."""
    margins: Quartiles | None
    """Quartiles of the intact model's margins: gold option minus the best other option."""
    options: tuple[float, ...]
    gold: tuple[float, ...]
    """Frequency with which each option is the gold option."""
    documents: tuple[ShownDocument, ...]
    """The documents that at least one run lists in `named`."""
    runs: tuple[RunDecisions, ...]
    compared: tuple[int, ...]
    """The removed whole layers whose lost documents `both` compares in pairs."""
    both: tuple[tuple[int, ...], ...]
    cut: float | None = Field(None, exclude_if=lambda cut: cut is None)
    """Share of the intact model's texts that the token limit ended; None if unknown."""
    public: bool
    """True if every known text comes from the hub or a package."""
    reasons: dict[str, str] = Field(default_factory=dict)
    """Reasons why `texts`, `margin` or `agreement` are missing."""

    def without_texts(self) -> DecisionsRecord:
        """Return a copy of the record without the texts of documents and of models."""
        empty: dict[str, Any] = {"question": None, "choices": (), "answer": None, "text": None}
        documents = tuple(document.model_copy(update=empty) for document in self.documents)
        runs = tuple(run.without_texts() for run in self.runs)
        reasons = {**self.reasons, "texts": PRIVATE_TEXTS}
        return self.model_copy(update={"documents": documents, "runs": runs, "reasons": reasons})
