"""A finding with a table and every kind of chart."""

from __future__ import annotations

from tracker.schema.estimates import Estimate
from tracker.schema.findings import FindingRecord, Line, LineChart, MapChart
from tracker.schema.tables import Heading, Table

HEADINGS = (Heading(label="layer", unit="count"), Heading(label="drop", unit="points"))


ROWS = (
    (Estimate(3), Estimate(0.125, low=0.1, high=0.15)),
    (Estimate(4), Estimate(None, reason="the baseline is at chance")),
)


TABLE = Table(title="What each layer costs", headings=HEADINGS, rows=ROWS)


CURVE = Line(name="a <b>", values=(0.1, None, 0.3), low=(0, None, 0.2), high=(1, None, 0.4))


CHART_AXES = {"x": "layer (0-based)", "y": "drop", "unit": "points"}


LINE_CHART = LineChart(title="How it grows", places=(0, 1, 2), lines=(CURVE,), **CHART_AXES)


MAP_CELLS = {"columns": (0, 1), "rows": ("0", "1"), "values": ((None, 0.5), (-0.25, None))}


MAP_CHART = MapChart(title="All pairs", name="interaction", **CHART_AXES, **MAP_CELLS)


FINDING = FindingRecord(
    study="joint",
    experiment="file.yaml",
    question="Do layers add up?",
    answers=("No.",),
    tables=(TABLE,),
    charts=(LINE_CHART, MAP_CHART),
    lacking=("piqa: at chance",),
    rests_on=(("key", "intact", 10),),
)
