"""The tables of the study `calibration`."""

from __future__ import annotations

from collections.abc import Sequence

from tracker.core.tables import Table
from tracker.studies.calibration.figures import DRAWS, SHOWN, Curve
from tracker.studies.layout import Row, entry, estimated, table


def needed_row(title: str, curve: Curve) -> Row:
    """Say how many documents one ranking needs."""
    found, how = curve.needed, "extrapolated" if curve.extrapolated else "measured"
    return (
        title,
        curve.name,
        curve.documents,
        curve.agreement(curve.half),
        entry(curve.predicted(curve.documents), curve.doubt),
        estimated(found),
        how if found.value is not None else estimated(found),
    )


def needed_table(rows: Sequence[Row], wanted: float) -> Table:
    """Set out the rows of all rankings."""
    return table(
        f"How many documents rank the layers with a reliability of {wanted:g}",
        (
            ("model and benchmark", "text"),
            ("ranked by", "text"),
            ("documents", "count"),
            ("two halves agree", "coefficient"),
            ("all agree with as many others", "coefficient"),
            (f"documents for {wanted:g}", "count"),
            ("how", "text"),
        ),
        rows,
        (
            "Agreement is the mean Spearman correlation of two samples; in brackets the middle "
            "95 % of random draws. That of all documents with as many others is extrapolated "
            "by Spearman-Brown. The interval of the number is a jackknife over documents. Where "
            "the brackets of two halves hold 0, or a tenth less of the documents leaves the number "
            "undefined, two halves agree no surer than chance, and no number is named.",
        ),
    )


def agreement_table(title: str, drop: Curve) -> Table:
    """List how well samples of each size agree."""
    rows: list[Row] = [
        (
            n,
            drop.agreement(n),
            entry(drop.predicted(n), drop.doubt),
            drop.agreement(n, apart=False),
            drop.agreement(n, "kendall"),
            *(drop.agreement(n, name) for name, _, _ in drop.tops),
        )
        for n in drop.sizes
        if n in SHOWN or n == drop.half
    ]
    chance = ", ".join(
        f"{k / drop.layers:.0%} of the {name}" for name, end, k in drop.tops if end == "top"
    )
    return table(
        f"{title}: agreement of random samples on the order by {drop.name}",
        (
            ("n", "count"),
            ("two samples", "coefficient"),
            ("by Spearman-Brown", "coefficient"),
            (f"a sample with all {drop.documents:,}", "coefficient"),
            ("two samples, Kendall", "coefficient"),
            *((f"{name} shared", "percent") for name, _, _ in drop.tops),
        ),
        rows,
        (
            f"In brackets the middle 95 % of {DRAWS} random draws. By chance two orders share "
            f"{chance}, and as many of the bottom. A sample is part of all documents, which is why "
            "it agrees better with them than with another sample.",
        ),
    )
