"""Draw the charts of one cell: drops, cosine score against drop, and decisions of runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tracker.analysis.agreement import correlation
from tracker.analysis.claims import shown_runs
from tracker.core import formats
from tracker.core.changes import WHOLE_LAYER, Change
from tracker.core.decision_records import DecisionsRecord
from tracker.core.estimates import Estimate
from tracker.core.formats import counted, two_digits
from tracker.core.kinds import KINDS
from tracker.core.proxies import PROXIES
from tracker.core.records import CellRecord, RunRecord, layers_of
from tracker.report import wording
from tracker.report.charts import style
from tracker.report.charts.maps import centred_map, kind_map, mapped
from tracker.report.charts.style import along_layers, run_hover
from tracker.report.wording import WORDS
from tracker.stats.accuracy import SCALES
from tracker.stats.arrays import Array
from tracker.stats.decisions import cluster_order, phi
from tracker.stats.support import Verdict


def curve_title(cell: CellRecord) -> str:
    """Return a title of the layer curve: the runs shown to cost or help, and the benchmark."""
    measure = formats.measure_of(cell)
    records = [run for run in cell.runs if run.change.kind.is_single]
    if not any(formats.defined(record.drop.value) for record in records):
        return f"{cell.title}: no {measure.change} is defined"
    shown = shown_runs(cell, records)
    costly, helpful = (
        [change for change, verdict in shown.items() if verdict == sign]
        for sign in ("costs", "helps")
    )
    # A layer with a replacement is not removed.
    removed = all(record.change.intervention == "remove" for record in records)
    noun = "removals" if removed else "runs"
    return WORDS.one("curve_title", cell, measure, len(records), noun, costly, helpful)


def scatter_title(cell: CellRecord) -> str:
    """Return a title of the scatter: three correlations, their intervals and their samples."""
    change = formats.measure_of(cell).change
    text = wording.correlation_text(correlation(cell))
    inner = correlation(cell, "inner")
    without = "without the two outer layers at each end"
    others = [f"{without} {wording.short_correlation(inner)}"] if inner else []
    others += [
        f"{name} {wording.short_correlation(found)}"
        for name, coefficient in (("Kendall tau-b", "kendall"), ("Pearson", "pearson"))
        if (found := correlation(cell, coefficient=coefficient))
    ]
    says = f"{cell.title}: Spearman of cosine score and {change} {text}"
    return f"{says}; {', '.join(others)}" if others else says


def cell_charts(cell: CellRecord) -> dict[str, go.Figure]:
    """Draw all charts that a cell's data allows, by name, for its run on a tracking backend."""
    found = {}
    if curve_kinds(cell):
        found["accuracy_drop"] = layer_curve(cell).figure()
    if cell.whole_layers:
        found["proxies"] = proxy_scatter(cell).figure()
    for name, kinds in mapped(cell).items():
        found[f"map_{name}"] = kind_map(cell, kinds).figure()
    return found


