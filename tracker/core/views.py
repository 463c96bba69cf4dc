"""Define which runs and documents of a cell are shown."""

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
    """Sort runs, each once; a requested set of layers replaces the same set drawn at random."""
    changes = set(runs)
    return tuple(
        sorted(c for c in changes if not c.drawn or replace(c, drawn=False) not in changes)
    )


Ordered = Annotated[tuple[Change, ...], AfterValidator(ordered)]


class Until(Record):
    """A question that ends the measuring of a cell, with its order and runs."""

    question: QuestionText
    seed: int
    """The seed of the random order of the documents."""
    runs: Ordered
    """The runs that the question is about, each once, in the order of `Change.order`."""

    @property
    def digest(self) -> str:
        """Eight characters that identify it, the same as in former versions."""
        changes = [change.columns for change in self.runs]
        return content_hash({"question": self.question, "seed": self.seed, "runs": changes})[:8]

    @property
    def asked(self) -> Question:
        """The parsed question."""
        return question(self.question)


class View(Record):
    """The shown part of a cell: runs, one metric, and a number of documents of each task."""

    metric: str
    removed: Layers = ()
    """The layers that every run lacks, ascending."""
    limit: Positive | None = None
    """Documents per task, from the first; None = all."""
    sample: Positive | None = None
    """Documents per task, drawn at random; None = not drawn."""
    seed: int | None = None
    """The seed of the drawn documents; None if none are drawn."""
    runs: Ordered
    """The requested runs, each once, in the order of `Change.order`."""
    until: Until | None = Field(None, exclude_if=lambda until: until is None)
    """The question that ends the measuring; None if all documents are measured."""
    named: bool = Field(False, exclude_if=lambda named: not named)
    """True if it was requested together with a larger view, and so is kept beside it."""
    explicit: bool = Field(False, exclude_if=lambda explicit: not explicit)
    """True if a run requested it, and not only a study or a search."""
    supersedes: tuple[str, ...] = Field((), exclude_if=lambda names: not names)
    """Names of the views that it replaces, in the folder and wherever they are tracked."""
    beside: str = Field("", exclude=True)
    """Distinction from other views of the cell for display, e.g. `64 documents`."""

    @property
    def extent(self) -> Extent:
        """The extent of the shown documents."""
        drawn = {} if self.seed is None else {"sample": self.sample, "seed": self.seed}
        return Extent(limit=self.limit, **drawn)

    @property
    def size(self) -> float:
        """The number of shown documents of each task; infinite for all."""
        return self.extent.size

    def name(self, primary_metric: str) -> str:
        """Return its identity within a cell, which depends on no other view.

        For example `intact`, `without-3-17`, `intact-sample-100-seed-1234`, `intact-limit-64` or
        `intact--acc_norm`. All documents and the benchmark's own metric add nothing to the name.
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
        """The requested runs and documents, e.g. `6 runs on 64 documents`."""
        runs = counted(len(self.runs), "run")
        if self.until is not None:
            return f"{runs} until {self.until.question} is answered"
        size = self.sample or self.limit
        return f"{runs} on {counted(size, 'document') if size else 'all documents'}"

    @property
    def order(self) -> tuple[object, ...]:
        """Metric, removed layers and seed; views with equal ones differ in documents only."""
        return self.metric, self.removed, self.seed

    def shows(self, other: View) -> bool:
        """Check whether it shows all runs of another view of its order, on more documents."""
        if self.until is not None or other.until is not None:
            return False
        return self.size > other.size and self.joined(other).runs == self.runs

    def joined(self, *others: View) -> View:
        """Return a copy that also shows the runs of other views."""
        runs = tuple(run for view in (self, *others) for run in view.runs)
        return View(**{**dict(self), "runs": runs})
