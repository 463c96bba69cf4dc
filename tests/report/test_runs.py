"""Sublayers, spans of layers and layers beneath, from the record to the page."""

from __future__ import annotations

from html import unescape
from typing import Any

import pytest

from tests.helpers import charts
from tests.helpers.ablations import with_change
from tracker.analysis.claims import controls_answer, parts_answer
from tracker.core.changes import Change
from tracker.core.estimates import Estimate
from tracker.core.records import NOT_MEASURED, CellRecord, RunRecord
from tracker.report import frames
from tracker.report.page import html

from .conftest import LAYERS, build_cell

WHOLE_ONLY = "measured for whole single layers only"
PROXIES = ("cosine_similarity", "cosine_score", "angular_distance", "relative_update")


def other(record: RunRecord, component: str, span: int) -> RunRecord:
    """Make a run of another kind from that of a whole layer, with a drop of its own."""
    share = {"layer": 1.0, "attention": 0.5, "mlp": 0.75}[component] * span
    return with_change(
        record,
        component=component,
        span=span,
        accuracy_drop=(record.drop.value or 0) * share,
        **dict.fromkeys(PROXIES),
        reasons=dict.fromkeys(PROXIES, WHOLE_ONLY),
    )


def several(
    components: tuple[str, ...] = ("layer", "attention", "mlp"),
    spans: tuple[int, ...] = (1, 2, 4),
    **changes: Any,
) -> CellRecord:
    """Make a cell with a run of every component, span and layer that is left."""
    cell = build_cell()
    removed = set(changes.get("removed", ()))
    layers = tuple(
        record if (component, span) == ("layer", 1) else other(record, component, span)
        for component in components
        for span in spans
        for record in cell.runs
        if record.change.layer + span <= LAYERS
        and not removed & set(range(record.change.layer, record.change.layer + span))
    )
    return cell.model_copy(update={"runs": layers, **changes})


def without(*removed: int, **changes: Any) -> CellRecord:
    """Make a cell whose runs all lack some layers."""
    beneath = {"remaining": Estimate(0.41, 0.34, 0.49)}
    return several(("layer",), (1,), removed=removed, **{**beneath, **changes})


class TestCharts:
    def test_the_curve_has_one_line_a_component_of_single_layers(self) -> None:
        cell = several()
        figure = charts.layer_curve(cell)
        lines = {t.name: t for t in figure.data if t.name != "cosine score"}
        assert list(lines) == ["layer", "attention", "mlp"]
        assert all(line.showlegend for line in lines.values())
        assert len({line.marker.symbol for line in lines.values()}) == 3
        for name, line in lines.items():
            drops = [100 * r.drop.value for r in cell.runs if r.change.kind == Change(name)]
            assert list(line.y) == pytest.approx(drops)
        (bars,) = (t for t in figure.data if t.name == "cosine score")
        assert list(bars.y) == [r.cosine_score for r in cell.whole_layers]

    def test_many_lines_have_their_intervals_in_their_hover_boxes_alone(self) -> None:
        few = several(spans=(1,))
        more = tuple(with_change(run, intervention="mean") for run in build_cell().runs)
        for cell, drawn in ((few, True), (few.model_copy(update={"runs": few.runs + more}), False)):
            lines = [t for t in charts.layer_curve(cell).data if t.name != "cosine score"]
            assert len(lines) == (3 if drawn else 4)
            assert {t.error_y.array is not None for t in lines} == {drawn}
            assert "95 % interval" in lines[0].hovertext[0]

    def test_the_span_map_holds_every_drop_at_its_place(self) -> None:
        cell = several()
        assert list(charts.mapped(cell)) == ["layer", "attention", "mlp"]
        assert charts.mapped(several(spans=(4,))) == {}
        figure = charts.kind_map(cell, "mlp")
        rows = list(figure.data[0].y)
        values = charts.grid(figure)
        assert rows == ["1", "2", "4"]
        assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
        assert len(figure.data[-1].x) == 0
        for record in (r for r in cell.runs if r.change.component == "mlp"):
            value = values[rows.index(str(record.change.span))][record.change.layer]
            assert value == pytest.approx(100 * record.drop.value)
        assert values[2][27:] == [None, None, None]

    def test_the_span_map_marks_what_is_undefined(self) -> None:
        cell = several(("layer",), (1, 2))
        layers = tuple(
            r.model_copy(update={"drop": Estimate(None, reason="a reason")})
            if (r.change.layer, r.change.span) == (3, 2)
            else r
            for r in cell.runs
        )
        missing = (Change.of_fields(layer=9, span=2),)
        layers = tuple(r for r in layers if (r.change.layer, r.change.span) != (9, 2))
        cell = cell.model_copy(update={"runs": layers, "missing": missing})
        *_, gaps = charts.kind_map(cell, "layer").data
        assert list(zip(gaps.x, gaps.y, strict=True)) == [(3, "2"), (9, "2")]
        assert "a reason" in gaps.hovertext[0]
        assert NOT_MEASURED in gaps.hovertext[1]
        assert "layers 9–10" in gaps.hovertext[1]

    def test_scatter_and_relevance_are_of_whole_layers(self) -> None:
        plain = build_cell()
        for draw in (charts.proxy_scatter, lambda cell: charts.heat_map([cell])):
            assert draw(several()).to_json() == draw(plain).to_json()


