"""The tables of the study `theorem`."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.core.formats import counted
from tracker.core.records import RunRecord
from tracker.core.tables import Column, Table, table
from tracker.models.counterexample import JOBS, LAYERS, WHISPER
from tracker.studies.theorem.figures import Shown

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
        Column("layer", "count", lambda run: run.layer),
        Column("its job", "text", lambda run: JOBS[run.layer]),
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
