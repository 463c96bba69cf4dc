"""Studies answer from the outcomes of a stored results folder as the version did that wrote it."""

from __future__ import annotations

import tarfile
from pathlib import Path

from tracker.core.findings import FindingRecord
from tracker.core.tables import Table
from tracker.ledger.store import Ledger, listed
from tracker.measuring.derive import record_of
from tracker.studies.base import Subject, open_study

from .conftest import asked_for

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDER = GOLDEN / "folders" / "studies.tar.xz"
"""A results folder with outcomes, observations and findings of six studies."""
SETTINGS = {"savings": {"questions": ("top 1 within 5 pp", "drop within 30 pp at 60 %")}}


def test_answers_are_those_that_are_stored(tmp_path: Path) -> None:
    """Figures equal the stored ones; sentences are those of `study_answers.txt`."""
    with tarfile.open(FOLDER) as archive:
        archive.extractall(tmp_path, filter="data")
    stores = {store.identity.benchmark.name: store for store in Ledger(tmp_path).cells()}
    lines: list[str] = []
    for finding in listed(tmp_path / "studies", FindingRecord, {}):
        context = asked_for(tmp_path / "experiments" / finding.experiment, tmp_path)
        study = open_study(finding.study, **SETTINGS.get(finding.study, {}))
        subjects = []
        for request in study.requests(context):
            store = stores[request.benchmark]
            view = store.views.of(request)
            subjects.append(Subject(request, store, record_of(store, view)))
        result = study.answer(context, subjects)
        for table, stored in zip(result.tables, finding.tables, strict=True):
            assert table.title == stored.title
            assert _figures(table) == _figures(stored)
        assert [chart.title for chart in result.charts] == [chart.title for chart in finding.charts]
        lines += [f"# {finding.study}", *result.answers, *result.lacking]
    assert lines == (GOLDEN / "study_answers.txt").read_text(encoding="utf-8").splitlines()


def _figures(table: Table) -> list[list[object]]:
    """The entries of a table by its columns' names, with five digits."""
    names, rows = table.plain()
    digits = [[f"{e:.5g}" if isinstance(e, int | float) else e for e in row] for row in rows]
    return [[*names], *digits]
