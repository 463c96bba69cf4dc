"""The leaderboards, comparisons and downloads of the page say what the records say."""

from __future__ import annotations

import base64
import gzip
import json
import re
from statistics import NormalDist

import pytest

from tracker.analysis.agreement import cosine_ranks, find_misjudged, pair_models
from tracker.analysis.boards import layer_board
from tracker.analysis.decisions import decisions_record
from tracker.report.charts import model
from tracker.report.leaderboard import misjudged_table
from tracker.report.page.html import render_page, render_report

from .conftest import (
    HOSTILE,
    LAYERS,
    build_cell,
    build_decisions,
    read_table,
    replace_layer,
    two_model_cells,
)


@pytest.fixture(scope="module", name="page")
def fixture_page() -> str:
    return render_page(two_model_cells(), {})


def read_embedded(page: str, name: str) -> bytes:
    match = re.search(rf'<script type="text/plain" id="{re.escape(name)}">([^<]*)</script>', page)
    assert match is not None
    return base64.b64decode(match[1])


def read_figures(page: str) -> dict[str, list]:
    return json.loads(gzip.decompress(read_embedded(page, "charts")))["figures"]


class TestRanks:
    def test_the_most_misjudged_layer_comes_first(self):
        board = layer_board([build_cell(n=2000)])
        ranks = cosine_ranks(board)
        misjudgements = find_misjudged(board)
        distances = {
            standing.layer: max(
                standing.rank.low - ranks[standing.layer],
                ranks[standing.layer] - standing.rank.high,
            )
            for standing in board.parts
        }
        assert misjudgements
        assert misjudgements[0].off == max(distances.values())
        assert [entry.off for entry in misjudgements] == sorted(
            (entry.off for entry in misjudgements), reverse=True
        )
        assert len(misjudgements) == sum(off > 0 for off in distances.values())
        row = read_table(misjudged_table(board, "m")).rows[0]
        worst = misjudgements[0]
        assert [value.text for value in row[:4]] == [
            str(worst.standing.layer),
            f"{worst.standing.rank.low} to {worst.standing.rank.high}",
            str(worst.cosine_rank),
            str(worst.off),
        ]


class TestAcross:
    def test_differences_that_are_shown_hold_all_together(self):
        base_cell, other_cell = (build_cell(model=name, seed=1) for name in ("base", "other"))
        interval_low, interval_high = base_cell.runs[0].drop.low, base_cell.runs[0].drop.high
        widening = NormalDist().inv_cdf(1 - 0.025 / LAYERS) / NormalDist().inv_cdf(0.975)
        needed_change = widening * 2**0.5 * (interval_high - interval_low) / 2
        for layer, factor in ((5, 0.9), (6, 1.1)):
            ends = ("accuracy_drop", "accuracy_drop_low", "accuracy_drop_high")
            changed_figures = {
                end: other_cell.runs[layer].figure(end) - factor * needed_change for end in ends
            }
            other_cell = replace_layer(other_cell, layer, **changed_figures)
        ((pair,), _) = pair_models([base_cell, other_cell])
        assert [comparison.shown for comparison in pair.comparisons] == [{6}]
        assert "; shown: 1 of 30 differences, such as layer 6" in model.difference_title(pair)
        (points,) = model.difference_chart(pair).to_figure().data
        assert [x for x, y in zip(points.x, points.marker.opacity, strict=True) if y == 1] == [6]


class TestPage:
    def test_names_are_escaped_in_every_chart(self):
        cells = [build_cell(HOSTILE, model=f"<b>{name}</b>", metric=HOSTILE) for name in ("a", "b")]
        text = json.dumps(read_figures(render_page(cells, {})), ensure_ascii=False)
        assert "<script" not in text
        assert "<b>a" not in text
        assert "&lt;script&gt;" in text

    def test_three_models_on_six_benchmarks_stay_small(self, monkeypatch, tmp_path):
        monkeypatch.setattr("tests.report.conftest.LAYERS", 32)
        cells = [
            build_cell(benchmark, model=f"Llama-3.2-1B-Instruct-{letter}", seed=seed)
            for seed, letter in enumerate("abc")
            for benchmark in ("arc_easy", "boolq", "hellaswag", "mmlu", "piqa", "winogrande")
        ]
        record = decisions_record(build_decisions(cells[0], 100))
        decided = {cell.record_key: record for cell in cells}
        path = render_report(cells, {}, tmp_path / "report.html", decided)
        assert path.stat().st_size < 4_500_000


def test_cells_that_differ_in_documents_alone_have_links_of_their_own():
    """Was: the overview led both to the last one."""
    page = render_page([build_cell(n=100), build_cell(n=160)], {})
    overview = page.split('id="overview"')[1].split("</table>")[0]
    assert 'href="#model-1-cell-1"' in overview
    assert 'href="#model-1-cell-2"' in overview
