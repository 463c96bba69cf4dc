"""What a study is: which cells it needs, and what it says of them once they are measured.

And from its file to its section: measure what it lacks, ask it, keep what it says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tracker.core.changes import WHOLE_LAYER, Ablation
from tracker.core.config import ONE_EACH, CellRequest
from tracker.core.errors import CellError, ExperimentError, RequestError
from tracker.core.estimates import Estimate
from tracker.core.experiment import Experiment
from tracker.core.experiment_input import ExperimentInput
from tracker.core.findings import FindingRecord, FoundChart
from tracker.core.formats import Measure, with_interval
from tracker.core.records import CellRecord, Place
from tracker.core.tables import Table
from tracker.core.views import View
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.aligned import AlignedOutcomes
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger, keep_finding
from tracker.measuring import observing
from tracker.measuring.derive import record_of
from tracker.measuring.job import Options
from tracker.measuring.observing import Observe, Observed
from tracker.measuring.prepare import look_up
from tracker.measuring.progress import Progress
from tracker.report.caveats import second_rounding_note
from tracker.runner import Finished, run_cells
from tracker.stats.arrays import Array
from tracker.team.publish import Publisher

SIGNIFICANT = 0.05
"""An adjusted p-value below this is called significant."""
FEWEST = 3
"""Layers that an order of layers needs."""


@dataclass(frozen=True)
class StudyContext:
    """What a study was asked.

    Attributes:
        asked: What it is about.
        ledger: The results folder.
        options: How models run, and where.
        progress: Told what happens.
        publisher: Hands runs to the tracking backends.
    """

    asked: ExperimentInput[Experiment]
    ledger: Ledger
    options: Options
    progress: Progress
    publisher: Publisher

    @property
    def experiment(self) -> Experiment:
        """What it is about, as a file says it."""
        return self.asked.file


@dataclass(frozen=True)
class Subject:
    """One measured cell of a study: its request, and where its outcomes are.

    Attributes:
        request: What was asked for.
        store: Its place in the ledger.
        record: All that its outcomes say.
    """

    request: CellRequest
    store: CellStore
    record: CellRecord

    @property
    def view(self) -> View:
        """What is shown of it."""
        return self.store.views.of(self.request)

    def outcomes(self, besides: Sequence[Ablation] = ()) -> AlignedOutcomes:
        """Read the outcomes of its view, lined up with those of other ablations."""
        return AlignedOutcomes(self.store, self.view, besides=besides)


def measured(request: CellRequest, ledger: Ledger) -> Subject | None:
    """Look up what was measured of a request; None where that is not all of it."""
    known = look_up(request, ledger)
    if known.store is None or not known.complete:
        return None
    return Subject(request, known.store, record_of(known.store, known.store.views.of(request)))


def observe(
    subject: Subject,
    kind: str,
    asked: StudyContext,
    begin: Callable[[Engine], Observe],
    among: Collection[tuple[str, int]] | None = None,
) -> Observed:
    """Observe documents of a study's cell, as `tracker.measuring.observing` does."""
    request, store, progress = subject.request, subject.store, asked.progress
    where = asked.ledger, asked.options, progress
    opened = partial(observing.open_observed, request, store, *where)
    return observing.observe(request, store, kind, begin, opened, progress, among)


def lined_up(observed: Observed, outcomes: AlignedOutcomes) -> dict[str, Array]:
    """Give what was observed of the documents of some outcomes, in their order."""
    rows = {document: row for row, document in enumerate(observed.documents)}
    chosen = [rows[document] for document in outcomes.documents]
    return {name: figures[chosen] for name, figures in observed.arrays.items()}


def second_roundings(subjects: Sequence[Subject]) -> list[str]:
    """Return which error is measured, of each model whose weights were rounded before."""
    notes = (second_rounding_note(subject.record) for subject in subjects)
    return [*dict.fromkeys(filter(None, notes))]


def whole_layers(request: CellRequest) -> tuple[int, ...]:
    """List the layers that a request removes alone and as a whole, ascending."""
    if request.changes is not None:
        changes = (change for change in request.changes if change.kind == WHOLE_LAYER)
        return tuple(sorted(change.layer for change in changes))
    whole = (
        "layer" in request.components and 1 in request.spans and "remove" in request.interventions
    )
    return tuple(sorted(request.layers)) if whole else ()


