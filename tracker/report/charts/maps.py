"""Draw heat maps of layers against benchmarks, spans, heads or other parts."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from tracker.analysis.boards import layer_relevance
from tracker.analysis.claims import run_verdicts
from tracker.analysis.comparable import benchmark_labels
from tracker.report.charts import style
from tracker.report.wording import WORDS
from tracker.schema import formats
from tracker.schema.changes import WHOLE_LAYER, Change
from tracker.schema.grouping import group_by
from tracker.schema.kinds import OUTER_MATRICES
from tracker.schema.records import CellRecord, first_layers

# Fading to transparency, not to white, keeps 0 quiet on light and on dark pages.
_COLOUR_SCALE = [
    [0.0, "rgba(196,118,47,1)"],
    [0.499, "rgba(196,118,47,0.08)"],
    [0.501, "rgba(61,116,168,0.08)"],
    [1.0, "rgba(61,116,168,1)"],
]
_CROSS_MARKER = {"symbol": "x-thin", "size": 6, "line": {"width": 1.2, "color": style.GREY}}
_DOT_MARKER = {"size": 5, "color": "#fdfdfc", "line": {"width": 1.2, "color": "#1f2328"}}
_MAX_DOTTED_ROWS = 12
"""Maximum number of rows of a map with dots; in larger maps, dots would hide the colours."""
ROW_AXIS = {"autorange": "reversed", "showgrid": False, "ticks": "", "type": "category"}
"""Settings of the axis for the rows of a map."""
COLOUR_BAR = {
    "orientation": "h",
    "thickness": 9,
    # The scale has this length on a phone too, because shorter scales would have slanted labels.
    "lenmode": "pixels",
    "len": 200,
    "tickangle": 0,
    "yref": "container",
    "y": 0.02,
    "yanchor": "bottom",
    "ticklabeloverflow": "allow",
    "outlinewidth": 0,
}


def heat_map_title(cells: Sequence[CellRecord]) -> str:
    """Return the title of the chart that `heat_map` draws."""
    layers = first_layers(WHOLE_LAYER, *cells)
    noun = "cell" if any(cell.removed for cell in cells) else "benchmark"
    size = f"{len(layers)} layers × {formats.count_text(len(cells), noun)}"
    values = [layer_relevance(cell, layer).value for cell in cells for layer in layers]
    n_undefined = values.count(None)
    undefined = f"; {n_undefined} undefined" if n_undefined else ""
    return f"{cells[0].model.name}: accuracy relevance, {size}{undefined}"


def heat_map(cells: Sequence[CellRecord]) -> style.Chart:
    """Draw a heat map of one model's accuracy relevance (1: without the layer, accuracy is chance).

    Each row is a benchmark, and each column is a removed layer. Values that are not significant are
    drawn in a pale colour. A cross marks undefined and missing values; its hover box gives the
    reason. ValueError is raised if the cells belong to several models.
    """
    if len({cell.model.key for cell in cells}) != 1:
        raise ValueError("heat_map takes benchmarks of exactly one model")
    layers = first_layers(WHOLE_LAYER, *cells)
    labels = [row_label(label) for label in benchmark_labels(cells)]
    return centred_map(
        heat_map_title(cells),
        "accuracy relevance",
        columns=layers,
        rows=labels,
        values=[[layer_relevance(cell, layer).value for layer in layers] for cell in cells],
        hovers=[style.align_runs(cell, WHOLE_LAYER, layers)[1] for cell in cells],
        shown_mask=[_significance_mask(cell, [WHOLE_LAYER], layers)[0] for cell in cells],
        ticks=("≤ −1<br>removal helps", "0<br>no change", "1<br>to chance"),
        largest=1,
        height=165 + row_height(labels) * len(cells),
        xaxis=style.layer_axis(layers),
    )


def row_label(label: str) -> str:
    """Format the label of a heat map's row, with settings (e.g. few-shot) on a new line."""
    name, _, details = label.partition(" · ")
    return "<br>".join(filter(None, (html.escape(name), style.wrap_text(details, 18))))


def row_height(labels: Sequence[str]) -> int:
    """Return the height of a heat map's rows in pixels."""
    return max((15 * (label.count("<br>") + 1) + 10 for label in labels), default=0)


