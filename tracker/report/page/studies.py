"""What studies found, laid out: tables, charts, sections of the page."""

from __future__ import annotations

import html
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count

import pandas as pd

from tracker.core.findings import FindingRecord, FoundChart, Line, LineChart, MapChart
from tracker.core.formats import WRITTEN, three_digits
from tracker.core.records import WHOLE_LAYER, CellRecord, Place
from tracker.report.charts.maps import ROWS, centred_map, strongest
from tracker.report.charts.style import Chart, chart, finite, layer_axis, line
from tracker.report.frames import frame_of
from tracker.report.page.sections import Figure

SEARCH = "search"
"""What a finding of `tracker prune` is called."""
_IN_SECTIONS = (SEARCH, "prune", "joint")
"""Findings whose sections show their runs: steps of searches, and the pairs of a first layer."""


@dataclass(frozen=True)
class StudySection:
    """What the page shows of one finding."""

    id: str
    finding: FindingRecord
    figures: tuple[Figure, ...]
    outgrown: str


def study_sections(
    findings: Sequence[FindingRecord], cells: Sequence[CellRecord]
) -> tuple[StudySection, ...]:
    """Lay findings out, beside the cells that the folder holds now."""
    return tuple(
        StudySection(
            id=f"study-{number}",
            finding=finding,
            figures=tuple(
                Figure(f"study-{number}-chart-{i}", each.title, study_chart(each))
                for i, each in enumerate(finding.charts, 1)
            ),
            outgrown=outgrown(finding, [cell.place for cell in cells]),
        )
        for number, finding in enumerate(findings, 1)
    )


def standing_alone(
    cells: Sequence[CellRecord], findings: Sequence[FindingRecord], searches: Collection[Place] = ()
) -> list[CellRecord]:
    """Leave out cells without a run, and those of searches' steps and of pairs.

    The sections of their findings show these. `searches` are steps that no finding names.
    """
    steps = {
        place for finding in findings if finding.study in _IN_SECTIONS for place in finding.rests_on
    }.union(searches)
    # One that was asked for no run is what an export was held against.
    return [cell for cell in cells if (cell.runs or cell.missing) and not _is_step(cell, steps)]


def _is_step(cell: CellRecord, steps: Collection[Place]) -> bool:
    """Whether a cell holds steps of searches, or pairs, alone.

    What lacks layers, or misses some of all runs of one layer, holds nothing else. `steps` are
    the cells of all of them.
    """
    whole = {run.layer for run in cell.runs if run.kind == WHOLE_LAYER}
    partial = bool(cell.removed) or len(whole) < cell.model.layers
    return partial and cell.place in steps


def outgrown(finding: FindingRecord, places: Sequence[Place]) -> str:
    """Say that cells of a finding hold other documents by now; empty where they do not."""
    held = {(key, view): n for key, view, n in places}
    now = [held.get((key, view), n) != n for key, view, n in finding.rests_on]
    if not any(now):
        return ""
    return (
        f"{sum(now)} of its {len(now)} measurements hold other documents by now; for today's "
        f"answer: {finding.again}"
    )


def study_frames(findings: Sequence[FindingRecord]) -> dict[str, pd.DataFrame]:
    """Put the tables of findings into data frames, in the record's own units, by file stem.

    A figure with an interval has columns `… low` and `… high`; an undefined one is empty, and its
    column `… reason` says why.
    """
    return {
        f"{stem}-{number}": frame_of(table)
        for stem, finding in by_stem(findings)
        for number, table in enumerate(finding.tables, 1)
    }


def by_stem(findings: Sequence[FindingRecord]) -> Iterator[tuple[str, FindingRecord]]:
    """Give each finding a stem for its files; those of several folders may have one name."""
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
    scale, unit = form.scale, form.name
    data = []
    for number, each in enumerate(found.lines):
        look = line(number)
        if each.low:
            data.append(_band(found, each, scale, look["color"]))
        data.append(
            {
                "type": "scatter",
                "name": each.name,
                "x": list(found.places),
                "y": [finite(value, scale) for value in each.values],
                "mode": "lines+markers",
                "line": look,
                "marker": {"size": 5},
                "hovertemplate": f"{html.escape(each.name)}<br>%{{x}}: %{{y:.4g}} {unit}"
                "<extra></extra>",
            }
        )
    title = f"{found.y} ({unit})" if unit else found.y
    whole = all(float(place).is_integer() for place in found.places)
    layers = whole and not found.log_x and "layer" in found.x
    places = [int(place) for place in found.places] if layers else []
    return chart(
        found.title,
        data,
        380,
        xaxis=layer_axis(places, found.x)
        if layers
        else {"title": {"text": found.x}, **({"type": "log"} if found.log_x else {})},
        yaxis={"title": {"text": title}, **({"type": "log"} if found.log_y else {})},
    )


def _band(found: LineChart, each: Line, scale: float, colour: str) -> dict[str, object]:
    """Shade between the ends of a line's intervals."""
    ends = [
        (place, finite(low, scale), finite(high, scale))
        for place, low, high in zip(found.places, each.low, each.high, strict=True)
        if low is not None and high is not None
    ]
    places, lows, highs = zip(*ends, strict=True) if ends else ((), (), ())
    return {
        "type": "scatter",
        "name": f"{each.name}, 95 %",
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

    values = [[finite(value, form.scale) for value in row] for row in found.values]
    largest = strongest(values)
    most = three_digits(largest)
    return centred_map(
        found.title,
        found.name,
        columns=found.columns,
        rows=[html.escape(row) for row in found.rows],
        values=values,
        hovers=found.hovers
        or [
            [f"{row} · {x}: {worded(v)}" for x, v in zip(found.columns, line, strict=True)]
            for row, line in zip(found.rows, found.values, strict=True)
        ],
        ticks=(f"−{most}", "0", f"{most} {form.name}".strip()),
        largest=largest,
        height=165 + max(16, 480 // max(1, len(found.rows))) * len(found.rows),
        crosses=False,
        xaxis=layer_axis(found.columns, found.x),
        yaxis=ROWS | {"title": {"text": found.y}},
    )
