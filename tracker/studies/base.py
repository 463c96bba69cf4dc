"""Define a study: its requests, and its answer from measured cells."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from tracker.analysis.aligned import AlignedOutcomes
from tracker.core.changes import Ablation
from tracker.core.config import CellRequest
from tracker.core.errors import (
    CellError,
    ExperimentError,
    RequestError,
    first_line,
    translate_errors,
)
from tracker.core.experiment import Experiment
from tracker.core.experiment_input import ExperimentInput
from tracker.core.fields import checked
from tracker.core.findings import FindingRecord, FoundChart, LineChart, MapChart
from tracker.core.formats import measure_of
from tracker.core.records import CellRecord, Place
from tracker.core.tables import Table
from tracker.core.views import View
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger, keep_finding
from tracker.measuring import observing
from tracker.measuring.derive import record_of
from tracker.measuring.job import Options
from tracker.measuring.observing import Observe, Observed
from tracker.measuring.prepare import look_up
from tracker.measuring.progress import Progress
from tracker.report.texts import TextTemplate
from tracker.report.wording import second_rounding_note
from tracker.runner import RunOutcome, run_cells
from tracker.studies.registry import STUDIES, StudySettings, settings_of
from tracker.team.publish import Publisher

SIGNIFICANT = 0.05
"""An adjusted p-value below this is called significant."""
FEWEST = 3
"""Layers that an order of layers needs."""
Settings = TypeVar("Settings", bound=StudySettings)


@dataclass(frozen=True)
class StudyContext:
    """Experiment of a study, with the options for measuring its cells.

    Attributes:
        input: Experiment as given by the user.
        ledger: Results folder.
        options: Options of running models.
        progress: Receiver of progress messages.
        publisher: Publisher of runs to the tracking backends.
    """

    input: ExperimentInput[Experiment]
    ledger: Ledger
    options: Options
    progress: Progress
    publisher: Publisher

    @property
    def experiment(self) -> Experiment:
        """The experiment file."""
        return self.input.file

    def run(self, requests: Sequence[CellRequest]) -> RunOutcome:
        """Measure and publish the missing parts of cells."""
        return run_cells(requests, self.ledger, self.publisher, self.options, self.progress)

    def subject(self, request: CellRequest) -> Subject | None:
        """Return the cell of a request; None where not all of it is measured."""
        cell = look_up(request, self.ledger)
        if cell.store is None or not cell.complete:
            return None
        return Subject(request, cell.store, record_of(cell.store, cell.store.views.of(request)))


@dataclass(frozen=True)
class Subject:
    """A measured cell of a study.

    Attributes:
        request: The request.
        store: Its folder in the ledger.
        record: The record derived from its outcomes.
    """

    request: CellRequest
    store: CellStore
    record: CellRecord

    @property
    def view(self) -> View:
        """The view of the request."""
        return self.store.views.of(self.request)

    @property
    def name(self) -> str:
        """The model and the benchmark, as they begin a sentence or a title."""
        return name_of(self.record)

    def outcomes(self, besides: Sequence[Ablation] = ()) -> AlignedOutcomes:
        """Read the outcomes of its view, aligned with those of other ablations."""
        return AlignedOutcomes(self.store, self.view, besides=besides)


def name_of(record: CellRecord) -> str:
    """Return the model and the benchmark of a cell, as they begin a sentence or a title."""
    return f"{record.model.name}, {record.benchmark.name}"


def observe(
    subject: Subject,
    kind: str,
    context: StudyContext,
    begin: Callable[[Engine], Observe],
    among: Collection[tuple[str, int]] | None = None,
) -> Observed:
    """Observe documents of a study's cell, as `tracker.measuring.observing` does."""
    request, store, progress = subject.request, subject.store, context.progress
    machine = context.ledger, context.options, progress
    opened = partial(observing.open_observed, request, store, *machine)
    return observing.observe(request, store, kind, begin, opened, progress, among)


def second_roundings(subjects: Sequence[Subject]) -> list[str]:
    """Return which error is measured, of each model whose weights were rounded before."""
    notes = (second_rounding_note(subject.record) for subject in subjects)
    return [*dict.fromkeys(filter(None, notes))]


def study_texts(name: str, **names: Any) -> TextTemplate:
    """Open the template of a study of this package; `names` are available in it."""
    common = {"measure_of": measure_of, "significant": SIGNIFICANT}
    return TextTemplate("tracker.studies", name, **common, **names)


@dataclass
class StudyResult:
    """Answer of a study; see `FindingRecord`.

    Attributes:
        answers: Sentences, the most important one first.
        tables: Tables.
        charts: Charts.
        lacking: Questions that could not be answered, and how to answer them.
        ran: Outcome of the cells that the study ran itself.
        rests_on: Cells that it uses besides its subjects.
        exports: Commands that save models shown to be better; not stored.
        files: Files that it wrote to the results folder.
        beside: Text that distinguishes it from other answers about the same file.
    """

    answers: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[FoundChart] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    ran: RunOutcome = field(default_factory=RunOutcome)
    rests_on: list[Place] = field(default_factory=list)
    exports: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    beside: str = ""

    def add(self, *parts: str | Table | FoundChart) -> None:
        """Add sentences, tables and charts, each behind those of its kind."""
        for part in parts:
            if isinstance(part, Table):
                self.tables.append(part)
            elif isinstance(part, LineChart | MapChart):
                self.charts.append(part)
            else:
                self.answers.append(part)

    def lack(self, title: str, *reasons: str) -> None:
        """Record the reasons why a cell's question could not be answered."""
        self.lacking += [f"{title}: {reason}" for reason in reasons]


