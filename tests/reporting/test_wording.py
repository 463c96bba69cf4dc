"""Numbers and sentences as people read them."""

from __future__ import annotations

from pathlib import Path

from tracker.records import NO_REASON
from tracker.reporting import formats, wording
from tracker.reporting.export import export, figures, frames
from tracker.reporting.facts import provenance_table
from tracker.reporting.html import render_page
from tracker.reporting.tables import layer_table, overview_table

from .conftest import CONSTANT, build_cell, study


def test_numbers_in_front_of_people() -> None:
    assert formats.points(-0.0001) == "0.0"
    assert formats.points(-0.0316) == "−3.2"
    assert formats.p_value(0.000034) == "3e−5"
    assert formats.p_value(0.0) == "0.000"
    assert formats.p_value(0.0123) == "0.012"


def test_sentence() -> None:
    cell = study()[0]
    found = {c.subset: c for c in cell.correlations[:2]}
    text = wording.sentence(cell)
    assert text == (
        "Spearman of cosine score and accuracy drop: "
        f"{found['all'].value:.2f} (95 % interval {found['all'].low:.2f} to "
        f"{found['all'].high:.2f}; 30 layers, 160 documents; p < 0.001); "
        f"without the two outer layers at each end {found['inner'].value:.2f} (95 % interval "
        f"{formats.fixed(found['inner'].low, 2)} to {found['inner'].high:.2f}; 26 layers, "
        "160 documents; p = 0.210)."
    )
    assert f"undefined ({CONSTANT}; 30 layers, 160 documents)" in wording.sentence(study()[2])
    assert "not computed" in wording.sentence(cell.model_copy(update={"correlations": ()}))
    bare = cell.correlations[0].model_copy(update={"low": None, "p_value": None, "n": 1})
    text = wording.correlation_text(bare)
    assert f"no interval: {NO_REASON}; 1 layer, 160 documents)" in text


def test_drawn_documents_are_named_wherever_cells_are(tmp_path: Path) -> None:
    """Two cells that differ in nothing else; the figures of one are not those of the other."""
    first = build_cell()
    drawn = first.model_copy(update={"sample_seed": 1234})
    says = "drawn at random (seed 1234)"
    assert wording.benchmark_labels([first, drawn]) == [
        "arc_easy · 0-shot · 160 documents",
        f"arc_easy · 0-shot · 160 documents {says}",
    ]
    facts = [{row[0].text: row[1].text for row in provenance_table(c).rows} for c in (first, drawn)]
    assert [f["documents measured"] for f in facts] == ["160", f"160 {says}"]
    for text in (layer_table(drawn).caption, overview_table([drawn]).rows[0][1].text):
        assert says in text
    assert first.place != drawn.place
    page = render_page([first, drawn], {})
    for section in (1, 2):
        assert page.count(f'id="model-1-cell-{section}"') == 1
    for frame in frames([first, drawn]).values():
        if "sample_seed" in frame:
            assert set(frame.sample_seed.dropna()) == {1234}
            assert frame.sample_seed.isna().sum() == len(frame) / 2
    for form in ("md", "tex"):
        (file,) = export([first, drawn], form, tmp_path / f"report.{form}")
        assert says in file.read_text()
    assert len(figures([first, drawn])) == len(figures([first])) * 2 - 1, "one heat map a model"


def test_summary_without_a_correlation() -> None:
    assert "No rank correlation" in wording.summary([build_cell(correlations=())])


def test_a_weak_baseline_is_warned_of() -> None:
    assert any("reaches down to chance" in t for t in wording.warnings(build_cell(baseline=0.27)))
