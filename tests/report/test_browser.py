"""Test the page in a real Chromium without a network: sort, filter, hover, print."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest
from playwright.sync_api import Locator, Page

from tests.helpers.findings import FINDING
from tracker.analysis.boards import LayerBoard, layer_board
from tracker.report import frames
from tracker.report.page.html import render_report

from .conftest import (
    EXPERIMENT,
    HOSTILE,
    LAYERS,
    build_cell,
    replace_layer,
    study_cells,
    two_model_cells,
)
from .visit import PageVisit

BOARD = "#model-1-board"
LAYER_COLUMN = f"{BOARD} tbody tr:not([hidden]) > :nth-child(2)"
CONTRAST = """(selector) => {
  const parse = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255)
      .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = light(parse(getComputedStyle(document.body).backgroundColor));
  const element = document.querySelector(selector);
  const style = getComputedStyle(element);
  const ink = light(parse(element instanceof SVGElement ? style.fill : style.color));
  return (Math.max(page, ink) + 0.05) / (Math.min(page, ink) + 0.05);
}"""


COVERED = """() => [...document.querySelectorAll(".chart")].filter((chart) => {
  const boxes = (selector) => [...chart.querySelectorAll(selector)]
    .map((part) => part.getBoundingClientRect());
  const top = Math.min(...boxes(".nsewdrag").map((box) => box.top));
  const above = boxes(".modebar, .legendtext");
  return !Number.isFinite(top) || !above.length || above.some((box) => box.bottom > top + 1);
}).map((chart) => chart.id)"""


@pytest.fixture(scope="module", name="report")
def fixture_report(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    return render_report(two_model_cells(), {"smollm2.yaml": EXPERIMENT}, path)


@pytest.fixture(name="page")
def fixture_page(chromium, report) -> Iterator[Page]:
    """Return the report as it is opened."""
    with PageVisit(chromium, report, scroll=False) as visit:
        yield visit.page


@pytest.fixture(scope="module", name="drawn")
def fixture_drawn(chromium, report) -> Iterator[Page]:
    """Open the report with every section open and every chart drawn, for read-only tests."""
    with PageVisit(chromium, report, scroll=False) as visit:
        visit.open_all()
        yield visit.page


@pytest.fixture(scope="module", name="board")
def fixture_board() -> LayerBoard:
    return layer_board(study_cells())


def layer_numbers(cells: Locator) -> list[int]:
    return [int(text) for text in cells.all_inner_texts()]


def scroll_to_table(page: Page, table: str) -> Locator:
    """Find a table with its buttons, and look at it."""
    box = page.locator(".table", has=page.locator(table))
    box.scroll_into_view_if_needed()
    return box


def read_csv(page: Page, table: str) -> list[dict[str, str]]:
    with page.expect_download() as download:
        scroll_to_table(page, table).get_by_role("button", name="CSV").click()
    csv_text = download.value.path().read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(csv_text)))


def test_page_draws_everything_offline(drawn):
    assert drawn.locator(".js-plotly-plot").count() == 2 * 5 + 2 + 5 * 2
    assert drawn.locator("#model-1-heat-map .heatmaplayer image").count() == 2
    crosses = drawn.locator("#model-1-heat-map .scatterlayer .trace").last.locator(".point")
    assert crosses.count() == 2 + 1 + LAYERS
    curve = drawn.locator("#model-1-cell-1-curve")
    for part in (".scatterlayer .point", ".barlayer .point", ".scatterlayer .errorbar"):
        assert curve.locator(part).count() == LAYERS
    assert drawn.locator("#model-1-cell-1-scatter .scatterlayer .trace").count() == 2
    assert drawn.locator("#model-1-cell-1-scatter .scatterlayer .point").count() == LAYERS
    assert drawn.locator("#model-1-cell-2-curve .scatterlayer .point").count() == LAYERS - 2
    drops = drawn.evaluate("document.getElementById('model-1-cell-1-curve').data[0].y")
    assert drops == pytest.approx([100 * run.drop.value for run in study_cells()[0].runs])
    curve.hover()
    with drawn.expect_download() as download:
        curve.locator(".modebar-btn").first.click()
    assert download.value.suggested_filename == "model-1-cell-1-curve.svg"
    assert "accuracy drop (pp)" in download.value.path().read_text(encoding="utf-8")


def test_it_fits_the_window_and_is_legible(chromium, report, drawn):
    """On a screen and on a phone, which scrolls tables and not the page, in both colour schemes."""
    check_layout(drawn, 1280)
    assert red_component(drawn) > 200
    with PageVisit(chromium, report, width=390, color_scheme="dark") as visit:
        visit.open_all()
        check_layout(visit.page, 390)
        assert red_component(visit.page) < 60
        table = visit.page.locator("#model-1-cell-1-layers")
        assert table.evaluate("(table) => table.parentElement.clientWidth < table.offsetWidth")


def check_layout(page: Page, width: int) -> None:
    # Buttons and legends stand above the axes.
    assert page.evaluate(COVERED) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    charts = "[...document.querySelectorAll('svg.main-svg')].map((svg) => svg.clientWidth)"
    assert max(page.evaluate(charts)) <= width
    for selector in (
        "p",
        "a",
        ".warnings li",
        ".notes li",
        "#model-1-cell-1-curve .x2tick text",
        "#model-1-cell-1-curve .ytitle",
        "#model-1-cell-1-scatter .textpoint text",
    ):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector


def red_component(page: Page) -> int:
    """Return the red component of the background, 0 to 255."""
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return int(re.findall(r"\d+", background)[0])


def test_a_loaded_page_can_be_captured_and_read_aloud(chromium, tmp_path):
    path = render_report(study_cells(), {}, tmp_path / "page.html", {}, [FINDING])
    page = chromium.new_page(offline=True)
    page.goto(path.as_uri(), wait_until="load")
    charts = page.locator(".chart").all()
    assert len(charts) == 5 + 3 * 2 + 2
    for chart in charts:
        assert chart.locator("svg.main-svg").count(), chart.get_attribute("id")
        assert chart.get_attribute("role") == "img"
        assert chart.get_attribute("aria-label")
    assert page.locator("iframe").count() == 0
    page.close()


def test_a_leaderboard_is_sorted_and_filtered_by_click_and_by_keyboard_and_sent(page, board):
    scroll_to_table(page, BOARD)
    layers = page.locator(LAYER_COLUMN)
    heads = page.locator(f"{BOARD} thead th")
    assert layer_numbers(layers) == [standing.layer for standing in board.parts]
    assert heads.nth(0).get_attribute("aria-sort") is None

    heads.nth(1).get_by_role("button").click()
    assert layer_numbers(layers) == sorted(standing.layer for standing in board.parts)
    assert heads.nth(1).get_attribute("aria-sort") == "ascending"
    assert heads.nth(0).get_attribute("aria-sort") is None

    heads.nth(5).get_by_role("button").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert heads.nth(5).get_attribute("aria-sort") == "descending"
    sorted_standings = sorted(board.parts, key=lambda standing: standing.cosine_score, reverse=True)
    assert layer_numbers(layers) == [standing.layer for standing in sorted_standings]

    # Layers without a rank come last, whichever way the others run.
    heads.nth(0).get_by_role("button").click()
    heads.nth(0).get_by_role("button").click()
    unranked = {standing.layer for standing in board.parts if standing.rank.value is None}
    assert set(layer_numbers(layers)[-len(unranked) :]) == unranked
    lowest_rank = max(standing.rank.low for standing in board.ranked)
    assert layer_numbers(layers)[0] in {
        standing.layer for standing in board.ranked if standing.rank.low == lowest_rank
    }

    # Filtered by keyboard.
    box = scroll_to_table(page, BOARD)
    box.get_by_role("searchbox", name="Layers").focus()
    page.keyboard.type("3, 10-12")
    assert sorted(layer_numbers(page.locator(LAYER_COLUMN))) == [3, 10, 11, 12]
    assert box.get_by_role("status").inner_text() == f"4 of {LAYERS} rows"
    layers = [int(row["layer (0-based)"]) for row in read_csv(page, BOARD)]
    assert sorted(layers) == [3, 10, 11, 12]
    # Was: 30 of 30 rows, without a word.
    box.get_by_role("searchbox", name="Layers").fill("banana")
    assert box.get_by_role("status").inner_text().startswith("type layers by number")

    cells = scroll_to_table(page, "#overview")
    cells.get_by_role("searchbox", name="Rows with").fill("360m piqa")
    assert cells.get_by_role("status").inner_text() == "1 of 5 rows"
    cells.get_by_role("searchbox", name="Rows with").fill("")
    assert cells.locator("tbody tr:visible").count() == 5

    # Its address is sent, and shows the same.
    box.get_by_role("searchbox", name="Layers").fill("3, 7-9")
    head = box.locator("thead button").nth(3)
    head.click()
    head.click()
    link, layers = page.url, page.locator(LAYER_COLUMN).all_inner_texts()
    assert len(layers) == 4
    page.goto("about:blank")
    page.goto(link)
    box = scroll_to_table(page, BOARD)
    box.get_by_role("searchbox", name="Layers").wait_for()
    assert page.locator(LAYER_COLUMN).all_inner_texts() == layers
    assert box.locator("thead th[aria-sort=descending]").count() == 1


def test_the_csv_of_a_table_holds_exact_figures(drawn, board):
    for row, standing in zip(read_csv(drawn, BOARD), board.parts, strict=True):
        for end, rank in (("low", standing.rank.low), ("high", standing.rank.high)):
            assert row[f"rank, 95 % confidence for all: {end}"] == str(rank or "")
        relevance = "mean accuracy relevance (95 % interval of each table row)"
        assert float(row[relevance]) == standing.relevance.value
        assert float(row[f"{relevance}: low"]) == standing.relevance.low
        assert float(row[f"{relevance}: high"]) == standing.relevance.high
        drop = float(row["mean accuracy drop (simultaneous 95 % intervals of all rows) (pp)"])
        assert drop == pytest.approx(100 * standing.deciding.value, rel=1e-14)
        assert float(row["mean cosine score (1 − cos)"]) == standing.cosine_score

    for row, record in zip(
        read_csv(drawn, "#model-1-cell-1-layers"), study_cells()[0].runs, strict=True
    ):
        assert int(row["layer (0-based)"]) == record.change.layer
        assert float(row["McNemar p"]) == record.drop.p_value
        assert float(row["accuracy relevance"]) == record.accuracy_relevance
        for end in ("low", "high"):
            expected = 100 * record.figure(f"accuracy_drop_{end}")
            assert float(row[f"95 % interval (pp): {end}"]) == pytest.approx(expected, rel=1e-14)
        assert "95 % interval (pp)" not in row, "only its two ends are figures"


def test_the_csv_of_a_table_holds_no_formula(chromium, tmp_path):
    """Before: a model named `=1+2` was computed by the spreadsheet that opened the download."""
    cells = [build_cell(name, model="=1+2") for name in ("@sum", "piqa")]
    with PageVisit(chromium, render_report(cells, {}, tmp_path / "r.html"), scroll=False) as visit:
        rows = read_csv(visit.page, "#overview")
        assert [row["model"] for row in rows] == ["'=1+2"] * 2
        assert rows[0]["benchmark"].startswith("'@sum")
        visit.open_all()
        layers = read_csv(visit.page, "#model-1-cell-1-layers")
    drops = [float(row["accuracy drop (pp)"]) for row in layers]
    assert min(drops) < 0, "figures are as they were"


def test_all_layers_are_downloaded_unrounded(drawn, tmp_path):
    layer_frame = frames.layer_frame(two_model_cells())
    for name, read in (("CSV", pd.read_csv), ("Parquet", pd.read_parquet)):
        with drawn.expect_download() as download:
            drawn.get_by_role("button", name=f"Download all layers as {name}").click()
        assert download.value.suggested_filename == f"layers.{name.lower()}"
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        if name == "CSV":
            assert path.read_text(encoding="utf-8") == layer_frame.to_csv(index=False)
        # CSV knows no whole numbers of which some are missing.
        frame = read(path).astype(layer_frame.dtypes)
        numbers = (
            layer_frame.select_dtypes("number").columns if name == "CSV" else layer_frame.columns
        )
        pd.testing.assert_frame_equal(frame[numbers], layer_frame[numbers], check_exact=True)


def test_keyboard_and_screen_reader_find_their_way(page):
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
    assert all(
        page.locator(f"section[aria-labelledby='{target[1:]}']").count() for target in targets
    )
    assert links.all_inner_texts() == [
        "Overview", "SmolLM2-135M-Instruct", "SmolLM2-360M", "Across models", "Downloads",
        "Provenance", "Definitions",
    ]  # fmt: skip
    selector = "table:not(:has(caption)), thead th:not([scope]), tbody tr:not(:has(th[scope=row]))"
    assert page.locator(selector).count() == 0
    page.locator(BOARD).scroll_into_view_if_needed()
    button = page.locator(f"{BOARD} thead button").first
    button.focus()
    page.keyboard.press("Tab")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"


def test_print_opens_every_section_and_fits_the_paper(chromium, report):
    with PageVisit(chromium, report, width=703, color_scheme="dark") as visit:
        page = visit.page
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.wait_for_function("document.querySelector('svg.main-svg').clientWidth === 680")
        assert page.locator("details:not([open])").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 703
        assert red_component(page) > 200
        page.evaluate("dispatchEvent(new Event('afterprint'))")


def test_hostile_names_are_shown_and_never_run_and_a_wrong_address_shows_all(chromium, tmp_path):
    cell = build_cell(
        HOSTILE,
        model="<img src=x onerror=alert(2)>",
        metric="<b>acc</b>",
        provenance={"device": HOSTILE},
    )
    cell = replace_layer(cell, 0, accuracy_relevance=None, reasons={"accuracy_relevance": HOSTILE})
    path = render_report([cell], {"x.yaml": f"</code></pre>{HOSTILE}"}, tmp_path / "x.html")
    with PageVisit(chromium, path, sent="#model-1-board?sort=99&filter=") as visit:
        page = visit.page
        assert len(page.locator(LAYER_COLUMN).all_inner_texts()) == LAYERS
        assert HOSTILE in page.locator("#overview tbody").inner_text()
        assert HOSTILE in page.locator("#model-1-heat-map .ytick text").text_content()
        assert page.locator("pre").inner_text() == f"</code></pre>{HOSTILE}"
        assert page.locator("img").count() == 0
        assert page.locator("#model-1-cell-1").inner_text() == f"{HOSTILE} · 0-shot"
