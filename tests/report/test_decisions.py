"""Test decisions on the page: the table that is loaded on request, the charts, the bounds."""

from __future__ import annotations

import gzip
import json
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
from playwright.sync_api import Locator

from tests.helpers.pages import HOSTILE
from tracker.analysis.decisions import Decisions, decisions_record
from tracker.core.decision_records import DecisionsRecord
from tracker.report.charts.cells import agreement, agreement_map
from tracker.report.frames import document_frame
from tracker.report.page import sections as shown
from tracker.report.page.html import render_page, render_report
from tracker.report.page.sections import BUDGET, packed_documents

from .conftest import build_cell, build_decisions
from .visit import Visit

CELL = build_cell()
Opened = Callable[[DecisionsRecord], AbstractContextManager[tuple[Locator, Locator]]]


@pytest.fixture(scope="module", name="found")
def fixture_found() -> Decisions:
    return build_decisions(CELL)


@pytest.fixture(scope="module", name="record")
def fixture_record(found) -> DecisionsRecord:
    return decisions_record(found)


def unpacked(text: str) -> dict[str, list]:
    return json.loads(gzip.decompress(b64decode(text)))


class TestCharts:
    def test_layers_that_lose_the_same_documents_stand_together(self, found, record):
        layers, grid = agreement(record)
        assert abs(layers.index(0) - layers.index(1)) == 1
        # Against numpy's correlation of the columns themselves.
        right = found.baseline.score > 0
        lost = {run.layer: found.lost(one)[right] for run, one in found.runs}
        for i, one in enumerate(layers):
            for j, other in enumerate(layers):
                assert grid[i, j] == pytest.approx(np.corrcoef(lost[one], lost[other])[0, 1])
        figure = agreement_map(CELL, record).figure()
        (field,) = figure.data  # no pair is marked
        assert list(field.x) == list(field.y) == [str(layer) for layer in layers]
        assert np.array(field.z) == pytest.approx(grid, abs=0.0051)


