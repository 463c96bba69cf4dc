"""The chart of the study `rescale`."""

from __future__ import annotations

from tracker.findings import Line, LineChart
from tracker.studies.rescale.figures import NAMES, Costs


def drop_chart(cell: Costs) -> LineChart:
    """Draw the drops of all layers, a line each way."""
    return LineChart(
        title=f"{cell.name}: accuracy drop with something in the layer's place",
        x="layer (0-based)",
        y="accuracy drop",
        unit="points",
        places=cell.layers,
        lines=tuple(
            Line(name=NAMES[way], values=tuple(cell.drops[way].tolist())) for way in cell.drops
        ),
    )
