"""Test decisions on the page: the table that is loaded on request, the charts, the bounds."""

from __future__ import annotations

import gzip
import json
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import numpy as np
import pytest
from playwright.sync_api import Locator

from tracker.analysis.decisions import Decisions, decisions_record
from tracker.report.frames import document_frame
from tracker.report.page import sections as shown
from tracker.report.page.html import render_page, render_report
from tracker.report.page.sections import DOCUMENT_BUDGET, decision_table, pack_documents
from tracker.schema.records import DecisionsRecord

from .conftest import HOSTILE, build_cell, build_decisions
from .visit import PageVisit

CELL = build_cell()
Opened = Callable[[DecisionsRecord], AbstractContextManager[tuple[Locator, Locator]]]


@pytest.fixture(scope="module", name="decisions")
def fixture_decisions() -> Decisions:
    return build_decisions(CELL)


@pytest.fixture(scope="module", name="record")
def fixture_record(decisions) -> DecisionsRecord:
    return decisions_record(decisions)


def unpack_json(text: str) -> dict[str, list]:
    return json.loads(gzip.decompress(b64decode(text)))


def test_documents_that_are_lost_by_not_ending_are_told_apart(decisions):
    """A text that is cut off is another failure than one that ends with a wrong answer."""
    draw, n = np.random.default_rng(0), len(decisions.documents)
    intact = replace(decisions.baseline, cut=draw.integers(0, 2, n) / 2)
    runs = [
        (run, replace(answers, cut=draw.integers(0, 3, n) / 2, text=["said"] * n))
        for run, answers in decisions.runs
    ]
    record = decisions_record(replace(decisions, baseline=intact, runs=runs))
    for (_, answers), run in zip(runs, record.runs, strict=True):
        triples = zip(intact.cut, answers.cut, decisions.lost_documents(answers), strict=True)
        assert run.lost_cut == sum(is_lost and after > before for before, after, is_lost in triples)
        assert run.cut == pytest.approx(answers.cut.mean(), rel=1e-3)
    assert 0 < sum(run.lost_cut for run in record.runs) < sum(run.lost for run in record.runs)
    table = decision_table(CELL, record)
    assert table.headings[-2].label.startswith("texts cut off")
    marks = [document.cut for run in record.runs for document in run.named]
    assert 0 < sum(marks) < len(marks)
    packed = unpack_json(pack_documents({"one": (CELL, record)})["one"])
    texts = [entry[4] for run in packed["runs"] for entry in run[3]]
    assert texts == ["said … [cut off]" if is_cut else "said" for is_cut in marks]


