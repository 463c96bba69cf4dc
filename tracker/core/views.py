"""What is shown of a cell."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pydantic import Field, field_validator

from tracker.core.config import Layers
from tracker.core.extent import Extent, Positive
from tracker.core.identities import Record
from tracker.core.questions import Question, question
from tracker.core.records import RunIdentity


def ordered(runs: Iterable[RunIdentity]) -> tuple[RunIdentity, ...]:
    """Put runs in order, each once."""
    return tuple(sorted(set(runs), key=lambda run: run.order))


class Until(Record):
    """A question that ends the measuring of a cell, as it was asked."""

    question: str
    seed: int
    """Of the random order in which documents were looked at."""
    runs: tuple[RunIdentity, ...]
    """Whose drops it is about, each once, in the order of `RunIdentity.order`."""

    @field_validator("question")
    @classmethod
    def _known(cls, text: str) -> str:
        return str(question(text))

    @field_validator("runs")
    @classmethod
    def _in_order(cls, runs: tuple[RunIdentity, ...]) -> tuple[RunIdentity, ...]:
        return ordered(runs)

    @property
    def asked(self) -> Question:
        """The question itself."""
        return question(self.question)


class View(Record):
    """What is shown of a cell: runs, by one metric, on so many documents of each task."""

    metric: str
    removed: Layers = ()
    """The layers that every run lacks, ascending."""
    limit: Positive | None = None
    """Documents per task, from the first; None = all."""
    sample: Positive | None = None
    """Documents per task, drawn at random; None = not drawn."""
    seed: int | None = None
    """Decides which ones are drawn; None where none are."""
    runs: tuple[RunIdentity, ...]
    """Each run that was asked for, once, in the order of `RunIdentity.order`."""
    until: Until | None = Field(None, exclude_if=lambda asked: asked is None)
    """The question that was asked of it; None where all of its documents were."""
    beside: str = Field("", max_length=200, exclude_if=lambda text: not text)
    """What tells it from the view of the same name that was there first, e.g. `64 documents`; empty
    for that one."""
    named: bool = Field(False, exclude_if=lambda named: not named)
    """Whether it was asked for beside a larger one, and so stays beside it."""

    @field_validator("runs")
    @classmethod
    def _in_order(cls, runs: tuple[RunIdentity, ...]) -> tuple[RunIdentity, ...]:
        return ordered(runs)

    @property
    def extent(self) -> Extent:
        """Which documents are shown."""
        drawn = {} if self.seed is None else {"sample": self.sample, "seed": self.seed}
        return Extent(limit=self.limit, **drawn)

    @property
    def size(self) -> float:
        """How many documents of each task are shown; infinite for all, in whatever order."""
        return self.sample or self.limit or math.inf

    @property
    def documents_asked(self) -> str:
        """Say what is shown, e.g. `6 runs on 64 documents`."""
        count = len(self.runs)
        runs = "1 run" if count == 1 else f"{count} runs"
        if self.until is not None:
            return f"{runs} until {self.until.question} is answered"
        if self.size == math.inf:
            return f"{runs} on all documents"
        return f"{runs} on {self.size} document{'s' if self.size > 1 else ''}"

    def joined(self, *others: View) -> View:
        """Show the runs of other views too; all else stays as it is here."""
        runs = tuple(run for view in (self, *others) for run in view.runs)
        return View(**{**dict(self), "runs": runs})
