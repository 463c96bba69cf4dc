"""The tables and charts of the study `calibration`."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.core.estimates import Estimate
from tracker.core.findings import Line, LineChart
from tracker.core.tables import Column, Table, table
from tracker.studies.calibration.figures import DRAWS, SHOWN, SIZES, Curve


def needed_table(rows: Sequence[tuple[str, Curve]], wanted: float) -> Table:
    """Say how many documents each ranking needs, of a title and a curve each."""

    def alike(row: tuple[str, Curve]) -> Estimate:
        curve = row[1]
        return Estimate(curve.predicted(curve.documents), reason=curve.doubt)

    def how(row: tuple[str, Curve]) -> Estimate | str:
        if row[1].needed.value is None:
            return row[1].needed
        return "extrapolated" if row[1].extrapolated else "measured"

    columns: tuple[Column[tuple[str, Curve]], ...] = (
        Column("model and benchmark", "text", lambda row: row[0]),
        Column("ranked by", "text", lambda row: row[1].name),
        Column("documents", "count", lambda row: row[1].documents),
        Column("two halves agree", "coefficient", lambda row: row[1].agreement(row[1].half)),
        Column("all agree with as many others", "coefficient", alike),
        Column(f"documents for {wanted:g}", "count", lambda row: row[1].needed),
        Column("how", "text", how),
    )
    return table(
        f"How many documents rank the layers with a reliability of {wanted:g}",
        columns,
        rows,
        "Agreement is the mean Spearman correlation of two samples; in brackets the middle "
        "95 % of random draws. That of all documents with as many others is extrapolated "
        "by Spearman-Brown. The interval of the number is a jackknife over documents. Where "
        "the brackets of two halves hold 0, a tenth less of the documents leaves the number "
        "undefined, or the layers are not shown to differ (Holm over all rows), two halves "
        "agree no surer than chance, and no number is named.",
    )


def agreement_table(title: str, drop: Curve) -> Table:
    """List how well samples of each size agree."""

    def shared(name: str) -> Column[int]:
        return Column(f"{name} shared", "percent", lambda n: drop.agreement(n, name))

    chance = ", ".join(
        f"{100 * k / drop.layers:.0f} % of the {name}" for name, end, k in drop.tops if end == "top"
    )
    with_all = f"a sample with all {drop.documents:,}"
    return table(
        f"{title}: agreement of random samples on the order by {drop.name}",
        (
            Column("n", "count", lambda n: n),
            Column("two samples", "coefficient", drop.agreement),
            Column("by Spearman-Brown", "coefficient", drop.predicted, drop.doubt),
            Column(with_all, "coefficient", lambda n: drop.agreement(n, apart=False)),
            Column("two samples, Kendall", "coefficient", lambda n: drop.agreement(n, "kendall")),
            *(shared(name) for name, _, _ in drop.tops),
        ),
        [n for n in drop.sizes if n in SHOWN or n == drop.half],
        f"In brackets the middle 95 % of {DRAWS} random draws. By chance two orders share "
        f"{chance}, and as many of the bottom. A sample is part of all documents, which is why "
        "it agrees better with them than with another sample.",
    )


def agreement_chart(title: str, curves: Sequence[Curve]) -> LineChart:
    """Draw how well samples of each size agree, by the drop and by what could stand in for it."""
    drop = curves[0]
    end = max(drop.documents, drop.needed.value or 0)
    places = sorted({*drop.sizes, *(n for n in SIZES if n <= 2 * end)})

    def line(curve: Curve, name: str, apart: bool, band: bool) -> Line:
        figures = (curve.agreement(n, apart=apart) if n in curve.sizes else None for n in places)
        return Line.of(name, figures, band)

    halves = f"{drop.name}, Spearman-Brown from two halves"
    with_all = f"{drop.name}, a sample with all {drop.documents:,}"
    return LineChart(
        title=f"{title}: how well samples of documents agree on the order of {drop.layers} layers",
        x="documents in a sample",
        y="rank correlation",
        unit="coefficient",
        places=tuple(places),
        lines=(
            line(drop, f"{drop.name}, two samples", True, True),
            Line(name=halves, values=tuple(map(drop.predicted, places))),
            line(drop, with_all, False, False),
            *(line(curve, f"{curve.name}, two samples", True, False) for curve in curves[1:]),
        ),
        log_x=True,
    )


def overlap_chart(title: str, drop: Curve) -> LineChart:
    """Draw how many of the most and least relevant layers two samples share."""
    places = [n for n in drop.sizes if n <= drop.half]
    lines = []
    for name, end, k in drop.tops:
        label = f"the {k} that matter {'most' if end == 'top' else 'least'}"
        lines.append(Line.of(label, (drop.agreement(n, name) for n in places), band=False))
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
