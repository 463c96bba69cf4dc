"""The chart of the study `rescale`."""

from __future__ import annotations

from tracker.core.findings import Line, LineChart, gaps
from tracker.studies.rescale.figures import NAMES, Costs
from tracker.studies.rescale.tables import in_unit


def drop_chart(cell: Costs) -> LineChart:
    """Draw the drops of all layers, a line each way."""
    return LineChart(
        title=f"{cell.name}: {cell.measure.change} with something in the layer's place",
        x="layer (0-based)",
        y=f"{cell.measure.change}{in_unit(cell.measure)}",
        unit=cell.measure.form,
        places=cell.layers,
        lines=tuple(Line(name=NAMES[way], values=gaps(cell.drops[way])) for way in cell.drops),
    )