class TestBounds:
    def test_a_page_names_fewer_documents_rather_than_growing(self, record, monkeypatch):
        whole = packed_documents({"one": (CELL, record)})["one"]
        assert [run[:3] for run in unpacked(whole)["runs"]] == [
            [run.run.label(), run.lost, run.won] for run in record.runs
        ]
        assert [len(run[3]) for run in unpacked(whole)["runs"]] == [
            len(run.named) for run in record.runs
        ]
        monkeypatch.setattr(shown, "BUDGET", 3 * len(whole) // 2)
        both = packed_documents(dict.fromkeys(("one", "two"), (CELL, record)))
        assert sum(map(len, both.values())) <= shown.BUDGET
        for run, full in zip(unpacked(both["one"])["runs"], record.runs, strict=True):
            assert run[1:3] == [full.lost, full.won]
            lost = [entry for entry in run[3] if not entry[1]]
            # Those whose margin changes most are the last to go.
            margins = [one.margin for one in full.named[: full.named_lost]]
            assert [entry[3] for entry in lost] == margins[: len(lost)]

    def test_a_full_mmlu_leaves_a_page_light(self, tmp_path):
        """Of thousands of documents, a page holds the texts of a few."""
        record = decisions_record(build_decisions(CELL, 3000))
        assert max(run.lost for run in record.runs) > 300
        path = render_report([CELL], {}, tmp_path / "report.html", {CELL.place: record})
        bare = render_report([CELL], {}, tmp_path / "bare.html")
        assert path.stat().st_size - bare.stat().st_size < 500_000
        assert BUDGET <= 2_000_000


class TestFrame:
    def test_every_changed_document_is_a_row(self, found):
        frame = document_frame([(CELL, found)])
        for run, one in found.runs:
            mine = frame[frame["layer"] == run.layer]
            lost, won = (set(mine[mine["change"] == kind]["doc"]) for kind in ("lost", "won"))
            assert lost == {int(n) for n in np.nonzero(found.lost(one))[0]}
            assert won == {int(n) for n in np.nonzero(found.won(one))[0]}
            for row in mine.itertuples():
                assert row.question == found.texts[row.doc].text.question
                assert json.loads(row.choices) == list(found.texts[row.doc].text.choices)
                assert (row.gold, row.choice) == (found.gold[row.doc], one.choice[row.doc])
                assert row.choice_intact == found.baseline.choice[row.doc]
                assert (row.margin_intact, row.margin) == (
                    found.baseline.margin[row.doc], one.margin[row.doc]
                )  # fmt: skip

    def test_private_texts_stay_where_they_are(self):
        found = build_decisions(CELL, public=False)
        frame = document_frame([(CELL, found)], private=False)
        assert frame[["question", "choices", "answer", "text", "text_intact"]].isna().all().all()
        assert frame["margin"].notna().all()
        assert document_frame([(CELL, found)])["question"].notna().all()


@pytest.fixture(name="opened")
def fixture_opened(chromium, tmp_path) -> Opened:
    """Open the documents of a page and load their rows."""

    @contextmanager
    def opened(record: DecisionsRecord) -> Iterator[tuple[Locator, Locator]]:
        path = render_report([CELL], {}, tmp_path / "report.html", {CELL.place: record})
        with Visit(chromium, path, scroll=False) as visit:
            section = visit.page.locator("details.documents")
            assert section.locator("table").count() == 0
            section.locator("summary").click()
            rows = section.locator("tbody tr")
            rows.first.wait_for()
            yield section, rows

    return opened


class TestBrowser:
    def test_it_is_loaded_when_it_is_opened_and_filtered(self, opened, record):
        with opened(record) as (section, rows):
            first = record.runs[0]
            assert rows.count() == first.named_lost
            worst, doc = first.named[0], record.documents[first.named[0].document]
            said = rows.first.inner_text()
            assert doc.question in said
            assert f"{worst.margin:.2f}".replace("-", "−") in said
            assert rows.first.locator(".gold").inner_text() == doc.choices[doc.gold]
            letters = rows.first.locator("strong").all_inner_texts()
            assert letters == ["ABCD"[doc.choice], "ABCD"[worst.choice]]
            status = section.locator("[role=status]")
            assert status.inner_text().startswith(f"{first.named_lost} of {first.lost} documents")

            other = record.runs[11]
            section.locator("select").nth(0).select_option("won")
            section.locator("select").nth(1).select_option("11")
            assert rows.count() == len(other.named) - other.named_lost
            shown = record.documents[other.named[other.named_lost].document]
            assert rows.first.locator("th").inner_text() == str(shown.doc)
            section.locator("input").fill(shown.question.split()[-1])
            assert rows.count() == 1

    def test_a_bar_a_row_and_a_link_lead_to_a_layers_documents(self, opened, record):
        with opened(record) as (section, _):
            page = section.page
            status = section.locator("[role=status]")
            page.locator("#model-1-headline .barlayer .point").nth(3).click(force=True)
            status.wait_for()
            assert page.url.endswith("#model-1-cell-1-breaks?run=layer+3")
            status.filter(has_text="that layer 3 loses").wait_for()
            board = page.locator("#model-1-board")
            board.scroll_into_view_if_needed()
            board.get_by_role("link", name="7", exact=True).click()
            status.filter(has_text="that layer 7 loses").wait_for()
            all_of_7 = section.locator("tbody tr").count()
            section.get_by_label("and not lost without").select_option("layer 0")
            assert section.locator("tbody tr").count() < all_of_7
            link = page.url
            assert "run=layer+7" in link
            assert "beside=layer+0" in link
            # Whoever is sent the link sees the same.
            page.goto("about:blank")
            page.goto(link)
            without = "that layer 7 loses, without those that are named of layer 0"
            status.filter(has_text=without).wait_for()

    def test_a_mean_leads_to_the_documents_of_each_of_its_benchmarks(
        self, chromium, record, tmp_path
    ):
        """Was: to those of the first one, as if it were of that alone."""
        cells = [CELL, build_cell("piqa")]
        decided = {cell.place: record for cell in cells}
        path = render_report(cells, {}, tmp_path / "report.html", decided)
        with Visit(chromium, path, scroll=False) as visit:
            page = visit.page
            page.locator("#model-1-headline .barlayer .point").nth(3).click(force=True)
            choices = page.locator("#model-1-headline").locator("xpath=../p")
            choices.wait_for()
            assert choices.inner_text() == (
                "Documents lost and won without layer 3, on: arc_easy · 0-shot · piqa · 0-shot"
            )
            assert "run=" not in page.url
            choices.get_by_role("link", name="piqa").click()
            section = page.locator("#model-1-cell-2-breaks")
            section.locator("[role=status]").filter(has_text="that layer 3 loses").wait_for()
            assert page.url.endswith("#model-1-cell-2-breaks?run=layer+3")
            board = page.locator(".table").filter(has=page.locator("#model-1-board"))
            board.get_by_role("link", name="7", exact=True).click()
            row = board.locator(".choices")
            row.wait_for()
            assert row.inner_text().startswith("Documents lost and won without layer 7, on: arc")

    def test_hostile_documents_are_shown_and_never_run(self, opened, record):
        hostile = tuple(
            one.model_copy(update={"question": f"</script>{HOSTILE}", "choices": (HOSTILE,) * 4})
            for one in record.documents
        )
        bad = record.model_copy(update={"documents": hostile})
        with opened(bad) as (_, rows):
            assert HOSTILE in rows.first.inner_text()

    def test_a_cell_without_decisions_has_no_section(self):
        page = render_page([CELL], {})
        assert 'details class="documents"' not in page
        assert "What breaks" not in page
