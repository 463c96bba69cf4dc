"""Define records of the documents that a run loses and wins."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tracker.core.changes import Change
from tracker.core.identities import Record, Shown

PRIVATE = "the texts of your own task are not uploaded (use --publish-documents to upload them)"


class ShownDocument(Record):
    """A document that some run loses or wins, with the intact model's response."""

    task: str
    doc: int
    """Its position in the task's split, 0-based."""
    question: Shown | None
    """The question; None where the text is unknown or private."""
    choices: tuple[Shown, ...]
    answer: Shown | None
    """The gold answer where there are no options."""
    gold: int | None
    choice: int | None
    """The option that the intact model chooses, 0-based."""
    margin: float | None
    text: Shown | None
    """The text that the intact model generates."""


class DecidedDocument(Record):
    """A run's response to a document that it loses or wins."""

    document: int
    """Its position in `DecisionsRecord.documents`."""
    choice: int | None
    margin: float | None
    text: Shown | None


Quartiles = tuple[float, float, float]
"""Lower quartile, median, upper quartile."""


class RunDecisions(Record):
    """The documents that a run loses and wins, and totals over all documents."""

    run: Change
    lost: int
    """Number of documents with a worse result than the intact model's."""
    won: int
    margins: Quartiles | None
    options: tuple[float, ...]
    """Frequency of each chosen option; empty without options."""
    named_lost: int
    """Number of lost documents in `named`, where they come first."""
    named: tuple[DecidedDocument, ...]
    """The documents whose margin changes most."""

    def without_texts(self) -> RunDecisions:
        """Return a copy without the texts that models generated."""
        named = tuple(document.model_copy(update={"text": None}) for document in self.named)
        return self.model_copy(update={"named": named})


class DecisionsRecord(Record):
    """The documents that the runs of a cell's view lose and win."""

    n: int
    """Number of documents."""
    right: int
    """Documents that the intact model answers correctly; 0 for metrics without correct answers."""
    margins: Quartiles | None
    """Margins of the intact model: gold option minus the best other option."""
    options: tuple[float, ...]
    gold: tuple[float, ...]
    """Frequency of each option as the gold option."""
    documents: tuple[ShownDocument, ...]
    """The documents that some run names."""
    runs: tuple[RunDecisions, ...]
    compared: tuple[int, ...]
    """The whole layers that `both` compares in pairs."""
    both: tuple[tuple[int, ...], ...]
    public: bool
    """True if every known text comes from the hub or a package."""
    reasons: dict[str, str] = Field(default_factory=dict)
    """Reasons why `texts`, `margin` or `agreement` are missing."""

    def without_texts(self) -> DecisionsRecord:
        """Return a copy without the texts of documents and of models."""
        silent: dict[str, Any] = {"question": None, "choices": (), "answer": None, "text": None}
        documents = tuple(document.model_copy(update=silent) for document in self.documents)
        runs = tuple(run.without_texts() for run in self.runs)
        reasons = {**self.reasons, "texts": PRIVATE}
        return self.model_copy(update={"documents": documents, "runs": runs, "reasons": reasons})
