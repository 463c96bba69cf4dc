"""The charts of the study `joint`."""

from __future__ import annotations

from tracker.core.findings import Line, LineChart, MapChart
from tracker.core.formats import p_value
from tracker.core.records import CellRecord
from tracker.studies.joint.figures import Pairs


def interaction_map(record: CellRecord, one: Pairs) -> MapChart:
    """Draw all interactions, each in both halves; pairs at the floor are gaps."""
    layers = sorted(one.alone)
    places = {pair: n for n, pair in enumerate(one.pairs)}
    values: list[list[float | None]] = []
    hovers: list[list[str]] = []
    for i in layers:
        found = [places.get((min(i, j), max(i, j))) for j in layers]
        values.append([None if n is None else one.value(n) for n in found])
        hovers.append(["" if n is None else _hover(one, n) for n in found])
    left_out = f", {int(one.floor.sum())} at the floor" if one.floor.any() else ""
    return MapChart(
        title=f"{record.title}: interaction of two layers by {one.measure}, "
        f"{len(one.pairs):,} pairs{left_out}",
        x="layer (0-based)",
        y="layer",
        name="interaction",
        unit=one.unit,
        columns=tuple(layers),
        rows=tuple(map(str, layers)),
        values=tuple(map(tuple, values)),
        hovers=tuple(map(tuple, hovers)),
    )


def _hover(one: Pairs, place: int) -> str:
    (i, j), found = one.pairs[place], one.found[place]
    assert found.value is not None
    said = (
        f"{i} with {j}: {one.said(found)} · both {one.said(float(one.together[place]))}"
        f" · {i} {one.said(one.alone[i])} · {j} {one.said(one.alone[j])}"
    )
    if one.floor[place]:
        return f"{said} · at the floor"
    return f"{said} · p {p_value(one.q[place])} (Benjamini-Hochberg)"


def distance_chart(record: CellRecord, one: Pairs) -> LineChart:
    """Draw the mean interaction of pairs by how many layers they are apart."""
    distances = sorted(one.by_distance)
    means = [one.by_distance[d][0] for d in distances]
    return LineChart(
        title=f"{record.title}: mean interaction by distance, {one.measure}",
        x="distance |i − j|",
        y="interaction",
        unit=one.unit,
        places=tuple(distances),
        lines=(
            Line.of("pairs that are not at the floor" if one.floor.any() else "all pairs", means),
        ),
    )
