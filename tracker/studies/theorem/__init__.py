"""The paper's theorem: a layer that cosine calls the least important may decide every answer.

The model is built by `tracker.models.counterexample`, for the documents of the file's benchmarks;
of the file's model it takes the tokenizer alone. It is saved as any checkpoint of transformers, and
measured as any model is.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tracker.benchmarks.benchmark import chosen_metric, open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.core.changes import INTACT, Ablation
from tracker.core.config import CellRequest, Changes, ModelSpec
from tracker.core.errors import CellError, RequestError, WorkError
from tracker.core.formats import counted
from tracker.core.grouping import grouped
from tracker.core.provenance import content_hash, file_hash, package_versions
from tracker.core.records import RunRecord
from tracker.core.tables import Column, Table, table
from tracker.ledger.files import lock_file, new_folder
from tracker.ledger.outcomes import METRIC
from tracker.models import counterexample
from tracker.models.counterexample import (
    JOBS,
    LARGEST,
    LAYERS,
    SMALLEST,
    WHISPER,
    Counterexample,
    hollow,
)
from tracker.models.load import weightless
from tracker.models.sources import find_model
from tracker.studies.base import Study, StudyContext, StudyResult, Subject
from tracker.studies.registry import TheoremSettings
from tracker.studies.theorem.lessons import Lesson, lesson

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_PLACES = 4096
"""Places that a model remembers at most: its MLPs have two units for each, in every layer."""
TOLERANCE = 1e-6
"""By what share of itself the score of layer 2 may be off, at most."""
_ACCURACIES = ("acc", "acc_norm")
_NOT_FINITE = "a figure of the model is not finite"


class Theorem(Study[TheoremSettings]):
    """Builds the transformer of the theorem for each benchmark and ε, and measures it."""

    name = "theorem"
    question = "Can the layer with the lowest cosine score decide every answer?"
    assumptions = (
        "the model is built, not trained: it shows what a cosine score cannot promise, not what "
        "trained models do",
    )

    def __init__(self, settings: TheoremSettings) -> None:
        super().__init__(settings)
        self.epsilons = tuple(sorted({*settings.epsilon}, reverse=True))
        for value in self.epsilons:
            if not SMALLEST <= value <= LARGEST:
                raise RequestError(
                    f"--epsilon {value:g}: the theorem is shown for ε from {SMALLEST:g} (below, "
                    f"the results' float64 does not hold it to 1e-6) to {LARGEST:g} (above, other "
                    "layers' scores would be lower); for example --epsilon 1e-6"
                )
        self._lesson_of = cache(lesson_of)  # it reads benchmarks

    def requests(self, context: StudyContext) -> list[CellRequest]:
        """Return requests for each layer of the model of each benchmark and ε.

        RequestError where a benchmark generates text or has no accuracy, or nothing of it can be
        taught.
        """
        super().requests(context)
        return [model.request for models in self._models(context) for model in models]

    def prepare(self, context: StudyContext) -> None:
        """Build and save the models that are missing."""
        for models in self._models(context):
            cell = models[0].cell
            context.progress.say(f"building for {cell.benchmark}")
            taught, shape, tokenizer = self._lesson_of(cell, context.options.trust_remote_code)
            built: Counterexample | None = None
            for model in models:
                with lock_file(model.folder.parent / "locks" / model.folder.name):
                    if not (model.folder / "config.json").is_file():
                        built = built or build(cell, taught, shape)
                        save(built.whispering(model.epsilon), tokenizer, model.folder)

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Set what was asked of each model beside what was measured of it."""
        result = StudyResult()
        built = {model.request: model for models in self._models(context) for model in models}
        measured = [measure(subject, built[subject.request]) for subject in subjects]
        for models in grouped(measured, lambda model: model.built.cell).values():
            result.add(*_answers(models), models_table(models), layers_table(models[-1]))
            result.lacking += _left_out(models[0])
        return result

    def _models(self, context: StudyContext) -> list[list[BuiltModel]]:
        """Return the models of each benchmark and tokenizer, built or not."""
        root = context.ledger.root / "studies" / self.name
        models = []
        for cell in dict.fromkeys(map(_documents_request, context.experiment.cells())):
            taught, shape, _ = self._lesson_of(cell, context.options.trust_remote_code)
            name = re.sub(r"[^a-zA-Z0-9_-]+", "_", str(cell.benchmark))
            known = fingerprint(cell, taught, shape)[:8]
            folders = {e: root / f"theorem-{name}-{e:g}-{known}" for e in self.epsilons}
            models.append([BuiltModel(cell, e, folder, taught) for e, folder in folders.items()])
        return models


def _documents_request(cell: CellRequest) -> CellRequest:
    """Return what of a cell says which documents, and how they are tokenised."""
    model = cell.model.model_copy(update={"dtype": "auto"})
    return replace(cell, model=model, removed=(), changes=Changes(layers=(0,)))


# The models


