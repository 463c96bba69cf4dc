"""The tables of the study `quantise`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from tracker.core import kinds
from tracker.core.estimates import Estimate
from tracker.core.formats import counted, measure_of
from tracker.core.records import CellRecord
from tracker.core.tables import Column, Table, table
from tracker.studies.quantise.figures import ALIKE, MEASURED, Sums, Tried


def choices_table(record: CellRecord, tried: Sequence[Tried], best: Tried) -> Table:
    """Set choices beside each other: what each takes, and what it costs."""
    measure, same = measure_of(record), "it is that itself"

    def by(row: Tried) -> str:
        return f"{row.candidate.by} (recommended)" if row is best else row.candidate.by

    columns: tuple[Column[Tried], ...] = (
        Column("chosen by", "text", by),
        Column("bits a weight", "proxy", lambda row: row.bits),
        Column("model (MB)", "proxy", lambda row: row.size / 1e6),
        Column("sum of losses where it was chosen", "nats", lambda row: row.candidate.expected),
        Column("loss of the whole there", "nats", lambda row: row.chosen_on),
        Column(f"{measure.level} on test documents", measure.level_form, lambda row: row.level),
        Column(measure.change, measure.form, lambda row: row.drop),
        Column("loss of gold log-probability", "nats", lambda row: row.gold),
        Column(f"{measure.level} kept beside {ALIKE}", measure.form, lambda row: row.beside, same),
        Column(f"log-probability kept beside {ALIKE}", "nats", lambda row: row.gold_beside, same),
    )
    return table(
        f"{record.model.name}, {record.benchmark.name}: choices within the budget.",
        columns,
        tried,
        f"Chosen on {record.counted} documents. 95 % intervals, each for itself.",
    )


def formats_table(record: CellRecord, best: Tried) -> Table:
    """Count in how many layers what is recommended gives a map which format."""
    counts = Counter((unit.which or "layer", form) for unit, form in best.candidate.choice.items())
    columns: tuple[Column[tuple[tuple[str, str], int]], ...] = (
        Column("what", "text", lambda row: row[0][0]),
        Column("format", "text", lambda row: row[0][1]),
        Column(
            *("layers", "count", lambda row: None if row[0][0] in kinds.ENDS else row[1]),
            otherwise="of no layer",
        ),
    )
    return table(
        f"{record.model.name}, {record.benchmark.name}: what is recommended.",
        columns,
        sorted(counts.items()),
    )


class _Row(NamedTuple):
    """Some units together, beside the sum of what they cost alone."""

    what: str
    measured: float
    summed: float
    more: Estimate


def sums_table(record: CellRecord, sums: Sums) -> Table:
    """Set what units cost together beside the sum of what they cost alone."""
    rows = [_Row(f"all {sums.units:,}", sums.whole, sums.expected, sums.more)]
    if (pairs := sums.pairs) is not None:
        both = float(pairs.together.mean())
        summed = [pairs.alone[i] + pairs.alone[j] for i, j in pairs.pairs]
        drawn = f"two, the mean of {counted(len(pairs.pairs), 'drawn pair')}"
        rows.append(_Row(drawn, both, sum(summed) / len(summed), pairs.mean))
    columns: tuple[Column[_Row], ...] = (
        Column("units together", "text", lambda row: row.what),
        Column("loss measured", "nats", lambda row: row.measured),
        Column("sum of losses alone", "nats", lambda row: row.summed),
        Column("more than the sum", "nats", lambda row: row.more),
    )
    return table(
        f"{record.model.name}, {record.benchmark.name}: do losses add up? Units of the choice by "
        f"{MEASURED}, on the documents that choose.",
        columns,
        rows,
        "95 % intervals over documents, each for itself, of these units.",
    )
