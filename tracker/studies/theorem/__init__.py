"""The paper's theorem: a layer that cosine calls the least important may decide every answer.

The model is built by `tracker.models.counterexample`, for the documents of the file's benchmarks;
of the file's model it takes the tokenizer alone. It is saved as any checkpoint of transformers, and
measured as any model is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache

from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.formats import counted
from tracker.ledger.files import lock_file
from tracker.models.counterexample import LARGEST, LAYERS, SMALLEST, WHISPER, Counterexample
from tracker.studies.base import Study, StudyContext, StudyResult, StudySetting, Subject, grouped
from tracker.studies.theorem.building import build, fingerprint, save, taught_by
from tracker.studies.theorem.figures import Built, Shown, measured
from tracker.studies.theorem.tables import layers_table, models_table, tiny

EPSILONS = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8)


class Theorem(Study):
    """Builds the transformer of the theorem for each benchmark and ε, and measures it.

    Args:
        epsilon: The cosine scores that the deciding layer is given.
    """

    name = "theorem"
    question = "Can the layer with the lowest cosine score decide every answer?"
    about = """
    The paper proves that it can; this study builds the model that shows it. For the documents of
    EXPERIMENT's benchmarks and each ε, a transformer of five layers is written down (the file's
    model gives the tokenizer alone) and measured as any model is: layer 2 has the cosine score ε,
    the lowest; the model answers every document, and none without layer 2. The checkpoints stay in
    the results folder, in studies/theorem, for transformers or lm_eval.

    \b
    Examples:
      tracker study theorem experiments/demo.yaml
      tracker study theorem experiments/demo.yaml --epsilon 1e-3 --epsilon 1e-8
    """
    settings = (
        StudySetting(
            "epsilon",
            float,
            "Cosine score of the deciding layer; may be given again. Default: 1e-1, 1e-2, 1e-4, "
            "1e-6 and 1e-8.",
            repeated=True,
        ),
    )

    def __init__(self, epsilon: Sequence[float] = EPSILONS) -> None:
        self._epsilons = tuple(sorted(set(epsilon), reverse=True)) or EPSILONS
        for each in self._epsilons:
            if not SMALLEST <= each <= LARGEST:
                raise RequestError(
                    f"--epsilon {each:g}: the theorem is shown for ε from {SMALLEST:g} (below, the "
                    f"results' float64 does not hold it to 1e-6) to {LARGEST:g} (above, other "
                    "layers' scores would be lower); for example --epsilon 1e-6"
                )
        self._taught_by = cache(taught_by)  # it reads benchmarks

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """Ask for each layer of the model of each benchmark and ε.

        RequestError where a benchmark generates text or has no accuracy, or nothing of it can be
        taught.
        """
        return [one.request for cell in _cells(asked) for one in self._models(cell, asked)]

    def prepare(self, asked: StudyContext) -> None:
        """Build and save the models that are not there."""
        for cell in _cells(asked):
            asked.progress.say(f"building for {cell.benchmark}")
            taught, shape, tokenizer = self._taught_by(cell, asked.options.trust_remote_code)
            built: Counterexample | None = None
            for one in self._models(cell, asked):
                with lock_file(one.folder.parent / "locks" / one.folder.name):
                    if not (one.folder / "config.json").is_file():
                        built = built or build(cell, taught, shape)
                        save(built.whispering(one.epsilon), tokenizer, one.folder)

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Set what was asked of each model beside what was measured of it."""
        models = [one for cell in _cells(asked) for one in self._models(cell, asked)]
        built = {one.request: one for one in models}
        each = grouped(
            [measured(subject, built[subject.request]) for subject in subjects],
            lambda shown: shown.built.cell,
        )
        return StudyResult(
            answers=[line for shown in each for line in _answers(shown)],
            tables=[
                table for shown in each for table in (models_table(shown), layers_table(shown[-1]))
            ],
            lacking=[line for shown in each for line in _left_out(shown[0])],
            assumptions=(
                "the model is built, not trained: it shows what a cosine score cannot promise, not "
                "what trained models do",
            ),
        )

    def _models(self, cell: CellRequest, asked: StudyContext) -> list[Built]:
        """The models of one benchmark, built or not."""
        taught, shape, _ = self._taught_by(cell, asked.options.trust_remote_code)
        name = re.sub(r"[^a-zA-Z0-9_-]+", "_", cell.benchmark)
        known = fingerprint(cell, taught, shape)[:8]
        root = asked.ledger.root / "studies" / self.name
        return [
            Built(cell, epsilon, root / f"theorem-{name}-{epsilon:g}-{known}", taught)
            for epsilon in self._epsilons
        ]


def _cells(asked: StudyContext) -> list[CellRequest]:
    """What is built for: each benchmark and tokenizer once."""
    return list(dict.fromkeys(map(_of_documents, asked.experiment.cells())))


def _of_documents(cell: CellRequest) -> CellRequest:
    """What of a cell says which documents, and how they are tokenised."""
    runs = ("components", "spans", "interventions", "only", "removed", "dtype")
    plain = {name: CellRequest.model_fields[name].default for name in runs}
    return cell.model_copy(update={**plain, "layers": (0,)})


def _answers(shown: Sequence[Shown]) -> list[str]:
    """Say for one benchmark whether the theorem holds, at the smallest ε first."""
    last = shown[-1]
    name = last.subject.record.benchmark.title
    noun = "token" if last.built.is_open else "document"
    failed = [each for each in shown if not each.holds]
    if failed:
        one = failed[0]
        return [
            f"The model built for {name} and ε = {tiny(one.built.epsilon)} does not show it: it "
            f"answers {one.right:,} of {counted(one.units, noun)}, {one.without:,} without layer "
            f"{WHISPER}, whose cosine score is {tiny(one.score)}, off by {tiny(one.error)} of "
            "itself; the lowest other is "
            f"{tiny(one.other)}."
        ]
    everything = f"all {counted(last.units, noun)}" if last.units > 1 else f"the one {noun}"
    that = " that can be" if last.built.lesson.left_out or last.built.lesson.clashing else ""
    worst = max(shown, key=lambda each: each.error)
    lines = [
        f"A model of {LAYERS} layers answers {everything}{that} of {name}; its layer {WHISPER} has "
        f"the cosine score {tiny(last.score)}, the lowest: any other is more than "
        f"{tiny(math.floor(last.other / last.score))} times as high. Without it not one {noun} is "
        "answered."
    ]
    if len(shown) > 1:
        lines.append(
            f"{name}: so it is for each of {len(shown)} ε from {tiny(shown[0].built.epsilon)} to "
            f"{tiny(last.built.epsilon)}; the score of layer {WHISPER} is ε but for "
            f"{tiny(worst.error)} of itself."
        )
    return lines


def _left_out(shown: Shown) -> list[str]:
    """Say which documents no such model answers, and why."""
    taught = shown.built.lesson
    name = shown.subject.record.benchmark.title
    by_reason: dict[str, list[str]] = {}
    for (task, doc), why in taught.left_out.items():
        by_reason.setdefault(why, []).append(f"{doc}" if task == name else f"{doc} of {task}")
    lines = [
        f"{name}: {counted(len(docs), 'document')} ({', '.join(docs[:5])}"
        f"{', …' if len(docs) > 5 else ''}) cannot be taught: {why}"
        for why, docs in by_reason.items()
    ]
    if taught.clashing and shown.built.is_open:
        lines.append(
            f"{name}: {counted(taught.clashing, 'token')} of {taught.tokens:,} cannot be taught: "
            "another text continues otherwise after the same beginning"
        )
    return lines
