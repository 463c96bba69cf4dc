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
from tracker.core.records import CellRecord
from tracker.ledger.store import Ledger
from tracker.ledger.verify import verify
from tracker.ledger.views import cell_key
from tracker.measuring.derive import all_records

FLIPS = 32
"""Of each kind of file; `make fuzz` tries many more."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return faults.make(tmp_path_factory.mktemp("whole") / "results")


@pytest.fixture(scope="module")
def truth(whole) -> object:
    shown, said = faults.seen(whole)
    assert not said
    assert len(shown[0]) == 2
    return shown


@pytest.fixture
def root(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "results"))


def test_a_flipped_bit_is_never_silent(whole, truth, tmp_path):
    """Was: of 250 bits flipped in shards, 134 gave other numbers without a word."""
    draw = random.Random(7)
    kinds: dict[str, list[Path]] = {}
    for path in faults.files(whole):
        kinds.setdefault(path.parent.name, []).append(path.relative_to(whole))
    found = []
    for paths in kinds.values():
        for _ in range(FLIPS // len(kinds)):
            root = Path(shutil.copytree(whole, tmp_path / "results"))
            hit = draw.choice(paths)
            faults.flip(root / hit, draw.randrange(8 * (root / hit).stat().st_size))
            # What was remembered and derived from the intact file may not hide it either.
            if hit.parent.name != "derived":
                shutil.rmtree(next(root.glob("cells/*/derived")), ignore_errors=True)
            found.append(faults.silent(root, truth, hit))
            shutil.rmtree(root)
    assert not list(filter(None, found))


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_file_may_be_anything(whole, truth, tmp_path, fault):
    """Was: UnicodeDecodeError, KeyError and more from files of a folder, or nothing at all."""
    for path in faults.files(whole):
        root = Path(shutil.copytree(whole, tmp_path / "results"))
        hit = path.relative_to(whole)
        faults.FAULTS[fault](root / hit)
        assert not faults.silent(root, truth, hit)
        shutil.rmtree(root)


def test_every_number_of_a_kept_folder_is_what_it_was(root):
    """By a key that nothing but the content decides, today as then."""
    ledger = Ledger.existing(root)
    (cell,) = ledger.cells()
    assert cell_key(cell.identity.model, cell.identity.benchmark) == cell.identity.key
    then = json.loads((faults.KEPT / "records.json").read_text())
    for before, now in zip(then, all_records(ledger.contents()), strict=True):
        before, now = (
            record.model_dump(mode="json", exclude={"view"})
            for record in (CellRecord.model_validate(before), now)
        )
        assert as_then(now, before) == before


def as_then(now: Any, then: Any) -> Any:
    """Leave out the last bits of weighted sums: they depend on where arrays lie in memory."""
    if isinstance(then, float) and isinstance(now, float):
        return then if math.isclose(now, then, rel_tol=1e-14) else now
    if isinstance(then, dict):
        return {name: as_then(value, then.get(name)) for name, value in now.items()}
    if isinstance(then, list):
        return [as_then(*both) for both in zip(now, then, strict=True)]
    return now


def test_every_damage_is_found(root):
    """Also where the size and the time of the file are what they were."""
    for path in faults.files(root):
        if path.name == "tracker.json":
            continue
        copy = Path(shutil.copytree(root, root.parent / "copy"))
        hit = copy / path.relative_to(root)
        # The last bit of a note may be blank; the middle of any file says something.
        faults.flip(hit, 4 * hit.stat().st_size)
        found = verify(Ledger.existing(copy))
        assert found.damaged, hit
        shutil.rmtree(copy)
