"""The figures hold the records' numbers, in pp, and nothing where nothing is known."""

from __future__ import annotations

import math

import pytest

from tests.helpers import charts
from tests.helpers.ablations import with_figures
from tracker.analysis.claims import shown_runs
from tracker.analysis.ranks.layers import layer_board
from tracker.core import formats
from tracker.core.records import NOT_MEASURED
from tracker.report.charts import style
from tracker.report.charts.across import depth_curves
from tracker.report.charts.headline import headline, near_together
from tracker.report.charts.model import relevance_curves
from tracker.report.charts.style import LINES, OPEN, label_sides

from .conftest import AT_CHANCE, LAYERS, build_cell, study, with_layer


def trace(figure, name):
    (found,) = [trace for trace in figure.data if trace.name.startswith(name)]
    return found


def test_curve_holds_drops_in_pp_and_cosine_scores_in_a_panel_of_their_own() -> None:
    cell = build_cell()
    figure = charts.layer_curve(cell)
    drops, scores = trace(figure, "accuracy drop"), trace(figure, "cosine score")
    assert list(drops.x) == list(range(LAYERS))
    assert any(record.drop.value < 0 for record in cell.runs)
    for i, record in enumerate(cell.runs):
        low, high = drops.y[i] - drops.error_y.arrayminus[i], drops.y[i] + drops.error_y.array[i]
        ends = (record.drop.low, record.drop.value, record.drop.high)
        assert (low, drops.y[i], high) == pytest.approx([100 * end for end in ends])
        colour = charts.HELPS if record.drop.value < 0 else charts.MATTERS
        assert drops.marker.color[i] == colour
    assert list(scores.y) == [record.cosine_score for record in cell.runs]
    assert scores.yaxis == "y2"
    assert figure.layout.yaxis2.overlaying is None
    assert figure.layout.xaxis.matches == "x2"
    low, drop, high = (
        formats.points(cell.runs[11].figure(f"accuracy_drop{end}")) for end in ("_low", "", "_high")
    )
    hover = drops.hovertext[11]
    assert "layer 11" in hover
    assert f"accuracy drop {drop} pp (95 % interval {low} to {high})" in hover
    assert "160 documents" in hover


def test_undefined_and_missing_layers_are_gaps_never_zero() -> None:
    cell = with_layer(
        build_cell(missing=(7,)),
        3,
        accuracy_drop=None,
        accuracy_drop_low=None,
        accuracy_drop_high=None,
        cosine_score=math.nan,
        reasons={"accuracy_drop": "no outcome"},
    )
    figure = charts.layer_curve(cell)
    drops, scores = trace(figure, "accuracy drop"), trace(figure, "cosine score")
    assert [x for x, y in zip(drops.x, drops.y, strict=True) if y is None] == [3, 7]
    assert [x for x, y in zip(scores.x, scores.y, strict=True) if y is None] == [3, 7]
    assert "no outcome" in drops.hovertext[3]
    assert NOT_MEASURED in drops.hovertext[7]
    assert not drops.connectgaps


def test_charts_without_any_number() -> None:
    bare = build_cell(runs=(), missing=(0, 1), correlations=())
    for figure in (
        charts.layer_curve(bare),
        charts.proxy_scatter(bare),
        charts.heat_map([bare]),
        charts.layer_curve(bare.model_copy(update={"missing": ()})),
    ):
        figure.to_json()


def test_what_is_open_is_faint() -> None:
    """Was strong where its own interval left 0 out, as one of twenty that show nothing does."""
    cell = build_cell()
    low, high = cell.runs[4].drop.low, cell.runs[4].drop.high
    half = (high - low) / 2  # 3.15 / 1.96 of it is the half for thirty layers
    for layer, drop in ((4, 1.5 * half), (5, 1.7 * half)):
        ends = {"accuracy_drop_low": drop - half, "accuracy_drop_high": drop + half}
        cell = with_layer(cell, layer, accuracy_drop=drop, mcnemar_p=1e-6, **ends)
    drops = trace(charts.layer_curve(cell), "accuracy drop")
    scatter = trace(charts.proxy_scatter(cell), "inner")
    for points, layers in ((drops, drops.x), (scatter, map(int, scatter.text))):
        strength = dict(zip(layers, points.marker.opacity, strict=True))
        assert (strength[4] < 1, strength[5]) == (True, 1)


