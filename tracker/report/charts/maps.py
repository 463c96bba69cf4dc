"""Heat maps: layers × benchmarks, and layers × spans or heads."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from tracker.analysis.boards import layer_relevance
from tracker.analysis.claims import shown_runs
from tracker.analysis.comparable import benchmark_labels
from tracker.core import formats
from tracker.core.changes import WHOLE_LAYER, Change
from tracker.core.grouping import grouped
from tracker.core.kinds import ENDS
from tracker.core.records import CellRecord, layers_of
from tracker.report.charts.style import (
    GREY,
    OPEN,
    Chart,
    along_layers,
    chart,
    finite,
    layer_axis,
    trace,
    wrap,
)
from tracker.report.wording import WORDS

# Fading to transparency, not to white, keeps 0 quiet on light and on dark pages.
_SCALE = [
    [0.0, "rgba(196,118,47,1)"],
    [0.499, "rgba(196,118,47,0.08)"],
    [0.501, "rgba(61,116,168,0.08)"],
    [1.0, "rgba(61,116,168,1)"],
]
_CROSS = {"symbol": "x-thin", "size": 6, "line": {"width": 1.2, "color": GREY}}
_DOT = {"size": 5, "color": "#fdfdfc", "line": {"width": 1.2, "color": "#1f2328"}}
_DOTTED = 12
"""In maps of more rows than this, dots would hide the colours."""
ROWS = {"autorange": "reversed", "showgrid": False, "ticks": "", "type": "category"}
"""The axis of a map's rows."""
COLOUR_BAR = {
    "orientation": "h",
    "thickness": 9,
    # As long on a phone, where labels would be slanted on fewer pixels.
    "lenmode": "pixels",
    "len": 200,
    "tickangle": 0,
    "yref": "container",
    "y": 0.02,
    "yanchor": "bottom",
    "ticklabeloverflow": "allow",
    "outlinewidth": 0,
}


def heat_title(cells: Sequence[CellRecord]) -> str:
    """Return a title of the heat map: its size, and the number of undefined values."""
    layers = layers_of(WHOLE_LAYER, *cells)
    total = len(layers) * len(cells)
    known = (layer_relevance(cell, layer).value for cell in cells for layer in layers)
    count = sum(value is not None for value in known)
    rows = "cell" if any(cell.removed for cell in cells) else "benchmark"
    size = f"{len(layers)} layers × {formats.counted(len(cells), rows)}"
    text = f"{cells[0].model.name}: accuracy relevance, {size}"
    return text + (f"; {total - count} undefined" if total > count else "")


def heat_map(cells: Sequence[CellRecord]) -> Chart:
    """Draw the accuracy relevance of every whole layer on every benchmark of one model.

    One row for each cell, centred at 0. Verdicts other than open are strong, all other values
    faint. Undefined and missing values are gaps with crosses that explain them (trace `undefined`).
    Raises ValueError if there is no cell, or if cells belong to several models.
    """
    if len({cell.model.key for cell in cells}) != 1:
        raise ValueError("heat_map takes benchmarks of exactly one model")
    layers = layers_of(WHOLE_LAYER, *cells)
    labels = [row_label(label) for label in benchmark_labels(cells)]
    return centred_map(
        heat_title(cells),
        "accuracy relevance",
        columns=layers,
        rows=labels,
        values=[[layer_relevance(cell, layer).value for layer in layers] for cell in cells],
        hovers=[along_layers(cell, WHOLE_LAYER, layers)[1] for cell in cells],
        shown=[_shown(cell, [WHOLE_LAYER], layers)[0] for cell in cells],
        ticks=("≤ −1<br>removal helps", "0<br>no change", "1<br>to chance"),
        largest=1,
        height=165 + row_height(labels) * len(cells),
        xaxis=layer_axis(layers),
    )


def row_label(label: str) -> str:
    """Return the label of a row: a benchmark, and below it the details that distinguish it."""
    name, _, rest = label.partition(" · ")
    return "<br>".join(filter(None, (html.escape(name), wrap(rest, 18))))