class TestBounds:
    def test_a_page_names_fewer_documents_rather_than_growing(self, record, monkeypatch):
        packed_text = pack_documents({"one": (CELL, record)})["one"]
        assert [run[:3] for run in unpack_json(packed_text)["runs"]] == [
            [run.run.label(), run.lost, run.won] for run in record.runs
        ]
        assert [len(run[3]) for run in unpack_json(packed_text)["runs"]] == [
            len(run.named) for run in record.runs
        ]
        monkeypatch.setattr(shown, "DOCUMENT_BUDGET", 3 * len(packed_text) // 2)
        packed_texts = pack_documents(dict.fromkeys(("one", "two"), (CELL, record)))
        assert sum(map(len, packed_texts.values())) <= shown.DOCUMENT_BUDGET
        for run, run_record in zip(
            unpack_json(packed_texts["one"])["runs"], record.runs, strict=True
        ):
            assert run[1:3] == [run_record.lost, run_record.won]
            lost_entries = [entry for entry in run[3] if not entry[1]]
            # Those whose margin changes most are the last to go.
            margins = [document.margin for document in run_record.named[: run_record.named_lost]]
            assert [entry[3] for entry in lost_entries] == margins[: len(lost_entries)]

    def test_a_full_mmlu_leaves_a_page_light(self, tmp_path):
        """Of thousands of documents, a page holds the texts of a few."""
        record = decisions_record(build_decisions(CELL, 3000))
        assert max(run.lost for run in record.runs) > 300
        path = render_report([CELL], {}, tmp_path / "report.html", {CELL.record_key: record})
        bare_path = render_report([CELL], {}, tmp_path / "bare.html")
        assert path.stat().st_size - bare_path.stat().st_size < 500_000
        assert DOCUMENT_BUDGET <= 2_000_000


class TestFrame:
    def test_every_changed_document_is_a_row(self, decisions):
        frame = document_frame([(CELL, decisions)])
        for run, outcomes in decisions.runs:
            run_rows = frame[frame["layer"] == run.layer]
            lost_numbers, won_numbers = (
                set(run_rows[run_rows["change"] == kind]["doc"]) for kind in ("lost", "won")
            )
            assert lost_numbers == {
                int(n) for n in np.nonzero(decisions.lost_documents(outcomes))[0]
            }
            assert won_numbers == {int(n) for n in np.nonzero(decisions.won_documents(outcomes))[0]}
            for row in run_rows.itertuples():
                assert row.question == decisions.texts[row.doc].text.question
                assert json.loads(row.choices) == list(decisions.texts[row.doc].text.choices)
                assert (row.gold, row.choice) == (decisions.gold[row.doc], outcomes.choice[row.doc])
                assert row.choice_intact == decisions.baseline.choice[row.doc]
                assert (row.margin_intact, row.margin) == (
                    decisions.baseline.margin[row.doc], outcomes.margin[row.doc]
                )  # fmt: skip

    def test_private_texts_stay_where_they_are(self):
        decisions = build_decisions(CELL, public=False)
        frame = document_frame([(CELL, decisions)], with_private=False)
        assert frame[["question", "choices", "answer", "text", "text_intact"]].isna().all().all()
        assert frame["margin"].notna().all()
        assert document_frame([(CELL, decisions)])["question"].notna().all()


@pytest.fixture(name="opened")
def fixture_opened(chromium, tmp_path) -> Opened:
    """Open the documents of a page and load their rows."""

    @contextmanager
    def opened(record: DecisionsRecord) -> Iterator[tuple[Locator, Locator]]:
        path = render_report([CELL], {}, tmp_path / "report.html", {CELL.record_key: record})
        with PageVisit(chromium, path, scroll=False) as visit:
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
            first_run = record.runs[0]
            assert rows.count() == first_run.named_lost
            worst_document, document_text = (
                first_run.named[0],
                record.documents[first_run.named[0].document],
            )
            row_text = rows.first.inner_text()
            assert document_text.question in row_text
            assert f"{worst_document.margin:.2f}".replace("-", "−") in row_text
            assert (
                rows.first.locator(".gold").inner_text()
                == document_text.choices[document_text.gold]
            )
            letters = rows.first.locator("strong").all_inner_texts()
            assert letters == ["ABCD"[document_text.choice], "ABCD"[worst_document.choice]]
            status = section.locator("[role=status]")
            assert status.inner_text().startswith(
                f"{first_run.named_lost} of {first_run.lost} documents"
            )

            other_run = record.runs[11]
            section.locator("select").nth(0).select_option("won")
            section.locator("select").nth(1).select_option("11")
            assert rows.count() == len(other_run.named) - other_run.named_lost
            document = record.documents[other_run.named[other_run.named_lost].document]
            assert rows.first.locator("th").inner_text() == str(document.doc)
            section.locator("input").fill(document.question.split()[-1])
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
            n_rows = section.locator("tbody tr").count()
            section.get_by_label("and not lost without").select_option("layer 0")
            assert section.locator("tbody tr").count() < n_rows
            link = page.url
            assert "run=layer+7" in link
            assert "beside=layer+0" in link
            # Whoever is sent the link sees the same.
            page.goto("about:blank")
            page.goto(link)
            status_text = "that layer 7 loses, without those that are named of layer 0"
            status.filter(has_text=status_text).wait_for()

    def test_a_mean_leads_to_the_documents_of_each_of_its_benchmarks(
        self, chromium, record, tmp_path
    ):
        """Was: to those of the first one, as if it were of that alone."""
        cells = [CELL, build_cell("piqa")]
        decided = {cell.record_key: record for cell in cells}
        path = render_report(cells, {}, tmp_path / "report.html", decided)
        with PageVisit(chromium, path, scroll=False) as visit:
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
        hostile_documents = tuple(
            document.model_copy(
                update={"question": f"</script>{HOSTILE}", "choices": (HOSTILE,) * 4}
            )
            for document in record.documents
        )
        hostile_record = record.model_copy(update={"documents": hostile_documents})
        with opened(hostile_record) as (_, rows):
            assert HOSTILE in rows.first.inner_text()

    def test_a_cell_without_decisions_has_no_section(self):
        page = render_page([CELL], {})
        assert 'details class="documents"' not in page
        assert "What breaks" not in page
