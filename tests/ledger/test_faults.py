"""What is on disk is proved: nothing that is damaged, edited or foreign is shown without a word."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.ledger import faults
from tracker.core.extent import ALL
from tracker.ledger.keys import cell_key
from tracker.ledger.shards import ASIDE
from tracker.ledger.store import Ledger
from tracker.ledger.verify import compare, verify
from tracker.ledger.views import CellIdentity
from tracker.measuring.derive import all_records

FLIPS = 150
"""Of each kind of file; `make fuzz` tries many more."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return faults.make(tmp_path_factory.mktemp("whole") / "results")


@pytest.fixture(scope="module")
def truth(whole: Path) -> object:
    shown, said = faults.seen(whole)
    assert not said
    assert len(shown[0]) == 2
    return shown


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "results"))


def test_a_flipped_bit_is_never_silent(whole: Path, truth: object, tmp_path: Path) -> None:
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
            shutil.rmtree(next(root.glob("cells/*/derived")), ignore_errors=True)
            found.append(faults.silent(root, truth, hit))
            shutil.rmtree(root)
    assert not list(filter(None, found))


@pytest.mark.parametrize("fault", faults.FAULTS)
def test_a_file_may_be_anything(whole: Path, truth: object, tmp_path: Path, fault: str) -> None:
    """Was: UnicodeDecodeError, KeyError and more from files of a folder, or nothing at all."""
    for path in faults.files(whole):
        root = Path(shutil.copytree(whole, tmp_path / "results"))
        hit = path.relative_to(whole)
        faults.FAULTS[fault](root / hit)
        assert not faults.silent(root, truth, hit)
        shutil.rmtree(root)


def cell_folder(root: Path) -> Path:
    (folder,) = root.glob("cells/*")
    return folder


def test_numbers_edited_in_derived_are_not_believed(root: Path, truth: object) -> None:
    """Was: believed for ever, and published."""
    for path in cell_folder(root).glob("derived/*.json"):
        note = json.loads(path.read_text())
        note["record"]["baseline_accuracy"] = 0.99
        path.write_text(json.dumps(note))
    assert faults.seen(root) == (truth, [])


def test_a_record_pasted_from_another_view_is_not_believed(root: Path, truth: object) -> None:
    faults.FAULTS["swapped"](next(cell_folder(root).glob("derived/*.json")))
    assert faults.seen(root) == (truth, [])


def other_cell(root: Path) -> Path:
    """A cell of a model of the same name with other weights, measured just as far."""
    ledger = Ledger.existing(root)
    (cell,) = ledger.cells()
    model = cell.identity.model.model_copy(update={"fingerprint": "0" * 64})
    other = ledger.cell(model, cell.identity.benchmark, {})
    for path in cell.shards():
        shard = cell.shard(path)
        rows = shard.table.to_pylist()
        (block,) = {block for block in cell.blocks(ALL) if path.name.startswith(block.name)}
        other.write(block, rows, {"device": "elsewhere"})
    return other.folder


def test_shards_of_another_model_are_set_aside(root: Path, caplog) -> None:
    """Was: taken for one's own; and over another block, missing documents on every rerun."""
    foreign = other_cell(root)
    mine = next(path for path in root.glob("cells/*") if path != foreign)
    for path in mine.glob("shards/*.parquet"):
        shutil.copy(foreign / "shards" / path.name, path)
    (cell,) = (one for one in Ledger.existing(root).cells() if one.folder == mine)
    (block, *_) = cell.blocks(ALL)
    assert cell.missing(block, ALL, ["baseline"])
    assert not cell.is_complete(ALL, ["baseline"])
    assert "it belongs to another benchmark" in caplog.text
    assert not len(cell.read())
    assert len(list(mine.glob(f"shards/*{ASIDE}"))) == 3


def test_a_shard_under_the_name_of_another_block_is_set_aside(root: Path, caplog) -> None:
    path = next(cell_folder(root).glob("shards/*.parquet"))
    path.rename(path.with_name(path.name.replace(".00000.", ".00001.")))
    (cell,) = Ledger.existing(root).cells()
    cell.read()
    assert "it is named as another block" in caplog.text


def test_one_damaged_cell_keeps_nobody_from_the_others(root: Path) -> None:
    damaged = other_cell(root)
    (damaged / "cell.json").unlink()
    contents = Ledger.existing(root).contents()
    assert len(all_records(contents)) == 2
    ((folder, what),) = contents.damaged.items()
    assert folder == str(damaged)
    assert "run its experiment again" in what


