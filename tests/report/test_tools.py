"""What a reader does with the page in a real Chromium: sort, filter, hover, download."""

from __future__ import annotations

import csv
import io
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import Browser, Locator

from tracker.report import frames
from tracker.report.leaderboard.layers import LayerBoard, layer_board
from tracker.report.page.html import render_report

from .conftest import EXPERIMENT, LAYERS, build_cell, study, two_models
from .visit import Visit

WIDE = {"width": 1280, "height": 900}
BOARD = "#model-1-board"
LAYER_COLUMN = f"{BOARD} tbody tr:not([hidden]) > :nth-child(2)"


@pytest.fixture(scope="module", name="report")
def fixture_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    return render_report(two_models(), {"smollm2.yaml": EXPERIMENT}, path)


@pytest.fixture(scope="module", name="board")
def fixture_board() -> LayerBoard:
    return layer_board(study())


def shown(cells: Locator) -> list[int]:
    return [int(text) for text in cells.all_inner_texts()]


def read_csv(visit: Visit, button: Locator) -> list[dict[str, str]]:
    with visit.page.expect_download() as download:
        button.click()
    text = download.value.path().read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def test_a_leaderboard_is_sorted_by_click_and_by_keyboard(
    chromium: Browser, report: Path, board: LayerBoard
) -> None:
    with Visit(chromium, report, scroll=False, viewport=WIDE) as visit:
        visit.page.locator(BOARD).scroll_into_view_if_needed()
        layers = visit.page.locator(LAYER_COLUMN)
        heads = visit.page.locator(f"{BOARD} thead th")
        assert shown(layers) == [one.layer for one in board.layers]
        assert heads.nth(0).get_attribute("aria-sort") == "ascending"

        heads.nth(1).get_by_role("button").click()
        assert shown(layers) == sorted(one.layer for one in board.layers)
        assert heads.nth(1).get_attribute("aria-sort") == "ascending"
        assert heads.nth(0).get_attribute("aria-sort") is None

        heads.nth(4).get_by_role("button").focus()
        visit.page.keyboard.press("Enter")
        visit.page.keyboard.press("Enter")
        assert heads.nth(4).get_attribute("aria-sort") == "descending"
        by_score = sorted(board.layers, key=lambda one: one.cosine_score, reverse=True)
        assert shown(layers) == [one.layer for one in by_score]

        # Layers without a rank come last, whichever way the others run.
        heads.nth(0).get_by_role("button").click()
        heads.nth(0).get_by_role("button").click()
        unranked = {one.layer for one in board.layers if one.rank is None}
        assert set(shown(layers)[-len(unranked) :]) == unranked
        assert shown(layers)[0] == [one for one in board.layers if one.rank][-1].layer
        assert visit.errors == []


def test_a_table_is_filtered_by_keyboard(chromium: Browser, report: Path) -> None:
    with Visit(chromium, report, scroll=False, viewport=WIDE) as visit:
        page = visit.page
        box = page.locator(".table", has=page.locator(BOARD))
        box.scroll_into_view_if_needed()
        box.get_by_role("searchbox", name="Layers").focus()
        page.keyboard.type("3, 10-12")
        assert sorted(shown(page.locator(LAYER_COLUMN))) == [3, 10, 11, 12]
        assert box.get_by_role("status").inner_text() == f"4 of {LAYERS} rows"
        rows = read_csv(visit, box.get_by_role("button", name="CSV"))
        assert sorted(int(row["layer (0-based)"]) for row in rows) == [3, 10, 11, 12]

        cells = page.locator(".table", has=page.locator("#overview"))
        cells.scroll_into_view_if_needed()
        cells.get_by_role("searchbox", name="Rows with").fill("360m piqa")
        assert cells.get_by_role("status").inner_text() == "1 of 5 rows"
        cells.get_by_role("searchbox", name="Rows with").fill("")
        assert cells.locator("tbody tr:visible").count() == 5


def test_the_csv_of_a_table_holds_exact_figures(
    chromium: Browser, report: Path, board: LayerBoard
) -> None:
    with Visit(chromium, report, viewport=WIDE) as visit:
        page = visit.page
        box = page.locator(".table", has=page.locator(BOARD))
        rows = read_csv(visit, box.get_by_role("button", name="CSV"))
        for row, one in zip(rows, board.layers, strict=True):
            assert row["rank"] == ("" if one.rank is None else str(one.rank))
            relevance = "mean relevance with 95 % interval"
            assert float(row[relevance]) == one.relevance.value
            assert float(row[f"{relevance}: low"]) == one.relevance.low
            assert float(row[f"{relevance}: high"]) == one.relevance.high
            drop = float(row["mean accuracy drop with 95 % interval (pp)"])
            assert drop == pytest.approx(100 * one.drop.value, rel=1e-14)
            assert float(row["mean cosine score (1 − cos)"]) == one.cosine_score

        visit.open_all()
        box = page.locator(".table", has=page.locator("#model-1-cell-1-layers"))
        rows = read_csv(visit, box.get_by_role("button", name="CSV"))
        for row, record in zip(rows, study()[0].runs, strict=True):
            assert float(row["McNemar p"]) == record.mcnemar_p
            assert float(row["accuracy relevance"]) == record.accuracy_relevance
            low = float(row["95 % interval (pp): low"])
            assert low == pytest.approx(100 * record.accuracy_drop_low, rel=1e-14)
            assert "95 % interval (pp)" not in row, "only its two ends are figures"
        assert visit.errors == []


