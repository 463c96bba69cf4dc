"""Draw charts of one model on one benchmark: drops, cosine scores, margins and lost documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tracker.analysis.agreement import find_correlation
from tracker.analysis.claims import run_verdicts
from tracker.analysis.runs import WHOLE_LAYERS_REASON
from tracker.report import wording
from tracker.report.charts import style
from tracker.report.charts.maps import centred_map, find_heat_map_rows, kind_map
from tracker.report.charts.style import align_runs, run_hover
from tracker.report.wording import WORDS
from tracker.schema import formats
from tracker.schema.changes import WHOLE_LAYER, Change
from tracker.schema.estimates import Estimate
from tracker.schema.formats import two_digits
from tracker.schema.grouping import group_by
from tracker.schema.kinds import KIND_STYLES
from tracker.schema.proxies import PROXIES
from tracker.schema.records import CellRecord, DecisionsRecord, RunRecord, first_layers
from tracker.stats.accuracy import RATIO_SCALES
from tracker.stats.arrays import Array
from tracker.stats.decisions import cluster_order, phi
from tracker.stats.support import Verdict


def curve_title(cell: CellRecord) -> str:
    """Return the title of `layer_curve`, with the layers that have significant effects."""
    measure = formats.metric_format(cell)
    records = [run for run in cell.runs if run.change.kind.is_single]
    if not any(formats.is_finite(record.drop.value) for record in records):
        return f"{cell.title}: no {measure.change} is defined"
    verdicts = run_verdicts(cell, records)
    costly, helpful = (
        [change for change, verdict in verdicts.items() if verdict == side]
        for side in ("costs", "helps")
    )
    # A layer with a replacement is not removed.
    is_removal = all(record.change.intervention == "remove" for record in records)
    noun = "removals" if is_removal else "runs"
    return WORDS.render("curve_title", cell, measure, len(records), noun, costly, helpful)


def scatter_title(cell: CellRecord) -> str:
    """Return the title of the scatter plot, with correlation coefficients and intervals."""
    title = (
        f"{cell.title}: Spearman correlation of cosine score and "
        f"{formats.metric_format(cell).change} "
    )
    title += wording.correlation_text(find_correlation(cell))
    records = {
        "without the first two and the last two layers": find_correlation(cell, "inner"),
        "Kendall tau-b": find_correlation(cell, coefficient="kendall"),
        "Pearson": find_correlation(cell, coefficient="pearson"),
    }
    texts = [f"{name} {wording.short_correlation(r)}" for name, r in records.items() if r]
    return f"{title}; {', '.join(texts)}" if texts else title


def cell_charts(cell: CellRecord) -> dict[str, go.Figure]:
    """Draw all charts of one model on one benchmark; return plotly figures by name."""
    figures = {}
    if curve_kinds(cell):
        figures["accuracy_drop"] = layer_curve(cell).to_figure()
    if cell.whole_layers:
        figures["proxies"] = proxy_scatter(cell).to_figure()
    for name, kinds in find_heat_map_rows(cell).items():
        figures[f"map_{name}"] = kind_map(cell, kinds).to_figure()
    return figures


def layer_curve(cell: CellRecord) -> style.Chart:
    """Draw the accuracy drop (or loss increase) of each layer, with cosine scores below.

    Drops and cosine scores are in two panels. Accuracy drops are in percentage points, and
    increases of a loss are in the unit of the loss. Each kind of ablation has its own line.
    Intervals (95 %) are drawn if there are at most three kinds of ablations. Layers without a value
    appear as gaps in the lines. The chart omits ablations of several layers at once and of single
    heads.
    """
    kinds = curve_kinds(cell)
    verdicts = run_verdicts(cell, [run for run in cell.runs if run.change.kind.is_single])
    is_single, measure = len(kinds) == 1, formats.metric_format(cell)
    data: list[dict[str, Any]] = []
    for number, kind in enumerate(kinds):
        layers = first_layers(kind, cell)
        records, hovers = align_runs(cell, kind, layers)
        drops = [record.drop if record else Estimate(None) for record in records]
        look = KIND_STYLES[kind.word]
        marker: dict[str, Any] = {"size": 7, "opacity": _opacities(records, verdicts)}
        if is_single:
            positions: Sequence[float] = layers
            name, colour, line_colour = measure.change, style.GREY, style.FAINT_GREY
            marker["color"] = style.sign_colours(drop.value for drop in drops)
        else:
            # Points of several traces are side by side, so that no interval hides another.
            offset = min(0.2, 0.8 / len(kinds)) * (number - (len(kinds) - 1) / 2)
            positions = [layer + offset for layer in layers]
            name, colour, line_colour = wording.kind_words(kind), look.colour, look.colour
            marker |= {"color": look.colour, "symbol": look.mark}
        data.append(
            style.estimate_trace(
                *("scatter", name, positions, drops, hovers, measure.scale),
                bars={"color": colour} if len(kinds) <= style.MAX_INTERVAL_LINES else None,
                mode="lines+markers",
                line={"color": line_colour, "width": 1},
                marker=marker,
                showlegend=not is_single,
            )
        )
    layers = first_layers(WHOLE_LAYER, cell)
    records, hovers = align_runs(cell, WHOLE_LAYER, layers)
    scores = [style.scale_value(run.cosine_score) if run else None for run in records]
    bars = style.build_trace("bar", "cosine score", layers, scores, hovers, xaxis="x2", yaxis="y2")
    bars |= {"marker": {"color": style.PROXY_COLOUR, "line": {"width": 0}}, "width": 0.6}
    data.append(bars | {"showlegend": False})
    note = {"text": WHOLE_LAYERS_REASON, "showarrow": False}
    note |= {"x": 0.5, "y": 0.5, "xref": "x2 domain", "yref": "y2 domain"}
    axis = style.layer_axis(sorted({layer for kind in kinds for layer in first_layers(kind, cell)}))
    return style.build_chart(
        curve_title(cell),
        data,
        470,
        xaxis=axis | {"title": {}, "anchor": "y", "matches": "x2", "showticklabels": False},
        xaxis2=axis | {"anchor": "y2"},
        yaxis=_change_axis(measure) | {"domain": [0.39, 1]},
        yaxis2={
            "title": {"text": "cosine score<br>(1 − cos)"},
            **{"domain": [0, 0.3], "anchor": "x2", "rangemode": "tozero"},
            **dict.fromkeys(("showticklabels", "showgrid"), bool(layers)),
        },
        annotations=[] if layers else [note],
    )


def _opacities(runs: Sequence[RunRecord | None], verdicts: Mapping[Change, Verdict]) -> list[float]:
    return style.opacities(run is not None and verdicts[run.change] != "open" for run in runs)


def _change_axis(measure: formats.MetricFormat) -> dict[str, Any]:
    return {"title": {"text": f"{measure.change} ({measure.unit})"}, "zeroline": True}


def curve_kinds(cell: CellRecord) -> list[Change]:
    """List the kinds of single-layer ablations in the chart `layer_curve`.

    For a cell without runs, the list contains only the removal of whole layers.
    """
    map_kinds = [kind for kinds in find_heat_map_rows(cell).values() for kind in kinds]
    single_kinds = [kind for kind in cell.kinds or [WHOLE_LAYER] if kind.is_single]
    return [kind for kind in single_kinds if kind.intervention != "repeat" or kind not in map_kinds]


def proxy_scatter(cell: CellRecord) -> style.Chart:
    """Draw the accuracy drop (or loss increase) of every layer against its cosine score.

    Each layer has one labelled point. Diamonds mark the first two and the last two layers, and
    circles mark all other layers.
    """
    measure = formats.metric_format(cell)
    records = [
        run
        for run in sorted(cell.whole_layers, key=lambda run: run.change.layer)
        if formats.is_finite(run.drop.value) and formats.is_finite(run.cosine_score)
    ]
    verdicts = run_verdicts(cell, cell.whole_layers)
    scores = [record.cosine_score or 0.0 for record in records]
    axis = style.value_axis(PROXIES["cosine_score"].heading, scores)
    ends = [end for r in records for end in (r.drop.value, r.drop.low, r.drop.high)]
    drops = [record.drop.value or 0.0 for record in records]
    x = style.relative_positions(list(map(math.log, scores)) if "type" in axis else scores)
    y = style.relative_positions(drops, [end for end in ends if end is not None])
    sides = style.label_sides(list(zip(x, y, strict=True)))
    outer_layers = {0, 1, cell.model.layers - 2, cell.model.layers - 1}
    data = []
    for name, symbol, width, is_outer in (
        ("inner layers", "circle", 0, False),
        ("the first two and the last two layers", "diamond-open", 2, True),
    ):
        points = [
            (record, side)
            for record, side in zip(records, sides, strict=True)
            if (record.change.layer in outer_layers) == is_outer
        ]
        group = [record for record, _ in points]
        colours = style.sign_colours(record.drop.value for record in group)
        data.append(
            style.estimate_trace(
                *("scatter", name, [record.cosine_score for record in group]),
                [record.drop for record in group],
                [run_hover(cell, record.change, record) for record in group],
                measure.scale,
                bars={"color": style.FAINT_GREY},
                text=[str(record.change.layer) for record in group],
                textposition=[side for _, side in points],
                marker={"size": 8, "symbol": symbol, "color": colours, "line": {"width": width}}
                | {"opacity": _opacities(group, verdicts)},
                **style.LABELLED_POINTS,
            )
        )
    yaxis = _change_axis(measure)
    return style.build_chart(scatter_title(cell), data, 460, xaxis=axis, yaxis=yaxis)


def margin_name(cell: CellRecord, decisions: DecisionsRecord) -> str:
    """Return the name of the margin with its unit: `margin of the gold option (nats)`.

    If a benchmark has no answer options, the margin is a log-probability.
    """
    if not decisions.options:
        is_text = cell.benchmark.tasks[0].metrics.get(cell.metric) in RATIO_SCALES
        return f"log-probability of the {'text' if is_text else 'answer'} (nats)"
    units = {"acc_norm": "nats a character", "acc_bytes": "nats a byte"}
    return f"margin of the gold option ({units.get(cell.metric.partition(',')[0], 'nats')})"


def margin_chart(cell: CellRecord, decisions: DecisionsRecord) -> style.Chart | None:
    """Draw the median and the quartiles of the gold option's margin for each run.

    Returns None if no margin is defined, or if only parts of layers are removed.
    """
    by_kind = group_by([run for run in decisions.runs if run.margins], lambda run: run.run.kind)
    kinds = [k for k in cell.kinds if k in by_kind and k.part is None and k.members is None]
    if decisions.margins is None or not kinds:
        return None
    is_single = len(kinds) == 1
    traces = []
    for number, kind in enumerate(kinds):
        look = KIND_STYLES[kind.word]
        line = {"color": look.colour} if is_single else style.line_style(number)
        bars = {"color": style.GREY if is_single else line["color"]}
        margins = {run.run: run.margins for run in by_kind[kind] if run.margins}
        hovers = [
            f"{run.label()}: median margin {two_digits(median)}, quartiles over the documents "
            f"{two_digits(lower)} and {two_digits(upper)}"
            for run, (lower, median, upper) in margins.items()
        ]
        traces.append(
            style.estimate_trace(
                *("scatter", wording.kind_words(kind), [run.layer for run in margins]),
                [Estimate(median, lower, upper) for lower, median, upper in margins.values()],
                hovers,
                bars=bars if len(kinds) <= style.MAX_INTERVAL_LINES else None,
                mode="markers" if is_single else "lines+markers",
                line=line,
                marker={"color": line["color"], "size": 7, "symbol": look.mark},
                showlegend=not is_single,
            )
        )
    low, median, high = decisions.margins
    shape = {"xref": "paper", "x0": 0, "x1": 1}
    band = {"type": "rect", "y0": low, "y1": high, "fillcolor": style.FAINT_GREY, "layer": "below"}
    middle = {"type": "line", "y0": median, "y1": median}
    name = margin_name(cell, decisions)
    return style.build_chart(
        f"{cell.title}: median {name} under each ablation",
        traces,
        320,
        shapes=[
            shape | band | {"line": {"width": 0}},
            shape | middle | {"line": {"color": style.GREY, "width": 1}},
        ],
        xaxis=style.layer_axis(
            sorted({layer for kind in kinds for layer in first_layers(kind, cell)})
        ),
        yaxis={"title": {"text": name}},
    )


def lost_document_correlations(decisions: DecisionsRecord) -> tuple[list[int], Array]:
    """Compute the correlation of lost documents for each pair of layers.

    A document is lost if it becomes wrong when the layer is removed.

    Args:
        decisions: Answers of a model under each ablation.

    Returns:
        The layers, ordered so that similar layers are adjacent, and the matrix of correlations (φ).
    """
    losses = np.array(decisions.both, dtype=np.float64).reshape((len(decisions.both),) * 2)
    coefficients = phi(losses, np.diag(losses), decisions.right)
    (rows,) = np.nonzero(~np.isnan(np.diag(coefficients)))
    order = rows[cluster_order(coefficients[np.ix_(rows, rows)])]
    return [decisions.compared[number] for number in order], coefficients[np.ix_(order, order)]


def lost_document_map(cell: CellRecord, decisions: DecisionsRecord) -> style.Chart | None:
    """Draw a heat map that shows whether removals of two layers make the same documents wrong.

    Returns None if fewer than two layers have defined correlations.
    """
    layers, coefficients = lost_document_correlations(decisions)
    if len(layers) < 2:
        return None
    labels = [str(layer) for layer in layers]
    n_left_out = len(decisions.compared) - len(layers)
    title = f"{cell.title}: correlation of the errors that the removals of two layers cause"
    if n_left_out:
        title += f"; layers not shown: {n_left_out} (no answer becomes wrong, or every answer)"
    axis = {"type": "category", "showgrid": False, "ticks": "", "tickangle": 0}
    axis |= {"tickfont": {"size": 9}}
    chart = centred_map(
        title,
        "agreement",
        columns=labels,
        rows=labels,
        values=[[round(float(value), 2) for value in row] for row in coefficients],
        hovers=(),
        ticks=("−1<br>never the same", "0<br>independent", "1<br>the same"),
        largest=1,
        height=170 + 15 * len(layers),
        has_crosses=False,
        xaxis=axis | {"title": {"text": "layer (0-based), clustered"}},
    )
    # There is no text for each pair, because the number of pairs is the square of the layers.
    chart.data[0] |= {
        "hovertext": None,
        "hoverinfo": None,
        "hovertemplate": "layers %{y} and %{x}: φ %{z:.2f}<extra></extra>",
    }
    return chart
