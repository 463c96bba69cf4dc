"""The tables of the study `theorem`."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.core.estimates import Unit
from tracker.core.formats import counted
from tracker.core.tables import Table
from tracker.models.counterexample import JOBS, LAYERS, WHISPER
from tracker.studies.layout import Row, entry, table
from tracker.studies.theorem.figures import Shown

_NOT_FINITE = "a figure of the model is not finite"


def models_table(shown: Sequence[Shown]) -> Table:
    """Set what was asked of each model of a benchmark beside what it was measured to be."""
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
    rows: list[Row] = []
    for each in shown:
        accuracy = each.subject.record.baseline_accuracy
        without = each.subject.record.runs_of()[WHISPER].accuracy
        rows.append(
            (
                each.built.epsilon,
                entry(each.score, _NOT_FINITE),
                entry(each.error, _NOT_FINITE),
                entry(each.other, _NOT_FINITE),
                entry(accuracy, _NOT_FINITE),
                entry(without, _NOT_FINITE),
                LAYERS,
                each.built.width,
                len(each.built.lesson.wanted),
            )
        )
    note = (
        f"{counted(lost, 'document')} of {record.n:,} could not be taught, and counts as it falls"
        if lost
        else ""
    )
    return table(
        f"{record.benchmark.title}, {record.documents}",
        heads,
        rows,
        (note,) if note else (),
    )


def layers_table(shown: Shown) -> Table:
    """What each layer of one model does, and what it seems to be worth."""
    record = shown.subject.record
    heads: tuple[tuple[str, Unit], ...] = (
        ("layer", "count"),
        ("its job", "text"),
        ("cosine score", "times"),
        (f"{record.metric} without it", "percent"),
    )
    rows: list[Row] = [
        (
            layer,
            JOBS[layer],
            entry(run.cosine_score, _NOT_FINITE),
            entry(run.accuracy, _NOT_FINITE),
        )
        for layer, run in record.runs_of().items()
    ]
    return table(
        f"{record.benchmark.title}, ε = {tiny(shown.built.epsilon)}, layer by layer",
        heads,
        rows,
    )


def tiny(figure: float) -> str:
    """Write a figure of any size, such as `1e−8`."""
    return f"{figure:.3g}".replace("e-0", "e−").replace("e-", "e−").replace("e+0", "e")
