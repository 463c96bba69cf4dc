"""A page opened in a real Chromium without a network, and everything that went wrong on it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM_ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SCROLL_SCRIPT = """async () => {
  for (const box of document.querySelectorAll('.chart, .table')) {
    if (box.closest('details:not([open])')) continue;
    box.scrollIntoView();
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  }
  scrollTo(0, 0);
}"""
DRAWN_SCRIPT = """() => [...document.querySelectorAll('.chart')].every(
  (box) => box.closest('details:not([open])') || box.querySelector('svg.main-svg'))"""


@contextmanager
def start_chromium() -> Iterator[Browser]:
    """Start the browser and end it."""
    path = shutil.which("chromium")
    assert path, "these tests need chromium on the PATH: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


class PageVisit:
    """One opened page; on leaving it, nothing may have gone wrong or been fetched.

    It is scrolled through first, so that every chart in an open section is drawn, unless
    `scroll_through` is false. `sent` is appended to the page's address, as in a link that was sent.
    """

    def __init__(
        self,
        chromium: Browser,
        path: Path,
        scroll: bool = True,
        width: int = 1280,
        sent: str = "",
        **options: object,
    ) -> None:
        viewport = {"width": width, "height": 900}
        self.context = chromium.new_context(offline=True, viewport=viewport, **options)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(120_000)  # a busy machine draws late
        self.errors: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("requestfailed", lambda request: self.errors.append(request.url))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: (self.errors.append("dialog"), dialog.dismiss()))
        self.page.goto(path.as_uri() + sent)
        self.page.wait_for_function("document.documentElement.dataset.charts === 'ready'")
        if scroll:
            self.scroll_through()

    def scroll_through(self) -> None:
        """Look at everything that is open."""
        self.page.evaluate(SCROLL_SCRIPT)
        self.page.wait_for_function(DRAWN_SCRIPT)

    def open_all(self) -> None:
        """Open every section, as a reader who wants all numbers does."""
        self.page.evaluate(
            "document.querySelectorAll('details').forEach((d) => { d.open = true; })"
        )
        self.scroll_through()

    def __enter__(self) -> PageVisit:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.context.close()
        if kind is None:
            assert self.errors == []
            assert all(url.startswith(("file:", "data:", "blob:")) for url in self.requests)
