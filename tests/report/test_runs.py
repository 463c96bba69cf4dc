"""Sublayers, spans of layers and layers beneath, from the record to the page."""

from __future__ import annotations

from html import unescape
from types import SimpleNamespace
from typing import Any

import pytest

from tracker.core import formats
from tracker.core.records import NOT_MEASURED, CellRecord, Kind, RunIdentity, RunRecord
from tracker.core.run_table import pick, run_columns, telling_apart
from tracker.core.tables import EntryText
from tracker.report import caveats, frames, tables, wording
from tracker.report.page import html

from . import drawn as charts
from .conftest import LAYERS, as_read, build_cell

WHOLE_ONLY = "measured for whole single layers only"
PROXIES = ("cosine_similarity", "cosine_score", "angular_distance", "relative_update")


def other(record: RunRecord, component: str, span: int) -> RunRecord:
    """Make a run of another kind from that of a whole layer, with a drop of its own."""
    last = record.layer + span - 1
    name = "layers" if component == "layer" else component
    share = {"layer": 1.0, "attention": 0.5, "mlp": 0.75}[component] * span
    return record.model_copy(
        update={
            "component": component,
            "span": span,
            "ablation": f"{name}:{','.join(map(str, range(record.layer, last + 1)))}",
            "accuracy_drop": (record.accuracy_drop or 0) * share,
            **dict.fromkeys(PROXIES),
            "reasons": dict.fromkeys(PROXIES, WHOLE_ONLY),
        }
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
        if record.layer + span <= LAYERS
        and not removed & set(range(record.layer, record.layer + span))
    )
    return cell.model_copy(update={"runs": layers, **changes})


def without(*removed: int, **changes: Any) -> CellRecord:
    """Make a cell whose runs all lack some layers."""
    beneath = {"removed_accuracy": 0.41, "removed_low": 0.34, "removed_high": 0.49}
    return several(("layer",), (1,), removed=removed, **{**beneath, **changes})


def column(table: SimpleNamespace, label: str) -> list[EntryText]:
    number = table.labels.index(label)
    return [row[number] for row in table.rows]


@pytest.mark.parametrize(
    ("run", "label"),
    [
        (RunIdentity(layer=3), "layer 3"),
        (RunIdentity(layer=3, span=4), "layers 3–6"),
        (RunIdentity(component="attention", layer=3), "attention 3"),
        (RunIdentity(component="mlp", layer=3, span=4), "mlp 3–6"),
    ],
)
def test_a_run_has_a_name(run: RunIdentity, label: str) -> None:
    assert run.label() == label


class TestTable:
    def test_component_and_span_stand_beside_the_layer_where_there_are_several(self) -> None:
        cell = several()
        table = as_read(tables.layer_table(cell))
        assert table.labels[:3] == [
            "first layer (0-based)", "component", "span (layers)",
        ]  # fmt: skip
        shown = [tuple(value.text for value in row[:3]) for row in table.rows]
        assert shown == [(str(r.layer), r.component, str(r.span)) for r in cell.runs]
        drops = [value.text for value in column(table, "accuracy drop (pp)")]
        assert drops == [formats.points(r.accuracy_drop or 0) for r in cell.runs]

    @pytest.mark.parametrize(
        ("components", "spans", "labels"),
        [
            (("layer",), (1,), ["layer (0-based)"]),
            (("attention",), (1,), ["layer (0-based)", "component"]),
            (("layer",), (4,), ["first layer (0-based)", "span (layers)"]),
        ],
    )
    def test_only_what_tells_runs_apart_has_a_column(self, components, spans, labels) -> None:
        cell = several(components, spans)
        chosen = pick(run_columns(cell), *telling_apart(cell))
        assert [column.label for column in chosen] == labels

    def test_one_note_says_where_a_proxy_is_undefined(self) -> None:
        notes = as_read(tables.layer_table(several(("layer", "attention"), (1, 2)))).notes
        assert (
            "cosine score (1 − cos): undefined for layer, 2 at a time: all 29 layers; attention: "
            "all 30 layers; attention, 2 at a time: all 29 layers: measured for whole single "
            "layers only."
        ) in notes

    def test_a_run_that_is_missing_has_a_row_of_its_own(self) -> None:
        cell = several(("layer", "attention"), (1,))
        missing = tuple(RunIdentity(component="attention", layer=layer) for layer in (5, 6))
        left = tuple(r for r in cell.runs if r.component == "layer" or r.layer not in (5, 6))
        cell = cell.model_copy(update={"runs": left, "missing": missing})
        table = as_read(tables.layer_table(cell))
        assert len(table.rows) == 2 * LAYERS
        assert column(table, "accuracy drop (pp)")[5].reason == ""
        assert column(table, "accuracy drop (pp)")[LAYERS + 5].reason == NOT_MEASURED
        assert caveats.warnings(cell) == ("Incomplete: attention: layers 5, 6: not measured yet.",)

    def test_the_overview_compares_whole_layers_with_their_cosine(self) -> None:
        assert (
            as_read(tables.overview_table([several()])).rows
            == as_read(tables.overview_table([build_cell()])).rows
        )
        bare = several(("attention",), (1,), correlations=())
        row = as_read(tables.overview_table([bare])).rows[0]
        assert row[5] == EntryText("–", "no whole single layer was removed")


