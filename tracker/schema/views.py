"""Define views: the runs, documents and metric that are shown for a model and benchmark."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated

from pydantic import AfterValidator, Field

from tracker.schema.changes import Change
from tracker.schema.extent import Clusters, Extent, Positive
from tracker.schema.fields import Layers, QuestionText
from tracker.schema.formats import count_text
from tracker.schema.identities import Record
from tracker.schema.provenance import content_hash
from tracker.schema.questions import Question, parse_question
from tracker.schema.records import view_name


def sort_runs(runs: Iterable[Change]) -> tuple[Change, ...]:
    """Sort runs and remove duplicates."""
    changes = set(runs)
    runs = (c for c in changes if not c.drawn or replace(c, drawn=False) not in changes)
    return tuple(sorted(runs))


SortedRuns = Annotated[tuple[Change, ...], AfterValidator(sort_runs)]


class Until(Record):
    """Stopping rule: a measurement stops when a question, such as `top 5`, is answered."""

    question: QuestionText
    seed: int
    """The seed of the random order of the documents."""
    runs: SortedRuns
    """The runs that the question refers to, without duplicates, in the order of `Change.order`."""

    @property
    def digest(self) -> str:
        """The first eight characters of a hash of the question, the seed and the runs."""
        changes = [change.columns for change in self.runs]
        return content_hash({"question": self.question, "seed": self.seed, "runs": changes})[:8]

    @property
    def parsed_question(self) -> Question:
        """The question as a `Question` object."""
        return parse_question(self.question)


class View(Record):
    """Selection of a model's results for a report: runs, documents and metric."""

    metric: str
    removed: Layers = ()
    """The layers that are removed in every run, ascending."""
    limit: Positive | None = None
    """Number of documents per task, from the first; None = all documents."""
    sample: Positive | None = None
    """Number of documents per task that are drawn at random; None = no random draw."""
    seed: int | None = None
    """The seed of the drawn documents; None if none are drawn."""
    runs: SortedRuns
    """The requested runs, without duplicates, in the order of `Change.order`."""
    until: Until | None = Field(None, exclude_if=lambda until: until is None)
    """The question whose answer ends the measurement; None if all documents are measured."""
    clusters: Clusters | None = Field(None, exclude_if=lambda clusters: clusters is None)
    """The clusters of dependent documents; None if all documents are independent."""
    named: bool = Field(False, exclude_if=lambda named: not named)
    """True if the view was requested together with a larger view; both views are then stored."""
    explicit: bool = Field(False, exclude_if=lambda explicit: not explicit)
    """True if the view was requested directly, and not only by a study or a search."""
    supersedes: tuple[str, ...] = Field((), exclude_if=lambda names: not names)
    """Names of the views that this view replaces, in the folder and in tracking backends."""
    beside: str = Field("", exclude=True)
    """Text that distinguishes the view from the cell's other views, such as `64 documents`."""

    @property
    def extent(self) -> Extent:
        """The limit, sample size and seed that select the shown documents."""
        sampling = {} if self.seed is None else {"sample": self.sample, "seed": self.seed}
        return Extent(limit=self.limit, **sampling)

    @property
    def size(self) -> float:
        """The maximum number of shown documents per task; infinite for all documents."""
        return self.extent.size

    def name(self, primary_metric: str) -> str:
        """Return the view's name, built from the removed layers, documents and metric.

        Examples are `intact`, `without-3-17`, `intact-sample-100-seed-1234`, `intact-limit-64` and
        `intact--acc_norm`.
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
    def request_text(self) -> str:
        """A description of the requested measurement, such as `6 runs on 64 documents`."""
        runs = count_text(len(self.runs), "run")
        if self.until is not None:
            return f"{runs} until {self.until.question} is answered"
        size = self.sample or self.limit
        return f"{runs} on {count_text(size, 'document') if size else 'all documents'}"

    @property
    def order(self) -> tuple[object, ...]:
        """The sort key of a view: metric, removed layers, seed."""
        return self.metric, self.removed, self.seed

    def shows(self, other_view: View) -> bool:
        """Return whether this view has all runs of another view, and more documents per task."""
        if self.until is not None or other_view.until is not None:
            return False
        return self.size > other_view.size and self.merge(other_view).runs == self.runs

    def merge(self, *other_views: View) -> View:
        """Return a copy of this view that also contains the runs of the other views."""
        runs = tuple(run for view in (self, *other_views) for run in view.runs)
        return View(**{**dict(self), "runs": runs})
