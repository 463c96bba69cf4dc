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

from tracker.core.config import ONE_EACH, CellRequest
from tracker.core.errors import RequestError
from tracker.core.formats import counted
from tracker.core.grouping import grouped
from tracker.ledger.files import lock_file
from tracker.models.counterexample import LARGEST, LAYERS, SMALLEST, WHISPER, Counterexample
from tracker.studies.base import Study, StudyContext, StudyResult, Subject
from tracker.studies.theorem.building import build, fingerprint, save, taught_by
from tracker.studies.theorem.figures import Built, Shown, layers_table, measured, models_table, tiny

EPSILONS = (1e-1, 1e-2, 1e-4, 1e-6, 1e-8)
_ASSUMED = (
    "the model is built, not trained: it shows what a cosine score cannot promise, not what "
    "trained models do"
)


class Theorem(Study):
    """Builds the transformer of the theorem for each benchmark and ε, and measures it.

    Args:
        epsilon: The cosine scores that the deciding layer is given.
    """

    question = "Can the layer with the lowest cosine score decide every answer?"

    def __init__(self, epsilon: Sequence[float] = ()) -> None:
        self._epsilons = tuple(sorted(set(epsilon), reverse=True)) or EPSILONS
        for value in self._epsilons:
            if not SMALLEST <= value <= LARGEST:
                raise RequestError(
                    f"--epsilon {value:g}: the theorem is shown for ε from {SMALLEST:g} (below, "
                    f"the results' float64 does not hold it to 1e-6) to {LARGEST:g} (above, other "
                    "layers' scores would be lower); for example --epsilon 1e-6"
                )
        self._taught_by = cache(taught_by)  # it reads benchmarks

    def requests(self, asked: StudyContext) -> list[CellRequest]:
        """Ask for each layer of the model of each benchmark and ε.

        RequestError where a benchmark generates text or has no accuracy, or nothing of it can be
        taught.
        """
        return [model.request for models in self._models(asked) for model in models]

    def prepare(self, asked: StudyContext) -> None:
        """Build and save the models that are not there."""
        for models in self._models(asked):
            cell = models[0].cell
            asked.progress.say(f"building for {cell.benchmark}")
            taught, shape, tokenizer = self._taught_by(cell, asked.options.trust_remote_code)
            built: Counterexample | None = None
            for model in models:
                with lock_file(model.folder.parent / "locks" / model.folder.name):
                    if not (model.folder / "config.json").is_file():
                        built = built or build(cell, taught, shape)
                        save(built.whispering(model.epsilon), tokenizer, model.folder)

    def say(self, asked: StudyContext, subjects: list[Subject]) -> StudyResult:
        """Set what was asked of each model beside what was measured of it."""
        built = {model.request: model for models in self._models(asked) for model in models}
        measures = [measured(subject, built[subject.request]) for subject in subjects]
        result = StudyResult([_ASSUMED])
        for shown in grouped(measures, lambda one: one.built.cell).values():
            result.answers += _answers(shown)
            result.tables += [models_table(shown), layers_table(shown[-1])]
            result.lacking += _left_out(shown[0])
        return result

    def _models(self, asked: StudyContext) -> list[list[Built]]:
        """The models of each benchmark and tokenizer, built or not."""
        root = asked.ledger.root / "studies" / self.name
        models = []
        for cell in dict.fromkeys(map(_of_documents, asked.experiment.cells())):
            taught, shape, _ = self._taught_by(cell, asked.options.trust_remote_code)
            name = re.sub(r"[^a-zA-Z0-9_-]+", "_", cell.benchmark)
            known = fingerprint(cell, taught, shape)[:8]
            folders = {e: root / f"theorem-{name}-{e:g}-{known}" for e in self._epsilons}
            models.append([Built(cell, e, folder, taught) for e, folder in folders.items()])
        return models


def _of_documents(cell: CellRequest) -> CellRequest:
    """What of a cell says which documents, and how they are tokenised."""
    plain = {name: CellRequest.model_fields[name].default for name in ("removed", "dtype")}
    return cell.model_copy(update={**ONE_EACH, **plain, "layers": (0,)})


def _answers(shown: Sequence[Shown]) -> list[str]:
    """Say for one benchmark whether the theorem holds, at the smallest ε first."""
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
    lines = [
        f"A model of {LAYERS} layers answers {everything}{that} of {name}. Its layer {WHISPER} has "
        f"the cosine score {tiny(last.score)}, the lowest: any other is more than "
        f"{tiny(math.floor(last.other / last.score))} times as high. Without it not one {noun} is "
        "answered."
    ]
    if len(shown) > 1:
        worst = max(one.error for one in shown)
        lines.append(
            f"{name}: so it is for each of {len(shown)} ε from {tiny(shown[0].built.epsilon)} to "
            f"{tiny(last.built.epsilon)}. The score of layer {WHISPER} is ε but for {tiny(worst)} "
            "of itself."
        )
    return lines


def _left_out(shown: Shown) -> list[str]:
    """Say which documents no such model answers, and why."""
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
