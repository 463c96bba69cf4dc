"""The tables and charts of the study `savings`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tracker.core.findings import Line, LineChart
from tracker.core.formats import points
from tracker.core.tables import Column, Table, table
from tracker.studies.savings.figures import ORDERS, POWER, MeasuredDocuments, Replayed, most


def times(cell: MeasuredDocuments, race: Replayed) -> float:
    """How many times fewer layer passes than lm-eval once for the baseline and each run."""
    return cell.plain / cell.everything / most(race.passes, 0.5)


def extent(cell: MeasuredDocuments) -> str:
    """Say which documents were raced through, such as `320 of 10,042 documents`."""
    measured = f"{len(cell.drops):,} of " if len(cell.drops) < cell.population else ""
    return f"{measured}{cell.population:,} documents"


def hardest_of(race: Replayed) -> str:
    """Say what is the hardest to know; other documents would find it between other runs."""
    # Write a distance, which may be a small part of a point.
    distance = f"{100 * race.bound.distance:.2g} pp"
    if race.asked.count is not None:
        return f"the last one in and the first one out, {distance} to tell apart"
    which = "varies most" if race.asked.kind == "drop" else "is the hardest to tell from 0"
    return f"the drop that {which}, to be known by {distance}"


def _ended(cell: MeasuredDocuments) -> str:
    return f"open after all {len(cell.drops):,} that are measured"


def savings_table(cell: MeasuredDocuments, replays: Sequence[Replayed]) -> Table:
    """List what each question took."""
    ended = _ended(cell)

    def early(race: Replayed) -> float:
        return float((race.answered & (race.documents < 1)).mean())

    columns: tuple[Column[Replayed], ...] = (
        Column("question", "text", lambda race: str(race.asked)),
        Column("documents", "percent", lambda race: most(race.documents, 0.5), ended),
        Column("documents, nine of ten", "percent", lambda race: most(race.documents, 0.9), ended),
        Column("layer passes", "percent", lambda race: most(race.passes, 0.5), ended),
        Column("layer passes, nine of ten", "percent", lambda race: most(race.passes, 0.9), ended),
        Column("fewer than lm-eval", "times", lambda race: times(cell, race) or None, ended),
        Column("answered before the end", "percent", early),
        Column("answered by the end", "percent", lambda race: float(race.answered.mean())),
        Column("wrong", "percent", lambda race: float(race.wrong.mean())),
        Column("promised", "percent", lambda race: 1 - race.asked.level),
    )
    return table(
        f"{cell.title}: what each question takes, by {extent(cell)}",
        columns,
        replays,
        f"Documents and layer passes: the median of {ORDERS} random orders, and what nine of "
        "ten took at most, of those that all documents of the split and all runs take. Fewer "
        "than lm-eval: the layer passes of lm-eval once for the baseline and once for each "
        "run, over the median. The end is that of the measured documents; where it is that of "
        "the split, unanswered are exact ties.",
    )


def bounds_table(cell: MeasuredDocuments, replays: Sequence[Replayed]) -> Table:
    """List what bounds each question."""

    def raced(race: Replayed) -> float:
        return most(race.documents, 0.5) * cell.population

    columns: tuple[Column[Replayed], ...] = (
        Column("question", "text", lambda race: str(race.asked)),
        Column("the hardest to know", "text", hardest_of),
        Column("standard deviation of a document", "points", lambda race: race.bound.sd),
        Column("documents of one look", "count", lambda race: race.bound.documents),
        Column("documents of the race", "count", raced, _ended(cell)),
    )
    return table(
        f"{cell.title}: what bounds each question",
        columns,
        replays,
        "For a set: the last one in and the first one out, with how far they are apart, what "
        "is tolerated included, and the standard deviation of their difference. One look: "
        "documents of a test with a fixed number of them, known in advance, with the same "
        f"confidence for all runs and, for sets and signs, {points(POWER)} % power. The race: "
        "the median, until nobody is open.",
    )


_PLACES = tuple(range(0, 101, 2))


def passes_chart(cell: MeasuredDocuments, found: Sequence[Replayed]) -> LineChart:
    """Draw in how many orders each question is answered by which share of the layer passes."""

    def line(one: Replayed) -> Line:
        passes = np.where(one.answered, one.passes, np.inf)
        shares = [float((100 * passes <= place + 1e-9).mean()) for place in _PLACES]
        return Line(name=str(one.asked), values=tuple(shares))

    return LineChart(
        title=f"{cell.title}: how soon each question is answered",
        x="layer passes, % of those of all documents of the split and all runs",
        y=f"answered, of {ORDERS} orders",
        unit="percent",
        places=_PLACES,
        lines=tuple(map(line, found)),
    )
