"""The tables of the study `savings`."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.core.estimates import Estimate
from tracker.core.formats import points
from tracker.core.tables import Column, Table, estimate, table
from tracker.studies.savings.figures import (
    ORDERS,
    POWER,
    Hardest,
    MeasuredDocuments,
    Replayed,
    most,
)


def times(cell: MeasuredDocuments, one: Replayed) -> float:
    """How many times fewer layer passes than lm-eval once for the baseline and each run."""
    return cell.plain / cell.everything / most(one.passes, 0.5)


def extent(cell: MeasuredDocuments) -> str:
    """Say which documents were raced through, such as `320 of 10,042 documents`."""
    measured = f"{len(cell.drops):,} of " if len(cell.drops) < cell.population else ""
    return f"{measured}{cell.population:,} documents"


def named(bound: Hardest) -> str:
    """Name what is the hardest to know."""
    names = [run.label() for run in bound.runs]
    if len(names) == 2:
        return f"{names[0]} and {names[1]}, {_fine(bound.distance)} pp to tell apart"
    return f"{names[0]}, to be known by {_fine(bound.distance)} pp"


def _ended(cell: MeasuredDocuments) -> str:
    return f"open after all {len(cell.drops):,} that are measured"


def _fine(distance: float) -> str:
    """Write a distance, which may be a small part of a point."""
    return f"{100 * distance:.2g}"


def _early(one: Replayed) -> float:
    return float((one.answered & (one.documents < 1)).mean())


def savings_table(cell: MeasuredDocuments, found: Sequence[Replayed]) -> Table:
    """List what each question took."""
    ended = _ended(cell)
    columns: tuple[Column[Replayed], ...] = (
        Column("question", "text", lambda one: str(one.asked)),
        Column("documents", "percent", lambda one: most(one.documents, 0.5), ended),
        Column("documents, nine of ten", "percent", lambda one: most(one.documents, 0.9), ended),
        Column("layer passes", "percent", lambda one: most(one.passes, 0.5), ended),
        Column("layer passes, nine of ten", "percent", lambda one: most(one.passes, 0.9), ended),
        Column("fewer than lm-eval", "times", lambda one: times(cell, one) or None, ended),
        Column("answered before the end", "percent", _early),
        Column("answered by the end", "percent", lambda one: float(one.answered.mean())),
        Column("wrong", "percent", lambda one: float(one.wrong.mean())),
        Column("promised", "percent", lambda one: 1 - one.asked.level),
    )
    return table(
        f"{cell.title}: what each question takes, by {extent(cell)}",
        columns,
        found,
        (
            f"Documents and layer passes: the median of {ORDERS} random orders, and what nine of "
            "ten took at most, of those that all documents of the split and all runs take. Fewer "
            "than lm-eval: the layer passes of lm-eval once for the baseline and once for each "
            "run, over the median. The end is that of the measured documents; where it is that of "
            "the split, unanswered are exact ties.",
        ),
    )


def bounds_table(
    cell: MeasuredDocuments, found: Sequence[Replayed], bounds: Sequence[Hardest]
) -> Table:
    """List what bounds each question."""
    ended = _ended(cell)

    def raced(row: tuple[Replayed, Hardest]) -> Estimate:
        return estimate(most(row[0].documents, 0.5) * cell.population, ended)

    columns: tuple[Column[tuple[Replayed, Hardest]], ...] = (
        Column("question", "text", lambda row: str(row[0].asked)),
        Column("the hardest to know", "text", lambda row: named(row[1])),
        Column("standard deviation of a document", "points", lambda row: row[1].sd),
        Column("documents of one look", "count", lambda row: row[1].documents),
        Column("documents of the race", "count", raced),
    )
    return table(
        f"{cell.title}: what bounds each question",
        columns,
        zip(found, bounds, strict=True),
        (
            "For a set: the last one in and the first one out, with how far they are apart, what "
            "is tolerated included, and the standard deviation of their difference. One look: "
            "documents of a test with a fixed number of them, known in advance, with the same "
            f"confidence for all runs and, for sets and signs, {points(POWER)} % power. The race: "
            "the median, until nobody is open.",
        ),
    )
