"""The paper's theorem: a layer that cosine calls the least important may decide every answer.

The model is built by `tracker.models.counterexample`, for the documents of the file's benchmarks;
of the file's model it takes the tokenizer alone. It is saved as any checkpoint of transformers, and
measured as any model is.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracker.ablations import INTACT, ablate
from tracker.benchmarks.benchmark import chosen_metric, open_benchmark
from tracker.benchmarks.encoder import RequestEncoder
from tracker.config import CellRequest
from tracker.errors import CellError, RequestError, WorkError
from tracker.findings import Entry, FoundTable, Heading, Unit
from tracker.ledger.files import lock_file
from tracker.ledger.outcomes import METRIC
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
from tracker.provenance import content_hash, file_hash, package_versions
from tracker.reporting.formats import counted
from tracker.studies.base import Asked, Said, Subject
from tracker.studies.lessons import Lesson, lesson

EPSILONS = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8)
MOST = 4096
"""Places that a model remembers at most: its MLPs have two units for each, in every layer."""
_NOT_FINITE = "a figure of the model is not finite"
_ACCURACIES = ("acc", "acc_norm")


@dataclass(frozen=True)
class _Built:
    """What is known of a built model beside what is measured."""

    cell: CellRequest
    epsilon: float
    width: int
    lesson: Lesson


@dataclass(frozen=True)
class _Shown:
    """What a built model was measured to be.

    `right` and `without` are how many of the `units` (documents; of a corpus tokens) that can be
    taught it answers, with and without layer 2.
    """

    built: _Built
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
        """Whether the theorem's model is this one."""
        return self.score < self.other and self.right == self.units > 0 == self.without


class Theorem:
    """Builds the transformer of the theorem for each benchmark and ε, and measures it.

    Args:
        epsilon: The cosine scores that the deciding layer is given.
    """

    name = "theorem"
    question = "Can the layer with the lowest cosine score decide every answer?"

    def __init__(self, epsilon: Sequence[float] = EPSILONS) -> None:
        self._epsilons = tuple(sorted(set(epsilon), reverse=True)) or EPSILONS
        for each in self._epsilons:
            if not SMALLEST <= each <= LARGEST:
                raise RequestError(
                    f"--epsilon {each:g}: the theorem is shown for ε from {SMALLEST:g} (below, the "
                    f"results' float64 does not hold it to 1e-6) to {LARGEST:g} (above, other "
                    "layers' scores would be lower); for example --epsilon 1e-6"
                )
        self._built: dict[CellRequest, _Built] = {}

    def requests(self, asked: Asked) -> list[CellRequest]:
        """Build a model for each benchmark and ε, and ask for each of its layers.

        RequestError where a benchmark generates text or has no accuracy, or nothing of it can be
        taught.
        """
        cells = []
        for cell in dict.fromkeys(map(_of_documents, asked.experiment.cells())):
            asked.progress.say(f"building for {cell.benchmark}")
            cells += self._of_one(cell, asked)
        return cells

    def say(self, asked: Asked, subjects: list[Subject]) -> Said:
        """Set what was asked of each model beside what was measured of it."""
        by_benchmark: dict[CellRequest, list[_Shown]] = {}
        for subject in subjects:
            shown = _measured(subject, self._built[subject.request])
            by_benchmark.setdefault(shown.built.cell, []).append(shown)
        each = list(by_benchmark.values())
        return Said(
            answers=[line for shown in each for line in _answers(shown)],
            tables=[table for shown in each for table in (_table(shown), _layers(shown[-1]))],
            lacking=[line for shown in each for line in _left_out(shown[0])],
            assumptions=(
                "the model is built, not trained: it shows what a cosine score cannot promise, not "
                "what trained models do",
            ),
        )

    def _of_one(self, cell: CellRequest, asked: Asked) -> list[CellRequest]:
        """Build the models of one benchmark, or find them built."""
        taught, shape, tokenizer = _taught(cell, asked.options.trust_remote_code)
        root = asked.ledger.root / "studies" / self.name
        known = _fingerprint(cell, taught, shape)[:8]
        built: Counterexample | None = None
        requests = []
        for epsilon in self._epsilons:
            name = f"{re.sub(r'[^a-zA-Z0-9_-]+', '_', cell.benchmark)}-{epsilon:g}-{known}"
            folder = root / f"theorem-{name}"
            with lock_file(root / "locks" / name):
                if not (folder / "config.json").is_file():
                    built = built or _build(cell, taught, shape)
                    _save(built.whispering(epsilon), tokenizer, folder)
            model = {"model": str(folder), "revision": None, "model_args": None}
            request = cell.model_copy(
                update={**model, "dtype": "float32", "layers": tuple(range(LAYERS))}
            )
            width = json.loads((folder / "config.json").read_text())["hidden_size"]
            self._built[request] = _Built(cell, epsilon, width, taught)
            requests.append(request)
        return requests


