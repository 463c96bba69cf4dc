"""The audit's charts, of one model."""

from __future__ import annotations

from tracker.core.findings import FoundChart, Line, LineChart, MapChart
from tracker.core.proxies import PROXIES
from tracker.stats.rank_agreement import midranks
from tracker.studies.audit.figures import ModelAudit, means
from tracker.studies.audit.measures import DROP


def charts_of(audit: ModelAudit) -> list[FoundChart]:
    """Every chart of the model."""
    return [*_cost(audit), *_depth(audit), *_map(audit)]


def _cost(audit: ModelAudit) -> list[FoundChart]:
    budgets, found, _ = audit.at_cost
    lines = [
        Line(name=PROXIES[name].label if name in PROXIES else audit.drop, values=tuple(row))
        for name, row in found.items()
        if any(value is not None for value in row)
    ]
    if not lines:
        return []
    return [
        LineChart(
            title=f"{audit.name}: what a proxy predicts for what it costs",
            x="forward passes spent on a benchmark",
            y="Spearman with the drop of other documents",
            unit="coefficient",
            places=tuple(budgets),
            lines=tuple(lines),
            log_x=True,
        )
    ]


def _depth(audit: ModelAudit) -> list[FoundChart]:
    shown = list(dict.fromkeys(["cosine_score", *(s.proxy for s in audit.summaries[:1])]))
    named = [s for s in audit.summaries if s.proxy in shown]
    if not named:
        return []
    cells = [c for c in named[0].cells if all(c in s.cells for s in named)]
    if not cells:
        return []
    profiles = {audit.drop: means(DROP, cells)}
    profiles |= {PROXIES[s.proxy].label: means(s.proxy, cells) for s in named}
    return [
        LineChart(
            title=f"{audit.name}: ranks of the layers over depth, mean over benchmarks",
            x="layer (0-based)",
            y="rank, the least relevant is 1",
            unit="count",
            places=tuple(cells[0].layers),
            lines=tuple(
                Line(name=name, values=tuple(midranks(rows).mean(axis=0).tolist()))
                for name, rows in profiles.items()
            ),
        )
    ]


def _map(audit: ModelAudit) -> list[FoundChart]:
    cells = [c for c in audit.cells if c.found["cosine_score"].spearman.value is not None]
    if not cells:
        return []
    columns = sorted({layer for cell in cells for layer in cell.layers})
    values = []
    for cell in cells:
        x, y = (midranks(each.means()) for each in (cell.measures["cosine_score"], cell.drop))
        at = dict(zip(cell.layers, (x - y).tolist(), strict=True))
        values.append(tuple(at.get(layer) for layer in columns))
    return [
        MapChart(
            title=f"{audit.name}: where the cosine score ranks a layer too high or too low",
            x="layer (0-based)",
            y="benchmark",
            name=f"ranks by cosine score above those by {audit.drop}",
            unit="count",
            columns=tuple(columns),
            rows=tuple(cell.label for cell in cells),
            values=tuple(values),
        )
    ]
