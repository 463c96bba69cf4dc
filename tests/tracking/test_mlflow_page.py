"""MLflow's own page in a real Chromium: what a team sees of a cell, its layers and a report."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import plotly.graph_objects as go
import pytest
from playwright.sync_api import Page, expect, sync_playwright
from plotly.offline import get_plotlyjs

from tests.helpers.mlflow_store import Store
from tracker.tracking.base import Page as Kept
from tracker.tracking.identity import cell_name
from tracker.tracking.mlflow.backend import MlflowBackend

from .conftest import cell_record

SECONDS = 120_000


@pytest.fixture(scope="module")
def browser_page() -> Iterator[Page]:
    path = shutil.which("chromium")
    assert path, "these tests need chromium on the PATH: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        # MLflow's log_figure leaves plotly.js to the network; here the installed one answers.
        page.route(
            re.compile(r"https://cdn\.plot\.ly/"),
            lambda route: route.fulfill(body=get_plotlyjs(), content_type="text/javascript"),
        )
        page.set_default_timeout(SECONDS)
        expect.set_options(timeout=SECONDS)
        yield page
        browser.close()


def test_a_cell_its_layers_and_a_report(
    server: str, results: Path, browser_page: Page, tmp_path: Path
) -> None:
    page, cell = browser_page, cell_record()
    backend = MlflowBackend("looked-at", results, server)
    chart = go.Figure(go.Scatter(y=[1, 2]), layout_title_text="Drop by layer")
    location = backend.publish(cell, [], {"curve": chart}).location
    store = Store(server, "looked-at")

    page.goto(location)
    expect(page.get_by_text(cell_name(cell)).first).to_be_visible()

    run = store.cell(cell).info
    address = f"{server}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    page.goto(address)
    expect(page.get_by_text("what the benchmark's accuracy loses").first).to_be_visible()
    expect(page.get_by_text("baseline_accuracy").first).to_be_visible()
    expect(page.get_by_text("model_fingerprint").first).to_be_visible()
    expect(page.get_by_text(re.compile("arc_easy.*cdcdcd|cdcdcd")).first).to_be_visible()
    page.goto(f"{address}/artifacts/charts/curve.html")
    expect(page.frame_locator("iframe").first.get_by_text("Drop by layer").first).to_be_visible()

    layer = store.layer(cell, 3).info
    page.goto(f"{server}/#/experiments/{run.experiment_id}/runs/{layer.run_id}")
    expect(page.get_by_text("layer 03 · arc_easy").first).to_be_visible()
    expect(page.get_by_text("Parent run").first).to_be_visible()

    file = tmp_path / "report.html"
    file.write_text("<!doctype html><title>r</title><h1>Which layers matter</h1>")
    backend.add_page(Kept([file], {}, [], "Two sentences."))
    (report,) = store.client.search_runs([run.experiment_id], "tags.`tracker.kind` = 'report'")
    address = f"{server}/#/experiments/{run.experiment_id}/runs/{report.info.run_id}"
    page.goto(address)
    expect(page.get_by_text("Two sentences.").first).to_be_visible()
    page.goto(f"{address}/artifacts/report.html")
    heading = page.frame_locator("iframe").first.get_by_role("heading", name="Which layers matter")
    expect(heading).to_be_visible()