def layer_curve(cell: CellRecord) -> style.Chart:
    """Draw the accuracy drop (or loss increase) of every layer above its cosine score.

    Two panels share the layer axis, because two scales in one panel would suggest a comparison of
    heights that means nothing. Drops are in pp, increases in the loss's unit (trace `accuracy drop`
    or `loss increase`; one trace a kind, under its name, where there are several), with 95 %
    intervals where these are few lines; cosine scores are the trace `cosine score`. Undefined and
    missing layers are gaps; spans of several layers, and heads, are not in it.
    """
    kinds = curve_kinds(cell)
    shown = shown_runs(cell, [run for run in cell.runs if run.change.kind.is_single])
    single, few = len(kinds) == 1, len(kinds) <= style.FEW
    measure = formats.measure_of(cell)
    data: list[dict[str, Any]] = []
    for number, kind in enumerate(kinds):
        layers = layers_of(kind, cell)
        records, hover = along_layers(cell, kind, layers)
        drops = [style.finite(run.drop.value, measure.scale) if run else None for run in records]
        look = KINDS[kind.word]
        opacity = _strength(records, shown)
        if single:
            places: Sequence[float] = layers
            colour, signs = style.GREY, style.sign_colours(drops)
            marker: dict[str, Any] = {"color": signs}
        else:
            # Side by side, so that no interval hides another.
            aside = min(0.2, 0.8 / len(kinds)) * (number - (len(kinds) - 1) / 2)
            places = [layer + aside for layer in layers]
            colour, marker = look.colour, {"color": look.colour, "symbol": look.mark}
        intervals = [run.drop if run else None for run in records]
        data.append(
            style.trace(
                "scatter",
                measure.change if single else wording.kind_words(kind),
                places,
                drops,
                hover,
                error_y=style.errors(intervals, measure.scale, color=colour) if few else {},
                mode="lines+markers",
                line={"color": style.FAINT if single else look.colour, "width": 1},
                marker={"size": 7, "opacity": opacity} | marker,
                showlegend=not single,
            )
        )
    layers = layers_of(WHOLE_LAYER, cell)
    records, hover = along_layers(cell, WHOLE_LAYER, layers)
    scores = [style.finite(run.cosine_score) if run else None for run in records]
    drawn = style.trace("bar", "cosine score", layers, scores, hover, xaxis="x2", yaxis="y2")
    drawn |= {"marker": {"color": style.PROXY, "line": {"width": 0}}, "width": 0.6}
    data.append(drawn | {"showlegend": False})
    nothing = {"text": "measured for whole single layers only", "showarrow": False}
    nothing |= {"x": 0.5, "y": 0.5, "xref": "x2 domain", "yref": "y2 domain"}
    along = style.layer_axis(sorted({layer for kind in kinds for layer in layers_of(kind, cell)}))
    return style.chart(
        curve_title(cell),
        data,
        470,
        xaxis=along | {"title": {}, "anchor": "y", "matches": "x2", "showticklabels": False},
        xaxis2=along | {"anchor": "y2"},
        yaxis=_change_axis(measure) | {"domain": [0.39, 1]},
        yaxis2={
            "domain": [0, 0.3],
            "anchor": "x2",
            "title": {"text": "cosine score<br>(1 − cos)"},
            "rangemode": "tozero",
            "showticklabels": bool(layers),
            "showgrid": bool(layers),
        },
        annotations=[] if layers else [nothing],
    )


def _strength(runs: Sequence[RunRecord | None], shown: Mapping[Change, Verdict]) -> list[float]:
    return style.strength(run is not None and shown[run.change] != "open" for run in runs)


def _change_axis(measure: formats.Measure) -> dict[str, Any]:
    return {"title": {"text": f"{measure.change} ({measure.unit})"}, "zeroline": True}


def curve_kinds(cell: CellRecord) -> list[Change]:
    """List the kinds of single layers that the layer curve draws; whole layers without runs.

    Repeated single layers are a row of the map of all spans, if there is one.
    """
    on_maps = [kind for kinds in mapped(cell).values() for kind in kinds]
    single = [kind for kind in cell.kinds or [WHOLE_LAYER] if kind.is_single]
    return [kind for kind in single if kind.intervention != "repeat" or kind not in on_maps]


def proxy_scatter(cell: CellRecord) -> style.Chart:
    """Draw the accuracy drop (or loss increase) of every layer against its cosine score.

    One labelled point for each layer where both are defined, in two traces: `inner layers`, and
    `outer layers` for the first two and the last two.
    """
    measure = formats.measure_of(cell)
    with_drop = [run for run in cell.whole_layers if formats.defined(run.drop.value)]
    records = [run for run in with_drop if formats.defined(run.cosine_score)]
    records.sort(key=lambda record: record.change.layer)
    shown = shown_runs(cell, cell.whole_layers)
    along = style.value_axis(PROXIES["cosine_score"].heading, [r.cosine_score for r in records])
    scores = [record.cosine_score or 0.0 for record in records]
    ends = [end for r in records for end in (r.drop.value, r.drop.low, r.drop.high)]
    across = style.shares([math.log(x) for x in scores] if along.get("type") == "log" else scores)
    up = style.shares([r.drop.value or 0.0 for r in records], [e for e in ends if e is not None])
    sides = style.label_sides(list(zip(across, up, strict=True)))
    side = dict(zip((record.change.layer for record in records), sides, strict=True))
    outer = {0, 1, cell.model.layers - 2, cell.model.layers - 1}
    data = []
    for name, symbol, width, is_outer in (
        ("inner layers", "circle", 0, False),
        ("outer layers (first two, last two)", "diamond-open", 2, True),
    ):
        group = [record for record in records if (record.change.layer in outer) == is_outer]
        signs = style.sign_colours(record.drop.value for record in group)
        data.append(
            style.trace(
                "scatter",
                name,
                [record.cosine_score for record in group],
                [style.finite(record.drop.value, measure.scale) for record in group],
                [run_hover(cell, record.change, record) for record in group],
                error_y=style.errors([r.drop for r in group], measure.scale, color=style.FAINT),
                mode="markers+text",
                text=[str(record.change.layer) for record in group],
                textposition=[side[record.change.layer] for record in group],
                textfont={"size": 10, "color": style.GREY},
                marker={"size": 8, "symbol": symbol, "color": signs, "line": {"width": width}}
                | {"opacity": _strength(group, shown)},
                # A legend would take the colour of its first point, as if all of them helped.
                showlegend=False,
            )
        )
    return style.chart(scatter_title(cell), data, 460, xaxis=along, yaxis=_change_axis(measure))


