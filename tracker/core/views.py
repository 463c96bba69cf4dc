"""What is shown of a cell."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, Field

from tracker.core.config import Layers, understood
from tracker.core.extent import Extent, Positive
from tracker.core.formats import counted
from tracker.core.identities import Record
from tracker.core.questions import Question, question
from tracker.core.records import RunIdentity


def ordered(runs: Iterable[RunIdentity]) -> tuple[RunIdentity, ...]:
    """Put runs in order, each once."""
    return tuple(sorted(set(runs), key=lambda run: run.order))


Ordered = Annotated[tuple[RunIdentity, ...], AfterValidator(ordered)]


class Until(Record):
    """A question that ends the measuring of a cell, as it was asked."""

    question: Annotated[str, AfterValidator(understood)]
    seed: int
    """Of the random order in which documents were looked at."""
    runs: Ordered
    """Whose drops it is about, each once, in the order of `RunIdentity.order`."""

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
    runs: Ordered
    """Each run that was asked for, once, in the order of `RunIdentity.order`."""
    until: Until | None = Field(None, exclude_if=lambda asked: asked is None)
    """The question that was asked of it; None where all of its documents were."""
    beside: str = Field("", max_length=200, exclude_if=lambda text: not text)
    """What tells it from the view of the same name that was there first, e.g. `64 documents`; empty
    for that one."""
    named: bool = Field(False, exclude_if=lambda named: not named)
    """Whether it was asked for beside a larger one, and so stays beside it."""

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
        runs = counted(len(self.runs), "run")
        if self.until is not None:
            return f"{runs} until {self.until.question} is answered"
        size = self.sample or self.limit
        return f"{runs} on {counted(size, 'document') if size else 'all documents'}"

    def joined(self, *others: View) -> View:
        """Show the runs of other views too; all else stays as it is here."""
        runs = tuple(run for view in (self, *others) for run in view.runs)
        return View(**{**dict(self), "runs": runs})