def test_a_damaged_identity_is_written_anew_and_nothing_is_measured_twice(root: Path) -> None:
    (cell,) = Ledger.existing(root).cells()
    (cell.folder / "cell.json").write_text("{")
    ledger = Ledger.existing(root)
    assert ledger.find("f" * 64) is None
    again = ledger.cell(cell.identity.model, cell.identity.benchmark, {})
    assert len(again.read()) == len(cell.read()) > 0


def test_an_identity_of_other_weights_is_refused(root: Path) -> None:
    """Its key is computed again; edited and sealed again, it belongs to another folder."""
    path = cell_folder(root) / "cell.json"
    identity = CellIdentity.read(path.read_bytes())
    model = identity.model.model_copy(update={"fingerprint": "0" * 64})
    for key in (identity.key, cell_key(model, identity.benchmark)):
        edited = identity.model_copy(update={"model": model, "key": key})
        path.write_text(edited.sealed())
        assert Ledger.existing(root).cells() == []


def test_an_edited_experiment_is_not_shown_as_what_was_run(root: Path) -> None:
    (root / "experiments" / "demo.yaml").write_text("method: random\n")
    contents = Ledger.existing(root).contents()
    assert contents.experiments == {}
    assert "not the text that was run" in "".join(contents.damaged.values())


def test_every_number_of_a_kept_folder_is_what_it_was(root: Path) -> None:
    """By a key that nothing but the content decides, today as then."""
    ledger = Ledger.existing(root)
    (cell,) = ledger.cells()
    assert cell_key(cell.identity.model, cell.identity.benchmark) == cell.identity.key
    then = json.loads((faults.KEPT / "records.json").read_text())
    for before, now in zip(then, all_records(ledger.contents()), strict=True):
        assert as_then(now.model_dump(mode="json"), before) == before


def as_then(now: Any, then: Any) -> Any:
    """Leave out the last bits of weighted sums: they depend on where arrays lie in memory."""
    if isinstance(then, float) and isinstance(now, float):
        return then if math.isclose(now, then, rel_tol=1e-14) else now
    if isinstance(then, dict):
        return {name: as_then(value, then.get(name)) for name, value in now.items()}
    if isinstance(then, list):
        return [as_then(*both) for both in zip(now, then, strict=True)]
    return now


class TestVerify:
    def test_a_whole_folder(self, root: Path) -> None:
        found = verify(Ledger.existing(root))
        (cell,) = found.cells
        assert (cell.shards, cell.aside) == (3, 0)
        assert cell.outcomes == len(cell.store.read())
        assert not found.damaged

    def test_every_damage_is_found(self, root: Path) -> None:
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

    def test_a_lost_shard_is_missed_until_it_is_there_again(self, root: Path) -> None:
        path = next(cell_folder(root).glob("shards/*.parquet"))
        content = path.read_bytes()
        path.unlink()
        all_records(Ledger.existing(root).contents())
        assert "it is gone" in verify(Ledger.existing(root)).damaged[str(path)]
        path.write_bytes(content)
        assert not verify(Ledger.existing(root)).damaged

    def test_two_copies(self, root: Path) -> None:
        copy = Path(shutil.copytree(root, root.parent / "copy"))
        pair = Ledger.existing(root), Ledger.existing(copy)
        assert list(compare(*pair)) == []
        other_cell(copy)
        (difference,) = compare(*pair)
        assert f"only in {copy}" in difference
        (cell,) = pair[0].cells()
        cell.shards()[0].unlink()
        assert any("outcomes are only in" in each for each in compare(*pair))

    def test_outcomes_that_differ(self, root: Path) -> None:
        copy = Path(shutil.copytree(root, root.parent / "copy"))
        (cell,) = Ledger.existing(copy).cells()
        path = cell.shards()[0]
        rows = cell.shard(path).table.to_pylist()
        rows[0]["metric/acc"] = 1 - rows[0]["metric/acc"]
        path.unlink()
        (block,) = {block for block in cell.blocks(ALL) if path.name.startswith(block.name)}
        cell.write(block, rows, {"device": "cpu"})
        (difference,) = compare(Ledger.existing(root), Ledger.existing(copy))
        assert "1 outcomes differ" in difference
