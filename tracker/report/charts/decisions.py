"""Charts of what runs decide: margins over layers, and agreement in the documents lost."""

from __future__ import annotations

import numpy as np

from tracker.core.decision_records import DecisionsRecord
from tracker.core.estimates import Estimate
from tracker.core.formats import counted, two_digits
from tracker.core.kinds import KINDS
from tracker.core.records import CellRecord, layers_of
from tracker.report import wording
from tracker.report.charts.maps import centred_map
from tracker.report.charts.style import (
    FAINT,
    FEW,
    GREY,
    Chart,
    chart,
    errors,
    layer_axis,
    line,
    trace,
)
from tracker.stats.accuracy import SCALES
from tracker.stats.arrays import Array
from tracker.stats.decisions import cluster_order, phi


def margin_name(cell: CellRecord, decided: DecisionsRecord) -> str:
    """Say what a margin is in nats of: the gold option over the best other one, or the answer."""
    name = cell.metric.partition(",")[0]
    if not decided.options:
        whole = cell.benchmark.tasks[0].metrics.get(cell.metric) in SCALES
        return f"log-probability of the {'text' if whole else 'answer'} (nats)"
    per = {"acc_norm": "nats a character", "acc_bytes": "nats a byte"}.get(name, "nats")
    return f"margin of the gold option ({per})"


def margin_chart(cell: CellRecord, decided: DecisionsRecord) -> Chart | None:
    """Draw the median margin of every run with its quartiles, beside the intact model's.

    None where no margin is defined, and where what was removed are parts of layers alone.
    """
    there = {run.run.kind for run in decided.runs if run.margins}
    kinds = [
        kind for kind in cell.kinds if kind in there and kind.part is None and kind.members is None
    ]
    if decided.margins is None or not kinds:
        return None
    layers = sorted({layer for kind in kinds for layer in layers_of(kind, cell)})
    low, middle, high = decided.margins
    several, few = len(kinds) > 1, len(kinds) <= FEW
    traces = []
    for number, kind in enumerate(kinds):
        mine = {
            one.run: one.margins for one in decided.runs if one.run.kind == kind and one.margins
        }
        quartiles = [Estimate(half, lower, upper) for lower, half, upper in mine.values()]
        look = line(number) if several else {"color": KINDS[kind.word].colour}
        colour = look["color"] if several else GREY
        hover = [
            f"{run.label()}: median {two_digits(half)}, half of the documents from "
            f"{two_digits(lower)} to {two_digits(upper)}"
            for run, (lower, half, upper) in mine.items()
        ]
        traces.append(
            trace(
                "scatter",
                wording.kind_words(kind),
                [run.layer for run in mine],
                [quartile.value for quartile in quartiles],
                hover,
                error_y=errors(quartiles, color=colour) if few else {},
                mode="lines+markers" if several else "markers",
                line=look,
                marker={"color": look["color"], "size": 7, "symbol": KINDS[kind.word].mark},
                showlegend=several,
            )
        )
    across = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": low, "y1": high}
    shapes = [
        {**across, "fillcolor": FAINT, "line": {"width": 0}, "layer": "below"},
        {**across, "type": "line", "y0": middle, "y1": middle, "line": {"color": GREY, "width": 1}},
    ]
    return chart(
        f"{cell.title}: median {margin_name(cell, decided)} without each layer",
        traces,
        320,
        shapes=shapes,
        xaxis=layer_axis(layers),
        yaxis={"title": {"text": margin_name(cell, decided)}},
    )


def agreement(decided: DecisionsRecord) -> tuple[list[int], Array]:
    """Correlate which documents the layers lose.

    Args:
        decided: What the runs of a cell decide.

    Returns:
        The layers that can be compared, those that agree beside each other, and their correlations.
    """
    both = np.array(decided.both, dtype=np.float64).reshape((len(decided.both),) * 2)
    coefficients = phi(both, np.diag(both), decided.right)
    (defined,) = np.nonzero(~np.isnan(np.diag(coefficients)))
    order = defined[cluster_order(coefficients[np.ix_(defined, defined)])]
    return [decided.compared[number] for number in order], coefficients[np.ix_(order, order)]


def agreement_map(cell: CellRecord, decided: DecisionsRecord) -> Chart | None:
    """Draw how far layers agree in the documents they lose; None for fewer than two layers."""
    layers, coefficients = agreement(decided)
    if len(layers) < 2:
        return None
    labels = [str(layer) for layer in layers]
    left_out = len(decided.compared) - len(layers)
    title = f"{cell.title}: agreement of layers in the documents lost"
    if left_out:
        title += f"; {counted(left_out, 'layer')} left out, which lose none or all"
    axis = {"type": "category", "showgrid": False, "ticks": "", "tickangle": 0}
    axis |= {"tickfont": {"size": 9}}
    drawn = centred_map(
        title,
        "agreement",
        columns=labels,
        rows=labels,
        values=[[round(float(value), 2) for value in row] for row in coefficients],
        hovers=(),
        ticks=("−1<br>never the same", "0<br>independent", "1<br>the same"),
        largest=1,
        height=170 + 15 * len(layers),
        crosses=False,
        xaxis=axis | {"title": {"text": "layer (0-based), clustered"}},
    )
    # Not a text for each pair: there are as many as the square of the layers.
    drawn.data[0] |= {
        "hovertext": None,
        "hoverinfo": None,
        "hovertemplate": "layers %{y} and %{x}: φ %{z:.2f}<extra></extra>",
    }
    return drawn