def test_all_layers_are_downloaded_unrounded(
    chromium: Browser, report: Path, tmp_path: Path
) -> None:
    wanted = frames.layer_frame(two_models())
    with Visit(chromium, report, scroll=False) as visit:
        for name, read in (("CSV", pd.read_csv), ("Parquet", pd.read_parquet)):
            with visit.page.expect_download() as download:
                visit.page.get_by_role("button", name=f"Download all layers as {name}").click()
            assert download.value.suggested_filename == f"layers.{name.lower()}"
            path = tmp_path / download.value.suggested_filename
            download.value.save_as(path)
            # CSV knows no whole numbers of which some are missing.
            frame = read(path).astype(wanted.select_dtypes("number").dtypes)
            assert list(frame.columns) == list(wanted.columns)
            numbers = wanted.select_dtypes("number").columns
            pd.testing.assert_frame_equal(frame[numbers], wanted[numbers], check_exact=True)
        assert visit.errors == []


def test_hover_says_value_interval_and_samples(
    chromium: Browser, report: Path, board: LayerBoard
) -> None:
    with Visit(chromium, report, viewport=WIDE) as visit:
        for chart, words in (
            ("#model-1-relevance-curves", ["layer 0 · arc_easy", "95 % interval", "160 documents"]),
            ("#across-depth", ["layer 0 of 30", "mean accuracy relevance 0.", "2 benchmarks"]),
            ("#pair-1", ["layer 0 · arc_easy", "difference in pp", "160 documents each"]),
        ):
            point = visit.page.locator(f"{chart} .scatterlayer .point").first
            point.scroll_into_view_if_needed()
            box = point.bounding_box()
            assert box is not None
            visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            label = visit.page.locator(f"{chart} .hoverlayer .hovertext").first
            label.wait_for()
            for word in words:
                assert word in label.text_content()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window(chromium: Browser, report: Path, width: int) -> None:
    with Visit(chromium, report, viewport={"width": width, "height": 844}) as visit:
        visit.open_all()
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width
        charts = "[...document.querySelectorAll('svg.main-svg')].map((svg) => svg.clientWidth)"
        assert max(visit.page.evaluate(charts)) <= width


def test_keyboard_and_screen_reader_find_their_way(chromium: Browser, report: Path) -> None:
    with Visit(chromium, report, scroll=False, viewport=WIDE) as visit:
        page = visit.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"

        levels = page.evaluate(
            "[...document.querySelectorAll('h1, h2, h3, h4')].map((h) => Number(h.tagName[1]))"
        )
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in pairwise(levels)), levels

        links = page.get_by_role("navigation", name="Sections").get_by_role("link")
        targets = [link.get_attribute("href") for link in links.all()]
        assert all(page.locator(f"section[aria-labelledby='{t[1:]}']").count() for t in targets)
        assert links.all_inner_texts() == [
            "Overview", "SmolLM2-135M-Instruct", "SmolLM2-360M", "Across models", "Downloads",
            "Provenance", "Definitions",
        ]  # fmt: skip
        bare = "table:not(:has(caption)), thead th:not([scope]), tbody tr:not(:has(th[scope=row]))"
        assert page.locator(bare).count() == 0
        page.locator(BOARD).scroll_into_view_if_needed()
        button = page.locator(f"{BOARD} thead button").first
        button.focus()
        page.keyboard.press("Tab")
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert page.evaluate(outline) == "solid"


def test_many_cells_open_quietly_and_are_drawn_on_demand(chromium: Browser, tmp_path: Path) -> None:
    cells = [build_cell(f"b{b}", model=f"m{m}", seed=m) for m in range(10) for b in range(10)]
    path = render_report(cells, {}, tmp_path / "many.html")
    with Visit(chromium, path, scroll=False, viewport=WIDE) as visit:
        page = visit.page
        assert page.locator("details.cell").count() == 100
        assert page.locator("details.cell[open]").count() == 0
        assert page.locator("#model-7-cell-3-curve svg").count() == 0
        drawn = page.locator(".js-plotly-plot").count()
        assert drawn < 20
        assert page.get_by_text("The first 10 of 45 pairs are shown.").count() == 1

        page.locator("#overview a[href='#model-7-cell-3']").click()
        page.locator("#model-7-cell-3-curve svg.main-svg").first.wait_for()
        assert page.locator("details.cell[open]").count() == 1

        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.locator("details.cell[open]").count() == 1
        assert page.locator("#model-1-ranks svg.main-svg").count() > 0
        assert visit.errors == []
