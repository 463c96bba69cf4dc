"""Numbers and sentences as people read them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tracker.core import formats
from tracker.core.records import NO_REASON
from tracker.report import caveats, wording
from tracker.report.export import export, figures, frames
from tracker.report.page.facts import provenance_table
from tracker.report.page.html import render_page
from tracker.report.sentences import compared_sentence
from tracker.report.tables import layer_table, overview_table

from .conftest import CONSTANT, as_read, build_cell, study


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
        "160 documents; p = 0.210). Of other proxies: angular distance 0.67 (0.42 to 0.84), "
        "relative update 0.55 (0.30 to 0.72)."
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
    facts = [
        {row[0].text: row[1].text for row in as_read(provenance_table(c)).rows}
        for c in (first, drawn)
    ]
    assert [f["documents measured"] for f in facts] == ["160", f"160 {says}"]
    for text in (
        as_read(layer_table(drawn)).title,
        as_read(overview_table([drawn])).rows[0][1].text,
    ):
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


def test_power_is_said_under_every_table_of_runs() -> None:
    """By another road: sqrt(2 z-values) of the normal test, from the shares that change."""
    cell = build_cell(n=160)
    says = wording.power_sentence(cell, cell.runs)
    assert says in layer_table(cell).notes
    shares = sorted(0.12 * 159 / 160 + run.accuracy_drop**2 for run in cell.runs)
    middle = (shares[14] + shares[15]) / 2
    found = re.fullmatch(
        r"Power \(80 %, two-sided 5 %, paired\): the smallest accuracy drop that 160 documents "
        r"reveal is (.+) pp under the median removal, (.+) pp under the one that changes most; "
        r"3 pp would take (.+) and (.+) documents\.",
        says,
    )
    for change, needed, share in zip(
        found.groups()[:2], found.groups()[2:], (middle, shares[-1]), strict=True
    ):
        assert float(change) == pytest.approx(100 * 2.8 * (share / 160) ** 0.5, rel=0.02)
        assert float(needed.replace(",", "")) == pytest.approx(7.85 * share / 0.03**2, rel=0.01)
    one = wording.power_sentence(cell, cell.runs[:1])
    assert "median" not in one
    assert " and " not in one
    loss = cell.model_copy(update={"higher_is_better": False, "metric": "bits_per_byte"})
    assert wording.power_sentence(loss, cell.runs).endswith("under the one that changes most.")


def test_power_is_undefined_where_nothing_changes() -> None:
    cell = build_cell()
    same = [run.model_copy(update={"drop_sd": 0.0, "accuracy_drop": 0.0}) for run in cell.runs]
    head = "Power (80 %, two-sided 5 %, paired): undefined"
    assert wording.power_sentence(cell, same) == (f"{head} (no outcome of a document has changed).")
    broken = {"drop_sd": None, "reasons": {"drop_sd": "one document has no spread"}}
    assert wording.power_sentence(cell, [same[0].model_copy(update=broken)]) == (
        f"{head} (one document has no spread)."
    )
    few = build_cell(n=3)
    assert "that 3 documents reveal is none; 3 pp would take" in wording.power_sentence(
        few, few.runs[:1]
    )
    assert wording.power_sentence(cell, []) == ""


def test_what_rounding_moves_is_put_down_to_what_it_may_be() -> None:
    cell = build_cell(compared=8, compared_difference=0.4, compared_unsteady=2)
    half = cell.model_copy(update={"model": cell.model.model_copy(update={"dtype": "bfloat16"})})
    steady = half.model_copy(update={"compared_unsteady": 0})
    for cells, why in (
        ([cell, steady], "the model is discontinuous there"),
        ([half], "half precision rounds coarsely, or the model is discontinuous there"),
    ):
        assert compared_sentence(cells).endswith(
            f" 2 of them differ by more than rounding should: {why}, in lm-eval too."
        )


def test_one_cell_is_summed_up_by_its_own_interval() -> None:
    cell = build_cell()
    (record,) = [r for r in (wording.correlation(cell),) if r is not None]
    said = wording.summary([cell])
    assert said.endswith(f" is {wording.correlation_text(record)}; 1 would be the same order.")
    assert "1 of 1 measurement" not in said
    assert "in 2 of 2 measurements its 95 % interval lies above 0." in wording.summary([cell, cell])


def test_summary_without_a_correlation() -> None:
    assert "No rank correlation" in wording.summary([build_cell(correlations=())])


def test_a_weak_baseline_is_warned_of() -> None:
    assert any("reaches down to chance" in t for t in caveats.warnings(build_cell(baseline=0.27)))