def test_scatter_holds_every_layer_once() -> None:
    cell = with_layer(build_cell(), 4, cosine_score=None)
    figure = charts.proxy_scatter(cell)
    inner, outer = trace(figure, "inner"), trace(figure, "outer")
    assert list(outer.text) == ["0", "1", "28", "29"]
    points = {
        int(layer): (x, y)
        for part in (inner, outer)
        for layer, x, y in zip(part.text, part.x, part.y, strict=True)
    }
    assert sorted(points) == [layer for layer in range(LAYERS) if layer != 4]
    for layer, (x, y) in points.items():
        assert x == cell.runs[layer].cosine_score
        assert y == pytest.approx(100 * cell.runs[layer].drop.value)


@pytest.mark.parametrize(("low", "kind"), [(0.2, None), (0.01, "log"), (0.0, None)])
def test_scatter_is_logarithmic_only_where_scores_span_a_decade(
    low: float, kind: str | None
) -> None:
    cell = build_cell()
    layers = tuple(r.model_copy(update={"cosine_score": 0.5}) for r in cell.runs)
    cell = with_layer(cell.model_copy(update={"runs": layers}), 5, cosine_score=low)
    axis = charts.proxy_scatter(cell).layout.xaxis
    assert axis.type == kind, "plotly takes a linear axis where none is named"
    assert ("log scale" in axis.title.text) == (kind == "log")


def test_heat_map_is_centred_and_marks_every_gap() -> None:
    cells = study()
    figure = charts.heat_map(cells)
    heat, gaps = trace(figure, "accuracy relevance"), trace(figure, "undefined")
    colours = figure.layout.coloraxis
    assert (colours.cmin, colours.cmid, colours.cmax) == (-1, 0, 1)
    seen = 0
    for row, cell in zip(charts.grid(figure), cells, strict=True):
        by_layer = {record.change.layer: record for record in cell.runs}
        for layer, z in zip(heat.x, row, strict=True):
            record = by_layer.get(layer)
            assert z == (record.accuracy_relevance if record else None)
            seen += z is None
    assert len(gaps.x) == seen == 2 + 1 + LAYERS
    hovers = " ".join(gaps.hovertext).replace("<br>", " ")
    assert NOT_MEASURED in hovers
    assert AT_CHANCE in hovers


def test_a_field_of_a_heat_map_is_strong_and_has_a_dot_where_something_is_shown() -> None:
    cells = [build_cell(), build_cell("piqa")]
    figure = charts.heat_map(cells)
    strong, faint, dots = (trace(figure, name) for name in ("accuracy", "open", "shown"))
    assert (strong.opacity, faint.opacity) == (None, OPEN)
    shown = []
    for y, cell in zip(strong.y, cells, strict=True):
        verdicts = shown_runs(cell, cell.whole_layers).values()
        shown += [(x, y) for x, verdict in enumerate(verdicts) if verdict != "open"]
    fields = [
        (x, y) for y, row in zip(strong.y, strong.z, strict=True)
        for x, z in zip(strong.x, row, strict=True) if z is not None
    ]  # fmt: skip
    assert fields == list(zip(dots.x, dots.y, strict=True)) == shown != []


def test_a_long_label_of_a_row_takes_lines_and_not_the_width_of_a_phone() -> None:
    cells = [build_cell(sample_seed=1234), build_cell(n=8, sample_seed=1234)]
    figure = charts.heat_map(cells)
    lines = figure.data[0].y[0].split("<br>")
    assert lines[0] == "arc_easy"
    assert max(map(len, lines)) <= 18
    assert figure.layout.height - charts.heat_map([build_cell()]).layout.height > 12 * len(lines)


def test_nothing_is_strong_where_intervals_are_wide() -> None:
    cell = build_cell(n=8)
    board = layer_board([cell, build_cell("piqa", n=8)])
    strong = [trace(charts.heat_map([cell]), "accuracy").z[0]]
    assert {value for row in strong for value in row} == {None}
    for figure in (
        relevance_curves(board, "m").figure(),
        relevance_curves(layer_board([cell]), "m").figure(),
        depth_curves([board, board], ["one", "other"]).figure(),
        charts.layer_curve(cell),
        charts.proxy_scatter(cell),
    ):
        strengths = [t.marker.opacity for t in figure.data if t.type == "scatter"]
        assert {one for many in strengths for one in many} == {OPEN}


def test_only_one_line_has_intervals_where_several_would_hide_each_other() -> None:
    board = layer_board([build_cell(), build_cell("piqa")])
    figure = relevance_curves(board, "m").figure()
    assert [t.error_y.array is not None for t in figure.data] == [False, False, True]
    verdicts = board.claims.verdicts
    strong = trace(figure, "mean").marker.opacity
    assert [one == 1 for one in strong] == [verdicts[la] != "open" for la in range(LAYERS)]
    assert {*strong} == {1, OPEN}


