"""Study: build a model in which every answer depends on the layer with the lowest cosine score.

`tracker.models.counterexample` builds the model for the benchmark documents of the experiment file.
The model in the experiment file provides only the tokenizer. The built model is saved as a
transformers checkpoint and measured like any other model.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tracker.benchmarks.benchmark import choose_metric, open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.ledger.files import lock_file, new_folder
from tracker.ledger.outcomes import METRIC_PREFIX
from tracker.models import counterexample
from tracker.models.counterexample import LAYER_COUNT, WHISPER, Continuations, Counterexample, Text
from tracker.models.load import build_for_planning
from tracker.models.sources import find_model
from tracker.schema.changes import INTACT, Ablation
from tracker.schema.config import CellRequest, Changes, ModelSpec
from tracker.schema.documents import Document, Request
from tracker.schema.errors import CellError, RequestError, WorkError
from tracker.schema.grouping import group_by
from tracker.schema.provenance import content_hash, file_hash, package_versions
from tracker.schema.records import RunRecord
from tracker.schema.tables import Column, Table, build_table
from tracker.studies.base import Study, StudyContext, StudyResult, Subject, study_texts
from tracker.studies.registry import TheoremSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAME_ANSWER = (
    "the right answer begins with a wrong answer, so the wrong answer is at least as likely"
)
LONGER_ANSWERS = (
    "every wrong answer begins with the right answer, so the right answer is at least as likely"
)
CLASHING_ANSWERS = "another document has the same text but a different right answer"
NO_GOLD_ANSWER = "the task does not give exactly one right answer"
MAX_POSITIONS = 4096
"""Maximum number of positions of a model; every MLP has two units for each position."""
MAX_SCORE_ERROR = 1e-6
"""Largest relative error of the score of layer 2."""
_ACCURACIES = ("acc", "acc_norm")
_NOT_FINITE = "an output of the model is not finite"

_Position = tuple[counterexample.PrefixDigest, int]
"""Key of a position, and the token that is predicted there."""
_Demand = tuple[counterexample.PrefixDigest, str, int, int]
"""Key of a position, `signed` or `fixed`, a token, and the token's value at the position."""


@dataclass
class Lesson:
    """Tokens that the built model must predict or avoid, with their positions.

    Attributes:
        texts: Token sequences of all documents that the model will read.
        targets: Digest of the preceding tokens → next tokens that the model must predict or avoid.
        certainty: Margin by which a predicted token's logit exceeds all other logits, in nats.
        left_out: (task, index) of a document → reason why no model can answer the document
            correctly, e.g. two equal answers.
        clashing: Number of tokens that the model cannot predict, because an earlier text has
            another token after the same preceding tokens.
        tokens: Number of tokens that are scored, if the benchmark is a text corpus; 0 for
            multiple-choice documents.
    """

    texts: list[Text] = field(default_factory=list)
    targets: dict[counterexample.PrefixDigest, Continuations] = field(default_factory=dict)
    certainty: float = 100.0
    left_out: dict[tuple[str, int], str] = field(default_factory=dict)
    clashing: int = 0
    tokens: int = 0


def plan_lesson(
    documents: Sequence[Document], length: int, vocabulary: int, decode: Callable[..., str]
) -> Lesson:
    """Choose the tokens that the built model must predict or avoid in each document.

    A chosen token has one of three kinds. Positive: only the intact model predicts the token.
    Negative: only the model without layer 2 predicts the token. Fixed: the token's prediction does
    not depend on layer 2.

    If all options of a document follow one context, the chosen tokens are where the right answer
    first differs from a wrong answer. If each option has its own context (as in Winogrande), one
    token is chosen per option.

    The right answer has a positive token, and a wrong answer has a negative token. In a text
    without options, every token is positive.

    Args:
        documents: Documents with their requests.
        length: Maximum context length of the model, in tokens; longer texts are cut as in lm-eval.
        vocabulary: Number of tokens in the vocabulary.
        decode: Function that turns a list of tokens into text.

    Returns:
        The target tokens, and the documents that no model can answer correctly.
    """
    lesson = Lesson()
    occurrences = _count_occurrences(documents, length)
    for document in documents:
        for request in document.requests:
            lesson.texts.append(Text(_read_tokens(request, length), len(request.continuation)))
        if not document.choices:
            _add_all_targets(lesson, document, length)
            continue
        demands = _list_targets(document, length, occurrences)
        if not isinstance(demands, str) and any(_has_clash(lesson, d) for d in demands):
            demands = CLASHING_ANSWERS
        if isinstance(demands, str):
            lesson.left_out[document.task, document.index] = demands
            continue
        for key, kind, token, weight in demands:
            getattr(lesson.targets.setdefault(key, Continuations()), kind)[token] = weight
        lead = _required_margin(document, vocabulary, decode)
        lesson.certainty = max(lesson.certainty, lead)
    return lesson