def lesson_of(cell: CellRequest, trust_remote_code: bool) -> tuple[Lesson, tuple[int, int], Any]:
    """Return the lesson of a benchmark, its (vocabulary, length), and the tokenizer."""
    benchmark = open_benchmark(cell)
    metric = chosen_metric(benchmark.identity, cell.metric)
    if metric not in _ACCURACIES:
        raise RequestError(
            f"{cell.title}: the theorem is about accuracy, and {metric} is none; it takes a "
            f"benchmark with {' or '.join(_ACCURACIES)}, such as arc_easy"
        )
    source = find_model(cell.model)
    model, tokenizer = weightless(source, "float32", trust_remote_code)
    length = RequestEncoder(model, tokenizer).max_length
    vocabulary = max(model.config.get_text_config().vocab_size, len(tokenizer))
    # lm-eval treats the tokenizers of some families in a way of their own, and ours is a Llama.
    encoder = RequestEncoder(hollow(vocabulary, length), tokenizer, cell.benchmark)
    documents = benchmark.documents(encoder, cell.extent)
    if any(document.prompt is not None for document in documents):
        raise RequestError(
            f"{cell.title} lets the model generate; the theorem's model is built for choices and "
            "given texts, such as arc_easy or corpus:FILE.txt"
        )
    taught = lesson(documents, length, vocabulary, tokenizer.decode)
    if not taught.wanted:
        raise RequestError(
            f"{cell.title}: none of its {counted(len(documents), 'document')} can be taught: "
            f"{next(iter(taught.left_out.values()), 'there are none')}"
        )
    if len(taught.wanted) > MAX_PLACES:
        raise RequestError(
            f"{cell.title}: {len(taught.wanted):,} places would have to be remembered, and a model "
            f"is built for {MAX_PLACES:,}; ask for fewer documents (limit, sample) or shorter "
            f"texts ({cell.benchmark}:TOKENS)"
        )
    return taught, (vocabulary, length), tokenizer


def fingerprint(cell: CellRequest, taught: Lesson, shape: tuple[int, int]) -> str:
    """Return a hash of all that a built model follows from."""
    memory = [(place.hex(), each.signed, each.fixed) for place, each in taught.wanted.items()]
    code = file_hash([Path(str(counterexample.__file__))])
    tokenizer = find_model(cell.model).fingerprint()
    texts = content_hash([text.tokens for text in taught.texts])
    versions = package_versions()
    versions = {name: versions[name] for name in ("torch", "transformers")}
    return content_hash([memory, texts, taught.certainty, shape, code, tokenizer, versions])


def build(cell: CellRequest, taught: Lesson, shape: tuple[int, int]) -> Counterexample:
    """Build the model of a lesson; RequestError where none can tell its places apart."""
    try:
        return Counterexample(taught.texts, taught.wanted, taught.certainty, *shape)
    except CellError as error:
        raise RequestError(
            f"{cell.title}: {error}; ask for fewer documents (limit, sample)"
        ) from None


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a checkpoint so that it is there as a whole, or not at all."""
    try:
        with new_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError as error:
        raise WorkError(f"{folder} cannot be written: {error.strerror or error}") from None


# Figures


@dataclass(frozen=True)
class BuiltModel:
    """A model for some documents and an ε; `folder` is where it is, or goes."""

    cell: CellRequest
    epsilon: float
    folder: Path
    lesson: Lesson

    @property
    def request(self) -> CellRequest:
        """The request for each of its layers."""
        model = ModelSpec(model=str(self.folder), dtype="float32")
        return replace(self.cell, model=model, changes=Changes(layers=tuple(range(LAYERS))))

    @property
    def width(self) -> int:
        """The size of its hidden states."""
        return int(json.loads((self.folder / "config.json").read_text())["hidden_size"])

    @property
    def is_open(self) -> bool:
        """True where tokens are counted and not documents."""
        return self.lesson.tokens > 0


@dataclass(frozen=True)
class MeasuredModel:
    """A built model as it was measured.

    `right` and `without` are how many of the `units` (documents; of a corpus tokens) that can be
    taught it answers, with and without layer 2; `other` is the lowest score of the other layers.
    """

    built: BuiltModel
    subject: Subject
    score: float
    other: float
    right: int
    without: int
    units: int

    @property
    def error(self) -> float:
        """By what share of itself the score is off."""
        return abs(self.score / self.built.epsilon - 1)

    @property
    def holds(self) -> bool:
        """True where it shows the theorem."""
        decides = self.right == self.units > 0 == self.without
        return decides and self.score < self.other and self.error <= TOLERANCE


def measure(subject: Subject, built: BuiltModel) -> MeasuredModel:
    """Count what a built model answers, and find its layers' cosine scores."""
    record, taught = subject.record, built.lesson
    scores = {
        layer: math.nan if run.cosine_score is None else run.cosine_score
        for layer, run in record.runs_of().items()
    }
    frame = subject.store.read_documents(subject.request.extent)
    documents = zip(frame["task"], frame["doc"], strict=True)
    frame = frame[[document not in taught.left_out for document in documents]]
    counts = {
        name: np.sum([_pair(value) for value in values], axis=0)
        for name, values in frame.groupby("ablation")[f"{METRIC}{record.metric}"]
    }
    right, units = map(int, counts[INTACT.name])
    return MeasuredModel(
        built,
        subject,
        score=scores.pop(WHISPER),
        other=min(scores.values()),
        right=right,
        without=int(counts[Ablation.of(removed=(WHISPER,)).name][0]),
        units=units - (taught.clashing if built.is_open else 0),
    )