class TestCharts:
    def test_the_curve_has_one_line_a_component_of_single_layers(self) -> None:
        cell = several()
        figure = charts.layer_curve(cell)
        lines = {t.name: t for t in figure.data if t.name != "cosine score"}
        assert list(lines) == ["layer", "attention", "mlp"]
        assert all(line.showlegend for line in lines.values())
        assert len({line.marker.symbol for line in lines.values()}) == 3
        for name, line in lines.items():
            drops = [100 * r.accuracy_drop for r in cell.runs if r.kind == Kind(name)]
            assert list(line.y) == pytest.approx(drops)
        (bars,) = (t for t in figure.data if t.name == "cosine score")
        assert list(bars.y) == [r.cosine_score for r in cell.whole_layers]

    def test_whole_layers_alone_look_as_ever(self) -> None:
        (line, _) = charts.layer_curve(build_cell()).data
        assert (line.name, line.showlegend) == ("accuracy drop", False)

    def test_the_title_names_the_component(self) -> None:
        title = charts.curve_title(several(("mlp",), (1, 2)))
        assert "removing mlp 0 costs most" in title or "removing mlp 1 costs most" in title

    def test_the_span_map_holds_every_drop_at_its_place(self) -> None:
        cell = several()
        assert charts.span_components(cell) == ["layer", "attention", "mlp"]
        assert charts.span_components(several(spans=(4,))) == []
        grid, gaps = charts.span_map(cell, "mlp").data
        assert list(grid.y) == ["1", "2", "4"]
        assert grid.zmin == -grid.zmax
        assert len(gaps.x) == 0
        for record in (r for r in cell.runs if r.component == "mlp"):
            row = list(grid.y).index(str(record.span))
            assert grid.z[row][record.layer] == pytest.approx(100 * record.accuracy_drop)
        assert list(grid.z[2][27:]) == [None, None, None]

    def test_the_span_map_marks_what_is_undefined(self) -> None:
        cell = several(("layer",), (1, 2))
        layers = tuple(
            r.model_copy(update={"accuracy_drop": None, "reasons": {"accuracy_drop": "a reason"}})
            if (r.layer, r.span) == (3, 2)
            else r
            for r in cell.runs
        )
        missing = (RunIdentity(layer=9, span=2),)
        layers = tuple(r for r in layers if (r.layer, r.span) != (9, 2))
        cell = cell.model_copy(update={"runs": layers, "missing": missing})
        _, gaps = charts.span_map(cell, "layer").data
        assert list(zip(gaps.x, gaps.y, strict=True)) == [(3, "2"), (9, "2")]
        assert "a reason" in gaps.hovertext[0]
        assert NOT_MEASURED in gaps.hovertext[1]
        assert "layers 9–10" in gaps.hovertext[1]

    def test_scatter_and_relevance_are_of_whole_layers(self) -> None:
        plain = build_cell()
        for draw in (charts.proxy_scatter, lambda cell: charts.heat_map([cell])):
            assert draw(several()).to_json() == draw(plain).to_json()


