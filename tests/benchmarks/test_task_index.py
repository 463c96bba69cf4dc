"""lm-eval's names, looked up instead of read from its 14,000 files."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import lm_eval.tasks
import pytest
from lm_eval.tasks import TaskManager

from tests.helpers.lm_eval import folder_tasks
from tracker.benchmarks import benchmark, factory
from tracker.ledger.files import read_note, write_note

DATA = ("dataset_path", "dataset_name")


def reload_tasks() -> dict:
    """Ask as a new process does."""
    return factory.list_tasks.__wrapped__()


@pytest.fixture(autouse=True)
def _empty(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Write a folder with one task, as if it were lm-eval's."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "own.yaml").write_text("task: own\n")
    monkeypatch.setattr(lm_eval.tasks, "__file__", str(folder / "__init__.py"))
    monkeypatch.setattr(factory, "TaskManager", partial(folder_tasks, folder))
    return folder


def test_every_task_is_found_where_lm_eval_finds_it(monkeypatch) -> None:
    manager = TaskManager()
    monkeypatch.setattr(factory, "TaskManager", lambda: manager)
    tasks = reload_tasks()
    monkeypatch.delattr(factory, "TaskManager")  # it cannot be asked a second time
    for our_tasks in (tasks, reload_tasks()):
        assert our_tasks.keys() == manager.task_index.keys()
        for name, entry in manager.task_index.items():
            our_entry = our_tasks[name]
            assert (our_entry.name, our_entry.kind) == (entry.name, entry.kind)
            assert (our_entry.yaml_path, our_entry.tags) == (entry.yaml_path, entry.tags)
            assert our_entry.cfg == {k: entry.cfg[k] for k in DATA if k in (entry.cfg or {})}


def test_a_file_that_changes_is_read_again(folder, tmp_path, caplog) -> None:
    """A template too, which has no suffix; a damaged note is made again."""
    caplog.set_level("INFO", "tracker")
    (folder / "_template").write_text("dataset_path: one/home\n")
    (folder / "own.yaml").write_text("include: _template\ntask: own\n")
    assert reload_tasks()["own"].cfg == {"dataset_path": "one/home"}
    assert reload_tasks().keys() == {"own"}
    assert caplog.messages == [
        "reading lm-eval's list of tasks; later commands use the cached list"
    ]  # was: ten silent seconds
    (folder / "_template").write_text("dataset_path: another/home\n")
    assert reload_tasks()["own"].cfg == {"dataset_path": "another/home"}
    (folder / "more.yaml").write_text("task: more\n")
    assert set(reload_tasks()) == {"own", "more"}
    for note in (tmp_path / "cache").rglob("*.json"):
        note.write_text(note.read_text().replace("own", "oww"))
    assert set(reload_tasks()) == {"own", "more"}


def test_builds_that_write_it_otherwise_do_not_read_each_others(folder, tmp_path, monkeypatch):
    for form in (1, 2):
        monkeypatch.setattr(factory, "_INDEX_FORMAT", form, raising=False)
        assert set(reload_tasks()) == {"own"}
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 2


@pytest.mark.parametrize("path", ["{tmp_path}/evil.yaml", "../evil.yaml"])
def test_a_planted_note_leads_to_no_file_outside(folder, tmp_path, path: str) -> None:
    """Was: an absolute path was taken, and lm-eval runs what `!function` of such a file names."""
    (tmp_path / "evil.yaml").write_text("task: own\n")
    reload_tasks()
    (note,) = (tmp_path / "cache").rglob("*.json")
    tasks = json.loads(read_note(note)["tasks"])
    tasks["own"][1] = path.format(tmp_path=tmp_path)
    write_note(note, {"tasks": json.dumps(tasks)})
    assert reload_tasks()["own"].yaml_path == folder / "own.yaml"
    assert json.loads(read_note(note)["tasks"])["own"][1] == "own.yaml"


def test_a_name_is_looked_for_in_a_file_that_is_called_so_first(monkeypatch) -> None:
    """Was: thousands of files were read for arc_easy; no file is called copa.yaml."""
    names, original = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: names.append(path.name) or original(path))
    is_defined = benchmark._is_defined.__wrapped__
    assert is_defined("arc_easy")
    assert names == ["arc_easy.yaml"]
    assert is_defined("mmlu_anatomy"), "whose keys are in quotes"
    assert set(names[1:]) == {"mmlu_anatomy.yaml"}
    assert is_defined("copa")