def find_heat_map_rows(cell: CellRecord) -> dict[str, list[Change]]:
    """Return the rows of each heat map of a cell: name of a heat map → kinds of ablations.

    A row can show the removal of head 3 from each layer, or of two adjacent layers.
    """
    # Several sets of layers begin at the same layer, so sets have no position on a map.
    kinds = [kind for kind in cell.kinds if not kind.members]
    kinds.sort(key=lambda kind: (kind.span, kind.number or 0))
    return {
        _family_name(family): rows
        for family, rows in group_by(kinds, lambda kind: kind.family).items()
        if len(rows) > 1 or rows[0].part is not None
    }


def _family_name(family: Change) -> str:
    name = family.word if family.repeats == 2 else f"{family.word}-{family.repeats}"
    return f"linear-{name}" if family.component == "linear" else name


def _describe_rows(kinds: Sequence[Change]) -> tuple[str, str]:
    """Describe the rows of a heat map in two texts: for the title, and for the axis."""
    kind = kinds[0]
    if kind.map is not None:
        return f"layer and linear map (weights rounded to {kind.intervention})", "linear map"
    if kind.number is not None:
        return f"layer and {kind.component}", kind.component
    if kind.intervention == "repeat":
        times = "again" if kind.repeats == 2 else f"{kind.repeats} times"
        title = f"first repeated layer and number of layers computed {times}"
        return title, f"layers computed {times}"
    parts = "layers" if kind.component == "layer" else f"layers’ {kind.component}"
    return f"first removed layer and number of removed {parts}", "layers"


def map_caption(kinds: Sequence[Change]) -> str:
    """Return a caption that explains the rows, columns and blank fields of a heat map."""
    return WORDS.render("map_caption", kinds, kinds[0])


def map_title(cell: CellRecord, kinds: Sequence[Change]) -> str:
    """Return the title of the heat map that `kind_map` draws, as plain text."""
    return f"{cell.title}: {formats.metric_format(cell).change} by {_describe_rows(kinds)[0]}"


def kind_map(cell: CellRecord, kinds: Sequence[Change]) -> style.Chart:
    """Draw a heat map of drops; each column is a layer, and each row is a kind of ablation.

    Values that are not significant are drawn in a pale colour. A cross marks undefined and missing
    values; its hover box gives the reason. A field is blank if its ablation was not requested.
    """
    measure = formats.metric_format(cell)
    has_parts = kinds[0].part is not None
    starts = {layer for kind in kinds if not kind.is_outer for layer in first_layers(kind, cell)}
    layers = sorted(starts) or [*range(cell.model.layers)]
    values: list[list[float | None]] = []
    hovers: list[list[str]] = []
    for kind in kinds:
        possible = {*first_layers(kind, cell)}
        columns = _stored_layers(kind, layers)
        records, texts = style.align_runs(cell, kind, columns)
        values.append(
            [style.scale_value(r.drop.value, measure.scale) if r else None for r in records]
        )
        hovers.append([t if c in possible else "" for c, t in zip(columns, texts, strict=True)])
    largest = largest_magnitude(values)
    limit = formats.three_digits(largest)
    action = "repetition" if kinds[0].intervention == "repeat" else "removal"
    action = "rounding" if kinds[0].map is not None else action
    return centred_map(
        map_title(cell, kinds),
        measure.change,
        columns=layers,
        rows=[str(kind.part if has_parts else kind.span) for kind in kinds],
        values=values,
        hovers=hovers,
        shown_mask=_significance_mask(cell, kinds, layers),
        ticks=(f"−{limit}<br>{action} helps", "0<br>no change", limit),
        largest=largest,
        height=165 + max(30 * min(len(kinds), _MAX_DOTTED_ROWS), 14 * len(kinds)),
        xaxis=style.layer_axis(layers, "layer (0-based)" if has_parts else "first layer (0-based)"),
        yaxis=ROW_AXIS | {"title": {"text": _describe_rows(kinds)[1]}},
    )


def _stored_layers(kind: Change, layers: Sequence[int]) -> Sequence[int]:
    """Return, for each column of a heat map, the layer number under which its run is stored.

    For layers and their parts, these numbers are `layers`. The run of the embedding (first column)
    and the run of the output head (last column) are stored as layer 0. Other columns get 1: no run.
    """
    if not kind.is_outer:
        return layers
    shown_column = 0 if kind.map == OUTER_MATRICES[0] else len(layers) - 1
    return [0 if column == shown_column else 1 for column in range(len(layers))]


