"""Lay out the findings of studies: tables, charts, sections of the page."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

import pandas as pd

from tracker.analysis.boards import sure
from tracker.core.changes import WHOLE_LAYER
from tracker.core.estimates import Estimate
from tracker.core.findings import SEARCH, FindingRecord, FoundChart, Line, LineChart, MapChart
from tracker.core.formats import WRITTEN, three_digits, with_interval
from tracker.core.records import CellRecord, Place
from tracker.report.charts.maps import ROWS, centred_map, row_height, row_label, strongest
from tracker.report.charts.style import (
    FEW,
    Chart,
    chart,
    errors,
    finite,
    layer_axis,
    line,
    log_axis,
    strength,
    trace,
)
from tracker.report.frames import frame_of
from tracker.report.page.sections import Figure
from tracker.report.wording import WORDS

_IN_SECTIONS = (SEARCH, "prune", "joint")
"""Findings whose sections show their runs: steps of searches, and the pairs of a first layer."""


@dataclass(frozen=True)
class StudySection:
    """Section of the page for one finding."""

    id: str
    finding: FindingRecord
    figures: tuple[Figure, ...]
    outgrown: str


def study_sections(
    findings: Sequence[FindingRecord], cells: Sequence[CellRecord]
) -> tuple[StudySection, ...]:
    """Build a section for each finding, with a note if the folder's cells have grown since."""
    return tuple(
        StudySection(
            id=f"study-{number}",
            finding=finding,
            figures=tuple(
                Figure(f"study-{number}-chart-{i}", each.title, study_chart(each))
                for i, each in enumerate(finding.charts, 1)
            ),
            outgrown=outgrown(finding, cells),
        )
        for number, finding in enumerate(findings, 1)
    )


def standing_alone(
    cells: Sequence[CellRecord], findings: Sequence[FindingRecord], searches: Collection[Place] = ()
) -> list[CellRecord]:
    """Return the cells except those without a run, and those of searches' steps and of pairs.

    The sections of their findings show these. `searches` are steps that no finding names.
    """
    steps = {
        place for finding in findings if finding.study in _IN_SECTIONS for place in finding.rests_on
    }.union(searches)
    # Cells without a requested run are the references of exports.
    return [cell for cell in cells if (cell.runs or cell.missing) and not _is_step(cell, steps)]


def _is_step(cell: CellRecord, steps: Collection[Place]) -> bool:
    """Return whether a cell holds only steps of searches, or pairs.

    A cell that lacks layers, or some of all runs of one layer, holds nothing else unless a run
    requested it. `steps` are the keys of all cells of searches and pairs.
    """
    whole = {run.change.layer for run in cell.runs if run.change.kind == WHOLE_LAYER}
    partial = bool(cell.removed) or len(whole) < cell.model.layers
    return partial and cell.place in steps and not cell.explicit


def outgrown(finding: FindingRecord, cells: Sequence[CellRecord]) -> str:
    """Return a sentence about cells that hold other documents by now; empty where none does."""
    held = {(c.key, view): c.n for c in cells for view in (*c.supersedes, c.view)}
    now = [held.get((key, view), n) != n for key, view, n in finding.rests_on]
    if not any(now):
        return ""
    return (
        f"{sum(now)} of its {len(now)} measurements hold other documents by now; for today's "
        f"answer: {finding.again}"
    )


def study_frames(findings: Sequence[FindingRecord]) -> dict[str, pd.DataFrame]:
    """Return the tables of findings as data frames, in the record's own units, by file stem.

    A figure with an interval has columns `… low` and `… high`. An undefined one is empty, and its
    column `… reason` has the reason.
    """
    return {
        f"{stem}-{number}": frame_of(table)
        for stem, finding in by_stem(findings)
        for number, table in enumerate(finding.tables, 1)
    }


def study_charts(findings: Sequence[FindingRecord]) -> dict[str, Chart]:
    """Draw the charts of findings, by file stem."""
    return {
        f"{stem}-{number}": study_chart(chart)
        for stem, finding in by_stem(findings)
        for number, chart in enumerate(finding.charts, 1)
    }


def by_stem(findings: Sequence[FindingRecord]) -> Iterator[tuple[str, FindingRecord]]:
    """Yield each finding with a stem for its files; names that occur twice are numbered."""
    taken: set[str] = set()
    for finding in findings:
        names = (f"{finding.name}--{number}" for number in count(2))
        stem = next(name for name in chain([finding.name], names) if name not in taken)
        taken.add(stem)
        yield stem, finding


