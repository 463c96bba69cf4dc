"""The leaderboards, comparisons and downloads of the page say what the records say."""

from __future__ import annotations

import base64
import gzip
import json
import re
from statistics import NormalDist

import pytest
from plotly.graph_objects import Figure

from tests.helpers.pages import HOSTILE
from tracker.analysis.agreement import cosine_ranks, misjudged, pairs_of
from tracker.analysis.boards import layer_board
from tracker.analysis.decisions import decisions_record
from tracker.report.charts import model, style
from tracker.report.leaderboard import misjudged_table
from tracker.report.page.html import render_page, render_report

from .conftest import LAYERS, as_read, build_cell, build_decisions, two_models, with_layer


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
    def test_the_most_misjudged_layer_comes_first(self):
        board = layer_board([build_cell(n=2000)])
        ranks = cosine_ranks(board)
        found = misjudged(board)
        outside = {
            one.layer: max(one.rank.low - ranks[one.layer], ranks[one.layer] - one.rank.high)
            for one in board.parts
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


class TestAcross:
    def test_differences_that_are_shown_hold_all_together(self):
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
        assert "; shown: 1 of 30 differences, such as layer 6" in model.difference_title(pair)
        (points,) = model.difference_chart(pair).figure().data
        assert [x for x, y in zip(points.x, points.marker.opacity, strict=True) if y == 1] == [6]


class TestPage:
    def test_every_chart_has_its_box_and_is_valid(self, page):
        figures = drawn(page)
        assert sorted(re.findall(r'class="chart" role="img" [^>]*id="([^"]+)"', page)) == sorted(
            figures
        )
        for data, layout in figures.values():
            figure = Figure(data, layout | {"template": style.TEMPLATE})
            assert figure.layout.height >= 150

    def test_names_are_escaped_in_every_chart(self):
        cells = [build_cell(HOSTILE, model=f"<b>{name}</b>", metric=HOSTILE) for name in ("a", "b")]
        text = json.dumps(drawn(render_page(cells, {})), ensure_ascii=False)
        assert "<script" not in text
        assert "<b>a" not in text
        assert "&lt;script&gt;" in text

    def test_five_models_on_ten_benchmarks_stay_small(self, monkeypatch, tmp_path):
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


def test_cells_that_differ_in_documents_alone_have_links_of_their_own():
    """Was: the overview led both to the last one."""
    page = render_page([build_cell(n=100), build_cell(n=160)], {})
    overview = page.split('id="overview"')[1].split("</table>")[0]
    assert 'href="#model-1-cell-1"' in overview
    assert 'href="#model-1-cell-2"' in overview