def _pair(value: float | str) -> tuple[int, int]:
    """Return a document's right answers and how many there are; of a corpus its tokens."""
    if isinstance(value, str):
        right, units = json.loads(value)
        return int(right), int(units)
    return int(value == 1), 1


# Sentences and tables


def _answers(shown: Sequence[MeasuredModel]) -> list[str]:
    """Return for one benchmark whether the theorem holds, at the smallest ε first."""
    last = shown[-1]
    name = last.subject.record.benchmark.title
    noun = "token" if last.built.is_open else "document"
    if failed := [one for one in shown if not one.holds]:
        one = failed[0]
        return [
            f"The model built for {name} and ε = {tiny(one.built.epsilon)} does not show it: it "
            f"answers {one.right:,} of {counted(one.units, noun)}, {one.without:,} without layer "
            f"{WHISPER}, whose cosine score is {tiny(one.score)}, off by {tiny(one.error)} of "
            f"itself; the lowest other is {tiny(one.other)}."
        ]
    everything = f"all {counted(last.units, noun)}" if last.units > 1 else f"the one {noun}"
    that = " that can be" if last.built.lesson.left_out or last.built.lesson.clashing else ""
    return [
        f"A model of {LAYERS} layers answers {everything}{that} of {name}. Its layer {WHISPER} has "
        f"the cosine score {tiny(last.score)}, the lowest: any other is more than "
        f"{tiny(math.floor(last.other / last.score))} times as high. Without it not one {noun} is "
        "answered."
    ]


def _left_out(shown: MeasuredModel) -> list[str]:
    """Return which documents no such model answers, and why."""
    taught, name, lines = shown.built.lesson, shown.subject.record.benchmark.title, []
    for places in grouped(taught.left_out, taught.left_out.__getitem__).values():
        docs = [f"{doc}" if task == name else f"{doc} of {task}" for task, doc in places]
        some = ", ".join([*docs[:5], *(["…"] if len(docs) > 5 else [])])
        lines.append(
            f"{name}: {counted(len(docs), 'document')} ({some}) cannot be taught: "
            f"{taught.left_out[places[0]]}"
        )
    if taught.clashing and shown.built.is_open:
        lines.append(
            f"{name}: {counted(taught.clashing, 'token')} of {taught.tokens:,} cannot be taught: "
            "another text continues otherwise after the same beginning"
        )
    return lines


def models_table(models: Sequence[MeasuredModel]) -> Table:
    """Make the table of what was asked of each model and what was measured."""
    record = models[0].subject.record
    lost, metric = len(models[0].built.lesson.left_out), record.metric

    def without(model: MeasuredModel) -> float | None:
        return model.subject.record.runs_of()[WHISPER].accuracy

    columns: list[Column[MeasuredModel]] = [
        Column("ε asked for", "times", lambda model: model.built.epsilon),
        Column(f"cosine score of layer {WHISPER}", "times", lambda model: model.score, _NOT_FINITE),
        Column("off by, of itself", "times", lambda model: model.error, _NOT_FINITE),
        Column("lowest other score", "score", lambda model: model.other, _NOT_FINITE),
        Column(metric, "percent", lambda m: m.subject.record.baseline.value, _NOT_FINITE),
        Column(f"{metric} without layer {WHISPER}", "percent", without, _NOT_FINITE),
        Column("layers", "count", lambda model: LAYERS),
        Column("width", "count", lambda model: model.built.width),
        Column("places remembered", "count", lambda model: len(model.built.lesson.wanted)),
    ]
    note = (
        f"{counted(lost, 'document')} of {record.n:,} could not be taught, and counts as it falls"
    )
    title = f"{record.benchmark.title}, {record.documents}"
    return table(title, columns, models, *(note,) if lost else ())


def layers_table(model: MeasuredModel) -> Table:
    """Make the table of what each layer of one model does, and what it seems to be worth."""
    record = model.subject.record
    columns: list[Column[RunRecord]] = [
        Column("layer", "count", lambda run: run.change.layer),
        Column("its job", "text", lambda run: JOBS[run.change.layer]),
        Column("cosine score", "times", lambda run: run.cosine_score, _NOT_FINITE),
        Column(f"{record.metric} without it", "percent", lambda run: run.accuracy, _NOT_FINITE),
    ]
    title = f"{record.benchmark.title}, ε = {tiny(model.built.epsilon)}, layer by layer"
    return table(title, columns, record.runs_of().values())


def tiny(figure: float) -> str:
    """Write a figure of any size, such as `1e−8`."""
    return f"{figure:.3g}".replace("e-0", "e−").replace("e-", "e−").replace("e+0", "e")