def _read_tokens(request: Request, length: int) -> tuple[int, ...]:
    """Return the input tokens of a request; truncate long requests on the left as lm-eval does."""
    return (*request.context, *request.continuation)[-(length + 1) :][:-1]


def _token_positions(request: Request, length: int) -> list[_Position]:
    """Return (digest of the preceding tokens, token) for each token of a continuation."""
    tokens = _read_tokens(request, length)
    digests = list(counterexample.prefix_digests(tokens))
    return list(zip(digests[-len(request.continuation) :], request.continuation, strict=True))


def _add_all_targets(lesson: Lesson, document: Document, length: int) -> None:
    """Add all tokens of a document without options to the tokens that the model must predict.

    `lesson.targets` receives the tokens. `lesson.clashing` counts the tokens that the model cannot
    predict, because an earlier text has another token after the same preceding tokens.
    """
    clashing = lesson.clashing
    for request in document.requests:
        for key, token in _token_positions(request, length):
            targets = lesson.targets.setdefault(key, Continuations())
            lesson.tokens += document.rolling
            if not targets.signed:
                targets.signed[token] = 1
            elif token not in targets.signed:
                lesson.clashing += 1
                targets.fixed[token] = -1
    if lesson.clashing > clashing and not document.rolling:
        lesson.left_out[document.task, document.index] = CLASHING_ANSWERS


def _count_occurrences(documents: Sequence[Document], length: int) -> Counter[_Position]:
    """Count the documents that contain each pair (digest of the preceding tokens, token).

    Documents whose options all follow one context are not counted.
    """
    occurrences: Counter[_Position] = Counter()
    for document in documents:
        choices = document.requests[: document.choices]
        if len({request.context for request in choices}) > 1:
            occurrences.update(
                {pair for request in choices for pair in _token_positions(request, length)}
            )
    return occurrences


def _list_targets(
    document: Document, length: int, occurrences: Mapping[_Position, int]
) -> list[_Demand] | str:
    """List the tokens that a model must predict or avoid to answer a document correctly.

    Args:
        document: A multiple-choice document.
        length: Maximum context length of the model, in tokens.
        occurrences: (digest of the preceding tokens, token) → number of documents with this pair.

    Returns:
        The target tokens, or a text with the reason why no model can answer the document correctly.
    """
    if document.gold is None:
        return NO_GOLD_ANSWER
    choices = document.requests[: document.choices]
    gold = choices[document.gold]
    demands: list[_Demand] = []
    partings: list[tuple[int, int]] = []
    right = _token_positions(gold, length)
    for index, choice in enumerate(choices):
        if index == document.gold:
            continue
        wrong = _token_positions(choice, length)
        if right[0][0] != wrong[0][0]:  # contexts of their own
            for pairs, weight in ((right, 1), (wrong, -1)):
                unique = [pair for pair in pairs if occurrences[pair] == 1]
                if not unique:
                    return CLASHING_ANSWERS
                demands.append((unique[0][0], "signed", unique[0][1], weight))
            continue
        n_shared = _count_shared(gold.continuation, choice.continuation)
        if n_shared == len(choice.continuation):
            return SAME_ANSWER
        if n_shared < len(gold.continuation):
            partings.append((n_shared, choice.continuation[n_shared]))
        else:
            key, token = wrong[n_shared]
            demands.append((key, "fixed", token, -1))
    if not partings and not any(kind == "signed" for _, kind, _, _ in demands):
        return LONGER_ANSWERS
    # Where wrong answers first differ from the right answer; only the first place has a sign.
    first = min(partings, default=None)
    kinds = {n: "signed" if first and n == first[0] else "fixed" for n, _ in sorted(partings)}
    demands += [(right[n][0], kind, right[n][1], 1) for n, kind in kinds.items()]
    for n, token in sorted(partings):
        demands.append((right[n][0], kinds[n], token, -1 if (n, token) == first else 0))
    return demands


