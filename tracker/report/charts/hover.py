"""Hover boxes: everything about one run, as plotly's markup.

Every text that comes from a record is escaped: plotly reads a subset of HTML.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence

from tracker.core.answers import interval_name
from tracker.core.changes import Change
from tracker.core.estimates import Estimate, Unit
from tracker.core.formats import defined, measure_of, named_interval, p_value, write
from tracker.core.proxies import OF_EXPERTS
from tracker.core.records import CellRecord, RunRecord
from tracker.report.charts.style import wrap


def run_hover(cell: CellRecord, run: Change, record: RunRecord | None) -> str:
    """Say everything about one run in a hover box; `record` is None where nothing was measured."""
    head = f"<b>{run.label()}</b> · {html.escape(cell.benchmark.title)}"
    if cell.removed:
        head += f"<br>{wrap(cell.beneath)}"
    if record is None:
        return f"{head}<br>{cell.absence(run)}"
    measure = measure_of(cell)
    drop = record.drop.value
    if drop is None:
        change = f"undefined: {wrap(cell.reason_of('accuracy_drop', record))}"
    else:
        between = named_interval(record.drop, measure.write, interval_name(cell))
        change = f"{measure.write(drop)} {measure.unit}{between}"
    lines = [head, f"{measure.change} {change}"]
    if record.drop.p_value is not None:
        lines.append(f"McNemar p {p_value(record.drop.p_value)} (unadjusted)")
    of_expert = run.component == "expert"
    proxies = [proxy.name for proxy in OF_EXPERTS] if of_expert else ["cosine_score"]
    units: dict[str, Unit] = {"accuracy_relevance": "relevance", **dict.fromkeys(proxies, "proxy")}
    for field, unit in units.items():
        value = record.figure(field)
        why = f"undefined: {wrap(cell.reason_of(field, record))}"
        lines.append(f"{field.replace('_', ' ')} {why if value is None else write(unit, value)}")
    lines.append(" ".join(filter(None, (f"{record.n:,} documents", cell.drawn))))
    return "<br>".join(lines)


def estimate_hover(
    head: str, what: str, found: Estimate, write: Callable[[float], str], samples: str
) -> str:
    """Say one figure with its interval and its samples in a hover box; `head` is what it is of."""
    if not defined(found.value):
        says = f"{what} undefined: {wrap(found.reason or 'not measured')}"
    else:
        says = f"{what} {write(found.value)}{named_interval(found, write) or ' (no interval)'}"
    return f"<b>{wrap(head)}</b><br>{says}<br>{html.escape(samples)}"


def along_layers(
    cell: CellRecord, kind: Change, layers: Sequence[int]
) -> tuple[list[RunRecord | None], list[str]]:
    """Line up the runs of a kind over layers: records (None where not measured), hover boxes."""
    measured = cell.runs_of(kind)
    runs = [kind.at(layer) for layer in layers]
    hovers = [run_hover(cell, run, measured.get(run.layer)) for run in runs]
    return [measured.get(layer) for layer in layers], hovers
