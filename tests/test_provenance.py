from __future__ import annotations

import getpass
import hashlib
import os
import platform
from pathlib import Path

import numpy as np

import tracker
from tracker.schema import provenance
from tracker.schema.provenance import (
    content_hash,
    describe_machine,
    file_hash,
    list_differences,
    merge_provenances,
    package_versions,
)


def write(folder: Path, **files: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return [folder / name for name in files]


def test_a_hash_is_the_sha256_of_canonical_json():
    expected = hashlib.sha256('{"a": 1, "b": "é"}'.encode()).hexdigest()
    assert content_hash({"b": "é", "a": 1}) == expected
    # The order of keys does not count; a tuple counts as a list, other objects by their text.
    for first, second in (({"a": {"c": 2, "d": 3}}, {"a": {"d": 3, "c": 2}}), ((1, 2), [1, 2])):
        assert content_hash(first) == content_hash(second)
    assert content_hash([Path("a")]) == content_hash(["a"])


def test_content_counts():
    values = [[1, 2], [2, 1], {"a": 1}, {"a": 2}, {"b": 1}, {"a": None}, {}, 1, "1", True]
    values += [["ab"], ["a", "b"]]
    assert len({content_hash(value) for value in values}) == len(values)


ONE = {"torch": "2.12.0", "cores": "2", "device": "cuda:0"}
OTHER = {"torch": "2.13.0", "cores": "64", "device": "cuda:1"}


def test_merged_provenances_list_all_values():
    both = {"torch": "2.12.0, 2.13.0", "cores": "2, 64", "device": "cuda:0, cuda:1"}
    assert merge_provenances([ONE, OTHER, ONE]) == both
    assert merge_provenances([ONE]) == ONE
    assert merge_provenances([]) == {}


def test_differences_list_relevant_versions_only():
    """Cores and the number of the accelerator are none."""
    for parts, expected in (
        ([ONE, OTHER], "torch 2.12.0, 2.13.0"),
        ([ONE, {**ONE, "cores": "1"}], ""),
        ([ONE, {**ONE, "device": "cpu"}], "device cpu, cuda"),
        ([ONE, {"device": "cuda:3"}], "torch 2.12.0, unknown"),
        ([ONE, {**ONE, "tokenizers": "0.22"}], ""),  # digests of tokens tell
        ([], ""),
    ):
        assert list_differences(parts) == expected


def test_file_hashes_depend_on_names_and_contents_only(tmp_path):
    files = write(tmp_path / "one", a="1", b="2")
    original = file_hash(files)
    os.utime(files[0], (1, 1))
    copies = write(tmp_path / "other" / "deep", b="2", a="1")
    assert original == file_hash(files) == file_hash(reversed(files)) == file_hash(copies)
    changes = [{"a": "1", "b": "3"}, {"a": "2", "b": "1"}, {"a": "1", "c": "2"}, {"a": "1"}]
    changes += [{"a": "12", "b": ""}, {"a": "1", "b": "2", "c": ""}]
    hashes = {file_hash(write(tmp_path / str(n), **contents)) for n, contents in enumerate(changes)}
    assert len(hashes | {original}) == 7


def test_versions_are_the_installed_ones(monkeypatch):
    versions = package_versions()
    assert versions["numpy"] == np.__version__
    names = {"tracker", "torch", "transformers", "tokenizers", "lm-eval", "datasets", "numpy"}
    assert set(versions) == names
    monkeypatch.setattr(provenance, "RECORDED_PACKAGES", ("none-such",))
    assert package_versions() == {"tracker": tracker.__version__, "none-such": "not installed"}


def test_the_machine_identifies_nobody():
    description = describe_machine()
    assert description["python"] == platform.python_version()
    assert int(description["cores"]) >= 1
    text = " ".join(description.values())
    assert platform.node() not in text.split()
    assert getpass.getuser() not in text.split()