def study_chart(found: FoundChart) -> Chart:
    """Draw a chart of a finding."""
    return _lines(found) if isinstance(found, LineChart) else _map(found)


def _lines(found: LineChart) -> Chart:
    form = WRITTEN[found.unit]
    unit = f" {form.name}" if form.name else ""
    banded = [each for each in found.lines if each.low]
    whole = all(float(place).is_integer() for place in found.places)
    layers = whole and not found.log_x and "layer" in found.x
    data: list[dict[str, Any]] = []
    for number, each in enumerate(found.lines):
        look, figures = line(number), _estimates(found, each)
        places = list(found.places)
        drawn: dict[str, Any] = {}
        if each.low and len(banded) == 1:
            data.append(_band(found, each, form.scale, look["color"]))
        elif each.low and len(banded) <= FEW:
            # Side by side, so that no interval hides another.
            aside = 0.14 * (banded.index(each) - (len(banded) - 1) / 2) if layers else 0
            places = [place + aside for place in places]
            drawn["error_y"] = errors(figures, form.scale, color=look["color"], thickness=1)
        hovers = [
            f"<b>{html.escape(each.name)}</b><br>{html.escape(found.x)} {place:g}: "
            f"{with_interval(figure, form.write, unit)}"
            for place, figure in zip(found.places, figures, strict=True)
        ]
        heights = [finite(figure.value, form.scale) for figure in figures]
        strong = strength(not _holds_zero(figure) for figure in figures)
        data.append(
            trace("scatter", html.escape(each.name), places, heights, hovers, mode="lines+markers")
            | {"line": look, "marker": {"size": 5, "opacity": strong}}
            | drawn
        )
    along: dict[str, Any] = {"title": {"text": found.x}}
    if layers:
        along = layer_axis([int(place) for place in found.places], found.x)
    elif found.log_x:
        along = log_axis(found.x, found.places)
    up = f"{found.y} ({form.name})" if form.name else found.y
    values = [finite(value, form.scale) for each in found.lines for value in each.values]
    axis = log_axis(up, values) if found.log_y else {"title": {"text": up}}
    made = chart(found.title, data, 380, xaxis=along, yaxis=axis)
    faint = any(_holds_zero(figure) for line in banded for figure in _estimates(found, line))
    return replace(made, explains=WORDS.one("study_lines", banded, FEW, faint))


def _estimates(found: LineChart, each: Line) -> list[Estimate]:
    nothing = (None,) * len(found.places)
    ends = (each.values, each.low or nothing, each.high or nothing)
    return [Estimate(*figures) for figures in zip(*ends, strict=True)]


def _holds_zero(figure: Estimate) -> bool:
    return figure.between is not None and not sure(figure)


def _band(found: LineChart, each: Line, scale: float, colour: str) -> dict[str, Any]:
    """Shade between the ends of a line's intervals."""
    ends = [
        (place, finite(low, scale), finite(high, scale))
        for place, low, high in zip(found.places, each.low, each.high, strict=True)
        if low is not None and high is not None
    ]
    places, lows, highs = zip(*ends, strict=True) if ends else ((), (), ())
    return {
        "type": "scatter",
        "name": f"{html.escape(each.name)}, 95 %",
        "x": places + places[::-1],
        "y": highs + lows[::-1],
        "mode": "lines",
        "fill": "toself",
        "fillcolor": colour,
        "opacity": 0.15,
        "line": {"width": 0},
        "hoverinfo": "skip",
        "showlegend": False,
    }


def _map(found: MapChart) -> Chart:
    form = WRITTEN[found.unit]

    def worded(value: float | None) -> str:
        return "undefined" if value is None else f"{form.write(value)} {form.name}".strip()

    rows = [row_label(row) for row in found.rows]
    values = [[finite(value, form.scale) for value in row] for row in found.values]
    largest = strongest(values)
    most = three_digits(largest)
    drawn = centred_map(
        found.title,
        found.name,
        columns=found.columns,
        rows=rows,
        values=values,
        hovers=found.hovers
        or [
            [f"{row} · {x}: {worded(v)}" for x, v in zip(found.columns, line, strict=True)]
            for row, line in zip(found.rows, found.values, strict=True)
        ],
        ticks=(f"−{most}", "0", f"{most} {form.name}".strip()),
        largest=largest,
        shown=found.shown or None,
        height=165 + max(16, min(row_height(rows), 480 // max(1, len(rows)))) * len(rows),
        crosses=False,
        xaxis=layer_axis(found.columns, found.x),
        yaxis=ROWS | {"title": {"text": found.y}},
    )
    return replace(drawn, explains=WORDS.one("study_map", found))
