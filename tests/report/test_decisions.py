"""What breaks, on the page: the table that is loaded when it is opened, the charts, the bounds."""

from __future__ import annotations

import gzip
import json
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import Browser, Locator

from tests.helpers.pages import HOSTILE
from tracker.analysis.decisions import Decisions, decisions_record
from tracker.core.decision_records import DecisionsRecord
from tracker.report.charts.decisions import (
    agreement,
    agreement_map,
    margin_chart,
)
from tracker.report.frames import document_frame
from tracker.report.page import decisions as shown
from tracker.report.page.decisions import BUDGET, decision_table, packed_documents
from tracker.report.page.html import render_page, render_report

from .conftest import as_read, build_cell, build_decisions
from .visit import Visit

CELL = build_cell()
Opened = Callable[[DecisionsRecord], AbstractContextManager[tuple[Locator, Locator]]]


def everywhere(record: DecisionsRecord, of_runs: dict[str, Any], **changes: Any) -> DecisionsRecord:
    """Change a record, and every run in it."""
    runs = tuple(run.model_copy(update=of_runs) for run in record.runs)
    return record.model_copy(update={"runs": runs, **changes})


@pytest.fixture(scope="module", name="found")
def fixture_found() -> Decisions:
    return build_decisions(CELL)


@pytest.fixture(scope="module", name="record")
def fixture_record(found: Decisions) -> DecisionsRecord:
    return decisions_record(found)


def unpacked(text: str) -> dict[str, list]:
    return json.loads(gzip.decompress(b64decode(text)))


class TestTable:
    def test_many_options_share_a_column(self, record) -> None:
        ten = (0.1,) * 10
        many = everywhere(record, {"options": ten}, options=ten, gold=ten)
        table = as_read(decision_table(CELL, many))
        assert table.labels[-2:] == ["F taken (%)", "later ones (%)"]
        assert [value.text for value in table.rows[1]][-2:] == ["10.0", "40.0"]

    def test_what_is_undefined_says_why(self, record) -> None:
        why = "acc_norm divides by the lengths of options"
        none = everywhere(record, {"margins": None}, margins=None, reasons={"margin": why})
        table = as_read(decision_table(CELL, none))
        assert (table.rows[1][3].text, table.rows[1][3].reason) == ("–", why)
        assert f"Margins: {why}." in table.notes


class TestCharts:
    def test_margins_are_the_quartiles(self, record) -> None:
        figure = margin_chart(CELL, record).figure()
        (trace,) = figure.data
        assert list(trace.x) == [run.run.layer for run in record.runs]
        for run, value, up, down in zip(
            record.runs, trace.y, trace.error_y.array, trace.error_y.arrayminus, strict=True
        ):
            assert (value - down, value, value + up) == pytest.approx(run.margins)
        band, middle = figure.layout.shapes
        assert (band.y0, middle.y0, band.y1) == record.margins

    def test_no_margin_is_no_chart(self, record) -> None:
        assert margin_chart(CELL, record.model_copy(update={"margins": None})) is None

    def test_layers_that_lose_the_same_documents_stand_together(self, found, record) -> None:
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

    def test_layers_that_lose_nothing_are_left_out_and_said(self, record) -> None:
        both = [list(row) for row in record.both]
        for place in range(len(both)):
            both[3][place] = both[place][3] = 0
        quiet = record.model_copy(update={"both": tuple(map(tuple, both))})
        chart = agreement_map(CELL, quiet)
        none = sum(row[place] == 0 for place, row in enumerate(both))
        assert chart.title.endswith(f"; {none} layers left out, which lose none or all")
        assert "3" not in chart.data[0]["x"]

    def test_one_layer_agrees_with_nobody(self, record) -> None:
        alone = record.model_copy(update={"compared": (0,), "both": ((4,),)})
        assert agreement_map(CELL, alone) is None
        none = record.model_copy(update={"compared": (), "both": ()})
        assert agreement_map(CELL, none) is None


class TestBounds:
    def test_a_page_names_fewer_documents_rather_than_growing(self, record, monkeypatch) -> None:
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

    def test_a_full_mmlu_leaves_a_page_light(self, tmp_path: Path) -> None:
        """Of thousands of documents, a page holds the texts of a few."""
        record = decisions_record(build_decisions(CELL, 3000))
        assert max(run.lost for run in record.runs) > 300
        path = render_report([CELL], {}, tmp_path / "report.html", {CELL.place: record})
        bare = render_report([CELL], {}, tmp_path / "bare.html")
        assert path.stat().st_size - bare.stat().st_size < 500_000
        assert BUDGET <= 2_000_000


class TestFrame:
    def test_every_changed_document_is_a_row(self, found: Decisions) -> None:
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

    def test_private_texts_stay_where_they_are(self) -> None:
        found = build_decisions(CELL, public=False)
        frame = document_frame([(CELL, found)], private=False)
        assert frame[["question", "choices", "answer", "text", "text_intact"]].isna().all().all()
        assert frame["margin"].notna().all()
        assert document_frame([(CELL, found)])["question"].notna().all()

    def test_no_cell_is_an_empty_table(self, tmp_path: Path) -> None:
        frame = document_frame([])
        frame.to_parquet(tmp_path / "documents.parquet")
        read_back = pd.read_parquet(tmp_path / "documents.parquet")
        assert list(read_back.columns) == list(document_frame([(CELL, build_decisions(CELL))]))
        assert not len(read_back)


@pytest.fixture(name="opened")
def fixture_opened(chromium: Browser, tmp_path: Path) -> Opened:
    """Opens the documents of a page; with them come their rows."""

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
    def test_it_is_loaded_when_it_is_opened_and_filtered(
        self, opened: Opened, record: DecisionsRecord
    ) -> None:
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

    def test_a_bar_a_row_and_a_link_lead_to_a_layers_documents(
        self, opened: Opened, record: DecisionsRecord
    ) -> None:
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
        self, chromium: Browser, record: DecisionsRecord, tmp_path: Path
    ) -> None:
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

    def test_tasks_of_a_group_are_filtered_and_unknown_texts_have_a_name(
        self, opened: Opened, record: DecisionsRecord
    ) -> None:
        half = [
            one.model_copy(update={"task": "anatomy" if place % 2 else "<b>law</b>"})
            for place, one in enumerate(record.without_texts().documents)
        ]
        quiet = record.without_texts().model_copy(update={"documents": tuple(half)})
        with opened(quiet) as (section, rows):
            every = rows.count()
            section.locator("select").nth(2).select_option("anatomy")
            assert 0 < rows.count() < every
            assert all("of anatomy" in text for text in rows.all_inner_texts())
            section.locator("select").nth(2).select_option("<b>law</b>")
            assert 0 < rows.count() < every
            why = rows.first.locator("abbr").get_attribute("title")
            assert "--publish-documents" in why

    def test_hostile_documents_are_shown_and_never_run(
        self, opened: Opened, record: DecisionsRecord
    ) -> None:
        hostile = tuple(
            one.model_copy(update={"question": f"</script>{HOSTILE}", "choices": (HOSTILE,) * 4})
            for one in record.documents
        )
        bad = record.model_copy(update={"documents": hostile})
        with opened(bad) as (_, rows):
            assert HOSTILE in rows.first.inner_text()

    def test_a_cell_without_decisions_has_no_section(self) -> None:
        page = render_page([CELL], {})
        assert 'details class="documents"' not in page
        assert "What breaks" not in page