def row_height(labels: Sequence[str]) -> int:
    """Return the height of rows with these labels in pixels, enough for the longest label."""
    return max((15 * (label.count("<br>") + 1) + 10 for label in labels), default=0)


def mapped(cell: CellRecord) -> dict[str, list[Change]]:
    """Find the kinds of runs that make a map together, by its name.

    They are the spans of one component, where there are several, and the parts of layers: a row
    each.
    """
    drawn = [kind for kind in cell.kinds if not kind.members]  # of which several begin at one layer
    drawn.sort(key=lambda kind: (kind.span, kind.number or 0))
    return {
        _name(family): kinds
        for family, kinds in grouped(drawn, lambda kind: kind.family).items()
        if len(kinds) > 1 or kinds[0].part is not None
    }


def _name(family: Change) -> str:
    name = family.word if family.repeats == 2 else f"{family.word}-{family.repeats}"
    return f"linear-{name}" if family.component == "linear" else name


def _rows_of(kinds: Sequence[Change]) -> tuple[str, str]:
    """Return the names of a map's rows for its title, and for its axis."""
    kind = kinds[0]
    if kind.map is not None:
        return f"layer and linear map in {kind.intervention}", "linear map"
    if kind.number is not None:
        return f"layer and {kind.component}", kind.component
    first = "first layer and number of "
    if kind.intervention == "repeat":
        times = "again" if kind.repeats == 2 else f"{kind.repeats} times"
        return f"{first}layers that are passed {times}", f"layers passed {times}"
    what = "layers" if kind.component == "layer" else f"layers’ {kind.component}"
    return f"{first}removed {what}", "layers"


def map_caption(kinds: Sequence[Change]) -> str:
    """Explain a map of kinds: its rows, its columns, and its blanks."""
    return WORDS.one("map_caption", kinds, kinds[0])


def map_title(cell: CellRecord, kinds: Sequence[Change]) -> str:
    """Return a title of a map of kinds in plain text."""
    return f"{cell.title}: {formats.measure_of(cell).change} by {_rows_of(kinds)[0]}"


def kind_map(cell: CellRecord, kinds: Sequence[Change]) -> Chart:
    """Draw the accuracy drop (or loss increase) by layer and by kind of change.

    One row for each span or head, centred at 0. Verdicts other than open are strong, all other
    values faint. Undefined and missing values are gaps with crosses that explain them (trace
    `undefined`). Positions without a run are blank.
    """
    measure = formats.measure_of(cell)
    numbered = kinds[0].part is not None
    of_layers = {layer for kind in kinds if not kind.is_end for layer in layers_of(kind, cell)}
    layers = sorted(of_layers) or [*range(cell.model.layers)]
    values: list[list[float | None]] = []
    hovers: list[list[str]] = []
    for kind in kinds:
        there = {*layers_of(kind, cell)}
        where = _layers_along(kind, layers)
        records, texts = along_layers(cell, kind, where)
        values.append([finite(r.drop.value, measure.scale) if r else None for r in records])
        hovers.append([t if layer in there else "" for layer, t in zip(where, texts, strict=True)])
    largest = strongest(values)
    most = formats.three_digits(largest)
    done = "passing it again" if kinds[0].intervention == "repeat" else "removal"
    done = "rounding" if kinds[0].map is not None else done
    return centred_map(
        map_title(cell, kinds),
        measure.change,
        columns=layers,
        rows=[str(kind.part if numbered else kind.span) for kind in kinds],
        values=values,
        hovers=hovers,
        shown=_shown(cell, kinds, layers),
        ticks=(f"−{most}<br>{done} helps", "0<br>no change", most),
        largest=largest,
        height=165 + max(30 * min(len(kinds), _DOTTED), 14 * len(kinds)),
        xaxis=layer_axis(layers, "layer (0-based)" if numbered else "first layer (0-based)"),
        yaxis=ROWS | {"title": {"text": _rows_of(kinds)[1]}},
    )


