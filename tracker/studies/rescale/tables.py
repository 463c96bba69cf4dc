"""The tables of the study `rescale`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tracker.core.estimates import Estimate, Unit
from tracker.core.formats import Measure
from tracker.core.kinds import Intervention
from tracker.core.tables import Table
from tracker.ledger.aligned import Array
from tracker.stats.multiple import holm
from tracker.stats.recovered import recovered
from tracker.studies.base import SIGNIFICANT
from tracker.studies.layout import Row, entry, estimated, table
from tracker.studies.rescale.figures import EVERY, NAMES, WAYS, Costs

_NOT_MEASURED = "not measured; what is lacking says why"
_NOT_FINITE = "a drop is not a finite number"
_NO_TEST = "McNemar's test needs outcomes that are right or wrong, and there are none"


def drop_unit(measure: Measure) -> Unit:
    """Say how a table or chart writes drops."""
    return "points" if measure.unit == "pp" else "score"


def in_unit(measure: Measure) -> str:
    """Name the unit of a drop behind what it is; nothing where `drop_unit` says it."""
    return "" if drop_unit(measure) == "points" else f", {measure.unit}"


def summary(cells: Sequence[Costs]) -> Table:
    """Say of each cell of one measure how much of the drop each stand-in wins back."""
    measure = cells[0].measure
    rows: list[Row] = []
    for cell in cells:
        both = ((cell.drops, cell.drawn), (cell.nats, cell.drawn_nats))
        shares = [_recovered(drops, drawn, way) for drops, drawn in both for way in WAYS]
        mean = entry(float(cell.drops["remove"].mean()), _NOT_FINITE)
        fitted = cell.fitted_on or Estimate(None, reason="it is not known")
        rows.append((cell.name, cell.n, mean, *shares, fitted))
    won_back: list[tuple[str, Unit]] = [
        (f"{NAMES[way]} wins back, {what}", "percent")
        for what in (f"of the {measure.level}", "of the gold log-probability")
        for way in WAYS
    ]
    return table(
        "What stands in for a layer, and how much of the drop it wins back",
        [
            ("model and benchmark", "text"),
            ("documents", "count"),
            (f"mean {measure.change} of a removal{in_unit(measure)}", drop_unit(measure)),
            *won_back,
            ("fitted on", "text"),
        ],
        rows,
        (
            "Won back: 1 − (sum of the drops with the stand-in) / (sum of the drops of "
            "removals), over all layers, with 95 % intervals from resampling documents. "
            "Below 0: worse than nothing in the layer's place.",
        ),
    )


def _recovered(
    drops: dict[Intervention, Array], drawn: dict[Intervention, Array], way: Intervention
) -> Estimate:
    if way not in drops:
        return Estimate(None, reason=_NOT_MEASURED)
    return estimated(recovered(drops["remove"], drops[way], drawn["remove"], drawn[way]))


def significant(cells: Sequence[Costs]) -> Table:
    """Count the layers where a stand-in does significantly better, or worse, than nothing."""
    rows: list[Row] = []
    for way in WAYS:
        some = [cell for cell in cells if way in cell.drops]
        if not some:
            continue
        p = holm([value for cell in some for value in cell.better[way]])
        gain = np.concatenate([cell.drops["remove"] - cell.drops[way] for cell in some])
        sure = np.array([value is not None and value < SIGNIFICANT for value in p])
        made = sum(value is not None for value in p)
        counts = (int((sure & (gain > 0)).sum()), int((sure & (gain < 0)).sum()))
        rows.append(
            (
                NAMES[way],
                made,
                *(entry(count if made else None, _NO_TEST) for count in counts),
            )
        )
    return table(
        "Layers where a stand-in does otherwise than nothing",
        (
            ("stand-in", "text"),
            ("layers × benchmarks tested", "count"),
            ("significantly better", "count"),
            ("significantly worse", "count"),
        ),
        rows,
        (
            "Exact McNemar tests, Holm's adjustment within each row, 5 %; layers of metrics that "
            "are not right or wrong a document are not tested.",
        ),
    )


def layer_table(cell: Costs) -> Table:
    """List what each layer costs with something in its place."""
    ways = [way for way in EVERY if way in cell.drops]
    rows: list[Row] = []
    for place, layer in enumerate(cell.layers):
        row: list[Estimate | float] = [layer]
        for way in ways:
            low, high = np.quantile(cell.drawn[way][:, place], [0.025, 0.975])
            row.append(entry(float(cell.drops[way][place]), _NOT_FINITE, low, high))
        rows.append(tuple(row))
    return table(
        f"{cell.name}: {cell.measure.change} of each layer with something in its place"
        f"{in_unit(cell.measure)}",
        [("layer", "count"), *((NAMES[way], drop_unit(cell.measure)) for way in ways)],
        rows,
    )
