"""The page and its tables hold the records' numbers, escape every name and need no network."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs

from tracker.core.errors import WorkError
from tracker.core.records import CellRecord
from tracker.report.frames import packed
from tracker.report.page.html import render_page, render_report

from .conftest import EXPERIMENT, build_cell, study


@pytest.fixture(scope="module", name="page")
def fixture_page() -> str:
    return render_page(study(), {"smollm2.yaml": EXPERIMENT})


def test_page_is_self_contained_and_small(page: str, tmp_path: Path) -> None:
    assert page.count(packed(get_plotlyjs())) == 1
    rest = re.sub(r'<script type="text/plain".*?</script>', "", page)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|@import|url\(|(?i:cdn)""", rest)
    path = render_report(study(), {}, tmp_path / "report.html")
    assert path.stat().st_size < 4_000_000


def test_same_input_gives_the_same_bytes(page: str) -> None:
    assert render_page(study(), {"smollm2.yaml": EXPERIMENT}) == page


def test_page_replaces_the_old_one_at_once(
    cells: list[CellRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "deep" / "report.html"
    assert render_report(cells[:1], {}, path) == path
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(WorkError, match="the disk is full"):
        render_report(cells, {}, path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


def test_no_cell_gives_a_page_that_says_so() -> None:
    page = render_page([], {})
    assert "No benchmark is measured yet" in page
    assert "without an experiment file" in page


def test_models_and_equal_labels_stay_apart() -> None:
    one, other = build_cell(), build_cell(key="f" * 64, seed=1)
    group = one.benchmark.model_copy(
        update={"tasks": one.benchmark.tasks * 2, "apply_chat_template": True}
    )
    third = build_cell(model="Other-1B", benchmark="mmlu").model_copy(update={"benchmark": group})
    page = render_page([one, third, other], {})
    assert "arc_easy · 0-shot · ffffffff" in page
    assert 'id="model-2-cell-1"' in page
    assert "2 models, 3 measurements" in page
    assert "tasks weighted by their documents" in page
    links = re.findall(r'<td class="text"><a href="#([^"]+)"', page)
    assert links == ["model-1-cell-1", "model-2-cell-1", "model-1-cell-2"]
