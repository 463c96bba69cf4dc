"""A results folder that tracker wrote in format 1 opens, and its numbers are what they were."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tracker.core.config import CellRequest
from tracker.core.errors import ResultsError
from tracker.ledger.keys import cell_key
from tracker.ledger.store import Ledger
from tracker.ledger.views import FORMAT, AskedView
from tracker.measuring.derive import all_records

OLD = Path(__file__).parent / "format1"


@pytest.fixture
def old(tmp_path: Path) -> Ledger:
    shutil.copytree(OLD, tmp_path / "results")
    return Ledger.existing(tmp_path / "results")


def test_every_number_is_what_it_was(old: Ledger) -> None:
    then = json.loads((OLD / "records.json").read_text())
    for before, now in zip(then, all_records(old.contents()), strict=True):
        found = now.model_dump(mode="json")
        for name, value in before.items():
            if name not in ("correlations", "reasons"):
                assert of_then(found["runs" if name == "layers" else name], value) == value, name
        for one, other in zip(before["correlations"], found["correlations"], strict=True):
            kept = {name: value for name, value in one.items() if name != "p_value"}
            assert of_then(other, kept) == kept


def of_then(now: Any, then: Any) -> Any:
    """Leave out what was not part of a record then, and the last bits of a weighted sum.

    A product of two vectors adds up in an order that depends on where they lie in memory.
    """
    if isinstance(then, float) and isinstance(now, float):
        return then if math.isclose(now, then, rel_tol=1e-14) else now
    if isinstance(then, dict):
        return {name: of_then(now[name], value) for name, value in then.items()}
    if isinstance(then, list):
        return [of_then(*each) for each in zip(now, then, strict=True)]
    return now


def test_its_cells_are_found_again(old: Ledger) -> None:
    """By a key that nothing but the content decides, today as then."""
    (cell,) = old.cells()
    assert cell_key(cell.identity.model, cell.identity.benchmark) == cell.identity.key


def test_a_view_by_another_metric_gets_a_name_of_its_own(old: Ledger) -> None:
    """Format 1 kept the last metric that was asked for under the name of the benchmark's own."""
    (cell,) = old.cells()
    path = cell.folder / "requests" / "intact.json"
    path.write_text(path.read_text().replace('"metric": null', '"metric": "acc_norm"'))
    (cell.folder / "requests" / "without-1.json").write_text("{damaged")
    views = [asked.view for asked in old_views(old)]
    old.create()
    assert [asked.view for asked in old_views(old)] == views
    names = {path.name for path in (cell.folder / "requests").iterdir()}
    assert names == {"intact--acc_norm.json", "without-2--acc_norm.json", "without-1.json"}
    cell.views.ask(CellRequest(model="m", benchmark="b", layers=(1,)), "project")
    assert [len(asked.view.runs) for asked in old_views(old)] == [1, 10, 2]


def old_views(ledger: Ledger) -> list[AskedView]:
    (cell,) = ledger.cells()
    damaged = cell.folder / "requests" / "without-1.json"
    with pytest.raises(ResultsError, match="damaged"):
        cell.views.asked()
    text = damaged.read_text()
    damaged.unlink()
    views = cell.views.asked()
    damaged.write_text(text)
    return views


def test_it_is_marked_when_something_is_written(old: Ledger) -> None:
    """So that an older tracker says that it is too old, and not that a file is damaged."""
    all_records(old.contents())
    assert json.loads((old.root / "tracker.json").read_text()) == {"format": 1}
    old.create()
    assert json.loads((old.root / "tracker.json").read_text()) == {"format": FORMAT}
    test_every_number_is_what_it_was(old)
