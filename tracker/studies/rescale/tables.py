"""The tables of the study `rescale`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tracker.config import Intervention
from tracker.findings import Entry, FoundTable, Unit
from tracker.ledger.viewed import Array
from tracker.metrics.multiple import holm
from tracker.metrics.recovered import recovered
from tracker.studies.base import SIGNIFICANT
from tracker.studies.layout import Row, entry, estimated, table
from tracker.studies.rescale.figures import EVERY, NAMES, WAYS, Costs

NO_MAP = "no linear map could be fitted, because the calibration text is short"


def summary(cells: Sequence[Costs]) -> FoundTable:
    """Say of each cell how much of the drop each stand-in wins back."""
    rows: list[Row] = []
    for cell in cells:
        both = ((cell.drops, cell.drawn), (cell.nats, cell.drawn_nats))
        shares = [_recovered(drops, drawn, way) for drops, drawn in both for way in WAYS]
        rows.append((cell.name, cell.n, float(cell.drops["remove"].mean()), *shares))
    won_back: list[tuple[str, Unit]] = [
        (f"{NAMES[way]} wins back, {what}", "percent")
        for what in ("of the accuracy", "of the gold log-probability")
        for way in WAYS
    ]
    return table(
        "What stands in for a layer, and how much of the drop it wins back",
        [
            ("cell", "text"),
            ("documents", "count"),
            ("mean drop of a removal", "points"),
            *won_back,
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
) -> Entry:
    if way not in drops:
        return Entry(reason=NO_MAP)
    return estimated(recovered(drops["remove"], drops[way], drawn["remove"], drawn[way]))


def significant(cells: Sequence[Costs]) -> FoundTable:
    """Count the layers where a stand-in does significantly better, or worse, than nothing."""
    rows: list[Row] = []
    for way in WAYS:
        some = [cell for cell in cells if way in cell.drops]
        if not some:
            continue
        p = holm([value for cell in some for value in cell.better[way]])
        gain = np.concatenate([cell.drops["remove"] - cell.drops[way] for cell in some])
        sure = np.array([value is not None and value < SIGNIFICANT for value in p])
        rows.append(
            (
                NAMES[way],
                len(p),
                int((sure & (gain > 0)).sum()),
                int((sure & (gain < 0)).sum()),
            )
        )
    return table(
        "Layers where a stand-in does otherwise than nothing",
        (
            ("stand-in", "text"),
            ("layers × cells", "count"),
            ("significantly better", "count"),
            ("significantly worse", "count"),
        ),
        rows,
        ("Exact McNemar tests, Holm's adjustment within each row, 5 %.",),
    )


def layer_table(cell: Costs) -> FoundTable:
    """List what each layer costs with something in its place."""
    ways = [way for way in EVERY if way in cell.drops]
    rows: list[Row] = []
    for place, layer in enumerate(cell.layers):
        row: list[Entry | float] = [layer]
        for way in ways:
            low, high = np.quantile(cell.drawn[way][:, place], [0.025, 0.975])
            row.append(entry(float(cell.drops[way][place]), low=low, high=high))
        rows.append(tuple(row))
    return table(
        f"{cell.name}: accuracy drop of each layer with something in its place",
        [("layer", "count"), *((NAMES[way], "points") for way in ways)],
        rows,
    )
