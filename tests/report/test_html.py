"""The page and its tables hold the records' numbers, escape every name and need no network."""

from __future__ import annotations

import errno
import re

import pytest
from plotly.offline import get_plotlyjs

from tracker.report.frames import pack_text
from tracker.report.page.html import render_page, render_report
from tracker.schema import formats
from tracker.schema.errors import WorkError

from .conftest import EXPERIMENT, study_cells


@pytest.fixture(scope="module", name="page")
def fixture_page() -> str:
    return render_page(study_cells(), {"smollm2.yaml": EXPERIMENT})


def test_page_is_self_contained_and_small(page, tmp_path):
    assert page.count(pack_text(get_plotlyjs())) == 1
    markup = re.sub(r'<script type="text/plain".*?</script>', "", page)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|@import|url\(|(?i:cdn)""", markup)
    path = render_report(study_cells(), {}, tmp_path / "report.html")
    assert path.stat().st_size < 4_000_000


def test_same_input_gives_the_same_bytes(page):
    assert render_page(study_cells(), {"smollm2.yaml": EXPERIMENT}) == page


def test_page_replaces_the_old_one_at_once(cells, tmp_path, monkeypatch):
    path = tmp_path / "deep" / "report.html"
    assert render_report(cells[:1], {}, path) == path
    old_content = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(WorkError, match="the disk is full"):
        render_report(cells, {}, path)
    assert path.read_bytes() == old_content
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_no_cell_gives_a_page_that_says_so():
    page = render_page([], {})
    assert "No benchmark is measured yet" in page
    assert "without an experiment file" in page


def test_numbers_in_front_of_people():
    assert formats.points(-0.0001) == "0.0"
    assert formats.points(-0.0316) == "−3.2"
    assert formats.p_value(0.000034) == "3e−5"
    assert formats.p_value(0.0) == "0.000"
    assert formats.p_value(0.0123) == "0.012"
    figures = [1083.4, 999.6, 999.4, 12.34, -0.01234]
    assert list(map(formats.three_digits, figures)) == ["1,083", "1,000", "999", "12.3", "−0.0123"]