def test_a_page_without_any_whole_layer_has_no_relevance_map() -> None:
    page = html.render_page([several(("mlp",), (2, 4), correlations=())], {})
    assert 'id="model-1-heat-map"' not in page
    assert 'id="model-1-cell-1-curve"' not in page
    assert 'id="model-1-cell-1-map-mlp-title"' in page


def numbered(record: RunRecord, **which: Any) -> RunRecord:
    """Make a run of a head, or of a stretch that is passed again, from that of a whole layer."""
    return with_change(record, **which, **dict.fromkeys(PROXIES))


def test_what_is_shown_of_heads_is_said_of_all_of_them_at_once() -> None:
    cell = build_cell()

    def head(number: int, drop: float) -> RunRecord:
        ends = {"accuracy_drop_low": drop - 0.05, "accuracy_drop_high": drop + 0.05}
        p = {"mcnemar_p": 1e-9 if abs(drop) > 0.1 else 0.5}
        return numbered(
            cell.runs[0], component="head", number=number, accuracy_drop=drop, **ends, **p
        )

    heads = [head(number, 0.06 if number else 0.3) for number in range(9)]
    runs = (*cell.runs, *heads)
    said = "Of 9 heads 1 is shown to cost accuracy: layer 0 head 0."
    assert parts_answer(cell.model_copy(update={"runs": runs})) == said
    alone = cell.model_copy(update={"runs": tuple(heads), "correlations": ()})
    page = unescape(html.render_page([alone], {}))
    assert said in page
    assert "nothing is correlated" not in page
    # Each alone would be shown, as 0.06 with 0.01 to 0.11; of nine at once it is not.
    none = cell.model_copy(update={"runs": tuple(heads[1:])})
    assert parts_answer(none) == "Of 8 heads none is shown to change accuracy."
    assert parts_answer(cell) == ""
    rises = cell.model_copy(update={"runs": (head(3, -0.3), head(4, -0.4), head(5, 0.3))})
    assert parts_answer(rises) == (
        "Of 3 heads 1 is shown to cost accuracy: layer 0 head 5; 2 are shown to raise accuracy: "
        "layer 0 head 4 and layer 0 head 3."
    )
    for drop, said in (
        (0.3, "shown to cost"),
        (-0.3, "shown to raise"),
        (0.0, "not shown to change"),
    ):
        alone = cell.model_copy(update={"runs": (head(3, drop),)})
        assert parts_answer(alone) == f"layer 0 head 3 is {said} accuracy."


def test_what_layers_cost_together_is_held_against_sets_drawn_at_random() -> None:
    cell = build_cell()

    def together(layers: tuple[int, ...], drop: float, drawn: bool) -> RunRecord:
        which = {"layer": layers[0], "span": len(layers), "members": layers, "drawn": drawn}
        return numbered(cell.runs[0], accuracy_drop=drop, **which)

    drawn = [together((0, n + 2), 0.2 + n / 1000, True) for n in range(40)]
    one = cell.model_copy(update={"runs": (together((0, 5), 0.1, False), *drawn)})
    assert controls_answer(one) == (
        "2 layers removed together: accuracy drop 10.0 pp (the set), 22.0 of 40 sets drawn at "
        "random (20.0 to 23.9). It is shown to differ from these (p = 0.049)."
    )
    inside = cell.model_copy(update={"runs": (together((0, 5), 0.201, False), *drawn)})
    # Two of forty cost as little.
    assert controls_answer(inside).endswith("is not shown to differ from these (p = 0.146).")
    several = cell.model_copy(update={"runs": (*one.runs, together((0, 7), 0.2, False))})
    assert controls_answer(several).startswith(
        "2 layers removed together: accuracy drop 15.0 pp (2 sets, on average), 22.0"
    )
    assert "differ" not in controls_answer(several)
    assert controls_answer(cell) == ""
    page = unescape(html.render_page([one], {}))
    assert controls_answer(one) in page
    assert "layers 0, 5" in page
    frame = frames.layer_frame([one])
    assert frame["members"][0] == "0, 5"
    assert frame["drawn"].notna().sum() == 40


def test_thousands_of_runs_are_a_map_on_a_page_that_opens() -> None:
    cell = build_cell()
    runs = tuple(
        numbered(cell.runs[(first + span) % LAYERS], layer=first, span=span, intervention="repeat")
        for first in range(64)
        for span in range(1, 65 - first)
    )
    assert len(runs) == 2080
    model = cell.model.model_copy(update={"layers": 64})
    cell = cell.model_copy(update={"runs": runs, "correlations": (), "model": model})
    page = html.render_page([cell], {})
    assert 'id="model-1-cell-1-map-repeat-title"' in page
    assert 'id="model-1-cell-1-curve-title"' not in page
    assert "number of layers that are passed again" in page
    assert len(page) < 8_000_000
