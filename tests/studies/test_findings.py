"""What a study found is kept with a digest, and set on the page and the terminal as it was said."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.findings import FINDING, HEADS, LINES, MAP, TABLE
from tests.report.conftest import build_cell
from tracker.core.estimates import Estimate
from tracker.core.findings import FindingRecord, Line
from tracker.core.tables import Column, EntryText, Table, headed, table, written
from tracker.ledger.store import keep_finding, listed
from tracker.report.charts.style import FEW, OPEN
from tracker.report.export import export, figures
from tracker.report.page.studies import outgrown, study_chart


def test_what_is_kept_comes_back_and_an_edit_is_noticed(tmp_path: Path) -> None:
    keep_finding(tmp_path, FINDING)
    damaged: dict[str, str] = {}
    assert listed(tmp_path / "studies", FindingRecord, damaged) == [FINDING]
    assert not damaged
    (path,) = tmp_path.glob("studies/*.json")
    path.write_text(path.read_text().replace("No.", "Yes"))
    assert listed(tmp_path / "studies", FindingRecord, damaged) == []
    assert damaged == {
        str(path): "its digest is not that of what it says: it was edited or damaged; type "
        f"`tracker study {FINDING.study} {FINDING.experiment}`, or delete it"
    }


def test_a_damaged_finding_names_the_command_that_finds_it(tmp_path: Path) -> None:
    """Was: that of a search was said to be a study's."""
    (tmp_path / "studies").mkdir()
    for name in ("search--p", "joint--my%20own"):
        (tmp_path / "studies" / f"{name}.json").write_text("{}")
    damaged: dict[str, str] = {}
    assert listed(tmp_path / "studies", FindingRecord, damaged) == []
    joint, search = damaged.values()
    assert "`tracker prune p.yaml`" in search
    assert "`tracker study joint my own.yaml`" in joint


def test_wrong_tables_are_refused() -> None:
    with pytest.raises(ValueError, match="an undefined value needs a reason"):
        Table(title="t", headings=HEADS[:1], rows=((Estimate(None),),))
    twice = table("t", [Column("layer", "count", float), Column("layer", "count", float)], [])
    with pytest.raises(ValueError, match="two columns have one name"):
        twice.plain()


def test_figures_are_scaled_and_dashes_carry_reasons() -> None:
    assert [headed(heading) for heading in HEADS] == ["layer", "drop (pp)"]
    texts = [written(entry, head) for entry, head in zip(TABLE.rows[0], HEADS, strict=True)]
    assert texts == [EntryText("3"), EntryText("12.5 (10.0 to 15.0)", figures="12.5 10.0 15.0")]
    assert written(TABLE.rows[1][1], HEADS[1]) == EntryText("–", "the baseline is at chance")


def test_what_kept_texts_as_figures_are_is_read_too() -> None:
    kept = {"value": "3 of 4", "low": None, "high": None, "reason": ""}
    heads = [{"label": "steps", "unit": "text"}]
    assert Table.model_validate({"title": "t", "headings": heads, "rows": [[kept]]}).rows == (
        ("3 of 4",),
    )


def test_charts_scale_too_and_leave_gaps() -> None:
    chart = study_chart(LINES)
    figure = chart.figure()
    band, curve = figure.data
    assert list(curve.y) == [10.0, None, 30.0]
    assert list(band.x) == [0, 2, 2, 0]
    assert list(band.y) == [100, 40, 20, 0]
    (heat,) = study_chart(MAP).figure().data
    assert [list(row) for row in heat.z] == [[None, 50], [-25, None]]
    assert list(heat.hovertext[0]) == ["0 · 0: undefined", "0 · 1: 50.0 pp"]
    # Legends of seven lines have stood across the title of a figure that stands alone.
    legend = figure.layout.legend
    assert (legend.yref, legend.y, legend.yanchor) == ("container", 0, "bottom")
    assert figure.layout.title.text
    assert "legend" not in chart.layout, "a page has no title there"


def test_a_line_is_faint_where_its_interval_holds_0_and_bands_never_overlap() -> None:
    curve = Line(name="a", values=(0.1, 0.2, 0.3), low=(-0.1, 0.1, 0.2), high=(0.2, 0.3, 0.4))
    plain = Line(name="plain", values=(0.1, 0.2, 0.3))

    def drawn(lines: int) -> list:
        many = tuple(curve.model_copy(update={"name": str(one)}) for one in range(lines))
        return list(study_chart(LINES.model_copy(update={"lines": (*many, plain)})).figure().data)

    band, line, other = drawn(1)
    assert band.fill == "toself"
    assert line.marker.opacity == (OPEN, 1, 1)
    assert other.marker.opacity == (1, 1, 1), "nothing is known of it"
    assert "95" not in line.hovertext[0]
    assert line.hovertext[0].endswith("layer (0-based) 0: 10.0 pp (−10.0 to 20.0)")
    for lines, reach in ((2, True), (FEW + 1, False)):
        *some, _ = drawn(lines)
        assert len(some) == lines
        assert [each.error_y.array is not None for each in some] == [reach] * lines
        assert [each.fill for each in some] == [None] * lines


def test_a_map_is_faint_where_nothing_is_shown() -> None:
    shown = MAP.model_copy(update={"shown": ((False, True), (False, False)), "shown_by": "so"})
    chart = study_chart(shown)
    strong, faint, dots = chart.figure().data
    assert [list(row) for row in strong.z] == [[None, 50], [None, None]]
    assert [list(row) for row in faint.z] == [[None, None], [-25, None]]
    assert (faint.opacity, list(zip(dots.x, dots.y, strict=True))) == (OPEN, [(1, "0")])
    assert chart.explains == "Colours: interaction. Strong: so. Faint: nothing is shown."
    assert chart.layout["height"] < 300, "two rows need no more"


def test_a_logarithmic_axis_has_whole_numbers() -> None:
    wide = LINES.model_copy(update={"places": (1, 30, 700), "log_x": True})
    ticks = study_chart(wide).layout["xaxis"]["tickvals"]
    assert [tick for tick in ticks if 1 <= tick <= 100] == [1, 2, 5, 10, 20, 50, 100]


def test_a_finding_says_when_it_is_outgrown() -> None:
    cell = build_cell().model_copy(update={"key": "key", "n": 10})
    assert outgrown(FINDING, [cell]) == ""
    larger = cell.model_copy(update={"view": "larger", "n": 12, "supersedes": ("intact",)})
    assert outgrown(FINDING, [larger]) == (
        "1 of its 1 measurements hold other documents by now; for today's answer: tracker study "
        "joint file.yaml"
    )


def test_findings_of_two_folders_keep_files_of_their_own(tmp_path: Path) -> None:
    """Two people's studies of a file of one name: neither takes the other's place, nor a part."""
    more = FINDING.model_copy(update={"answers": ("Yes.",), "tables": (TABLE, TABLE)})
    paths = export([], "csv", tmp_path, {}, [FINDING, more])
    stems = {path.stem for path in paths if path.stem.startswith("joint")}
    assert stems == {"joint--file-1", "joint--file--2-1", "joint--file--2-2"}
    drawn = {f"joint--file{second}-{number}" for second in ("", "--2") for number in (1, 2)}
    assert set(figures([], [FINDING, more])) == drawn