def removing_whole_layers(request: CellRequest, **update: Any) -> CellRequest:
    """Ask for whole single layers of a cell and nothing else, with other fields as in `update`."""
    return request.model_copy(update={**ONE_EACH, **update})


def refuse_removed(cell: CellRequest, why: str, asked: StudyContext) -> None:
    """Refuse a cell of which layers are removed beneath: RequestError."""
    if cell.removed:
        raise RequestError(f"{cell.title}: {why}; leave 'removed' out of {asked.asked.source}")


def amount(change: Estimate, measure: Measure) -> str:
    """Write a change with its unit and interval, or why it is undefined."""
    if change.value is None:
        return f"an undefined amount ({change.reason})"
    return with_interval(change, measure.write, f" {measure.unit}")


def side(estimate: Estimate, of: float = 0.0) -> int:
    """Say on which side of a value an interval is: 1 above, −1 below, 0 where it holds the value.

    0 too where there is no interval.
    """
    if estimate.low is None or estimate.high is None:
        return 0
    return int(estimate.low > of) - int(estimate.high < of)


@dataclass
class StudyResult:
    """What a study says; see `FindingRecord`.

    Beside it stand what became of cells that it ran itself, and places of them on which it rests;
    what to type to save models that it found to be better, which is told and not kept; files that
    it left in the results folder; and `command` and `beside` of its finding, where it has some.
    """

    assumptions: Sequence[str]
    answers: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[FoundChart] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    ran: Finished = field(default_factory=Finished)
    rests_on: list[Place] = field(default_factory=list)
    exports: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    command: str = ""
    beside: str = ""


class Study(Protocol):
    """One question. A folder of this package has one, and `registry` names it.

    It keeps nothing from one call to the next: each may be asked alone.

    Attributes:
        question: What it asks, as a sentence that heads its section.
        races: Whether `until` may end its measuring early.
    """

    question: str
    races: bool = False

    @property
    def name(self) -> str:
        """What it is called on the command line, as its class is."""
        return type(self).__name__.lower()

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """List the cells that it needs measured, equal models next to each other.

        RequestError where the experiment file is not enough for the question.
        """
        ...

    def prepare(self, asked: StudyContext) -> None:
        """Make what its cells are about and is not there: a model that is built, for most nothing.

        RequestError where that cannot be made.
        """

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Answer from the cells that could be measured, in the order of the requests.

        What else it must observe of a model it measures here, block by block, and keeps in the
        ledger. What is not there is said under `lacking`.
        """
        ...


def conduct(study: Study, asked: StudyContext) -> tuple[FindingRecord, Finished, StudyResult]:
    """Measure and publish the cells of a study as `run_cells` does, and keep what it finds.

    Returns what is kept, what became of the cells that it needs and of those that it ran itself,
    and what else it says. RequestError if the file is not enough, CellError where no cell could be
    measured.
    """
    requests = study.requests(asked)
    if not study.races and any(request.until is not None for request in requests):
        raise ExperimentError(
            "'until' stops at the answer to another question than a study's; leave it out of the "
            "file, or write 'sample' for fewer documents"
        )
    study.prepare(asked)
    outcome = run_cells(requests, asked.ledger, asked.publisher, asked.options, asked.progress)
    found = (measured(request, asked.ledger) for request in requests)
    subjects = [subject for subject in found if subject is not None]
    if not subjects:
        raise CellError("\n".join(f"{title}: {why}" for title, why in outcome.failed.items()))
    result = study.say(asked, subjects)
    outcome = outcome.joined(result.ran)
    failed = (f"{title}: {why}" for title, why in outcome.failed.items())
    places = (*(subject.record.place for subject in subjects), *result.rests_on)
    finding = FindingRecord(
        study=study.name,
        experiment=asked.asked.name,
        question=study.question,
        lacking=(*result.lacking, *failed),
        rests_on=tuple(dict.fromkeys(places)),
        command=result.command,
        beside=result.beside,
        answers=tuple(result.answers),
        tables=tuple(result.tables),
        charts=tuple(result.charts),
        assumptions=tuple(result.assumptions),
    )
    keep_finding(asked.ledger.root, finding)
    return finding, outcome, result
