"""Define the base class of studies: measurements that answer a research question."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from tracker.analysis.aligned import AlignedOutcomes
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.cells import CellStore
from tracker.ledger.store import Ledger, write_finding
from tracker.measuring import observing
from tracker.measuring.derive import derive_record
from tracker.measuring.job import Options
from tracker.measuring.observing import Observations, ObserveDocument
from tracker.measuring.prepare import find_cell
from tracker.measuring.progress import Progress
from tracker.report.wording import second_rounding_note
from tracker.runner import RunOutcome, run_cells
from tracker.schema import errors
from tracker.schema.changes import Ablation
from tracker.schema.config import CellRequest
from tracker.schema.experiment import Experiment
from tracker.schema.experiment_input import ExperimentInput
from tracker.schema.fields import validate_settings
from tracker.schema.findings import FindingRecord, LineChart, MapChart, StudyChart
from tracker.schema.records import CellRecord, RecordKey
from tracker.schema.tables import Table
from tracker.schema.text_templates import TextTemplate
from tracker.schema.views import View
from tracker.studies.registry import STUDIES, StudySettings, find_settings
from tracker.team.publish import Publisher

SIGNIFICANT = 0.05
"""An adjusted p-value below this is called significant."""
MIN_LAYERS_RANKED = 3
"""Minimum number of layers for a ranking of layers."""
Settings = TypeVar("Settings", bound=StudySettings)


@dataclass(frozen=True)
class StudyContext:
    """Experiment file of a study, and everything that is needed to measure its models.

    Attributes:
        input: Experiment file, with equivalent command-line arguments.
        ledger: Results folder.
        options: Options for running models, such as the device.
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
        """The parsed experiment file."""
        return self.input.file

    def run(self, requests: Sequence[CellRequest]) -> RunOutcome:
        """Measure and publish the requested results that are not stored yet."""
        return run_cells(requests, self.ledger, self.publisher, self.options, self.progress)

    def subject(self, request: CellRequest) -> Subject | None:
        """Return the stored results for a request, or None if the measurement is incomplete."""
        cell = find_cell(request, self.ledger)
        if cell.store is None or not cell.complete:
            return None
        record = derive_record(cell.store, cell.store.views.view_of(request))
        return Subject(request, cell.store, record)


@dataclass(frozen=True)
class Subject:
    """Measured results of one model on one benchmark, as a study requested them.

    Attributes:
        request: The study's request, which names the model, the benchmark and the ablations.
        store: The folder of this model and benchmark in the results folder.
        record: Summary statistics over all requested documents.
    """

    request: CellRequest
    store: CellStore
    record: CellRecord

    @property
    def view(self) -> View:
        """The runs, documents and metric of the request."""
        return self.store.views.view_of(self.request)

    @property
    def name(self) -> str:
        """The names of the model and the benchmark, for the start of a sentence or title."""
        return cell_label(self.record)

    def outcomes(self, extra_ablations: Sequence[Ablation] = ()) -> AlignedOutcomes:
        """Read the outcomes of the documents measured under all requested and extra ablations."""
        return AlignedOutcomes(self.store, self.view, extra_ablations=extra_ablations)


def cell_label(record: CellRecord) -> str:
    """Return the names of a model and a benchmark, for the start of a sentence or title."""
    return f"{record.model.name}, {record.benchmark.name}"


def observe_subject(
    subject: Subject,
    kind: str,
    context: StudyContext,
    begin: Callable[[Engine], ObserveDocument],
    documents: Collection[tuple[str, int]] | None = None,
) -> Observations:
    """Observe documents with a model, e.g. measure proxies; compute only what is not stored.

    Args:
        subject: The model and the benchmark.
        kind: Name under which the statistics are stored.
        context: Context of the study.
        begin: Function that takes an engine (the running model). It returns a function that
            computes the statistics of one document.
        documents: Documents to observe, as (task, number in the task's split); None for all.

    Returns:
        The statistics of the observed documents.
    """
    request, store, progress = subject.request, subject.store, context.progress
    machine = context.ledger, context.options, progress
    open_cell = partial(observing.open_observed_cell, request, store, *machine)
    return observing.observe_cell(request, store, kind, begin, open_cell, progress, documents)


def second_rounding_notes(subjects: Sequence[Subject]) -> list[str]:
    """Return a warning for each model with a checkpoint that is already quantised."""
    notes = (second_rounding_note(subject.record) for subject in subjects)
    return [*dict.fromkeys(filter(None, notes))]


def study_texts(name: str, **names: Any) -> TextTemplate:
    """Open the text template of a built-in study, with `names` as variables of the template."""
    return TextTemplate("tracker.studies", name, significant=SIGNIFICANT, **names)


_FRAME_TEXTS = study_texts("frame")
"""Template of the reasons why an experiment file is not enough for a study."""


