"""Files on disk are verified: damaged, edited or foreign content is always reported."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import faults
from tracker.ledger.store import Ledger
from tracker.ledger.verify import verify_ledger
from tracker.ledger.views import cell_key
from tracker.measuring.derive import list_records
from tracker.schema.records import CellRecord

FLIPS = 32
"""Of each kind of file; `make fuzz` tries many more."""


@pytest.fixture(scope="module")
def intact_root(tmp_path_factory) -> Path:
    return faults.make_results(tmp_path_factory.mktemp("whole") / "results")


@pytest.fixture(scope="module")
def truth(intact_root) -> object:
    contents, damaged = faults.show_results(intact_root)
    assert not damaged
    assert len(contents[0]) == 2
    return contents


@pytest.fixture
def root(intact_root, tmp_path) -> Path:
    return Path(shutil.copytree(intact_root, tmp_path / "results"))


def test_a_flipped_bit_is_never_silent(intact_root, truth, tmp_path):
    """Was: of 250 bits flipped in shards, 134 gave other numbers without a word."""
    draw = random.Random(7)
    kinds: dict[str, list[Path]] = {}
    for path in faults.damageable_files(intact_root):
        kinds.setdefault(path.parent.name, []).append(path.relative_to(intact_root))
    problems = []
    for paths in kinds.values():
        for _ in range(FLIPS // len(kinds)):
            root = Path(shutil.copytree(intact_root, tmp_path / "results"))
            target = draw.choice(paths)
            faults.flip_bit(root / target, draw.randrange(8 * (root / target).stat().st_size))
            # What was remembered and derived from the intact file may not hide it either.
            if target.parent.name != "derived":
                shutil.rmtree(next(root.glob("cells/*/derived")), ignore_errors=True)
            problems.append(faults.silent_difference(root, truth, target))
            shutil.rmtree(root)
    assert not list(filter(None, problems))


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_any_damage_of_a_file_is_reported(intact_root, truth, tmp_path, fault):
    """Was: UnicodeDecodeError, KeyError and more from files of a folder, or nothing at all."""
    for path in faults.damageable_files(intact_root):
        root = Path(shutil.copytree(intact_root, tmp_path / "results"))
        target = path.relative_to(intact_root)
        faults.FAULTS[fault](root / target)
        assert not faults.silent_difference(root, truth, target)
        shutil.rmtree(root)


def test_records_of_a_stored_folder_are_unchanged(root):
    """By a key that nothing but the content decides, today as then."""
    ledger = Ledger.open_existing(root)
    (cell,) = ledger.cells()
    assert cell_key(cell.identity.model, cell.identity.benchmark) == cell.identity.key
    stored_records = json.loads((faults.KEPT_FOLDER / "records.json").read_text())
    for before, now in zip(stored_records, list_records(ledger.contents()), strict=True):
        before, now = (
            record.model_dump(mode="json", exclude={"view"})
            for record in (CellRecord.model_validate({"view": now.view, **before}), now)
        )
        now, before = without_later_figures(now), without_later_figures(before)
        assert as_then(now, before) == before


def without_later_figures(value: Any) -> Any:
    """Leave out the figures that records of former versions do not have."""
    if isinstance(value, dict):
        later = {name for name in value if "choice_" in name or name == "outcome_seconds"}
        return {n: without_later_figures(v) for n, v in value.items() if n not in later}
    return [*map(without_later_figures, value)] if isinstance(value, list) else value


def as_then(current: Any, former: Any) -> Any:
    """Leave out the last bits of weighted sums: they depend on where arrays lie in memory."""
    if isinstance(former, float) and isinstance(current, float):
        return former if math.isclose(current, former, rel_tol=1e-14) else current
    if isinstance(former, dict):
        return {name: as_then(value, former.get(name)) for name, value in current.items()}
    if isinstance(former, list):
        return [as_then(*pair) for pair in zip(current, former, strict=True)]
    return current


def test_every_damage_is_found(root):
    """Also where the size and the time of the file are what they were."""
    for path in faults.damageable_files(root):
        if path.name == "tracker.json":
            continue
        copy = Path(shutil.copytree(root, root.parent / "copy"))
        target = copy / path.relative_to(root)
        # The last bit of a note may be blank; the middle of any file says something.
        faults.flip_bit(target, 4 * target.stat().st_size)
        verification = verify_ledger(Ledger.open_existing(copy))
        assert verification.damaged, target
        shutil.rmtree(copy)