def _layers_along(kind: Change, layers: Sequence[int]) -> Sequence[int]:
    """Return the layer whose run of a kind is shown in each column.

    The embedding and the head have a single run each, stored as layer 0. The embedding's is shown
    in the first column, the head's in the last one. All other columns get a layer without a run.
    """
    if not kind.is_end:
        return layers
    place = 0 if kind.map == ENDS[0] else len(layers) - 1
    return [0 if column == place else 1 for column in range(len(layers))]


def _shown(cell: CellRecord, kinds: Sequence[Change], layers: Sequence[int]) -> list[list[bool]]:
    """Return which runs have a verdict other than open, simultaneous for all runs of a map."""
    verdicts = shown_runs(cell, [run for run in cell.runs if run.change.kind in kinds])
    return [
        [
            not (kind.is_end and layer) and verdicts.get(kind.at(layer), "open") != "open"
            for layer in _layers_along(kind, layers)
        ]
        for kind in kinds
    ]


def strongest(values: Sequence[Sequence[float | None]]) -> float:
    """Find the size of the largest value of a map, 1 where all are 0 or none is defined."""
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
    shown: Sequence[Sequence[bool]] | None = None,
    crosses: bool = True,
    **layout: Any,
) -> Chart:
    """Draw a heat map whose colours are centred at 0.

    Values with a verdict (trace `name`) have a dot if there is room, since they may be small. Open
    values (trace `open`) are faint.

    Args:
        title: Title in plain text.
        name: Name of the mapped quantity, and of the trace.
        columns: Positions of the columns.
        rows: Labels of the rows (plotly's markup).
        values: Rows of values; None is a gap.
        hovers: Hover box of each value.
        ticks: Labels of the colours of -largest, 0 and largest.
        largest: Value of the strongest colour.
        height: Height in pixels.
        shown: Mask of the values with a verdict; None = no verdicts.
        crosses: Whether gaps with a hover box are marked (trace `undefined`).
        **layout: Axes: `xaxis`, and `yaxis` if it is not `ROWS`.

    Returns:
        The chart.
    """
    known = shown or [[True] * len(columns)] * len(rows)

    def heat(label: str, sure: bool, **look: Any) -> dict[str, Any]:
        mine = [
            [value if which == sure else None for value, which in zip(*row, strict=True)]
            for row in zip(values, known, strict=True)
        ]
        common = {"coloraxis": "coloraxis", "xgap": 1, "ygap": 1, "hoverongaps": False}
        return trace("heatmap", label, columns, rows, hovers, z=mine, **common, **look)

    data = [heat(name, True)]
    if shown:
        data.append(heat("open", False, opacity=OPEN))
    if shown and len(rows) <= _DOTTED:
        dots = [
            (column, row, "")
            for row, figures, surely in zip(rows, values, known, strict=True)
            for column, value, sure in zip(columns, figures, surely, strict=True)
            if sure and value is not None
        ]
        # The field below has the hover box.
        data.append(_marks("shown", dots, _DOT) | {"hoverinfo": "skip"})
    if crosses:
        gaps = [
            (column, row, hover)
            for row, figures, texts in zip(rows, values, hovers, strict=True)
            for column, value, hover in zip(columns, figures, texts, strict=True)
            if value is None and hover
        ]
        data.append(_marks("undefined", gaps, _CROSS))
    colours = {"cmin": -largest, "cmid": 0, "cmax": largest, "colorscale": _SCALE}
    bar = COLOUR_BAR | {"tickvals": [-largest, 0, largest], "ticktext": list(ticks)}
    axes = {"yaxis": ROWS, "coloraxis": colours | {"colorbar": bar}} | layout
    return chart(title, data, height, margin={"b": 105}, **axes)


def _marks(
    name: str, places: Sequence[tuple[int | str, str, str]], marker: Mapping[str, Any]
) -> dict[str, Any]:
    """Mark places of a map: column, row label and hover box of each."""
    columns, rows, hovers = zip(*places, strict=True) if places else ((), (), ())
    return trace(
        "scatter", name, columns, rows, hovers, mode="markers", marker=marker, showlegend=False
    )
