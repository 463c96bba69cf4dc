"""What the study `theorem` finds of a built model: its scores, what it answers, and the tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tracker.core.changes import INTACT, Ablation
from tracker.core.config import CellRequest
from tracker.core.formats import counted
from tracker.core.records import RunRecord
from tracker.core.tables import Column, Table, table
from tracker.ledger.outcomes import METRIC
from tracker.models.counterexample import JOBS, LAYERS, WHISPER
from tracker.studies.base import Subject
from tracker.studies.theorem.lessons import Lesson

PROMISED = 1e-6
"""By what share of itself the score of layer 2 may be off, at most."""


@dataclass(frozen=True)
class Built:
    """What is known of a built model beside what is measured: `folder` is where it is, or goes."""

    cell: CellRequest
    epsilon: float
    folder: Path
    lesson: Lesson

    @property
    def request(self) -> CellRequest:
        """What is measured of it."""
        model = {"model": str(self.folder), "revision": None, "model_args": None}
        runs = {"dtype": "float32", "layers": tuple(range(LAYERS))}
        return self.cell.model_copy(update=model | runs)

    @property
    def width(self) -> int:
        """The size of its hidden states."""
        return int(json.loads((self.folder / "config.json").read_text())["hidden_size"])

    @property
    def is_open(self) -> bool:
        """Whether tokens are counted and not documents."""
        return self.lesson.tokens > 0


@dataclass(frozen=True)
class Shown:
    """What a built model was measured to be.

    `right` and `without` are how many of the `units` (documents; of a corpus tokens) that can be
    taught it answers, with and without layer 2.
    """

    built: Built
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
        decides = self.right == self.units > 0 == self.without
        return decides and self.score < self.other and self.error <= PROMISED


def measured(subject: Subject, built: Built) -> Shown:
    """Count what a built model answers, and find its layers' cosine scores."""
    record, lesson = subject.record, built.lesson
    scores = {
        layer: math.nan if run.cosine_score is None else run.cosine_score
        for layer, run in record.runs_of().items()
    }
    frame = subject.store.read_documents(subject.request.extent)
    places = zip(frame["task"], frame["doc"], strict=True)
    taught = frame[[place not in lesson.left_out for place in places]]
    counts = {
        name: np.sum([_pair(value) for value in values], axis=0)
        for name, values in taught.groupby("ablation")[f"{METRIC}{record.metric}"]
    }
    right, units = map(int, counts[INTACT.name])
    return Shown(
        built,
        subject,
        score=scores.pop(WHISPER),
        other=min(scores.values()),
        right=right,
        without=int(counts[Ablation.of(removed=(WHISPER,)).name][0]),
        units=units - (lesson.clashing if built.is_open else 0),
    )


def _pair(value: float | str) -> tuple[int, int]:
    """A document's right answers and how many there are; of a corpus its tokens."""
    if isinstance(value, str):
        right, units = json.loads(value)
        return int(right), int(units)
    return int(value == 1), 1


_NOT_FINITE = "a figure of the model is not finite"


def models_table(shown: Sequence[Shown]) -> Table:
    """Set what was asked of each model of a benchmark beside what it was measured to be."""
    record = shown[0].subject.record
    lost = len(shown[0].built.lesson.left_out)
    metric = record.metric

    def without(each: Shown) -> float | None:
        return each.subject.record.runs_of()[WHISPER].accuracy

    columns: tuple[Column[Shown], ...] = (
        Column("ε asked for", "times", lambda each: each.built.epsilon),
        Column(f"cosine score of layer {WHISPER}", "times", lambda each: each.score, _NOT_FINITE),
        Column("off by, of itself", "times", lambda each: each.error, _NOT_FINITE),
        Column("lowest other score", "score", lambda each: each.other, _NOT_FINITE),
        Column(metric, "percent", lambda each: each.subject.record.baseline_accuracy, _NOT_FINITE),
        Column(f"{metric} without layer {WHISPER}", "percent", without, _NOT_FINITE),
        Column("layers", "count", lambda each: LAYERS),
        Column("width", "count", lambda each: each.built.width),
        Column("places remembered", "count", lambda each: len(each.built.lesson.wanted)),
    )
    note = (
        f"{counted(lost, 'document')} of {record.n:,} could not be taught, and counts as it falls"
    )
    title = f"{record.benchmark.title}, {record.documents}"
    return table(title, columns, shown, *(note,) if lost else ())


def layers_table(shown: Shown) -> Table:
    """What each layer of one model does, and what it seems to be worth."""
    record = shown.subject.record
    columns: tuple[Column[RunRecord], ...] = (
        Column("layer", "count", lambda run: run.change.layer),
        Column("its job", "text", lambda run: JOBS[run.change.layer]),
        Column("cosine score", "times", lambda run: run.cosine_score, _NOT_FINITE),
        Column(f"{record.metric} without it", "percent", lambda run: run.accuracy, _NOT_FINITE),
    )
    return table(
        f"{record.benchmark.title}, ε = {tiny(shown.built.epsilon)}, layer by layer",
        columns,
        record.runs_of().values(),
    )


def tiny(figure: float) -> str:
    """Write a figure of any size, such as `1e−8`."""
    return f"{figure:.3g}".replace("e-0", "e−").replace("e-", "e−").replace("e+0", "e")
