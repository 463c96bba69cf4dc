"""The paper's theorem: a layer that cosine calls the least important may decide every answer.

The model is built by `tracker.models.counterexample`, for the documents of the file's benchmarks;
of the file's model it takes the tokenizer alone. It is saved as any checkpoint of transformers, and
measured as any model is.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tracker.benchmarks.benchmark import chosen_metric, open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.core.changes import INTACT, Ablation
from tracker.core.config import CellRequest, Changes, ModelSpec
from tracker.core.documents import Document, Request
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
    Place,
    Text,
    Wanted,
    hollow,
    places,
)
from tracker.models.load import weightless
from tracker.models.sources import find_model
from tracker.studies.base import Study, StudyContext, StudyResult, Subject, study_texts
from tracker.studies.registry import TheoremSettings

SAME = "a wrong answer is the right one, or its beginning: no language model finds it less likely"
LONGER = (
    "each wrong answer only continues the right one: no language model finds the right one less "
    "likely"
)
CLASH = "another document with the same text wants another answer"
NO_GOLD = "the task names no answer, or several, as the right one"

_Demand = tuple[Place, str, int, int]
"""Key of a position, `signed` or `fixed`, a token, and its value at the position."""


@dataclass
class Lesson:
    """Tokens to teach for some documents, and their positions.

    Attributes:
        texts: All texts that will be read.
        wanted: Tokens that must follow, at the deciding positions.
        certainty: Lead of a token in nats, large enough that no length of an answer outweighs it.
        left_out: (task, index) → reason why a document cannot be taught.
        clashing: Number of tokens of open texts where another text continues differently.
        tokens: Number of tokens of texts that are scored token by token; 0 for other documents.
    """

    texts: list[Text] = field(default_factory=list)
    wanted: dict[Place, Wanted] = field(default_factory=dict)
    certainty: float = 100.0
    left_out: dict[tuple[str, int], str] = field(default_factory=dict)
    clashing: int = 0
    tokens: int = 0


def lesson(
    documents: Sequence[Document], length: int, vocabulary: int, decode: Callable[..., str]
) -> Lesson:
    """Choose the tokens to teach.

    For choices that follow one context, the first token in which the right answer differs from a
    wrong one is taught under a sign, together with the token of the wrong answer. If further wrong
    answers differ only later, the right answer's token there is taught for certain.

    If each choice has a context of its own (Winogrande), a token is taught under a sign, after the
    right context and against the wrong ones. It is the first token that no other document has
    there, because such documents come in pairs. For open texts every token is taught.

    Args:
        documents: Documents with their requests.
        length: Maximum number of tokens of the model's context; longer texts are cut as in lm-eval.
        vocabulary: Number of tokens of the vocabulary.
        decode: Function that turns a list of tokens into text.

    Returns:
        The lesson.
    """
    found = Lesson()
    owners = _owners(documents, length)
    for document in documents:
        for request in document.requests:
            found.texts.append(Text(_read(request, length), len(request.continuation)))
        if not document.choices:
            _learn_all(found, document, length)
            continue
        demands = _demands(document, length, owners)
        if not isinstance(demands, str) and any(_clashes(found, each) for each in demands):
            demands = CLASH
        if isinstance(demands, str):
            found.left_out[document.task, document.index] = demands
            continue
        for place, kind, token, worth in demands:
            getattr(found.wanted.setdefault(place, Wanted()), kind)[token] = worth
        needed = _certainty(document, vocabulary, decode)
        found.certainty = max(found.certainty, needed)
    return found


def _read(request: Request, length: int) -> tuple[int, ...]:
    """Return the tokens of a request that the model reads, cut from the left."""
    return (*request.context, *request.continuation)[-(length + 1) :][:-1]


def _predicted(request: Request, length: int) -> list[tuple[Place, int]]:
    """Return the position that predicts each token of a continuation, and the token, in order."""
    tokens = _read(request, length)
    scored = list(places(tokens))[len(tokens) - len(request.continuation) :]
    return list(zip(scored, request.continuation, strict=True))


def _learn_all(found: Lesson, document: Document, length: int) -> None:
    """Teach every token of open texts; the first text with a position decides its next token."""
    before = found.clashing
    for request in document.requests:
        for place, token in _predicted(request, length):
            known = found.wanted.setdefault(place, Wanted())
            found.tokens += document.rolling
            if not known.signed:
                known.signed[token] = 1
            elif token not in known.signed:
                found.clashing += 1
                known.fixed[token] = -1
    if found.clashing > before and not document.rolling:
        found.left_out[document.task, document.index] = CLASH


def _owners(documents: Sequence[Document], length: int) -> Counter[tuple[Place, int]]:
    """Count the documents with a token at a position, where choices have contexts of their own.

    Returns the number of documents for each (position, token).
    """
    owners: Counter[tuple[Place, int]] = Counter()
    for document in documents:
        choices = document.requests[: document.choices]
        if len({request.context for request in choices}) > 1:
            owners.update({pair for request in choices for pair in _predicted(request, length)})
    return owners


def _demands(
    document: Document, length: int, owners: Mapping[tuple[Place, int], int]
) -> list[_Demand] | str:
    """Return the demands of one document with choices, or why it cannot be taught."""
    if document.gold is None:
        return NO_GOLD
    choices = document.requests[: document.choices]
    gold = choices[document.gold]
    demands: list[_Demand] = []
    partings: list[tuple[int, int]] = []
    here = _predicted(gold, length)
    for number, wrong in enumerate(choices):
        if number == document.gold:
            continue
        there = _predicted(wrong, length)
        if here[0][0] != there[0][0]:  # contexts of their own
            for predicted, worth in ((here, 1), (there, -1)):
                own = [pair for pair in predicted if owners[pair] == 1]
                if not own:
                    return CLASH
                place, token = own[0]
                demands.append((place, "signed", token, worth))
            continue
        part = _parting(gold.continuation, wrong.continuation)
        if part == len(wrong.continuation):
            return SAME
        if part < len(gold.continuation):
            partings.append((part, wrong.continuation[part]))
        else:
            place, token = there[part]
            demands.append((place, "fixed", token, -1))
    if not partings and not any(kind == "signed" for _, kind, _, _ in demands):
        return LONGER
    if partings:
        demands += _at_partings(here, sorted(partings))
    return demands


def _at_partings(
    here: Sequence[tuple[Place, int]], partings: Sequence[tuple[int, int]]
) -> Iterator[_Demand]:
    """Yield demands where a wrong answer first differs from the right one; the first is signed."""
    first = partings[0][0]
    for part in dict.fromkeys(part for part, _ in partings):
        place, token = here[part]
        yield place, "signed" if part == first else "fixed", token, 1
    for part, token in partings:
        kind = "signed" if part == first else "fixed"
        yield here[part][0], kind, token, -1 if (part, token) == partings[0] else 0


def _parting(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that two answers share at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))


def _clashes(found: Lesson, demand: _Demand) -> bool:
    """Check whether earlier documents want something else of a token at a place."""
    place, kind, token, worth = demand
    known = found.wanted.get(place)
    if known is None:
        return False
    other = known.fixed if kind == "signed" else known.signed
    return token in other or getattr(known, kind).get(token, worth) != worth


def _certainty(document: Document, vocabulary: int, decode: Callable[..., str]) -> float:
    """Return the nats that outweigh all other tokens of two answers, also divided by lengths.

    Where nothing is taught, the tokens of the vocabulary are equally likely within a nat.
    """
    choices = [request.continuation for request in document.requests[: document.choices]]
    lengths = [max(1, len(decode(list(tokens)).strip())) for tokens in choices]
    tokens = max(map(len, choices))
    return 2 * (math.log(vocabulary) + 1) * tokens * max(lengths) / min(lengths)


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_PLACES = 4096
"""Places that a model remembers at most: its MLPs have two units for each, in every layer."""
TOLERANCE = 1e-6
"""Largest relative error of the score of layer 2."""
_ACCURACIES = ("acc", "acc_norm")
_NOT_FINITE = "a figure of the model is not finite"


def tiny(figure: float) -> str:
    """Write a figure of any size, such as `1e−8`."""
    return f"{figure:.3g}".replace("e-0", "e−").replace("e-", "e−").replace("e+0", "e")


TEXTS = study_texts("theorem", tiny=tiny)


class Theorem(Study[TheoremSettings]):
    """Builds the transformer of the theorem for each benchmark and ε, and measures it."""

    name = "theorem"
    question = "Can the layer with the lowest cosine score decide every answer?"
    texts = TEXTS

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
        """Compare the specification of each model with its measurements."""
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
    """Return the parts of a cell that determine its documents and their tokenisation."""
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
    source = find_model(cell.model, trust_remote_code)
    model, tokenizer = weightless(source, "float32")
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
    """Build the model of a lesson; RequestError if no model can distinguish its positions."""
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
    """A model for some documents and an ε; `folder` is its location."""

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
        """The relative error of the score."""
        return abs(self.score / self.built.epsilon - 1)

    @property
    def holds(self) -> bool:
        """True where it shows the theorem."""
        decides = self.right == self.units > 0 == self.without
        return decides and self.score < self.other and self.error <= TOLERANCE


def measure(subject: Subject, built: BuiltModel) -> MeasuredModel:
    """Count a built model's right answers, and compute its layers' cosine scores."""
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
    failed = [model for model in shown if not model.holds]
    return TEXTS.all("answer", (failed or shown[-1:])[0], LAYERS, WHISPER)


def _left_out(shown: MeasuredModel) -> list[str]:
    """Return which documents no such model answers, and why."""
    taught = shown.built.lesson
    groups = grouped(taught.left_out, taught.left_out.__getitem__)
    return TEXTS.all("left_out", shown, shown.subject.record.benchmark.title, taught, groups)


def models_table(models: Sequence[MeasuredModel]) -> Table:
    """Build the table of the specification and the measurements of each model."""
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
    title = f"{record.benchmark.title}, {record.documents}"
    return table(title, columns, models, *TEXTS.all("model_notes", lost, record.n))


def layers_table(model: MeasuredModel) -> Table:
    """Build the table of the function and the apparent relevance of each layer of one model."""
    record = model.subject.record
    columns: list[Column[RunRecord]] = [
        Column("layer", "count", lambda run: run.change.layer),
        Column("its job", "text", lambda run: JOBS[run.change.layer]),
        Column("cosine score", "times", lambda run: run.cosine_score, _NOT_FINITE),
        Column(f"{record.metric} without it", "percent", lambda run: run.accuracy, _NOT_FINITE),
    ]
    title = f"{record.benchmark.title}, ε = {tiny(model.built.epsilon)}, layer by layer"
    return table(title, columns, record.runs_of().values())