def _significance_mask(
    cell: CellRecord, kinds: Sequence[Change], layers: Sequence[int]
) -> list[list[bool]]:
    """Return a mask of a heat map that is true where the drop is significant.

    The mask has one row for each kind of ablation, and one column for each layer. The tests are
    corrected for the number of runs in the heat map.
    """
    verdicts = run_verdicts(cell, [run for run in cell.runs if run.change.kind in kinds])
    return [
        [
            not (kind.is_outer and layer) and verdicts.get(kind.at_layer(layer), "open") != "open"
            for layer in _stored_layers(kind, layers)
        ]
        for kind in kinds
    ]


def largest_magnitude(values: Sequence[Sequence[float | None]]) -> float:
    """Return the largest absolute value of a heat map; 1 if all values are 0 or undefined."""
    return max((abs(v) for row in values for v in row if v is not None), default=0) or 1


def centred_map(
    title: str,
    name: str,
    *,
    columns: Sequence[int | str],
    rows: Sequence[str],
    values: Sequence[Sequence[float | None]],
    hovers: Sequence[Sequence[str]],
    ticks: tuple[str, str, str],
    largest: float,
    height: int,
    shown_mask: Sequence[Sequence[bool]] | None = None,
    has_crosses: bool = True,
    **layout: Any,
) -> style.Chart:
    """Draw a heat map whose colours are centred at 0.

    Values that are not significant are drawn in a pale colour. If the map has few rows, dots mark
    the significant values.

    Args:
        title: Title in plain text.
        name: Name of the mapped quantity, and of the trace.
        columns: Positions of the columns.
        rows: Labels of the rows (plotly's markup).
        values: Rows of values; None is a gap.
        hovers: Hover box of each value.
        ticks: Labels of the colour bar at -`largest`, 0 and `largest`.
        largest: Absolute value that has the strongest colour.
        height: Height in pixels.
        shown_mask: Mask of the significant values; None if significance was not tested.
        has_crosses: Whether gaps with a hover box are marked.
        **layout: Axes: `xaxis`, and optionally `yaxis`.

    Returns:
        The chart.
    """
    mask = shown_mask or [[True] * len(columns)] * len(rows)

    def field_trace(label: str, is_shown: bool, **more: Any) -> dict[str, Any]:
        shown = [
            [value if flag == is_shown else None for value, flag in zip(*row, strict=True)]
            for row in zip(values, mask, strict=True)
        ]
        more |= {"coloraxis": "coloraxis", "xgap": 1, "ygap": 1, "hoverongaps": False}
        return style.build_trace("heatmap", label, columns, rows, hovers, z=shown, **more)

    data = [field_trace(name, True)]
    if shown_mask:
        data.append(field_trace("open", False, opacity=style.OPEN_OPACITY))
    texts = hovers or [[""] * len(columns)] * len(rows)
    fields = [
        (column, row, *field)
        for row, *lines in zip(rows, values, mask, texts, strict=True)
        for column, *field in zip(columns, *lines, strict=True)
    ]
    if shown_mask and len(rows) <= _MAX_DOTTED_ROWS:
        dots = [(x, y, "") for x, y, value, shown, _ in fields if shown and value is not None]
        # The field below the mark has the hover box.
        data.append(_mark_trace("shown", dots, _DOT_MARKER) | {"hoverinfo": "skip"})
    if has_crosses:
        gaps = [(x, y, text) for x, y, value, _, text in fields if value is None and text]
        data.append(_mark_trace("undefined", gaps, _CROSS_MARKER))
    colours = {"cmin": -largest, "cmid": 0, "cmax": largest, "colorscale": _COLOUR_SCALE}
    bar = COLOUR_BAR | {"tickvals": [-largest, 0, largest], "ticktext": list(ticks)}
    axes = {"yaxis": ROW_AXIS, "coloraxis": colours | {"colorbar": bar}} | layout
    return style.build_chart(title, data, height, margin={"b": 105}, **axes)


def _mark_trace(
    name: str, marks: Sequence[tuple[int | str, str, str]], marker: Mapping[str, Any]
) -> dict[str, Any]:
    """Build a plotly trace of marks on a heat map; each mark is (column, row, hover box)."""
    x, y, hovers = zip(*marks, strict=True) if marks else ((), (), ())
    look = {"mode": "markers", "marker": marker, "showlegend": False}
    return style.build_trace("scatter", name, x, y, hovers, **look)
