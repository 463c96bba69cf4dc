"""Render the findings of studies as tables, charts and sections of the page."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

import pandas as pd

from tracker.report.charts import maps, style
from tracker.report.frames import table_frame
from tracker.report.page.sections import Figure
from tracker.report.wording import WORDS
from tracker.schema.changes import WHOLE_LAYER
from tracker.schema.estimates import Estimate
from tracker.schema.findings import (
    SEARCH_STUDY,
    FindingRecord,
    Line,
    LineChart,
    MapChart,
    StudyChart,
)
from tracker.schema.formats import UNIT_FORMATS, figure_text, three_digits
from tracker.schema.records import CellRecord, RecordKey

_SHOWN_STUDIES = (SEARCH_STUDY, "prune", "joint")
"""Studies whose sections show their runs: steps of searches, and pairs with a first layer."""


@dataclass(frozen=True)
class StudySection:
    """Section of the page for the results of one study."""

    id: str
    finding: FindingRecord
    figures: tuple[Figure, ...]
    document_count_note: str


def study_sections(
    findings: Sequence[FindingRecord], cells: Sequence[CellRecord]
) -> tuple[StudySection, ...]:
    """Build a section of the page for each study."""
    return tuple(
        StudySection(
            id=f"study-{number}",
            finding=finding,
            figures=tuple(
                Figure(f"study-{number}-chart-{i}", chart.title, draw_study_chart(chart))
                for i, chart in enumerate(finding.charts, 1)
            ),
            document_count_note=document_count_note(finding, cells),
        )
        for number, finding in enumerate(findings, 1)
    )


def exclude_search_cells(
    cells: Sequence[CellRecord],
    findings: Sequence[FindingRecord],
    search_keys: Collection[RecordKey] = (),
) -> list[CellRecord]:
    """Leave out cells that were measured only for searches or layer pairs.

    A cell: the results of one model on one benchmark. `findings` and `search_keys` name the cells
    that searches and studies of layer pairs used.
    """
    shown = [finding for finding in findings if finding.study in _SHOWN_STUDIES]
    steps = {key for finding in shown for key in finding.rests_on}.union(search_keys)
    # Cells without a requested run are the references of exports.
    cells = [cell for cell in cells if cell.runs or cell.missing]
    return [cell for cell in cells if not _is_search_step(cell, steps)]


def _is_search_step(cell: CellRecord, steps: Collection[RecordKey]) -> bool:
    """Return whether a cell was measured only for a search or for layer pairs.

    `steps` contains the keys of all cells that searches or studies of layer pairs used.
    """
    whole_layers = {run.change.layer for run in cell.runs if run.change.kind == WHOLE_LAYER}
    is_partial = bool(cell.removed) or len(whole_layers) < cell.model.layers
    return is_partial and cell.record_key in steps and not cell.explicit


def document_count_note(finding: FindingRecord, cells: Sequence[CellRecord]) -> str:
    """Return a note if the numbers of documents have changed since a study; otherwise ""."""
    sizes = {(c.key, view): c.n for c in cells for view in (*c.supersedes, c.view)}
    grown = [sizes.get((key, view), n) != n for key, view, n in finding.rests_on]
    if not any(grown):
        return ""
    return (
        f"The number of documents has changed in {sum(grown)} of the {len(grown)} measurements "
        f"that this study used. To repeat the study, type: {finding.command_line}"
    )


def study_frames(findings: Sequence[FindingRecord]) -> dict[str, pd.DataFrame]:
    """Convert the tables of studies to data frames; return them by file name.

    The columns `NAME low` and `NAME high` contain the interval of NAME. Undefined numbers are
    missing, with the reason in the column `NAME reason`.
    """
    return {
        f"{stem}-{number}": table_frame(table)
        for stem, finding in name_findings(findings)
        for number, table in enumerate(finding.tables, 1)
    }


def study_charts(findings: Sequence[FindingRecord]) -> dict[str, style.Chart]:
    """Draw the charts of studies; return them by file name."""
    return {
        f"{stem}-{number}": draw_study_chart(chart)
        for stem, finding in name_findings(findings)
        for number, chart in enumerate(finding.charts, 1)
    }


def name_findings(findings: Sequence[FindingRecord]) -> Iterator[tuple[str, FindingRecord]]:
    """Yield each study with a unique file name; equal names get a number (`NAME--2`)."""
    stems: set[str] = set()
    for finding in findings:
        names = (f"{finding.name}--{number}" for number in count(2))
        stem = next(name for name in chain([finding.name], names) if name not in stems)
        stems.add(stem)
        yield stem, finding


def draw_study_chart(record: StudyChart) -> style.Chart:
    """Draw one chart of a study from its stored record."""
    return _draw_lines(record) if isinstance(record, LineChart) else _draw_map(record)


def _draw_lines(record: LineChart) -> style.Chart:
    unit = UNIT_FORMATS[record.unit]
    suffix = f" {unit.name}" if unit.name else ""
    tested = [line for line in record.lines if line.low]
    is_integral = all(float(x).is_integer() for x in record.places)
    is_by_layer = is_integral and not record.log_x and "layer" in record.x
    data: list[dict[str, Any]] = []
    for number, line in enumerate(record.lines):
        look, estimates = style.line_style(number), _line_estimates(record, line)
        positions, bars = list(record.places), None
        if line.low and len(tested) == 1:
            data.append(_interval_band(record, line, unit.scale, look["color"]))
        elif line.low and len(tested) <= style.MAX_INTERVAL_LINES:
            # Points of several traces are side by side, so that no interval hides another.
            offset = 0.14 * (tested.index(line) - (len(tested) - 1) / 2) if is_by_layer else 0
            positions = [x + offset for x in positions]
            bars = {"color": look["color"], "thickness": 1}
        hovers = [
            f"<b>{html.escape(line.name)}</b><br>{html.escape(record.x)} {x:g}: "
            f"{figure_text(estimate, unit.write, suffix)}"
            for x, estimate in zip(record.places, estimates, strict=True)
        ]
        strong = style.opacities(not _contains_zero(estimate) for estimate in estimates)
        data.append(
            style.estimate_trace(
                *("scatter", html.escape(line.name), positions, estimates, hovers, unit.scale),
                bars=bars,
                mode="lines+markers",
                line=look,
                marker={"size": 5, "opacity": strong},
            )
        )
    x_axis: dict[str, Any] = {"title": {"text": record.x}}
    if is_by_layer:
        x_axis = style.layer_axis([int(x) for x in record.places], record.x)
    elif record.log_x:
        x_axis = style.log_axis(record.x, record.places)
    title = f"{record.y} ({unit.name})" if unit.name else record.y
    values = [
        style.scale_value(value, unit.scale) for line in record.lines for value in line.values
    ]
    y_axis = style.log_axis(title, values) if record.log_y else {"title": {"text": title}}
    chart = style.build_chart(record.title, data, 380, xaxis=x_axis, yaxis=y_axis)
    has_pale = any(_contains_zero(e) for line in tested for e in _line_estimates(record, line))
    words = WORDS.render("study_lines", tested, style.MAX_INTERVAL_LINES, has_pale)
    return replace(chart, explanation=words)


def _line_estimates(record: LineChart, line: Line) -> list[Estimate]:
    gaps = (None,) * len(record.places)
    figures = zip(line.values, line.low or gaps, line.high or gaps, strict=True)
    return [Estimate(*values) for values in figures]


def _contains_zero(estimate: Estimate) -> bool:
    return estimate.bounds is not None and not estimate.side()


def _interval_band(record: LineChart, line: Line, scale: float, colour: str) -> dict[str, Any]:
    """Build a trace that shades the intervals of a line."""
    points = [
        (x, style.scale_value(low, scale), style.scale_value(high, scale))
        for x, low, high in zip(record.places, line.low, line.high, strict=True)
        if low is not None and high is not None
    ]
    positions, lows, highs = zip(*points, strict=True) if points else ((), (), ())
    return {
        **{"type": "scatter", "name": f"{html.escape(line.name)}, 95 %", "mode": "lines"},
        **{"x": positions + positions[::-1], "y": highs + lows[::-1]},
        **{"fill": "toself", "fillcolor": colour, "opacity": 0.15, "line": {"width": 0}},
        **{"hoverinfo": "skip", "showlegend": False},
    }


def _draw_map(record: MapChart) -> style.Chart:
    unit = UNIT_FORMATS[record.unit]

    def value_text(value: float | None) -> str:
        return "undefined" if value is None else f"{unit.write(value)} {unit.name}".strip()

    rows = [maps.row_label(row) for row in record.rows]
    values = [[style.scale_value(value, unit.scale) for value in row] for row in record.values]
    largest = maps.largest_magnitude(values)
    limit = three_digits(largest)
    chart = maps.centred_map(
        record.title,
        record.name,
        columns=record.columns,
        rows=rows,
        values=values,
        hovers=record.hovers
        or [
            [f"{row} · {x}: {value_text(v)}" for x, v in zip(record.columns, line, strict=True)]
            for row, line in zip(record.rows, record.values, strict=True)
        ],
        ticks=(f"−{limit}", "0", f"{limit} {unit.name}".strip()),
        largest=largest,
        shown_mask=record.shown or None,
        height=165 + max(16, min(maps.row_height(rows), 480 // max(1, len(rows)))) * len(rows),
        has_crosses=False,
        xaxis=style.layer_axis(record.columns, record.x),
        yaxis=maps.ROW_AXIS | {"title": {"text": record.y}},
    )
    return replace(chart, explanation=WORDS.render("study_map", record))
