"""Runs from a tracking project are checked before they are used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tracker.ledger.files import seal_note
from tracker.measuring.derive import derive_record
from tracker.measuring.progress import Silent
from tracker.schema.distribution import LEDGER_FORMAT
from tracker.team import collect as pulling
from tracker.tracking.base import RemoteCell, Target

(CELL,) = (Path(__file__).parents[1] / "ledger" / "kept" / "cells").iterdir()
KEY = json.loads((CELL / "cell.json").read_text())["key"]
OTHER_KEY = "the cell's key does not fit the model and benchmark in cell.json"


class Project:
    """A project whose server sends whatever it likes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        for path in (CELL / "cell.json", CELL / "requests/intact.json", *CELL.glob("shards/*")):
            shutil.copy(path, folder)
        self.folder = folder
        self.key = f"{KEY}/cell"
        self.version = "1"

    def cells(self) -> list[RemoteCell]:
        return [RemoteCell(self.key, "the cell", self.version, "")]

    def fetch(self, cell: RemoteCell, folder: Path) -> None:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)

    def close(self) -> None:
        pass

    def change_file(self, name: str, change: Callable[[dict[str, object]], object]) -> None:
        content = json.loads((self.folder / name).read_text())
        change(content)
        content.pop("digest")
        (self.folder / name).write_text(seal_note(content))


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    project = Project(tmp_path / "remote")
    monkeypatch.setenv("TRACKER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pulling, "open_backend", lambda *_: project)
    return project


def pull() -> tuple[list[object], str]:
    """Return the records that were pulled, and why others were not."""
    cells, failed = pulling.pull_project(Target("mlflow", "layers"), "layers", Silent())
    return [derive_record(*cell) for cell in cells], "; ".join(failed.values())


def files(project: Project) -> set[str]:
    cache = project.folder.parent / "cache"
    return {path.name for path in cache.glob("*/cells/*/shards/*.parquet")}


def test_what_is_whole_is_believed(project):
    (record,), reason = pull()
    assert (reason, record.n, len(record.runs)) == ("", 6, 7)
    assert files(project) == {path.name for path in CELL.glob("shards/*")}


@pytest.mark.parametrize(
    "field", [("model", "fingerprint"), ("model", "dtype"), ("benchmark", "num_fewshot"), ("key",)]
)
def test_an_identity_that_does_not_fit_its_key_is_refused(project, field):
    """Was: whatever key a file stated was believed."""

    def change(content: dict[str, object]) -> None:
        *parents, last_name = field
        for name in parents:
            content = content[name]  # type: ignore[assignment]
        content[last_name] = 5 if last_name == "num_fewshot" else "../../../elsewhere"

    project.change_file("cell.json", change)
    assert pull() == (
        [],
        f"the files do not have tracker's format: {OTHER_KEY}",
    )
    assert not files(project)


def test_the_files_of_another_cell_are_refused(project):
    project.key = f"{'0' * 64}/cell"
    assert OTHER_KEY in pull()[1]


def test_names_are_never_paths(project):
    """Was: a shard kept the name under which it came."""
    for number, path in enumerate(sorted(project.folder.glob("*.parquet"))):
        path.rename(path.with_name(f"..{number}.parquet"))
    shutil.move(project.folder / "intact.json", project.folder / "..%2F.json")
    project.change_file("cell.json", lambda content: content["model"].update(name="../../up"))
    (record,), reason = pull()
    assert (reason, len(record.runs)) == ("", 7)
    assert files(project) == {path.name for path in CELL.glob("shards/*")}
    assert not list(project.folder.parent.glob("up*"))


@pytest.mark.parametrize(
    "change", [{"task": "other"}, {"doc": -1}, {"doc": 570}, {"doc": 40}, {"doc": None}, {}]
)
def test_a_shard_of_another_cell_is_refused(project, change):
    path = next(project.folder.glob("*.parquet"))
    rows = pq.read_table(path).to_pylist()
    rows[0].update(change)
    pq.write_table(pa.Table.from_pylist(rows if change else [{"a": 1}]), path)
    assert f"{path.name} is not a shard of this benchmark" in pull()[1]


@pytest.mark.parametrize(
    "change",
    [
        {"runs": [{"layer": 3}]},
        {"runs": [{"layer": -1}]},
        {"runs": [{"layer": 0, "span": 0}]},
        {"removed": [-1]},
        {"metric": "f1"},
    ],
)
def test_a_view_that_the_cell_cannot_have_is_refused(project, change):
    view = {"metric": "acc", "runs": [], **change}
    text = seal_note({"format": LEDGER_FORMAT, "project": "p", "view": view})
    (project.folder / "intact.json").write_text(text)
    records, reason = pull()
    assert records == []
    assert "do not have tracker's format" in reason


def test_a_newer_trackers_cell_asks_for_an_upgrade(project):
    new = LEDGER_FORMAT + 1
    project.change_file("intact.json", lambda content: content.update(format=new, more="fields"))
    formats = f"format {new}, but this version of tracker reads format {LEDGER_FORMAT}"
    assert f"it has {formats}. Upgrade" in pull()[1]


def test_a_note_that_is_none_is_refused(project):
    """Was: one that is nested deeply ended in an internal error."""
    (project.folder / "intact.json").write_text("[" * 10**5)
    records, reason = pull()
    assert not records
    assert "the files do not have tracker's format" in reason
