"""The leaderboards, comparisons and downloads of the page say what the records say."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path
from statistics import NormalDist

import pytest
from plotly.graph_objects import Figure

from tests.helpers.charts import grid
from tests.helpers.pages import HOSTILE
from tracker.analysis.decisions import decisions_record
from tracker.analysis.ranks.layers import layer_board
from tracker.analysis.ranks.pairs import compare, pairs_of
from tracker.analysis.ranks.proxies import cosine_ranks, misjudged
from tracker.core.records import CellRecord
from tracker.report.charts import across, model, style
from tracker.report.leaderboard import difference_table, layer_board_table, misjudged_table
from tracker.report.page.html import render_page, render_report

from .conftest import (
    AT_CHANCE,
    LAYERS,
    as_read,
    build_cell,
    build_decisions,
    study,
    two_models,
    with_layer,
)


@pytest.fixture(scope="module", name="page")
def fixture_page() -> str:
    return render_page(two_models(), {})


def embedded(page: str, name: str) -> bytes:
    found = re.search(rf'<script type="text/plain" id="{re.escape(name)}">([^<]*)</script>', page)
    assert found is not None
    return base64.b64decode(found[1])


def drawn(page: str) -> dict[str, list]:
    return json.loads(gzip.decompress(embedded(page, "charts")))["figures"]


class TestRanks:
    def test_a_layer_is_strong_where_its_ranks_miss_the_diagonal(self) -> None:
        board = layer_board([build_cell(n=2000)])
        by_cosine = cosine_ranks(board)
        drawn = model.rank_chart(board, "m")
        _, *groups = drawn.figure().data
        standings = {str(standing.layer): standing for standing in board.ranked}
        off = []
        for group in groups:
            for place, text in enumerate(group.text):
                standing, rank = standings.pop(text), group.y[place]
                assert group.x[place] == by_cosine[standing.layer]
                best = rank - group.error_y.arrayminus[place]
                worst = rank + group.error_y.array[place]
                assert (best, worst) == (standing.rank.low, standing.rank.high)
                if not best <= group.x[place] <= worst:
                    off.append(standing.layer)
                assert (group.marker.opacity == 1) == (standing.layer in off)
        assert off
        assert not standings
        assert drawn.title == (
            f"m: for {len(off)} of {LAYERS} layers we can show that the true rank differs from the "
            "cosine rank"
        )

    def test_nothing_is_strong_where_ranks_are_open(self) -> None:
        drawn = model.rank_chart(layer_board([build_cell(n=8)]), "m")
        _, faint, strong = drawn.figure().data
        assert (len(faint.x), faint.marker.opacity, len(strong.x)) == (LAYERS, style.OPEN, 0)
        assert drawn.title == (
            "m: for no layer can we show that its true rank differs from its cosine rank"
        )
        unscored = with_layer(build_cell(), 4, cosine_score=None)
        assert model.rank_chart(layer_board([unscored]), "m") is None

    def test_the_most_misjudged_layer_comes_first(self) -> None:
        board = layer_board([build_cell(n=2000)])
        ranks = cosine_ranks(board)
        found = misjudged(board)
        outside = {
            one.layer: max(one.rank.low - ranks[one.layer], ranks[one.layer] - one.rank.high)
            for one in board.layers
        }
        assert found
        assert found[0].off == max(outside.values())
        assert [one.off for one in found] == sorted((one.off for one in found), reverse=True)
        assert len(found) == sum(off > 0 for off in outside.values())
        row = as_read(misjudged_table(board, "m")).rows[0]
        first = found[0]
        assert [value.text for value in row[:4]] == [
            str(first.standing.layer),
            f"{first.standing.rank.low} to {first.standing.rank.high}",
            str(first.cosine_rank),
            str(first.off),
        ]

    def test_without_a_score_there_is_no_cosine_rank(self) -> None:
        board = layer_board([with_layer(build_cell(), 4, cosine_score=None)])
        assert cosine_ranks(board) == {}
        assert misjudged(board) == []
        assert "Layer 4: no mean cosine score" in layer_board_table(board, "m").notes[0]


class TestDepth:
    def test_relevance_has_a_line_a_benchmark_and_their_mean(self) -> None:
        board = layer_board(study())
        figure = model.relevance_curves(board, "m").figure()
        assert [trace.name for trace in figure.data] == [
            "arc_easy · 0-shot",
            "piqa · 0-shot",
            "mean",
        ]
        piqa = figure.data[1]
        by_layer = {record.change.layer: record for record in study()[1].runs}
        for layer, y in enumerate(piqa.y):
            assert y == (by_layer[layer].accuracy_relevance if layer in by_layer else None)
        assert "not measured yet" in piqa.hovertext[7]
        assert AT_CHANCE in piqa.hovertext[12]
        means = {one.layer: one.relevance for one in board.layers}
        for layer, (y, up) in enumerate(
            zip(figure.data[2].y, figure.data[2].error_y.array, strict=True)
        ):
            assert y == means[layer].value
            assert y + up == pytest.approx(means[layer].high)

    def test_each_proxy_has_a_panel(self) -> None:
        cells = study()
        figure = model.proxy_curves(cells, "m").figure()
        axes = {"y": "cosine_score", "y2": "angular_distance", "y3": "relative_update"}
        assert len(figure.data) == 9
        for place, trace in enumerate(figure.data):
            records = {record.change.layer: record for record in cells[place % 3].runs}
            for layer, y in zip(trace.x, trace.y, strict=True):
                wanted = records[layer].figure(axes[trace.yaxis]) if layer in records else None
                assert y == wanted

    def test_across_models_depth_is_relative(self) -> None:
        two = [layer_board([build_cell(model=name)]) for name in ("a", "b")]
        figure = across.depth_curves(two, ["a", "b"]).figure()
        assert [trace.name for trace in figure.data] == ["a", "b"]
        # Side by side, a little to the left.
        assert figure.data[0].x[::29] == pytest.approx((0, 1), abs=0.005)
        by_layer = {one.layer: one.relevance.value for one in two[0].layers}
        assert list(figure.data[0].y) == [by_layer[layer] for layer in range(LAYERS)]


class TestAcross:
    def test_one_model_has_nothing_to_be_compared_with(self) -> None:
        page = render_page(study(), {})
        assert 'id="across"' not in page

    @pytest.mark.parametrize("benchmarks", [["a", "b"], ["a", "b", "c", "d"]])
    def test_differences_equal_those_of_the_leaderboard(self, benchmarks: list[str]) -> None:
        one = [build_cell(name, model="base", seed=1) for name in benchmarks]
        other = [build_cell(name, model="instruct", seed=2) for name in benchmarks]
        (pair,), count = pairs_of([*one, *other])
        assert (pair.one, pair.other, count) == ("base", "instruct", 1)
        data = across.difference_chart(pair).figure().data
        rows = [trace.y for trace in data]
        if data[0].type == "heatmap":
            rows = grid(across.difference_chart(pair).figure())
        table = difference_table(pair)
        for place, (mine, theirs, row) in enumerate(zip(one, other, rows, strict=True)):
            for layer, estimate in compare(mine, theirs).items():
                assert row[layer] == pytest.approx(100 * estimate.value)
                value = table.rows[layer][place + 1]
                figures = (estimate.value, estimate.low, estimate.high)
                assert (value.value, value.low, value.high) == pytest.approx(figures)

    def test_differences_that_are_shown_hold_all_together(self) -> None:
        base, other = (build_cell(model=name, seed=1) for name in ("base", "other"))
        low, high = base.runs[0].drop.low, base.runs[0].drop.high
        wide = NormalDist().inv_cdf(1 - 0.025 / LAYERS) / NormalDist().inv_cdf(0.975)
        needed = wide * 2**0.5 * (high - low) / 2
        for layer, times in ((5, 0.9), (6, 1.1)):
            ends = ("accuracy_drop", "accuracy_drop_low", "accuracy_drop_high")
            moved = {end: other.runs[layer].figure(end) - times * needed for end in ends}
            other = with_layer(other, layer, **moved)
        ((pair,), _) = pairs_of([base, other])
        assert [shared.shown for shared in pair.comparisons] == [{6}]
        assert "; shown: 1 of 30 differences, such as layer 6" in across.difference_title(pair)
        (points,) = across.difference_chart(pair).figure().data
        assert [x for x, y in zip(points.x, points.marker.opacity, strict=True) if y == 1] == [6]

    def test_only_equal_settings_and_depths_are_paired(self) -> None:
        base = build_cell(model="base")
        assert pairs_of([base, build_cell(model="other", n=80)]) == ([], 0)
        deeper = build_cell(model="other")
        deeper = deeper.model_copy(
            update={"model": deeper.model.model_copy(update={"layers": LAYERS + 1})}
        )
        assert pairs_of([base, deeper]) == ([], 0)
        page = render_page([base, deeper], {})
        assert "No two models have as many layers and share a benchmark" in page


class TestPage:
    def test_every_chart_has_its_box_and_is_valid(self, page: str) -> None:
        figures = drawn(page)
        assert sorted(re.findall(r'class="chart" role="img" [^>]*id="([^"]+)"', page)) == sorted(
            figures
        )
        for data, layout in figures.values():
            figure = Figure(data, layout | {"template": style.TEMPLATE})
            assert figure.layout.height >= 150

    def test_names_are_escaped_in_every_chart(self) -> None:
        cells = [build_cell(HOSTILE, model=f"<b>{name}</b>", metric=HOSTILE) for name in ("a", "b")]
        text = json.dumps(drawn(render_page(cells, {})), ensure_ascii=False)
        assert "<script" not in text
        assert "<b>a" not in text
        assert "&lt;script&gt;" in text

    def test_five_models_on_ten_benchmarks_stay_small(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr("tests.report.conftest.LAYERS", 32)
        cells = [
            build_cell(benchmark, model=f"Llama-3.2-1B-Instruct-{letter}", seed=seed)
            for seed, letter in enumerate("abcde")
            for benchmark in (
                "arc_challenge", "arc_easy", "boolq", "commonsense_qa", "hellaswag", "mmlu",
                "openbookqa", "piqa", "social_iqa", "winogrande",
            )
        ]  # fmt: skip
        record = decisions_record(build_decisions(cells[0], 100))
        decided = {cell.place: record for cell in cells}
        path = render_report(cells, {}, tmp_path / "report.html", decided)
        assert path.stat().st_size < 8_000_000

    def test_a_page_of_nothing_but_losses_says_why_nothing_is_ranked(self) -> None:
        cells: list[CellRecord] = []
        for name in ("a", "b"):
            cell = study()[2]
            identity = cell.model.model_copy(update={"name": name, "fingerprint": name * 64})
            cells.append(cell.model_copy(update={"model": identity}))
        page = render_page(cells, {})
        assert "that accuracy has nothing to lose there" in page
        assert 'id="model-1-board"' not in page
        assert "none, because no two models share a benchmark on all their layers" in page


def test_cells_that_differ_in_documents_alone_have_links_of_their_own() -> None:
    """Was: the overview led both to the last one."""
    page = render_page([build_cell(n=100), build_cell(n=160)], {})
    overview = page.split('id="overview"')[1].split("</table>")[0]
    assert 'href="#model-1-cell-1"' in overview
    assert 'href="#model-1-cell-2"' in overview