def test_labels_of_points_that_are_close_stand_apart() -> None:
    assert len({*label_sides([(0.5, 0.5)] * 4)}) == 4
    apart = label_sides([(0.1, 0.5), (0.9, 0.5)])
    assert apart[0] == apart[1]
    # A neighbour on the right and above leaves other sides.
    assert label_sides([(0.5, 0.5), (0.5125, 0.532)])[0] != "top right"


def test_no_line_has_a_colour_that_says_something_of_a_removal() -> None:
    def parts(colour: str) -> list[int]:
        return [int(colour[place : place + 2], 16) for place in (1, 3, 5)]

    for line in LINES:
        for said in (charts.HELPS, charts.MATTERS):
            assert math.dist(parts(line), parts(said)) > 50, line
    for figure in (charts.layer_curve(build_cell()), charts.proxy_scatter(build_cell())):
        assert not any(t.showlegend for t in figure.data), "it would show the first point's colour"


def test_heat_map_takes_one_model() -> None:
    with pytest.raises(ValueError, match="exactly one model"):
        charts.heat_map([build_cell(), build_cell(model="other")])


def test_the_headline_is_strong_where_something_is_shown_and_marks_what_cosine_misses() -> None:
    board = layer_board([build_cell(), build_cell("piqa")])
    figure = headline(board, "a model").figure()
    costs, scores = trace(figure, "accuracy relevance"), trace(figure, "cosine score")
    by_layer = {one.layer: one for one in board.layers}
    assert list(costs.x) == list(scores.x) == sorted(by_layer)
    for layer, cost, up, score in zip(costs.x, costs.y, costs.error_y.array, scores.y, strict=True):
        standing = by_layer[layer]
        assert (cost, score) == (standing.relevance.value, standing.cosine_score)
        assert cost + up == pytest.approx(standing.relevance.high)
    found = board.claims
    assert found.costly
    strength = dict(zip(costs.x, costs.marker.opacity, strict=True))
    assert {layer for layer, much in strength.items() if much == 1} == {*found.costly}
    assert {strength[layer] for layer in found.open} == {OPEN}
    assert sorted(box.x0 + 0.5 for box in figure.layout.shapes) == found.missed
    numbers = ", ".join(note.text[3:-4] for note in figure.layout.annotations)
    assert numbers == ", ".join(map(str, found.missed))


def test_where_accuracy_shows_nothing_the_log_probability_stands_beside_it() -> None:
    cell = build_cell(n=8)
    runs = tuple(
        with_figures(
            run,
            gold_logprob_low=run.gold_drop.value - 0.01,
            gold_logprob_high=run.gold_drop.value + 0.01,
        )
        for run in cell.runs
    )
    board = layer_board([cell.model_copy(update={"runs": runs})])
    assert not board.claims.costly
    figure = headline(board, "a model").figure()
    falls = trace(figure, "fall of the right answer’s log-probability")
    for run, height in zip(runs, falls.y, strict=True):
        assert height == pytest.approx(math.copysign(abs(run.gold_drop.value) ** 0.5, height))
    largest = sorted(runs, key=lambda run: -run.gold_drop.value)[:5]
    assert board.claims.falling
    assert {*board.claims.falling} <= {run.change.layer for run in largest}
    assert "Middle: by how many nats" in headline(board, "a model").explains


@pytest.mark.parametrize(
    ("marked", "notes"),
    [
        ([10, 26, 25], [(10, "10"), (25.5, "25, 26")]),
        ([24, 26, 28], [(26, "24, 26, 28")]),
        ([3, 6], [(3, "3"), (6, "6")]),
    ],
)
def test_numbers_of_near_layers_stand_together_where_a_phone_would_overlay_them(
    marked: list[int], notes: list[tuple[float, str]]
) -> None:
    assert near_together(marked) == notes


def test_a_figure_that_stands_alone_says_what_faint_means():
    def drawn(**look):
        return style.chart("title", [style.trace("bar", "", [0, 1], [2, 3], [], **look)], 99)

    for look in ({"opacity": style.OPEN}, {"marker": {"opacity": style.strength([True, False])}}):
        assert "faint: open" in drawn(**look).figure().layout.title.text
    plain = drawn(marker={"opacity": style.strength([True, True])})
    assert plain.figure().layout.title.text == "title"
