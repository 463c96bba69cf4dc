"""The tables of the study `joint`."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.core.estimates import Estimate
from tracker.core.records import CellRecord
from tracker.core.tables import Table
from tracker.studies.base import SIGNIFICANT
from tracker.studies.joint.figures import Pairs
from tracker.studies.layout import Row, entry, estimated, table

STRONGEST = 10
"""Pairs of each sign that a table lists."""


def summary_row(record: CellRecord, one: Pairs) -> Row:
    """Sum a cell up by one measure."""
    # Nats and percentage points stand in one column, as text.
    mean = one.mean
    return (
        record.title,
        one.measure,
        record.n,
        len(one.pairs),
        int(one.floor.sum()),
        one.said(mean)
        if mean.value is not None
        else Estimate(None, reason=mean.reason or "undefined"),
        len(one.significant(1)),
        len(one.significant(-1)),
        estimated(one.rank),
        estimated(one.explained),
    )


def summary(rows: Sequence[Row]) -> Table:
    """Set out the rows of all cells and measures."""
    return table(
        "How well the drops of two layers add up",
        (
            ("model and benchmark", "text"),
            ("measure", "text"),
            ("documents", "count"),
            ("pairs", "count"),
            ("at the floor", "count"),
            ("mean interaction", "text"),
            ("redundant", "count"),
            ("sub-additive", "count"),
            ("Spearman of sum and joint drop", "coefficient"),
            ("R² of the sum", "coefficient"),
        ),
        rows,
        (
            "Interaction: drop of both minus the sum of both drops, over pairs that are not at the "
            "floor. Redundant (above 0) and sub-additive (below 0): significant after "
            f"Benjamini-Hochberg at {SIGNIFICANT:.0%}. In brackets 95 % intervals over documents.",
        ),
    )


def strongest(record: CellRecord, one: Pairs, sign: int) -> Table:
    """List the pairs whose interaction of a sign is the largest."""
    values = [(sign * (one.value(n) or 0), n) for n in range(len(one.pairs))]
    chosen = sorted((each for each in values if each[0] > 0), reverse=True)[:STRONGEST]
    rows: list[Row] = []
    for _, n in chosen:
        found, (i, j) = one.found[n], one.pairs[n]
        rows.append(
            (
                f"{i}, {j}",
                j - i,
                estimated(found),
                float(one.together[n]),
                one.alone[i],
                one.alone[j],
                entry(found.p_value),
                float(one.q[n]),
            )
        )
    word = "redundant: together they cost more" if sign > 0 else "sub-additive: they cost less"
    return table(
        f"{record.title}: the most {word} than the sum, by {one.measure}",
        (
            ("layers", "text"),
            ("apart", "count"),
            ("interaction", one.unit),
            ("both", one.unit),
            ("the first", one.unit),
            ("the second", one.unit),
            ("p", "p"),
            ("p, Benjamini-Hochberg", "p"),
        ),
        rows,
        (
            f"The largest of {int((~one.floor).sum()):,} interactions, which are therefore larger "
            "here than other documents would show.",
        ),
    )