class TestBeneath:
    def test_the_title_and_a_sentence_say_it(self) -> None:
        cell = without(3, 17)
        assert cell.title.endswith(" · 0-shot · without layers 3, 17")
        assert charts.curve_title(cell).startswith(cell.title)
        assert wording.sentence(cell).startswith(
            "Every run here lacks layers 3, 17 as well. Without these alone, accuracy is 41.0 % "
            "(95 % interval 34.0 to 49.0); intact, it is 50.0 % (95 % interval 42.3 to 57.7). "
            "Every accuracy drop is relative to the intact model, so it holds what these layers "
            "cost too. Spearman of"
        )

    def test_an_undefined_accuracy_says_why(self) -> None:
        cell = without(3, removed_accuracy=None, reasons={"removed_accuracy": "not measured yet"})
        assert "Without this one alone, accuracy is undefined (not measured yet);" in (
            wording.sentence(cell)
        )
        assert "Removed accuracy is undefined: not measured yet." in caveats.warnings(cell)

    def test_the_heat_map_says_what_is_gone_already(self) -> None:
        _, gaps = charts.heat_map([build_cell(), without(3, 17)]).data
        assert list(gaps.x) == [3, 17]
        assert all("removed already, beneath every run" in text for text in gaps.hovertext)
        table = as_read(tables.relevance_table([build_cell(), without(3, 17)]))
        assert table.rows[3][2] == EntryText("–", "removed already, beneath every run")
        assert table.labels[2] == "arc_easy · 0-shot · without layers 3, 17"


def test_the_page_shows_each_view_and_leaves_out_what_has_no_runs() -> None:
    cells = [several(), without(3, 17), several(("attention",), (1,), removed=(4,))]
    page = html.render_page(cells, {})
    text = unescape(page)
    for number in (1, 2, 3):
        assert page.count(f'id="model-1-cell-{number}"') == 1
        assert f'href="#model-1-cell-{number}"' in page
    for component in ("layer", "attention", "mlp"):
        assert f'id="model-1-cell-1-spans-{component}-title"' in page
    assert "one line for each component of a layer" in text
    assert "<h4>Runs</h4>" in page
    assert 'id="model-1-cell-2-scatter"' in page
    assert 'id="model-1-cell-3-scatter"' not in page
    assert "No whole single layer was removed, so nothing is correlated." in text
    assert "each layer, each layer’s attention, each layer’s MLP, each span of layers and the " in (
        text
    )


def test_a_page_without_any_whole_layer_has_no_relevance_map() -> None:
    page = html.render_page([several(("mlp",), (2, 4), correlations=())], {})
    assert 'id="model-1-heat-map"' not in page
    assert 'id="model-1-cell-1-curve"' not in page
    assert 'id="model-1-cell-1-spans-mlp-title"' in page


def test_the_frames_name_component_span_and_removed() -> None:
    cells = [several(("layer", "mlp"), (1, 4)), without(3, 17)]
    frame = frames.layer_frame(cells)
    assert len(frame) == sum(len(cell.runs) for cell in cells)
    row = frame[(frame.component == "mlp") & (frame.span == 4) & (frame.layer == 3)].iloc[0]
    assert row.accuracy_drop == next(
        r.accuracy_drop for r in cells[0].runs if r.kind == Kind("mlp", 4) and r.layer == 3
    )
    assert frame.removed.unique().tolist() == ["", "3,17"]
    assert frames.correlation_frame(cells).removed.unique().tolist() == ["", "3,17"]