def _of_documents(cell: CellRequest) -> CellRequest:
    """What of a cell says which documents, and how they are tokenised."""
    runs = ("components", "spans", "interventions", "only", "removed", "dtype")
    plain = {name: CellRequest.model_fields[name].default for name in runs}
    return cell.model_copy(update={**plain, "layers": (0,)})


def _taught(cell: CellRequest, trust_remote_code: bool) -> tuple[Lesson, tuple[int, int], Any]:
    """Find out what to teach for a benchmark: the lesson, (vocabulary, length), the tokenizer."""
    benchmark = open_benchmark(cell)
    metric = chosen_metric(benchmark.identity, cell.metric)
    if metric not in _ACCURACIES:
        raise RequestError(
            f"{cell.title}: the theorem is about accuracy, and {metric} is none; it takes a "
            f"benchmark with {' or '.join(_ACCURACIES)}, such as arc_easy"
        )
    source = find_model(cell.model, cell.revision, cell.model_args)
    model, tokenizer = weightless(source, "float32", trust_remote_code)
    length = RequestEncoder(model, tokenizer).max_length
    vocabulary = max(model.config.get_text_config().vocab_size, len(tokenizer))
    # lm-eval treats the tokenizers of some families in a way of their own, and ours is a Llama.
    encoder = RequestEncoder(hollow(vocabulary, length), tokenizer, cell)
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
    if len(taught.wanted) > MOST:
        raise RequestError(
            f"{cell.title}: {len(taught.wanted):,} places would have to be remembered, and a model "
            f"is built for {MOST:,}; ask for fewer documents (limit, sample) or shorter texts "
            f"({cell.benchmark}:TOKENS)"
        )
    return taught, (vocabulary, length), tokenizer


def _fingerprint(cell: CellRequest, taught: Lesson, shape: tuple[int, int]) -> str:
    """What a built model follows from."""
    memory = [(place.hex(), each.signed, each.fixed) for place, each in taught.wanted.items()]
    code = file_hash([Path(__file__).parents[1] / "models" / "counterexample.py"])
    tokenizer = find_model(cell.model, cell.revision, cell.model_args).fingerprint()
    texts = content_hash([text.tokens for text in taught.texts])
    versions = package_versions()
    versions = {name: versions[name] for name in ("torch", "transformers")}
    return content_hash([memory, texts, taught.certainty, shape, code, tokenizer, versions])


def _build(cell: CellRequest, taught: Lesson, shape: tuple[int, int]) -> Counterexample:
    try:
        return Counterexample(taught.texts, taught.wanted, taught.certainty, *shape)
    except CellError as error:
        raise RequestError(
            f"{cell.title}: {error}; ask for fewer documents (limit, sample)"
        ) from None


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save a checkpoint so that it is there as a whole, or not at all."""
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(folder)
    except OSError as error:
        raise WorkError(f"{folder} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _measured(subject: Subject, built: _Built) -> _Shown:
    """Count what a built model answers, and find its layers' cosine scores."""
    scores = {
        layer: float("nan") if run.cosine_score is None else run.cosine_score
        for layer, run in subject.record.runs_of().items()
    }
    column = f"{METRIC}{subject.record.metric}"
    frame = subject.outcomes()
    taught = [
        place not in built.lesson.left_out
        for place in zip(frame["task"], frame["doc"], strict=True)
    ]
    values = frame[taught].groupby("ablation")[column]
    counts = {name: [_pair(value) for value in each] for name, each in values}
    of = counts[INTACT.name]
    return _Shown(
        built,
        subject,
        score=scores.pop(WHISPER),
        other=min(scores.values()),
        right=sum(right for right, _ in of),
        without=sum(right for right, _ in counts[ablate("layer", (WHISPER,)).name]),
        units=sum(units for _, units in of) - (built.lesson.clashing if _is_open(built) else 0),
    )


def _pair(value: float | str) -> tuple[int, int]:
    """A document's right answers and how many there are; of a corpus its tokens."""
    if isinstance(value, str):
        right, units = json.loads(value)
        return int(right), int(units)
    return int(value == 1), 1


def _is_open(built: _Built) -> bool:
    """Whether tokens are counted and not documents."""
    return built.lesson.tokens > 0


