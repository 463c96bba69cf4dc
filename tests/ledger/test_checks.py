from __future__ import annotations

import json
from pathlib import Path

from tracker.ledger.checks import Checks

KEY = "0123456789abcdef" * 4


def test_what_is_kept_is_recalled_by_whoever_opens_the_folder(tmp_path: Path) -> None:
    checks = Checks(tmp_path)
    assert checks.recall(KEY) is None
    checks.keep(KEY, "sound")
    checks.keep("f" * 64, "unsound")
    assert Checks(tmp_path).recall(KEY) == "sound"
    assert Checks(tmp_path).recall("f" * 64) == "unsound"
    # Where `verify` looks, and where folders that are measured on have theirs.
    assert (tmp_path / "checks" / f"{KEY[:32]}.json").is_file()


def test_a_verdict_that_was_edited_is_reached_anew(tmp_path: Path) -> None:
    checks = Checks(tmp_path)
    checks.keep(KEY, "unsound")
    (path,) = (tmp_path / "checks").iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), "verdict": "sound"}))
    assert checks.recall(KEY) is None


def test_a_folder_that_cannot_be_written_stops_no_measurement(tmp_path: Path) -> None:
    (tmp_path / "checks").write_text("a file in its place")
    Checks(tmp_path).keep(KEY, "sound")
    assert Checks(tmp_path).recall(KEY) is None
