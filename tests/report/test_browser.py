"""The page in a real Chromium without a network: drawn, legible, quiet and harmless."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tracker.report.page.html import render_report

from .conftest import EXPERIMENT, LAYERS, build_cell, study, with_layer
from .visit import Visit

HOSTILE = "<script>alert(1)</script>"
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


@pytest.fixture(scope="module", name="report")
def fixture_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    return render_report(study(), {"smollm2.yaml": EXPERIMENT}, path)


def test_page_draws_everything_offline(chromium: Browser, report: Path) -> None:
    with Visit(chromium, report, viewport={"width": 1280, "height": 900}) as visit:
        page = visit.page
        assert page.locator(".js-plotly-plot").count() == 5 + 3 * 2
        assert page.locator("#model-1-heat-map .heatmaplayer image").count() == 1
        assert page.locator("#model-1-heat-map .scatterlayer .point").count() == 2 + 1 + LAYERS
        curve = page.locator("#model-1-cell-1-curve")
        assert curve.locator(".scatterlayer .point").count() == LAYERS
        assert curve.locator(".barlayer .point").count() == LAYERS
        assert curve.locator(".scatterlayer .errorbar").count() == LAYERS
        assert page.locator("#model-1-cell-1-scatter .scatterlayer .trace").count() == 2
        assert page.locator("#model-1-cell-1-scatter .scatterlayer .point").count() == LAYERS
        assert page.locator("#model-1-cell-2-curve .scatterlayer .point").count() == LAYERS - 2
        assert visit.errors == []
        assert all(re.match(r"(file|data|blob):", url) for url in visit.requests)


def test_tables_and_charts_show_the_records_numbers(chromium: Browser, report: Path) -> None:
    cell = study()[0]
    with Visit(chromium, report) as visit:
        visit.open_all()
        rows = visit.page.locator("#model-1-cell-1-layers tbody tr").all_inner_texts()
        drawn = visit.page.evaluate("document.getElementById('model-1-cell-1-curve').data[0].y")
        for row, drop, record in zip(rows, drawn, cell.runs, strict=True):
            shown = [part.replace("−", "-") for part in re.split(r"\t+", row)]
            assert int(shown[0]) == record.layer
            assert float(shown[2]) == pytest.approx(100 * record.accuracy_drop, abs=0.051)
            assert float(shown[6]) == pytest.approx(record.cosine_score, abs=6e-4)
            assert drop == pytest.approx(100 * record.accuracy_drop)


def test_hover_names_the_layer(chromium: Browser, report: Path) -> None:
    with Visit(chromium, report, viewport={"width": 1280, "height": 900}) as visit:
        for chart, index, text in (
            ("#model-1-cell-1-curve", 11, "layer 11"),
            ("#model-1-heat-map", 0, "not measured yet"),
        ):
            point = visit.page.locator(f"{chart} .scatterlayer .point").nth(index)
            point.scroll_into_view_if_needed()
            box = point.bounding_box()
            assert box is not None
            visit.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            label = visit.page.locator(f"{chart} .hoverlayer .hovertext")
            label.first.wait_for()
            assert text in label.first.text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_are_legible(chromium: Browser, report: Path, scheme: str) -> None:
    with Visit(chromium, report, color_scheme=scheme) as visit:
        page = visit.page
        visit.open_all()
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        red = int(re.findall(r"\d+", background)[0])
        assert (red < 60) == (scheme == "dark")
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


def test_phone_scrolls_tables_not_the_page(chromium: Browser, report: Path) -> None:
    with Visit(chromium, report, viewport={"width": 390, "height": 844}) as visit:
        visit.open_all()
        width, box, table = visit.page.evaluate(
            """() => {
              const table = document.getElementById('model-1-cell-1-layers');
              return [document.documentElement.scrollWidth, table.parentElement.clientWidth,
                      table.offsetWidth];
            }"""
        )
        assert width <= 390
        assert box < table
        chart = visit.page.locator("#model-1-cell-1-curve svg.main-svg").first.bounding_box()
        assert chart is not None
        assert chart["width"] <= 390


def test_print_opens_every_section_and_fits_the_paper(chromium: Browser, report: Path) -> None:
    with Visit(chromium, report, color_scheme="dark") as visit:
        page = visit.page
        page.set_viewport_size({"width": 703, "height": 900})
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        page.wait_for_function("document.querySelector('svg.main-svg').clientWidth === 680")
        assert page.locator("details:not([open])").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 703
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert int(re.findall(r"\d+", background)[0]) > 200
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert visit.errors == []


def test_a_chart_can_be_saved_as_svg(chromium: Browser, report: Path) -> None:
    with Visit(chromium, report, viewport={"width": 1280, "height": 900}) as visit:
        visit.page.locator("#model-1-cell-1-curve").hover()
        with visit.page.expect_download() as download:
            visit.page.locator("#model-1-cell-1-curve .modebar-btn").first.click()
        assert download.value.suggested_filename == "model-1-cell-1-curve.svg"
        assert "accuracy drop (pp)" in download.value.path().read_text(encoding="utf-8")
        assert visit.errors == []


def test_hostile_names_are_shown_and_never_run(chromium: Browser, tmp_path: Path) -> None:
    cell = build_cell(
        HOSTILE,
        model="<img src=x onerror=alert(2)>",
        metric="<b>acc</b>",
        provenance={"device": HOSTILE},
    )
    cell = with_layer(cell, 0, accuracy_relevance=None, reasons={"accuracy_relevance": HOSTILE})
    path = render_report([cell], {"x.yaml": f"</code></pre>{HOSTILE}"}, tmp_path / "x.html")
    with Visit(chromium, path, viewport={"width": 1280, "height": 900}) as visit:
        page = visit.page
        assert HOSTILE in page.locator("#overview tbody").inner_text()
        assert HOSTILE in page.locator("#model-1-heat-map .ytick text").text_content()
        assert page.locator("pre").inner_text() == f"</code></pre>{HOSTILE}"
        assert page.locator("img").count() == 0
        assert page.locator("#model-1-cell-1").inner_text() == f"{HOSTILE} · 0-shot"
        assert visit.errors == []