def _answers(shown: Sequence[_Shown]) -> list[str]:
    """Say for one benchmark whether the theorem holds, at the smallest ε first."""
    last = shown[-1]
    name = last.subject.record.benchmark.name
    noun = "token" if _is_open(last.built) else "document"
    failed = [each for each in shown if not each.holds]
    if failed:
        one = failed[0]
        return [
            f"The model built for {name} and ε = {_tiny(one.built.epsilon)} does not show it: it "
            f"answers {one.right:,} of {counted(one.units, noun)}, {one.without:,} without layer "
            f"{WHISPER}, whose cosine score is {_tiny(one.score)}; the lowest other is "
            f"{_tiny(one.other)}."
        ]
    everything = f"all {counted(last.units, noun)}" if last.units > 1 else f"the one {noun}"
    that = " that can be" if last.built.lesson.left_out or last.built.lesson.clashing else ""
    worst = max(shown, key=lambda each: each.error)
    lines = [
        f"A model of {LAYERS} layers answers {everything}{that} of {name}; its layer {WHISPER} has "
        f"the cosine score {_tiny(last.score)}, the lowest: any other is more than "
        f"{_tiny(math.floor(last.other / last.score))} times as high. Without it not one {noun} is "
        "answered."
    ]
    if len(shown) > 1:
        lines.append(
            f"{name}: so it is for each of {len(shown)} ε from {_tiny(shown[0].built.epsilon)} to "
            f"{_tiny(last.built.epsilon)}; the score of layer {WHISPER} is ε but for "
            f"{_tiny(worst.error)} of itself."
        )
    return lines


def _tiny(figure: float) -> str:
    return f"{figure:.3g}".replace("e-0", "e−").replace("e-", "e−").replace("e+0", "e")


def _table(shown: Sequence[_Shown]) -> FoundTable:
    record = shown[0].subject.record
    lost = len(shown[0].built.lesson.left_out)
    heads: tuple[tuple[str, Unit], ...] = (
        ("ε asked for", "times"),
        (f"cosine score of layer {WHISPER}", "times"),
        ("off by, of itself", "times"),
        ("lowest other score", "score"),
        (f"{record.metric}", "percent"),
        (f"{record.metric} without layer {WHISPER}", "percent"),
        ("layers", "count"),
        ("width", "count"),
        ("places remembered", "count"),
    )
    rows = []
    for each in shown:
        accuracy = each.subject.record.baseline_accuracy
        without = each.subject.record.runs_of()[WHISPER].accuracy
        figures = (
            each.built.epsilon,
            each.score,
            each.error,
            each.other,
            accuracy,
            without,
            LAYERS,
            each.built.width,
            len(each.built.lesson.wanted),
        )
        rows.append(
            tuple(Entry(value=f, reason="" if f is not None else _NOT_FINITE) for f in figures)
        )
    note = (
        f"{counted(lost, 'document')} of {record.n:,} could not be taught, and counts as it falls"
        if lost
        else ""
    )
    return FoundTable(
        title=f"{record.benchmark.name}, {record.documents}",
        headings=tuple(Heading(label=label, unit=unit) for label, unit in heads),
        rows=tuple(rows),
        notes=(note,) if note else (),
    )


def _layers(shown: _Shown) -> FoundTable:
    """What each layer of one model does, and what it seems to be worth."""
    record = shown.subject.record
    heads: tuple[tuple[str, Unit], ...] = (
        ("layer", "count"),
        ("its job", "text"),
        ("cosine score", "times"),
        (f"{record.metric} without it", "percent"),
    )
    rows = []
    for layer, run in record.runs_of().items():
        figures = (layer, JOBS[layer], run.cosine_score, run.accuracy)
        rows.append(
            tuple(Entry(value=f, reason="" if f is not None else _NOT_FINITE) for f in figures)
        )
    return FoundTable(
        title=f"{record.benchmark.name}, ε = {_tiny(shown.built.epsilon)}, layer by layer",
        headings=tuple(Heading(label=label, unit=unit) for label, unit in heads),
        rows=tuple(rows),
    )


def _left_out(shown: _Shown) -> list[str]:
    """Say which documents no such model answers, and why."""
    taught = shown.built.lesson
    name = shown.subject.record.benchmark.name
    by_reason: dict[str, list[str]] = {}
    for (task, doc), why in taught.left_out.items():
        by_reason.setdefault(why, []).append(f"{doc}" if task == name else f"{doc} of {task}")
    lines = [
        f"{name}: {counted(len(docs), 'document')} ({', '.join(docs[:5])}"
        f"{', …' if len(docs) > 5 else ''}) cannot be taught: {why}"
        for why, docs in by_reason.items()
    ]
    if taught.clashing and _is_open(shown.built):
        lines.append(
            f"{name}: {counted(taught.clashing, 'token')} of {taught.tokens:,} cannot be taught: "
            "another text continues otherwise after the same beginning"
        )
    return lines