@dataclass
class StudyResult:
    """Results of a study, which `conduct_study` stores as a `FindingRecord`.

    Attributes:
        answers: Sentences that answer the research question, starting with the most important
            sentence.
        tables: Tables for the report.
        charts: Charts for the report.
        lacking: Sentences about results that could not be computed, with the reasons.
        ran: Outcome of measurements that the study ran while it computed the answer.
        rests_on: Keys of records that the answer uses, besides the requested results.
        exports: Shell commands with which the user can save improved models.
        files: Files that the study wrote to the results folder.
        suffix: Text that distinguishes this result from other results of the study on the same
            experiment file.
    """

    answers: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    charts: list[StudyChart] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    ran: RunOutcome = field(default_factory=RunOutcome)
    rests_on: list[RecordKey] = field(default_factory=list)
    exports: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    suffix: str = ""

    def add(self, *elements: str | Table | StudyChart) -> None:
        """Append each element to the answers, tables or charts, depending on its type."""
        for element in elements:
            if isinstance(element, Table):
                self.tables.append(element)
            elif isinstance(element, LineChart | MapChart):
                self.charts.append(element)
            else:
                self.answers.append(element)

    def lack(self, title: str, *reasons: str) -> None:
        """Add reasons why a result is missing; `title` names the model and benchmark."""
        self.lacking += [f"{title}: {reason}" for reason in reasons]


class Study(Generic[Settings]):
    """Base class of studies, which list the required measurements and answer a research question.

    A study keeps no state between method calls.

    Args:
        settings: Settings of the study.

    Attributes:
        name: Name in the registry of studies.
        question: The research question, which is the heading of the study's section in reports.
        texts: Template of the study's sentences; None if there is no template.
        races: Whether the study accepts experiment files that use `until` to stop a measurement
            early.
        intact: Whether the experiment file must start from the intact model.
        layers: Minimum number of single layers that the experiment file must remove.
        chooses: Whether the study selects something, such as layers, by results on calibration
            documents. A study that selects needs a random sample of documents, not the first
            documents.
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
        """Sentences about the assumptions of the study's statistical methods, with sources."""
        return () if self.texts is None else self.texts.render_all("assumptions", self.settings)

    @property
    def command(self) -> list[str]:
        """The command that runs the study, without the experiment file and the options."""
        return [*(self.settings.command or f"tracker study {self.name}").split()]

    def requests(self, context: StudyContext) -> list[CellRequest]:
        """List the measurements that the study needs; requests of the same model are adjacent.

        Raises RequestError if the experiment file does not meet the requirements of the study.
        """
        cells = context.experiment.cells()
        for cell in cells:
            self._check(cell, context)
        return [request for cell in cells for request in self.expand(cell, context)]

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterable[CellRequest]:
        """Yield the requests for one model and benchmark; by default, only the file's request."""
        return [cell]

    def prepare(self, context: StudyContext) -> None:
        """Prepare the measurements, e.g. create a model to measure; by default do nothing.

        Raises RequestError if the preparation fails.
        """

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Compute the study's results from the measured results of all models and benchmarks."""
        raise NotImplementedError

    def _check(self, cell: CellRequest, context: StudyContext) -> None:
        """Raise RequestError if the request `cell` does not meet the requirements of the study.

        `cell` is the experiment file's request for one model and one benchmark.
        """
        named, problem = (cell, self, context.input.source), ""
        if cell.until is not None and not self.races:
            raise errors.ExperimentError(_FRAME_TEXTS.render("races"))
        if self.intact and cell.removed:
            problem = _FRAME_TEXTS.render("intact", *named)
        elif self.layers > len(layers := {*cell.changes.whole_layers} - {*cell.removed}):
            problem = _FRAME_TEXTS.render("layers", *named, len(layers))
        elif self.chooses and cell.documents.limit is not None:
            problem = _FRAME_TEXTS.render("limit", cell)
        if problem:
            raise errors.RequestError(problem)


def open_study(name: str, **values: Any) -> Study[Any]:
    """Create a study from its name and settings.

    Raises RequestError if the name or a setting is invalid.
    """
    settings = validate_settings(find_settings(name), values, "--")
    module, _, kind = settings.study.partition(":")

    def translate(error: Exception) -> errors.RequestError | None:
        reason = f"{type(error).__name__}: {errors.first_line(error)}"
        text = f"study {name!r}, {settings.study}, cannot be opened: {reason}"
        return None if name in STUDIES else errors.RequestError(text)

    with errors.translate_errors(translate):
        study: Study[Any] = getattr(import_module(module), kind)(settings)
    return study


def conduct_study(
    study: Study[Any], context: StudyContext
) -> tuple[FindingRecord, RunOutcome, StudyResult]:
    """Run a study: measure and publish its requests, compute its results, and store them.

    Returns the stored record, the outcome of all measurements, and the study's results. Raises
    RequestError if the experiment file lacks required runs, and CellError if every measurement
    failed.
    """
    requests = study.requests(context)
    study.prepare(context)
    outcome = context.run(requests)
    subjects = [*filter(None, map(context.subject, requests))]
    if not subjects:
        raise errors.CellError("\n".join(_failure_notes(outcome)))
    result = study.answer(context, subjects)
    outcome = outcome.joined(result.ran)
    keys = (*(subject.record.record_key for subject in subjects), *result.rests_on)
    options = study.settings.command_options()
    command = shlex.join([*study.command, *options])
    finding = FindingRecord(
        study=study.name,
        experiment=context.input.name,
        question=study.question,
        lacking=(*result.lacking, *_failure_notes(outcome)),
        rests_on=tuple(dict.fromkeys(keys)),
        command=command if options or study.settings.command else "",
        beside=result.suffix,
        answers=tuple(result.answers),
        tables=tuple(result.tables),
        charts=tuple(result.charts),
        assumptions=tuple(study.assumptions),
    )
    write_finding(context.ledger.root, finding)
    return finding, outcome, result


def _failure_notes(outcome: RunOutcome) -> Iterator[str]:
    for title, reason in outcome.failed.items():
        yield f"{title}: {reason}"
