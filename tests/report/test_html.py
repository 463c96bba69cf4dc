"""The page and its tables hold the records' numbers, escape every name and need no network."""

from __future__ import annotations

import errno
import re

import pytest
from plotly.offline import get_plotlyjs

from tests.helpers import charts
from tracker.report import wording
from tracker.report.frames import pack_text
from tracker.report.page.html import render_page, render_report
from tracker.report.tables import layer_table
from tracker.schema import formats
from tracker.schema.errors import WorkError

from .cells import loss_cell
from .conftest import EXPERIMENT, build_cell, replace_layer, study_cells


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


def test_the_page_has_no_word_of_accuracy():
    page = render_page([loss_cell()], {})
    article = page[page.index("<article") : page.index("</article>")]
    assert "orange where removal lowers loss" in article
    assert "accuracy drop" not in article
    assert "pp)" not in article


def find_trace(figure, name):
    (matching_trace,) = [trace for trace in figure.data if trace.name.startswith(name)]
    return matching_trace


def test_what_is_not_significant_is_pale():
    """Was strong where its own interval left 0 out, as one of twenty that show nothing does."""
    cell = build_cell()
    low, high = cell.runs[4].drop.low, cell.runs[4].drop.high
    half_width = (high - low) / 2  # 3.15 / 1.96 of it is the half for thirty layers
    for layer, drop in ((4, 1.5 * half_width), (5, 1.7 * half_width)):
        bounds = {"accuracy_drop_low": drop - half_width, "accuracy_drop_high": drop + half_width}
        cell = replace_layer(cell, layer, accuracy_drop=drop, mcnemar_p=1e-6, **bounds)
    drops = find_trace(charts.layer_curve(cell), "accuracy drop")
    scatter = find_trace(charts.proxy_scatter(cell), "inner")
    for points, layers in ((drops, drops.x), (scatter, map(int, scatter.text))):
        opacities = dict(zip(layers, points.marker.opacity, strict=True))
        assert (opacities[4] < 1, opacities[5]) == (True, 1)


def test_numbers_in_front_of_people():
    assert formats.points(-0.0001) == "0.0"
    assert formats.points(-0.0316) == "−3.2"
    assert formats.p_value(0.000034) == "3e−5"
    assert formats.p_value(0.0) == "0.000"
    assert formats.p_value(0.0123) == "0.012"
    figures = [1083.4, 999.6, 999.4, 12.34, -0.01234]
    assert list(map(formats.three_digits, figures)) == ["1,083", "1,000", "999", "12.3", "−0.0123"]


def test_power_is_said_under_every_table_of_runs():
    """By another road: sqrt(2 z-values) of the normal test, from the shares that change."""
    cell = build_cell(n=160)
    sentence = wording.power_sentence(cell, cell.runs)
    assert sentence in layer_table(cell).notes
    shares = sorted(0.12 * 159 / 160 + run.drop.value**2 for run in cell.runs)
    median_share = (shares[14] + shares[15]) / 2
    match = re.fullmatch(
        r"Smallest detectable accuracy drop with 160 documents \(80 % power, two-sided 5 %, "
        r"paired, 30 runs together\): (.+) pp for the median removal, (.+) pp for the removal that "
        r"changes most\.",
        sentence,
    )
    for change, share in zip(match.groups(), (median_share, shares[-1]), strict=True):
        assert float(change) == pytest.approx(
            100 * (3.144 + 0.842) * (share / 160) ** 0.5, rel=0.05
        )
    short_sentence = wording.power_sentence(cell, cell.runs[:1])
    assert "median" not in short_sentence
    assert "together" not in short_sentence
    loss = cell.model_copy(update={"higher_is_better": False, "metric": "bits_per_byte"})
    assert wording.power_sentence(loss, cell.runs).endswith("for the removal that changes most.")
