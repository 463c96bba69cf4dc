"""The charts of the study `calibration`."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.core.findings import Line, LineChart
from tracker.studies.calibration.figures import SIZES, Curve


def agreement_chart(title: str, curves: Sequence[Curve]) -> LineChart:
    """Draw how well samples of each size agree, by the drop and by what could stand in for it."""
    drop = curves[0]
    known = [one.needed.value for one in curves[:1] if one.needed.value is not None]
    end = max([drop.documents, *known])
    places = sorted({*drop.sizes, *(n for n in SIZES if n <= 2 * end)})

    def line(curve: Curve, name: str, apart: bool, band: bool) -> Line:
        figures = (curve.agreement(n, apart=apart) if n in curve.sizes else None for n in places)
        return Line.of(name, figures, band)

    predicted = Line(
        name=f"{drop.name}, Spearman-Brown from two halves",
        values=tuple(drop.predicted(n) for n in places),
    )
    within = line(drop, f"{drop.name}, a sample with all {drop.documents:,}", False, False)
    return LineChart(
        title=f"{title}: how well samples of documents agree on the order of {drop.layers} layers",
        x="documents in a sample",
        y="rank correlation",
        unit="coefficient",
        places=tuple(places),
        lines=(
            line(drop, f"{drop.name}, two samples", True, True),
            predicted,
            within,
            *(line(one, f"{one.name}, two samples", True, False) for one in curves[1:]),
        ),
        log_x=True,
    )


def overlap_chart(title: str, drop: Curve) -> LineChart:
    """Draw how many of the most and least relevant layers two samples share."""
    places = [n for n in drop.sizes if n <= drop.half]
    lines = [
        Line.of(
            f"the {k} that matter {'most' if end == 'top' else 'least'}",
            (drop.agreement(n, name) for n in places),
            band=False,
        )
        for name, end, k in drop.tops
    ]
    for count in sorted({k for _, _, k in drop.tops}):
        chance = (count / drop.layers,) * len(places)
        lines.append(Line(name=f"{count} by chance", values=chance))
    return LineChart(
        title=f"{title}: layers that two samples have in common, by {drop.name}",
        x="documents in a sample",
        y="shared",
        unit="percent",
        places=tuple(places),
        lines=tuple(lines),
        log_x=True,
    )