class Study(Generic[Settings]):
    """Research question: its requests, and its answer once they are measured.

    It keeps no state between calls, so each method may be called alone.

    Args:
        settings: Settings of the study.

    Attributes:
        name: Name in the registry.
        question: Question, the heading of its section.
        texts: Template of its sentences, with the macro `assumptions`; None if another package's
            study writes them in code.
        races: Whether `until` may stop its measuring early.
        intact: Whether it requires the intact model, without removed layers.
        layers: Minimum number of whole single layers that each cell must remove.
        chooses: Whether documents choose something, so that they must be drawn at random.
    """

    name: ClassVar[str]
    question: ClassVar[str]
    texts: ClassVar[TextTemplate | None] = None
    races: ClassVar[bool] = False
    intact: ClassVar[bool] = False
    layers: ClassVar[int] = 0
    chooses: ClassVar[bool] = False

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def assumptions(self) -> Sequence[str]:
        """Assumptions of the statistics, each with its source."""
        return () if self.texts is None else self.texts.all("assumptions", self.settings)

    @property
    def command(self) -> list[str]:
        """The command that asks the question again, without the experiment."""
        return [*(self.settings.command or f"tracker study {self.name}").split()]

    def requests(self, context: StudyContext) -> list[CellRequest]:
        """List the cells that it needs measured, equal models next to each other.

        RequestError where the experiment file is not enough for the question.
        """
        cells = context.experiment.cells()
        for cell in cells:
            self._check(cell, context)
        return [request for cell in cells for request in self.expand(cell, context)]

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterable[CellRequest]:
        """Yield the requests for one cell of the file: by default the cell itself."""
        return [cell]

    def prepare(self, context: StudyContext) -> None:
        """Prepare what its cells need, such as a model to build; most studies need nothing.

        Raises RequestError if that fails.
        """

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Answer from the cells that could be measured, in the order of the requests."""
        raise NotImplementedError

    def _check(self, cell: CellRequest, context: StudyContext) -> None:
        """Raise RequestError for a cell that does not meet the requirements."""
        file, problem = context.input.source, ""
        if self.races is False and cell.until is not None:
            raise ExperimentError(
                "'until' stops at the answer to another question than a study's; leave it out of "
                "the file, or write 'sample' for fewer documents"
            )
        if self.intact and cell.removed:
            problem = f"the study {self.name} starts from the intact model; leave 'removed' out "
            problem += f"of {file}"
        elif self.layers > len(layers := {*cell.changes.whole_layers} - {*cell.removed}):
            problem = (
                f"the study {self.name} needs whole single layers, {self.layers} or more, and "
                f"{file} removes {len(layers)}; write layer: {{value: all}}, and leave "
                "'component', 'span' and 'intervention' out"
            )
        elif self.chooses and cell.documents.limit is not None:
            problem = (
                "documents that choose are drawn at random; write 'sample: {value: "
                f"{cell.documents.limit}}}' instead of 'limit'"
            )
        if problem:
            raise RequestError(f"{cell.title}: {problem}")


def open_study(name: str, **values: Any) -> Study[Any]:
    """Load a study with these settings; RequestError if there is none, or a setting is wrong."""
    settings = checked(settings_of(name), values, "--")
    module, _, kind = settings.study.partition(":")

    def problem(error: Exception) -> RequestError | None:
        why = f"{type(error).__name__}: {first_line(error)}"
        text = f"study {name!r}, {settings.study}, cannot be opened: {why}"
        return None if name in STUDIES else RequestError(text)

    with translate_errors(problem):
        study: Study[Any] = getattr(import_module(module), kind)(settings)
    return study


def conduct(
    study: Study[Any], context: StudyContext
) -> tuple[FindingRecord, RunOutcome, StudyResult]:
    """Measure and publish the cells of a study, answer its question and store the finding.

    Returns the finding, the outcome of all cells, and the whole answer. RequestError if the file
    lacks required runs, CellError if no cell could be measured.
    """
    requests = study.requests(context)
    study.prepare(context)
    outcome = context.run(requests)
    subjects = [*filter(None, map(context.subject, requests))]
    if not subjects:
        raise CellError("\n".join(_failures(outcome)))
    result = study.answer(context, subjects)
    outcome = outcome.joined(result.ran)
    places = (*(subject.record.place for subject in subjects), *result.rests_on)
    options = study.settings.typed()
    command = shlex.join([*study.command, *options])
    finding = FindingRecord(
        study=study.name,
        experiment=context.input.name,
        question=study.question,
        lacking=(*result.lacking, *_failures(outcome)),
        rests_on=tuple(dict.fromkeys(places)),
        command=command if options or study.settings.command else "",
        beside=result.beside,
        answers=tuple(result.answers),
        tables=tuple(result.tables),
        charts=tuple(result.charts),
        assumptions=tuple(study.assumptions),
    )
    keep_finding(context.ledger.root, finding)
    return finding, outcome, result


def _failures(outcome: RunOutcome) -> Iterator[str]:
    for title, reason in outcome.failed.items():
        yield f"{title}: {reason}"
