from __future__ import annotations

import getpass
import hashlib
import os
import platform
from pathlib import Path

import numpy as np
import pytest

import tracker
from tracker.core import provenance
from tracker.core.provenance import (
    content_hash,
    differences,
    file_hash,
    file_stamp,
    machine,
    package_versions,
    united,
)


def write(folder: Path, **files: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return [folder / name for name in files]


class TestContentHash:
    def test_is_the_sha256_of_canonical_json(self) -> None:
        assert content_hash({"b": "é", "a": 1}) == (
            hashlib.sha256('{"a": 1, "b": "é"}'.encode()).hexdigest()
        )

    def test_the_order_of_keys_does_not_count(self) -> None:
        assert content_hash({"a": 1, "b": {"c": 2, "d": 3}}) == content_hash(
            {"b": {"d": 3, "c": 2}, "a": 1}
        )

    def test_a_tuple_counts_as_a_list(self) -> None:
        assert content_hash((1, 2)) == content_hash([1, 2])

    def test_other_objects_count_by_their_text(self) -> None:
        assert content_hash([Path("a")]) == content_hash(["a"])

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ([1, 2], [2, 1]),
            ({"a": 1}, {"a": 2}),
            ({"a": 1}, {"b": 1}),
            ({"a": None}, {}),
            (1, "1"),
            (["ab"], ["a", "b"]),
            (True, 1),
        ],
    )
    def test_content_counts(self, one: object, other: object) -> None:
        assert content_hash(one) != content_hash(other)


ONE = {"torch": "2.12.0", "cores": "2", "device": "cuda:0"}
OTHER = {"torch": "2.13.0", "cores": "64", "device": "cuda:1"}


class TestStacks:
    def test_where_parts_differ_every_value_is_named(self) -> None:
        assert united([ONE, OTHER, ONE]) == {
            "torch": "2.12.0, 2.13.0",
            "cores": "2, 64",
            "device": "cuda:0, cuda:1",
        }
        assert united([ONE]) == ONE
        assert united([]) == {}

    def test_only_what_can_change_a_number_is_a_difference(self) -> None:
        """Cores and the number of the accelerator are none."""
        assert differences([ONE, OTHER]) == "torch 2.12.0, 2.13.0"
        assert differences([ONE, {**ONE, "cores": "1"}]) == ""
        cpu = {**ONE, "device": "cpu"}
        assert differences([ONE, cpu]) == "device cpu, cuda"
        assert differences([ONE, {"device": "cuda:3"}]) == "torch 2.12.0, unknown"
        assert differences([]) == ""


class TestFileHash:
    def test_neither_order_nor_folder_counts(self, tmp_path) -> None:
        files = write(tmp_path / "one", a="1", b="2")
        copies = write(tmp_path / "other" / "deep", b="2", a="1")
        assert file_hash(files) == file_hash(reversed(files)) == file_hash(copies)

    @pytest.mark.parametrize(
        "changed",
        [
            {"a": "1", "b": "3"},
            {"a": "2", "b": "1"},
            {"a": "1", "c": "2"},
            {"a": "1"},
            {"a": "12", "b": ""},
            {"a": "1", "b": "2", "c": ""},
        ],
    )
    def test_names_and_bytes_count(self, tmp_path, changed: dict[str, str]) -> None:
        original = file_hash(write(tmp_path / "one", a="1", b="2"))
        assert file_hash(write(tmp_path / "other", **changed)) != original

    def test_the_time_does_not_count(self, tmp_path) -> None:
        files = write(tmp_path, a="1")
        before = file_hash(files)
        os.utime(files[0], (1, 1))
        assert file_hash(files) == before


class TestFileStamp:
    def test_holds_size_and_time_in_order(self, tmp_path) -> None:
        b, a = write(tmp_path, b="12", a="1")
        os.utime(a, ns=(7, 7))
        os.utime(b, ns=(9, 9))
        assert file_stamp([b, a]) == file_stamp([a, b]) == [(str(a), 1, 7), (str(b), 2, 9)]

    def test_notices_new_content(self, tmp_path) -> None:
        files = write(tmp_path, a="1")
        before = file_stamp(files)
        assert file_stamp(files) == before
        write(tmp_path, a="22")
        longer = file_stamp(files)
        assert longer != before
        # The same size: only the time tells.
        write(tmp_path, a="33")
        os.utime(files[0], ns=(5, 5))
        assert file_stamp(files) != longer


def test_versions_are_the_installed_ones(monkeypatch) -> None:
    assert package_versions()["numpy"] == np.__version__
    assert set(package_versions()) == {
        "tracker",
        "torch",
        "transformers",
        "lm-eval",
        "datasets",
        "numpy",
    }
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package",))
    assert package_versions() == {
        "tracker": tracker.__version__,
        "no-such-package": "not installed",
    }


def test_the_machine_identifies_nobody() -> None:
    found = machine()
    assert found["python"] == platform.python_version()
    assert int(found["cores"]) >= 1
    text = " ".join(found.values())
    assert platform.node() not in text.split()
    assert getpass.getuser() not in text.split()
