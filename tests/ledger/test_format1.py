"""A results folder that tracker wrote in format 1 opens, and its numbers are what they were."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tracker.ledger.store import FORMAT, Ledger
from tracker.runner.derive import all_records

OLD = Path(__file__).parent / "format1"


@pytest.fixture
def old(tmp_path: Path) -> Ledger:
    shutil.copytree(OLD, tmp_path / "results")
    return Ledger.existing(tmp_path / "results")


def test_every_number_is_what_it_was(old: Ledger) -> None:
    then = json.loads((OLD / "records.json").read_text())
    for before, now in zip(then, all_records(old), strict=True):
        found = now.model_dump(mode="json")
        for name, value in before.items():
            if name not in ("correlations", "reasons"):
                assert found[name] == value, name
        for one, other in zip(before["correlations"], found["correlations"], strict=True):
            assert {n: other[n] for n in one if n != "p_value"} == {
                n: v for n, v in one.items() if n != "p_value"
            }


def test_it_is_marked_when_something_is_written(old: Ledger) -> None:
    """So that an older tracker says that it is too old, and not that a file is damaged."""
    all_records(old)
    assert json.loads((old.root / "tracker.json").read_text()) == {"format": 1}
    old.create()
    assert json.loads((old.root / "tracker.json").read_text()) == {"format": FORMAT}
    test_every_number_is_what_it_was(old)
