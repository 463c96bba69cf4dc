from __future__ import annotations

import json
from pathlib import Path

import pytest

from tracker.ledger.cache import Checks

KEY = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Write a user's cache of its own, beside the results folders."""
    monkeypatch.setenv("TRACKER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checks"


def test_what_is_kept_is_recalled_by_whoever_opens_the_folder(tmp_path):
    checks = Checks(tmp_path)
    assert checks.recall(KEY) is None
    checks.keep(KEY, "sound")
    checks.keep("f" * 64, "unsound")
    assert Checks(tmp_path).recall(KEY) == "sound"
    assert Checks(tmp_path).recall("f" * 64) == "unsound"
    # Where `verify` looks, and where folders that are measured on have theirs.
    assert (tmp_path / "checks" / f"{KEY[:32]}.json").is_file()


def test_a_verdict_that_was_edited_is_reached_anew(tmp_path, cache):
    checks = Checks(tmp_path)
    checks.keep(KEY, "unsound")
    for folder in (tmp_path / "checks", cache):
        (path,) = folder.iterdir()
        path.write_text(json.dumps({**json.loads(path.read_text()), "verdict": "sound"}))
    assert checks.recall(KEY) is None


def test_another_folder_of_the_same_user_takes_a_verdict_over(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    Checks(one).keep(KEY, "sound")
    assert Checks(other).recall(KEY) == "sound"
    # Its figures rest on the verdict from now on, so it goes where they go.
    name = f"{KEY[:32]}.json"
    assert (other / "checks" / name).read_text() == (one / "checks" / name).read_text()
    assert Checks(other).recall("f" * 64) is None


def test_folders_that_cannot_be_written_stop_no_measurement(tmp_path, cache):
    cache.parent.write_text("a file in its place")
    Checks(tmp_path / "one").keep(KEY, "sound")
    assert Checks(tmp_path / "one").recall(KEY) == "sound"
    (tmp_path / "checks").write_text("a file in its place")
    Checks(tmp_path).keep(KEY, "sound")
    assert Checks(tmp_path).recall(KEY) is None
