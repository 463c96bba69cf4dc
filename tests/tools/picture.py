"""README's pictures: the head of the demo's page, light and dark.

tracker run experiments/demo.yaml && python -m tests.tools.picture results/report.html docs/images
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.report.visit import PageVisit, start_chromium

ENDS = ("h1", "#model-1-headline")


def main(page: Path, folder: Path) -> None:
    """Take the page from its heading to the end of its first chart."""
    with start_chromium() as browser:
        for scheme, name in (("light", "report"), ("dark", "report-dark")):
            style_options = {"color_scheme": scheme, "device_scale_factor": 1.5}
            with PageVisit(browser, page, scroll=False, width=900, **style_options) as visit:
                top, end = (visit.page.locator(part).bounding_box() for part in ENDS)
                height = end["y"] + end["height"] - top["y"] + 20
                clip = {"x": 0, "y": top["y"] - 12, "width": 900, "height": height}
                visit.page.screenshot(path=folder / f"{name}.png", clip=clip, full_page=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
