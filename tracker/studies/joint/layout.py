"""The tables and charts of the study `joint`."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.core.estimates import Estimate
from tracker.core.findings import Line, LineChart, MapChart
from tracker.core.formats import p_value
from tracker.core.records import CellRecord
from tracker.core.tables import Column, Table, table
from tracker.studies.base import SIGNIFICANT
from tracker.studies.joint.figures import Pairs

STRONGEST = 10
"""Pairs of each sign that a table lists."""


def summary(rows: Sequence[tuple[CellRecord, Pairs]]) -> Table:
    """Sum up each cell by each measure."""

    def mean(row: tuple[CellRecord, Pairs]) -> Estimate | str:
        # Nats and percentage points stand in one column, as text.
        pairs = row[1]
        return pairs.mean if pairs.mean.value is None else pairs.write(pairs.mean)

    columns: tuple[Column[tuple[CellRecord, Pairs]], ...] = (
        Column("model and benchmark", "text", lambda row: row[0].title),
        Column("measure", "text", lambda row: row[1].measure),
        Column("documents", "count", lambda row: row[0].n),
        Column("pairs", "count", lambda row: len(row[1].pairs)),
        Column("at the floor", "count", lambda row: int(row[1].floor.sum())),
        Column("mean interaction", "text", mean),
        Column("redundant", "count", lambda row: len(row[1].significant(1))),
        Column("sub-additive", "count", lambda row: len(row[1].significant(-1))),
        Column("Spearman of sum and joint drop", "coefficient", lambda row: row[1].rank),
        Column("R² of the sum", "coefficient", lambda row: row[1].explained),
    )
    return table(
        "How well the drops of two layers add up",
        columns,
        rows,
        "Interaction: drop of both minus the sum of both drops, over pairs that are not at the "
        "floor. Redundant (above 0) and sub-additive (below 0): significant after "
        f"Benjamini-Hochberg at {100 * SIGNIFICANT:.0f} %. In brackets 95 % intervals over "
        "documents.",
    )


def strongest(record: CellRecord, one: Pairs, sign: int) -> Table:
    """List the pairs whose measured interaction of a sign is the largest."""

    def rank(n: int) -> Estimate:
        best, worst = one.ranks[n]
        return Estimate(best, best, worst)

    values = [(sign * (one.value(n) or 0), n) for n in range(len(one.pairs))]
    chosen = [n for value, n in sorted(values, reverse=True)[:STRONGEST] if value > 0]
    word = "redundant: together they cost more" if sign > 0 else "sub-additive: they cost less"
    columns: tuple[Column[int], ...] = (
        Column("layers", "text", lambda n: "{}, {}".format(*one.pairs[n])),
        Column("apart", "count", lambda n: one.pairs[n][1] - one.pairs[n][0]),
        Column("interaction", one.unit, one.at_once.__getitem__),
        Column("its rank", "count", rank, interval=True),
        Column("both", one.unit, lambda n: float(one.together[n])),
        Column("the first", one.unit, lambda n: one.alone[one.pairs[n][0]]),
        Column("the second", one.unit, lambda n: one.alone[one.pairs[n][1]]),
        Column("p", "p", lambda n: one.found[n].p_value),
        Column("p, Benjamini-Hochberg", "p", lambda n: float(one.q[n])),
    )
    return table(
        f"{record.title}: the most {word} than the sum, by {one.measure}",
        columns,
        chosen,
        f"The largest measured ones of {len(one.open):,} interactions, which are therefore "
        "larger here than other documents would show. Intervals, and ranks from the most "
        "redundant pair on, hold for all of them at once with 95 % confidence.",
    )


def interaction_map(record: CellRecord, pairs: Pairs) -> MapChart:
    """Draw all interactions, each in both halves; pairs at the floor are gaps."""
    layers = sorted(pairs.alone)
    places = {pair: n for n, pair in enumerate(pairs.pairs)}
    grid = [[places.get((min(i, j), max(i, j))) for j in layers] for i in layers]
    sure = {place for sign in (1, -1) for place in pairs.significant(sign)}
    left_out = f", {int(pairs.floor.sum())} at the floor" if pairs.floor.any() else ""
    return MapChart(
        title=f"{record.title}: interaction of two layers by {pairs.measure}, "
        f"{len(pairs.pairs):,} pairs{left_out}",
        x="layer (0-based)",
        y="layer",
        name="interaction",
        unit=pairs.unit,
        columns=tuple(layers),
        rows=tuple(map(str, layers)),
        values=tuple(tuple(None if n is None else pairs.value(n) for n in row) for row in grid),
        hovers=tuple(tuple("" if n is None else _hover(pairs, n) for n in row) for row in grid),
        shown=tuple(tuple(n in sure for n in row) for row in grid),
        shown_by=f"significant after Benjamini-Hochberg at {100 * SIGNIFICANT:.0f} %",
    )


def _hover(pairs: Pairs, place: int) -> str:
    (i, j), write = pairs.pairs[place], pairs.write
    text = (
        f"{i} with {j}: {write(pairs.found[place])} · both {write(float(pairs.together[place]))}"
        f" · {i} {write(pairs.alone[i])} · {j} {write(pairs.alone[j])}"
    )
    if pairs.floor[place]:
        return f"{text} · at the floor"
    return f"{text} · p {p_value(pairs.q[place])} (Benjamini-Hochberg)"


def distance_chart(record: CellRecord, pairs: Pairs) -> LineChart:
    """Draw the mean interaction of pairs by how many layers they are apart."""
    name = "pairs that are not at the floor" if pairs.floor.any() else "all pairs"
    return LineChart(
        title=f"{record.title}: mean interaction by distance, {pairs.measure}",
        x="distance |i − j|",
        y="interaction",
        unit=pairs.unit,
        places=tuple(pairs.by_distance),
        lines=(Line.of(name, pairs.by_distance.values()),),
    )
