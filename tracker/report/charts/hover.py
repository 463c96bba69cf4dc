"""Hover boxes: everything about one run, as plotly's markup.

Every text that comes from a record is escaped: plotly reads a subset of HTML.
"""

from __future__ import annotations

import html
from collections.abc import Callable

from tracker.core.answers import interval_name
from tracker.core.estimates import Estimate
from tracker.core.formats import defined, interval, measure_of, p_value, write
from tracker.core.records import CellRecord, Kind, RunIdentity, RunRecord, layers_of
from tracker.report.charts.style import wrap


def run_hover(cell: CellRecord, run: RunIdentity, record: RunRecord | None) -> str:
    """Say everything about one run in a hover box; `record` is None where nothing was measured."""
    head = f"<b>{run.label()}</b> · {html.escape(cell.benchmark.title)}"
    if cell.removed:
        head += f"<br>{wrap(cell.beneath)}"
    if record is None:
        return f"{head}<br>{cell.absence(run)}"
    measure = measure_of(cell)
    drop, relevance = record.accuracy_drop, cell.relevance_of(record)
    lines = [head]
    if drop is None:
        why = wrap(cell.reason_of("accuracy_drop", record))
        lines.append(f"{measure.change} undefined: {why}")
    else:
        ends = interval(record.accuracy_drop_low, record.accuracy_drop_high, measure.write)
        between = f" ({interval_name(cell)} {ends})" if ends else ""
        lines.append(f"{measure.change} {measure.write(drop)} {measure.unit}{between}")
    if record.mcnemar_p is not None:
        lines.append(f"McNemar p {p_value(record.mcnemar_p)} (unadjusted)")
    if relevance[0] is None:
        lines.append(f"accuracy relevance undefined: {wrap(relevance[1])}")
    else:
        lines.append(f"accuracy relevance {write('relevance', relevance[0])}")
    if record.cosine_score is None:
        lines.append(f"cosine score undefined: {wrap(cell.reason_of('cosine_score', record))}")
    else:
        lines.append(f"cosine score {write('proxy', record.cosine_score)}")
    lines.append(" ".join(filter(None, (f"{record.n:,} documents", cell.drawn))))
    return "<br>".join(lines)


def estimate_hover(
    head: str, what: str, found: Estimate, write: Callable[[float], str], samples: str
) -> str:
    """Say one figure with its interval and its samples in a hover box; `head` is what it is of."""
    if not defined(found.value):
        says = f"{what} undefined: {wrap(found.reason or 'not measured')}"
    else:
        ends = interval(found.low, found.high, write)
        says = f"{what} {write(found.value)} " + (
            f"(95 % interval {ends})" if ends else "(no interval)"
        )
    return f"<b>{wrap(head)}</b><br>{says}<br>{html.escape(samples)}"


def along_layers(
    cell: CellRecord, kind: Kind
) -> tuple[list[int], list[RunRecord | None], list[str]]:
    """Line up the runs of a kind: layers, records (None where not measured), and hover boxes."""
    layers = layers_of(kind, cell)
    found = cell.runs_of(kind)
    runs = [RunIdentity(layer=layer, **kind._asdict()) for layer in layers]
    hover = [run_hover(cell, run, found.get(run.layer)) for run in runs]
    return layers, [found.get(layer) for layer in layers], hover
