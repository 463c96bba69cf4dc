"""Findings are stored with a digest, and shown unchanged on the page and the terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.findings import FINDING, HEADS, TABLE
from tests.report.conftest import build_cell
from tracker.core.estimates import Estimate
from tracker.core.findings import FindingRecord
from tracker.core.tables import Column, Table, table
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.shards import Arrays
from tracker.ledger.store import keep_finding, listed
from tracker.measuring.derive import record_of
from tracker.measuring.observing import Observed
from tracker.report.export import export, figures
from tracker.report.page.studies import outgrown
from tracker.runner import run_cells
from tracker.studies.base import StudyContext, Subject, observe

from .conftest import asked_for, stores


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


def _subject(path: Path, results: Path) -> tuple[StudyContext, Subject]:
    asked = asked_for(path, results)
    (request,) = asked.experiment.cells()
    run_cells([request], asked.ledger, asked.publisher, asked.options, asked.progress)
    (store,) = stores(path, results)
    return asked, Subject(request, store, record_of(store, store.views.of(request)))


def test_what_was_observed_before_a_process_ends_is_kept(
    tiny_llama, experiment, tmp_path, monkeypatch
):
    """Was: 32 documents of a long observation were lost together."""
    monkeypatch.setattr("tracker.measuring.observing.OFTEN", 0.0)
    path = experiment(tiny_llama(), limit=None, sample=5, layer=[1])
    asked, subject = _subject(path, tmp_path / "results")
    seen: list[int] = []

    def begin(engine: Engine):
        def watch(document) -> Arrays:
            seen.append(document.index)
            if len(seen) == 3:
                raise KeyboardInterrupt
            return {"index": np.array(document.index)}

        return watch

    with pytest.raises(KeyboardInterrupt):
        observe(subject, "test", asked, begin)
    found = observe(subject, "test", asked, begin)
    assert [doc for _, doc in found.documents] == [*seen[:2], *seen[3:]]
    assert found.arrays["index"].tolist() == [*seen[:2], *seen[3:]]


def test_only_what_is_missing_is_observed(tiny_llama, experiment, tmp_path):
    model, seen = tiny_llama(), []

    def begin(engine: Engine):
        def watch(document) -> Arrays:
            seen.append(document.index)
            tokens = len(document.requests[0].context)
            return {"tokens": np.array(tokens), "map": np.full((2, 3), document.index)}

        return watch

    def observed(sample: int) -> Observed:
        path = experiment(model, limit=None, sample=sample, layer=[1])
        asked, subject = _subject(path, tmp_path / "results")
        return observe(subject, "test", asked, begin)

    few = observed(3)
    assert few.arrays["map"].shape == (3, 2, 3)
    assert few.arrays["tokens"].shape == (3,)
    more = observed(40)
    assert len(seen) == len(set(seen)) == 40
    assert [doc for _, doc in more.documents] == seen
    assert (more.arrays["map"][:, 1, 2] == seen).all()
    assert more.documents[:3] == few.documents
    _first, second = sorted((tmp_path / "results").glob("cells/*/observed/test/*"))
    content = second.read_bytes()
    second.write_bytes(content[:40] + bytes([content[40] ^ 1]) + content[41:])
    again = observed(40)
    assert len(seen) == 48
    assert (again.arrays["map"] == more.arrays["map"]).all()
