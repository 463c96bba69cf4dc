"""Numbers and sentences as people read them."""

from __future__ import annotations

from tracker.records import NO_REASON
from tracker.reporting import formats, wording

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


def test_summary_without_a_correlation() -> None:
    assert "No rank correlation" in wording.summary([build_cell(correlations=())])


def test_a_weak_baseline_is_warned_of() -> None:
    assert any("reaches down to chance" in t for t in wording.warnings(build_cell(baseline=0.27)))