def _count_shared(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Count the tokens in the common prefix of two answers."""
    return len([*takewhile(lambda pair: pair[0] == pair[1], zip(tokens, others, strict=False))])


def _has_clash(lesson: Lesson, demand: _Demand) -> bool:
    """Return whether a new target contradicts the targets of earlier documents in `lesson`.

    Two targets contradict each other if they require different predictions of one token at one
    position.
    """
    key, kind, token, weight = demand
    targets = lesson.targets.get(key)
    if targets is None:
        return False
    opposite = targets.fixed if kind == "signed" else targets.signed
    return token in opposite or getattr(targets, kind).get(token, weight) != weight


def _required_margin(document: Document, vocabulary: int, decode: Callable[..., str]) -> float:
    """Compute by how much (in nats) the logit of a target token must exceed all other logits.

    With this margin, no other token of an answer can change which answer is most likely.
    """
    choices = [request.continuation for request in document.requests[: document.choices]]
    lengths = [max(1, len(decode(list(tokens)).strip())) for tokens in choices]
    tokens = max(map(len, choices))
    return 2 * (math.log(vocabulary) + 1) * tokens * max(lengths) / min(lengths)


def write_tiny(figure: float) -> str:
    """Format a number of any magnitude with three significant digits, such as `1e−8`."""
    return f"{figure:.3g}".replace("e-0", "e−").replace("e-", "e−").replace("e+0", "e")


THEOREM_TEXTS = study_texts("theorem", tiny=write_tiny)


class Theorem(Study[TheoremSettings]):
    """Study that builds and measures the paper's counterexample model for each benchmark and ε."""

    name = "theorem"
    question = "Can a model fail without the layer that has the lowest cosine score?"
    texts = THEOREM_TEXTS

    def __init__(self, settings: TheoremSettings) -> None:
        super().__init__(settings)
        self.epsilons = tuple(sorted({*settings.epsilon}, reverse=True))
        ends = counterexample.MIN_EPSILON, counterexample.MAX_EPSILON
        for value in self.epsilons:
            if not ends[0] <= value <= ends[1]:
                raise RequestError(THEOREM_TEXTS.render("wrong_epsilon", value, *ends))
        self._lesson = cache(load_lesson)  # it reads benchmarks

    def requests(self, context: StudyContext) -> list[CellRequest]:
        """List the requests that remove each layer of each built model (one per benchmark and ε).

        Raises RequestError if a benchmark generates text, has no accuracy, or has no document that
        the model can learn to answer.
        """
        super().requests(context)
        return [model.request for models in self._models(context) for model in models]

    def prepare(self, context: StudyContext) -> None:
        """Build and save the counterexample models that are not saved yet."""
        for models in self._models(context):
            cell = models[0].cell
            context.progress.say(f"building for {cell.benchmark}")
            lesson, shape, tokenizer = self._lesson(cell, context.options.trust_remote_code)
            built: Counterexample | None = None
            for model in models:
                with lock_file(model.folder.parent / "locks" / model.folder.name):
                    if not (model.folder / "config.json").is_file():
                        built = built or _build_counterexample(cell, lesson, shape)
                        _save_model(built.set_epsilon(model.epsilon), tokenizer, model.folder)

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Check whether the measurements of each built model confirm the paper's theorem."""
        result = StudyResult()
        built = {model.request: model for models in self._models(context) for model in models}
        measured = [MeasuredModel(built[subject.request], subject) for subject in subjects]
        for models in group_by(measured, lambda model: model.built.cell).values():
            # A model that does not confirm the theorem, or else the model of the smallest ε.
            model = next((model for model in models if not model.holds), models[-1])
            result.add(*THEOREM_TEXTS.render_all("answer", model, LAYER_COUNT, WHISPER))
            result.add(_models_table(models), _layers_table(models[-1]))
            lesson, title = model.built.lesson, model.subject.record.benchmark.title
            groups = group_by(lesson.left_out, lesson.left_out.__getitem__)
            result.lacking += THEOREM_TEXTS.render_all("left_out", model, title, lesson, groups)
        return result

    def _models(self, context: StudyContext) -> list[list[BuiltModel]]:
        """Describe the models to build: for each benchmark, a list with one model for each ε."""
        root = context.ledger.root / "studies" / self.name
        models = []
        for cell in dict.fromkeys(map(_documents_request, context.experiment.cells())):
            lesson, shape, _ = self._lesson(cell, context.options.trust_remote_code)
            name = re.sub(r"[^a-zA-Z0-9_-]+", "_", str(cell.benchmark))
            digest = _fingerprint(cell, lesson, shape)[:8]
            folders = {e: root / f"theorem-{name}-{e:g}-{digest}" for e in self.epsilons}
            models.append([BuiltModel(cell, e, folder, lesson) for e, folder in folders.items()])
        return models


def _documents_request(cell: CellRequest) -> CellRequest:
    """Return a copy of a request with default values for the dtype and the ablations."""
    model = cell.model.model_copy(update={"dtype": "auto"})
    return replace(cell, model=model, removed=(), changes=Changes(layers=(0,)))


# The models


def load_lesson(cell: CellRequest, trust_remote_code: bool) -> tuple[Lesson, tuple[int, int], Any]:
    """Read a benchmark, and choose the tokens that the built model must predict or avoid.

    Returns the chosen tokens, the pair (vocabulary size, context length), and the tokenizer.
    RequestError is raised if the study does not support the benchmark.
    """
    benchmark = open_benchmark(cell)
    metric = choose_metric(benchmark.identity, cell.metric)
    if metric not in _ACCURACIES:
        raise RequestError(THEOREM_TEXTS.render("no_accuracy", cell, metric, _ACCURACIES))
    source = find_model(cell.model, trust_remote_code)
    model, tokenizer = build_for_planning(source, "float32")
    length = RequestEncoder(model, tokenizer).max_length
    vocabulary = max(model.config.get_text_config().vocab_size, len(tokenizer))
    # lm-eval treats the tokenizers of some families in a way of their own, and ours is a Llama.
    llama = counterexample.build_empty_llama(vocabulary, length)
    encoder = RequestEncoder(llama, tokenizer, cell.benchmark)
    documents = benchmark.documents(encoder, cell.extent)
    if any(document.prompt is not None for document in documents):
        raise RequestError(THEOREM_TEXTS.render("generates", cell))
    lesson = plan_lesson(documents, length, vocabulary, tokenizer.decode)
    count = len(lesson.targets)
    if not count:
        reasons = lesson.left_out.values()
        raise RequestError(THEOREM_TEXTS.render("nothing_taught", cell, len(documents), reasons))
    if count > MAX_POSITIONS:
        raise RequestError(THEOREM_TEXTS.render("too_many", cell, count, MAX_POSITIONS))
    return lesson, (vocabulary, length), tokenizer


def _fingerprint(cell: CellRequest, lesson: Lesson, shape: tuple[int, int]) -> str:
    """Return a hash of everything that determines the weights of a built model."""
    targets = [(key.hex(), tokens.signed, tokens.fixed) for key, tokens in lesson.targets.items()]
    code = file_hash([Path(str(counterexample.__file__))])
    tokenizer = find_model(cell.model).fingerprint()
    texts = content_hash([text.tokens for text in lesson.texts])
    versions = package_versions()
    versions = {name: versions[name] for name in ("torch", "transformers")}
    return content_hash([targets, texts, lesson.certainty, shape, code, tokenizer, versions])


def _build_counterexample(
    cell: CellRequest, lesson: Lesson, shape: tuple[int, int]
) -> Counterexample:
    """Build the model that predicts the target tokens in `lesson`.

    `shape` is the pair (vocabulary size, context length). RequestError is raised if the model
    cannot be built.
    """
    try:
        return Counterexample(lesson.texts, lesson.targets, lesson.certainty, *shape)
    except CellError as error:
        raise RequestError(f"{cell.title}: {error}; set a smaller 'limit' or 'sample'") from None


def _save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a checkpoint atomically, so that a crash leaves no incomplete checkpoint."""
    try:
        with new_folder(folder) as temporary:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except OSError as error:
        raise WorkError(f"{folder} cannot be written: {error.strerror or error}") from None


# Figures


@dataclass(frozen=True)
class BuiltModel:
    """Model built for one benchmark and ε; `folder` contains the saved checkpoint."""

    cell: CellRequest
    epsilon: float
    folder: Path
    lesson: Lesson

    @property
    def request(self) -> CellRequest:
        """The request that measures the removal of each layer of the model."""
        model = ModelSpec(model=str(self.folder), dtype="float32")
        return replace(self.cell, model=model, changes=Changes(layers=tuple(range(LAYER_COUNT))))

    @property
    def width(self) -> int:
        """The size of the model's hidden states."""
        return int(json.loads((self.folder / "config.json").read_text())["hidden_size"])


@dataclass
class MeasuredModel:
    """Measured accuracy and cosine scores of a built model.

    `units` is the number of documents (in a text corpus: tokens) that the model was built to
    answer. `right` is the number of correct answers of the intact model. `without` is the number of
    correct answers without layer 2. `score` is the cosine score of layer 2, and `other` is the
    lowest cosine score of the other layers.
    """

    built: BuiltModel
    subject: Subject

    def __post_init__(self) -> None:
        """Set all attributes from the measured answers and cosine scores."""
        subject, record, lesson = self.subject, self.subject.record, self.built.lesson
        cosines = [run.cosine_score for run in record.runs_of_kind().values()]
        scores = [math.nan if score is None else score for score in cosines]
        self.score, self.other = scores.pop(WHISPER), min(scores)
        frame = subject.store.read_documents(subject.request.extent)
        documents = zip(frame["task"], frame["doc"], strict=True)
        frame = frame[[document not in lesson.left_out for document in documents]]
        groups = frame.groupby("ablation")[f"{METRIC_PREFIX}{record.metric}"]
        counts = {name: np.sum([*map(_count_answers, values)], axis=0) for name, values in groups}
        self.right, self.units = map(int, counts[INTACT.name])
        self.without = int(counts[Ablation.from_changes(removed=(WHISPER,)).name][0])
        self.units -= lesson.clashing if lesson.tokens else 0

    @property
    def error(self) -> float:
        """Relative error of layer 2's measured cosine score, compared with ε."""
        return abs(self.score / self.built.epsilon - 1)

    @property
    def holds(self) -> bool:
        """True if the measurements confirm the theorem.

        The theorem: layer 2 has the lowest cosine score, about ε, and every answer depends on layer
        2.
        """
        decides = self.right == self.units > 0 == self.without
        return decides and self.score < self.other and self.error <= MAX_SCORE_ERROR


def _count_answers(value: float | str) -> tuple[int, int]:
    """Return how many answers of a document are right, and how many answers the document has.

    A multiple-choice document has one answer, and `value` is its accuracy (0 or 1). In a text
    corpus, every token is an answer, and `value` is the JSON text `[right, all]`.
    """
    if isinstance(value, str):
        right, units = json.loads(value)
        return int(right), int(units)
    return int(value == 1), 1


# Tables


def _models_table(models: Sequence[MeasuredModel]) -> Table:
    """Build the table with one row for each ε: measured cosine scores and accuracies."""
    record = models[0].subject.record
    lost, metric = len(models[0].built.lesson.left_out), record.metric

    def without(model: MeasuredModel) -> float | None:
        return model.subject.record.runs_of_kind()[WHISPER].accuracy

    columns: list[Column[MeasuredModel]] = [
        Column("ε asked for", "times", lambda model: model.built.epsilon),
        Column(f"cosine score of layer {WHISPER}", "times", lambda model: model.score, _NOT_FINITE),
        Column("off by, of itself", "times", lambda model: model.error, _NOT_FINITE),
        Column("lowest other score", "score", lambda model: model.other, _NOT_FINITE),
        Column(metric, "percent", lambda m: m.subject.record.baseline.value, _NOT_FINITE),
        Column(f"{metric} without layer {WHISPER}", "percent", without, _NOT_FINITE),
        Column("layers", "count", lambda model: LAYER_COUNT),
        Column("width", "count", lambda model: model.built.width),
        Column("places remembered", "count", lambda model: len(model.built.lesson.targets)),
    ]
    title = f"{record.benchmark.title}, {record.documents_text}"
    notes = THEOREM_TEXTS.render_all("model_notes", lost, record.n)
    return build_table(title, columns, models, *notes)


def _layers_table(model: MeasuredModel) -> Table:
    """Build the table of each layer's role, cosine score, and accuracy without the layer."""
    record = model.subject.record
    columns: list[Column[RunRecord]] = [
        Column("layer", "count", lambda run: run.change.layer),
        Column("its job", "text", lambda run: counterexample.LAYER_ROLES[run.change.layer]),
        Column("cosine score", "times", lambda run: run.cosine_score, _NOT_FINITE),
        Column(f"{record.metric} without it", "percent", lambda run: run.accuracy, _NOT_FINITE),
    ]
    title = f"{record.benchmark.title}, ε = {write_tiny(model.built.epsilon)}, layer by layer"
    return build_table(title, columns, record.runs_of_kind().values())
