"""What a study found is kept with a digest, and set on the page and the terminal as it was said."""

from __future__ import annotations

import pytest

from tests.helpers.findings import FINDING, HEADS, TABLE
from tests.report.conftest import build_cell
from tracker.core.estimates import Estimate
from tracker.core.findings import FindingRecord
from tracker.core.tables import Column, Table, table
from tracker.ledger.store import keep_finding, listed
from tracker.report.export import export, figures
from tracker.report.page.studies import outgrown


def test_what_is_kept_comes_back_and_an_edit_is_noticed(tmp_path):
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


def test_a_damaged_finding_names_the_command_that_finds_it(tmp_path):
    """Was: that of a search was said to be a study's."""
    (tmp_path / "studies").mkdir()
    for name in ("search--p", "joint--my%20own"):
        (tmp_path / "studies" / f"{name}.json").write_text("{}")
    damaged: dict[str, str] = {}
    assert listed(tmp_path / "studies", FindingRecord, damaged) == []
    joint, search = damaged.values()
    assert "`tracker prune p.yaml`" in search
    assert "`tracker study joint my own.yaml`" in joint


def test_wrong_tables_are_refused():
    with pytest.raises(ValueError, match="an undefined value needs a reason"):
        Table(title="t", headings=HEADS[:1], rows=((Estimate(None),),))
    twice = table("t", [Column("layer", "count", float), Column("layer", "count", float)], [])
    with pytest.raises(ValueError, match="two columns have one name"):
        twice.plain()


def test_what_kept_texts_as_figures_are_is_read_too():
    kept = {"value": "3 of 4", "low": None, "high": None, "reason": ""}
    heads = [{"label": "steps", "unit": "text"}]
    assert Table.model_validate({"title": "t", "headings": heads, "rows": [[kept]]}).rows == (
        ("3 of 4",),
    )


def test_a_finding_says_when_it_is_outgrown():
    cell = build_cell().model_copy(update={"key": "key", "n": 10})
    assert outgrown(FINDING, [cell]) == ""
    larger = cell.model_copy(update={"view": "larger", "n": 12, "supersedes": ("intact",)})
    assert outgrown(FINDING, [larger]) == (
        "1 of its 1 measurements hold other documents by now; for today's answer: tracker study "
        "joint file.yaml"
    )


def test_findings_of_two_folders_keep_files_of_their_own(tmp_path):
    """Two people's studies of a file of one name: neither takes the other's place, nor a part."""
    more = FINDING.model_copy(update={"answers": ("Yes.",), "tables": (TABLE, TABLE)})
    paths = export([], "csv", tmp_path, {}, [FINDING, more])
    stems = {path.stem for path in paths if path.stem.startswith("joint")}
    assert stems == {"joint--file-1", "joint--file--2-1", "joint--file--2-2"}
    drawn = {f"joint--file{second}-{number}" for second in ("", "--2") for number in (1, 2)}
    assert set(figures([], [FINDING, more])) == drawn
