"""What is shown of a cell."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated

from pydantic import AfterValidator, Field

from tracker.core.changes import Change
from tracker.core.extent import Extent, Positive
from tracker.core.fields import Layers, QuestionText
from tracker.core.formats import counted
from tracker.core.identities import Record
from tracker.core.provenance import content_hash
from tracker.core.questions import Question, question
from tracker.core.records import view_name


def ordered(runs: Iterable[Change]) -> tuple[Change, ...]:
    """Put runs in order, each once: layers that were requested are no control drawn at random."""
    changes = set(runs)
    return tuple(
        sorted(c for c in changes if not c.drawn or replace(c, drawn=False) not in changes)
    )


Ordered = Annotated[tuple[Change, ...], AfterValidator(ordered)]


class Until(Record):
    """A question that ends the measuring of a cell, as it was asked."""

    question: QuestionText
    seed: int
    """Of the random order in which documents were looked at."""
    runs: Ordered
    """Whose drops it is about, each once, in the order of `Change.order`."""

    @property
    def digest(self) -> str:
        """Eight characters that tell it from others, the same as in former versions."""
        changes = [change.columns for change in self.runs]
        return content_hash({"question": self.question, "seed": self.seed, "runs": changes})[:8]

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
    """Each run that was asked for, once, in the order of `Change.order`."""
    until: Until | None = Field(None, exclude_if=lambda until: until is None)
    """The question that ends the measuring; None where all of the documents are measured."""
    named: bool = Field(False, exclude_if=lambda named: not named)
    """Whether it was requested together with a larger view, and so is kept beside it."""
    explicit: bool = Field(False, exclude_if=lambda explicit: not explicit)
    """Whether a run requested it, and not only a study or a search."""
    supersedes: tuple[str, ...] = Field((), exclude_if=lambda names: not names)
    """Names of the views whose place it has taken, in the folder and wherever they are tracked."""
    beside: str = Field("", exclude=True)
    """What distinguishes it from other views of the cell, for display, e.g. `64 documents`."""

    @property
    def extent(self) -> Extent:
        """Which documents are shown."""
        drawn = {} if self.seed is None else {"sample": self.sample, "seed": self.seed}
        return Extent(limit=self.limit, **drawn)

    @property
    def size(self) -> float:
        """How many documents of each task are shown; infinite for all, in whatever order."""
        return self.extent.size

    def name(self, primary_metric: str) -> str:
        """Return its identity within a cell, which depends on no other view.

        For example `intact`, `without-3-17`, `intact-sample-100-seed-1234`, `intact-limit-64` or
        `intact--acc_norm`: all documents and the benchmark's own metric go without saying.
        """
        selection = ""
        if self.until is not None:
            question = re.sub(r"\W+", "-", self.until.question)
            selection = f"-until-{question}-{self.until.digest}"
        if self.sample is not None:
            selection += f"-sample-{self.sample}-seed-{self.seed}"
        elif self.limit is not None:
            selection += f"-limit-{self.limit}"
        return view_name(self.removed, selection, self.metric, primary_metric)

    @property
    def documents_asked(self) -> str:
        """Say what is shown, e.g. `6 runs on 64 documents`."""
        runs = counted(len(self.runs), "run")
        if self.until is not None:
            return f"{runs} until {self.until.question} is answered"
        size = self.sample or self.limit
        return f"{runs} on {counted(size, 'document') if size else 'all documents'}"

    @property
    def order(self) -> tuple[object, ...]:
        """Metric, removed layers and seed, which views share that differ in documents alone."""
        return self.metric, self.removed, self.seed

    def shows(self, other: View) -> bool:
        """Return whether it shows all runs of another view of its order, on more documents."""
        if self.until is not None or other.until is not None:
            return False
        return self.size > other.size and self.joined(other).runs == self.runs

    def joined(self, *others: View) -> View:
        """Show the runs of other views too; all else stays as it is here."""
        runs = tuple(run for view in (self, *others) for run in view.runs)
        return View(**{**dict(self), "runs": runs})
