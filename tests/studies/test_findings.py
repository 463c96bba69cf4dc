"""Findings are stored with a digest, and shown unchanged on the page and the terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.faults import flip_bit
from tests.helpers.findings import FINDING, HEADINGS, TABLE
from tests.report.conftest import build_cell
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.shards import DocumentArrays
from tracker.ledger.store import read_records, write_finding
from tracker.measuring.derive import derive_record
from tracker.measuring.observing import Observations
from tracker.report.export import export_report, report_figures
from tracker.report.page.studies import document_count_note
from tracker.runner import run_cells
from tracker.schema.estimates import Estimate
from tracker.schema.findings import FindingRecord
from tracker.schema.tables import Column, Table, build_table
from tracker.studies.base import StudyContext, Subject, observe_subject

from .conftest import cell_stores, study_context


def test_what_is_kept_comes_back_and_an_edit_is_noticed(tmp_path):
    write_finding(tmp_path, FINDING)
    errors: dict[str, str] = {}
    assert read_records(tmp_path / "studies", FindingRecord, errors) == [FINDING]
    assert not errors
    (path,) = tmp_path.glob("studies/*.json")
    path.write_text(path.read_text().replace("No.", "Yes"))
    assert read_records(tmp_path / "studies", FindingRecord, errors) == []
    assert errors == {
        str(path): "the digest does not match the content: the file was edited or damaged; type "
        f"`tracker study {FINDING.study} {FINDING.experiment}`, or delete it"
    }


def test_a_damaged_finding_names_the_command_that_finds_it(tmp_path):
    """Was: that of a search was said to be a study's."""
    (tmp_path / "studies").mkdir()
    for name in ("search--p", "joint--my%20own"):
        (tmp_path / "studies" / f"{name}.json").write_text("{}")
    errors: dict[str, str] = {}
    assert read_records(tmp_path / "studies", FindingRecord, errors) == []
    joint, search = errors.values()
    assert "`tracker prune p.yaml`" in search
    assert "`tracker study joint my own.yaml`" in joint


def test_wrong_tables_are_refused():
    with pytest.raises(ValueError, match="an undefined value must have a reason"):
        Table(title="t", headings=HEADINGS[:1], rows=((Estimate(None),),))
    table = build_table("t", [Column("layer", "count", float)] * 2, [])
    with pytest.raises(ValueError, match="two columns have the same name"):
        table.plain()


def test_a_finding_says_when_it_is_outgrown():
    cell = build_cell().model_copy(update={"key": "key", "n": 10})
    assert document_count_note(FINDING, [cell]) == ""
    larger = cell.model_copy(update={"view": "larger", "n": 12, "supersedes": ("intact",)})
    assert document_count_note(FINDING, [larger]) == (
        "The number of documents has changed in 1 of the 1 measurements that this study used. To "
        "repeat the study, type: tracker study joint file.yaml"
    )


def test_findings_of_two_folders_keep_files_of_their_own(tmp_path):
    """Two people's studies of a file of one name: neither takes the other's place, nor a part."""
    second = FINDING.model_copy(update={"answers": ("Yes.",), "tables": (TABLE, TABLE)})
    paths = export_report([], "csv", tmp_path, {}, [FINDING, second])
    stems = {path.stem for path in paths if path.stem.startswith("joint")}
    assert stems == {"joint--file-1", "joint--file--2-1", "joint--file--2-2"}
    names = {f"joint--file{suffix}-{number}" for suffix in ("", "--2") for number in (1, 2)}
    assert set(report_figures([], [FINDING, second])) == names


def _measure_subject(path: Path, results: Path) -> tuple[StudyContext, Subject]:
    context = study_context(path, results)
    (request,) = context.experiment.cells()
    run_cells([request], context.ledger, context.publisher, context.options, context.progress)
    (store,) = cell_stores(path, results)
    return context, Subject(request, store, derive_record(store, store.views.view_of(request)))


def test_observations_before_an_interrupt_are_kept(tiny_llama, experiment, tmp_path, monkeypatch):
    """Was: 32 documents of a long observation were lost together."""
    monkeypatch.setattr("tracker.measuring.observing.SAVE_SECONDS", 0.0)
    path = experiment(tiny_llama(), limit=None, sample=5, layer=[1])
    context, subject = _measure_subject(path, tmp_path / "results")
    indices: list[int] = []

    def begin(engine: Engine):
        def watch(document) -> DocumentArrays:
            indices.append(document.index)
            if len(indices) == 3:
                raise KeyboardInterrupt
            return {"index": np.array(document.index)}

        return watch

    with pytest.raises(KeyboardInterrupt):
        observe_subject(subject, "test", context, begin)
    observations = observe_subject(subject, "test", context, begin)
    assert [doc for _, doc in observations.documents] == [*indices[:2], *indices[3:]]
    assert observations.arrays["index"].tolist() == [*indices[:2], *indices[3:]]


def test_only_what_is_missing_is_observed(tiny_llama, experiment, tmp_path):
    model, indices = tiny_llama(), []

    def begin(engine: Engine):
        def watch(document) -> DocumentArrays:
            indices.append(document.index)
            tokens = len(document.requests[0].context)
            return {"tokens": np.array(tokens), "map": np.full((2, 3), document.index)}

        return watch

    def observe_sample(sample: int) -> Observations:
        path = experiment(model, limit=None, sample=sample, layer=[1])
        context, subject = _measure_subject(path, tmp_path / "results")
        return observe_subject(subject, "test", context, begin)

    small = observe_sample(3)
    assert small.arrays["map"].shape == (3, 2, 3)
    assert small.arrays["tokens"].shape == (3,)
    large = observe_sample(40)
    assert len(indices) == len(set(indices)) == 40
    assert [doc for _, doc in large.documents] == indices
    assert (large.arrays["map"][:, 1, 2] == indices).all()
    assert large.documents[:3] == small.documents
    _, damaged = sorted((tmp_path / "results").glob("cells/*/observed/test/*"))
    flip_bit(damaged, 8 * 40)
    repeated = observe_sample(40)
    assert len(indices) == 48
    assert (repeated.arrays["map"] == large.arrays["map"]).all()