def margin_name(cell: CellRecord, decided: DecisionsRecord) -> str:
    """Name the margin of a cell: of the gold option over the best other one, or of the answer."""
    name = cell.metric.partition(",")[0]
    if not decided.options:
        whole = cell.benchmark.tasks[0].metrics.get(cell.metric) in SCALES
        return f"log-probability of the {'text' if whole else 'answer'} (nats)"
    per = {"acc_norm": "nats a character", "acc_bytes": "nats a byte"}.get(name, "nats")
    return f"margin of the gold option ({per})"


def margin_chart(cell: CellRecord, decided: DecisionsRecord) -> style.Chart | None:
    """Draw the median margin of every run with its quartiles, and that of the intact model.

    None if no margin is defined, or if only parts of layers are removed.
    """
    there = {run.run.kind for run in decided.runs if run.margins}
    kinds = [
        kind for kind in cell.kinds if kind in there and kind.part is None and kind.members is None
    ]
    if decided.margins is None or not kinds:
        return None
    layers = sorted({layer for kind in kinds for layer in layers_of(kind, cell)})
    low, middle, high = decided.margins
    several, few = len(kinds) > 1, len(kinds) <= style.FEW
    traces = []
    for number, kind in enumerate(kinds):
        mine = {
            one.run: one.margins for one in decided.runs if one.run.kind == kind and one.margins
        }
        quartiles = [Estimate(half, lower, upper) for lower, half, upper in mine.values()]
        look = style.line(number) if several else {"color": KINDS[kind.word].colour}
        colour = look["color"] if several else style.GREY
        hover = [
            f"{run.label()}: median {two_digits(half)}, half of the documents from "
            f"{two_digits(lower)} to {two_digits(upper)}"
            for run, (lower, half, upper) in mine.items()
        ]
        traces.append(
            style.trace(
                "scatter",
                wording.kind_words(kind),
                [run.layer for run in mine],
                [quartile.value for quartile in quartiles],
                hover,
                error_y=style.errors(quartiles, color=colour) if few else {},
                mode="lines+markers" if several else "markers",
                line=look,
                marker={"color": look["color"], "size": 7, "symbol": KINDS[kind.word].mark},
                showlegend=several,
            )
        )
    across = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": low, "y1": high}
    shapes = [
        {**across, "fillcolor": style.FAINT, "line": {"width": 0}, "layer": "below"},
        {
            **across,
            "type": "line",
            "y0": middle,
            "y1": middle,
            "line": {"color": style.GREY, "width": 1},
        },
    ]
    return style.chart(
        f"{cell.title}: median {margin_name(cell, decided)} without each layer",
        traces,
        320,
        shapes=shapes,
        xaxis=style.layer_axis(layers),
        yaxis={"title": {"text": margin_name(cell, decided)}},
    )


def agreement(decided: DecisionsRecord) -> tuple[list[int], Array]:
    """Correlate the sets of documents that layers lose.

    Args:
        decided: Decisions of the runs of a cell.

    Returns:
        The comparable layers, with similar layers next to each other, and their correlations.
    """
    both = np.array(decided.both, dtype=np.float64).reshape((len(decided.both),) * 2)
    coefficients = phi(both, np.diag(both), decided.right)
    (defined,) = np.nonzero(~np.isnan(np.diag(coefficients)))
    order = defined[cluster_order(coefficients[np.ix_(defined, defined)])]
    return [decided.compared[number] for number in order], coefficients[np.ix_(order, order)]


def agreement_map(cell: CellRecord, decided: DecisionsRecord) -> style.Chart | None:
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
