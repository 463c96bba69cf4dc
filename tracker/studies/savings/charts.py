"""The chart of the study `savings`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tracker.core.findings import Line, LineChart
from tracker.studies.savings.figures import ORDERS, MeasuredDocuments, Replayed

_PLACES = tuple(range(0, 101, 2))


def passes_chart(cell: MeasuredDocuments, found: Sequence[Replayed]) -> LineChart:
    """Draw in how many orders each question is answered by which share of the layer passes."""

    def line(one: Replayed) -> Line:
        passes = np.where(one.answered, one.passes, np.inf)
        shares = [float((100 * passes <= place + 1e-9).mean()) for place in _PLACES]
        return Line(name=str(one.asked), values=tuple(shares))

    return LineChart(
        title=f"{cell.title}: how soon each question is answered",
        x="layer passes, % of those of all documents of the split and all runs",
        y=f"answered, of {ORDERS} orders",
        unit="percent",
        places=_PLACES,
        lines=tuple(map(line, found)),
    )
