"""What the runs of a cell decide: the documents that they lose and win."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from tracker.core.changes import Change
from tracker.core.identities import Record, Shown

PRIVATE = "the texts of your own task are not uploaded (use --publish-documents to upload them)"


class ShownDocument(Record):
    """A document that some run loses or wins, and what the intact model makes of it."""

    task: str
    doc: int
    """Its place in the task's split, 0-based."""
    question: Shown | None
    """None where the text is not known, or not to be shown."""
    choices: tuple[Shown, ...]
    answer: Shown | None
    """The gold answer where there are no options."""
    gold: int | None
    choice: int | None
    """The option that the intact model takes, 0-based."""
    margin: float | None
    text: Shown | None
    """What the intact model generates."""


class DecidedDocument(Record):
    """What a run makes of a document that it loses or wins."""

    document: int
    """Its place in `DecisionsRecord.documents`."""
    choice: int | None
    margin: float | None
    text: Shown | None


Quartiles = tuple[float, float, float]
"""Lower quartile, median, upper quartile."""


class RunDecisions(Record):
    """Which documents a run loses and wins, and what it decides over all."""

    run: Change
    lost: int
    """Documents that it makes worse than the intact model does."""
    won: int
    margins: Quartiles | None
    options: tuple[float, ...]
    """How often each option is taken; empty without options."""
    named_lost: int
    """How many of `named` are lost: the first ones."""
    named: tuple[DecidedDocument, ...]
    """Those whose margin changes most."""

    def without_texts(self) -> RunDecisions:
        """Leave out what models generated."""
        named = tuple(document.model_copy(update={"text": None}) for document in self.named)
        return self.model_copy(update={"named": named})


class DecisionsRecord(Record):
    """What the runs of a cell's view decide, document by document."""

    n: int
    """Documents."""
    right: int
    """Documents that the intact model has right; 0 where they are not right or wrong."""
    margins: Quartiles | None
    """Of the intact model: by how much the gold option beats the best other one."""
    options: tuple[float, ...]
    gold: tuple[float, ...]
    """How often each option is the gold one."""
    documents: tuple[ShownDocument, ...]
    """Those that some run names."""
    runs: tuple[RunDecisions, ...]
    compared: tuple[int, ...]
    """The whole layers of which `both` says how many documents each two lose."""
    both: tuple[tuple[int, ...], ...]
    public: bool
    """Whether every known text is of the hub or a package."""
    reasons: dict[str, str] = Field(default_factory=dict)
    """Why there are no `texts`, `margin` or `agreement`."""

    def without_texts(self) -> DecisionsRecord:
        """Leave out what documents say and what models generated."""
        silent: dict[str, Any] = {"question": None, "choices": (), "answer": None, "text": None}
        documents = tuple(document.model_copy(update=silent) for document in self.documents)
        runs = tuple(run.without_texts() for run in self.runs)
        reasons = {**self.reasons, "texts": PRIVATE}
        return self.model_copy(update={"documents": documents, "runs": runs, "reasons": reasons})
