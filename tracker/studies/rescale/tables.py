"""The tables of the study `rescale`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tracker.core.estimates import Estimate
from tracker.core.formats import Measure
from tracker.core.kinds import Intervention
from tracker.core.tables import Column, Table, estimate, table
from tracker.stats.multiple import holm
from tracker.stats.recovered import recovered
from tracker.studies.base import SIGNIFICANT
from tracker.studies.rescale.figures import EVERY, NAMES, WAYS, Costs

_NOT_MEASURED = "not measured; what is lacking says why"
_NOT_FINITE = "a drop is not a finite number"
_NO_TEST = "McNemar's test needs outcomes that are right or wrong, and there are none"


def in_unit(measure: Measure) -> str:
    """Name the unit of a drop behind what it is; nothing where its form says it."""
    return "" if measure.form == "points" else f", {measure.unit}"


def summary(cells: Sequence[Costs]) -> Table:
    """Say of each cell of one measure how much of the drop each stand-in wins back."""
    measure = cells[0].measure

    def won_back(way: Intervention, nats: bool) -> Column[Costs]:
        what = "the gold log-probability" if nats else f"the {measure.level}"

        def value(cell: Costs) -> Estimate:
            drops, drawn = (cell.nats, cell.drawn_nats) if nats else (cell.drops, cell.drawn)
            if way not in drops:
                return Estimate(None, reason=_NOT_MEASURED)
            return recovered(drops["remove"], drops[way], drawn["remove"], drawn[way])

        return Column(f"{NAMES[way]} wins back, of {what}", "percent", value)

    def mean(cell: Costs) -> Estimate:
        return estimate(float(cell.drops["remove"].mean()), _NOT_FINITE)

    label = f"mean {measure.change} of a removal{in_unit(measure)}"
    return table(
        "What stands in for a layer, and how much of the drop it wins back",
        [
            Column("model and benchmark", "text", lambda cell: cell.name),
            Column("documents", "count", lambda cell: cell.n),
            Column(label, measure.form, mean),
            *(won_back(way, nats) for nats in (False, True) for way in WAYS),
            Column("fitted on", "text", lambda cell: cell.fitted_on or None, "it is not known"),
        ],
        cells,
        (
            "Won back: 1 − (sum of the drops with the stand-in) / (sum of the drops of "
            "removals), over all layers, with 95 % intervals from resampling documents. "
            "Below 0: worse than nothing in the layer's place.",
        ),
    )


class _Tested(NamedTuple):
    """A row: a stand-in, and in how many layers it was tested and does better or worse."""

    way: Intervention
    made: int
    better: int
    worse: int


def significant(cells: Sequence[Costs]) -> Table:
    """Count the layers where a stand-in does significantly better, or worse, than nothing."""
    rows = []
    for way in WAYS:
        some = [cell for cell in cells if way in cell.drops]
        if not some:
            continue
        p = holm([value for cell in some for value in cell.better[way]])
        gain = np.concatenate([cell.drops["remove"] - cell.drops[way] for cell in some])
        sure = np.array([value is not None and value < SIGNIFICANT for value in p])
        made = sum(value is not None for value in p)
        counts = (int((sure & (gain > 0)).sum()), int((sure & (gain < 0)).sum()))
        rows.append(_Tested(way, made, *counts))
    columns: tuple[Column[_Tested], ...] = (
        Column("stand-in", "text", lambda row: NAMES[row.way]),
        Column("layers × benchmarks tested", "count", lambda row: row.made),
        Column(
            "significantly better", "count", lambda row: row.better if row.made else None, _NO_TEST
        ),
        Column(
            "significantly worse", "count", lambda row: row.worse if row.made else None, _NO_TEST
        ),
    )
    return table(
        "Layers where a stand-in does otherwise than nothing",
        columns,
        rows,
        (
            "Exact McNemar tests, Holm's adjustment within each row, 5 %; layers of metrics that "
            "are not right or wrong a document are not tested.",
        ),
    )


def layer_table(cell: Costs) -> Table:
    """List what each layer costs with something in its place."""

    def column(way: Intervention) -> Column[int]:
        def value(place: int) -> Estimate:
            low, high = np.quantile(cell.drawn[way][:, place], [0.025, 0.975])
            return estimate(float(cell.drops[way][place]), _NOT_FINITE, float(low), float(high))

        return Column(NAMES[way], cell.measure.form, value)

    return table(
        f"{cell.name}: {cell.measure.change} of each layer with something in its place"
        f"{in_unit(cell.measure)}",
        [
            Column("layer", "count", lambda place: cell.layers[place]),
            *(column(way) for way in EVERY if way in cell.drops),
        ],
        range(len(cell.layers)),
    )
