"""A finding with a table and every kind of chart."""

from __future__ import annotations

from tracker.core.estimates import Estimate
from tracker.core.findings import FindingRecord, Line, LineChart, MapChart
from tracker.core.tables import Heading, Table

HEADS = (Heading(label="layer", unit="count"), Heading(label="drop", unit="points"))


ROWS = (
    (Estimate(3), Estimate(0.125, low=0.1, high=0.15)),
    (Estimate(4), Estimate(None, reason="the baseline is at chance")),
)


TABLE = Table(title="What each layer costs", headings=HEADS, rows=ROWS)


CURVE = Line(name="a <b>", values=(0.1, None, 0.3), low=(0, None, 0.2), high=(1, None, 0.4))


PLACES = {"x": "layer (0-based)", "y": "drop", "unit": "points"}


LINES = LineChart(title="How it grows", places=(0, 1, 2), lines=(CURVE,), **PLACES)


CELLS = {"columns": (0, 1), "rows": ("0", "1"), "values": ((None, 0.5), (-0.25, None))}


MAP = MapChart(title="All pairs", name="interaction", **PLACES, **CELLS)


FINDING = FindingRecord(
    study="joint",
    experiment="file.yaml",
    question="Do layers add up?",
    answers=("No.",),
    tables=(TABLE,),
    charts=(LINES, MAP),
    lacking=("piqa: at chance",),
    rests_on=(("key", "intact", 10),),
)
