"""Test the exact output of `tracker verify` on hand-made cells; see also test_faults.py."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.helpers.stored_cells import asks, benchmark_identity, fill, model_identity, row
from tracker.core.distribution import FORMAT
from tracker.ledger.blocks import Block
from tracker.ledger.cache import Checks
from tracker.ledger.cells import CellStore
from tracker.ledger.files import write_bytes, write_note
from tracker.ledger.shards import read_observations, shard_file, write_observations
from tracker.ledger.store import Ledger
from tracker.ledger.verify import VerifiedCell, compare, verify

BLOCK = Block("arc_easy", 0)


class TestVerify:
    def test_what_a_cell_holds_is_counted(self, ledger, cell, cell_of):
        fill(cell, BLOCK, [0, 1], ["baseline", "layer:0"])
        fill(cell, Block("arc_easy", 1), [32], ["baseline"])
        cell_of(name="other")
        told: list[int] = []
        found = verify(ledger, told.append)
        held, other = found.cells
        assert held == VerifiedCell(held.store, 2, 3, 5, 0)
        assert other == VerifiedCell(other.store, 0, 0, 0, 0)
        assert held.store.folder == cell.folder
        assert found.damaged == {}
        assert told == [1, 1]

    def test_what_is_set_aside_is_named_until_it_is_deleted(self, ledger, cell):
        fill(cell, BLOCK, [0, 1], ["baseline"])
        fill(cell, Block("arc_easy", 1), [32], ["baseline"])
        path = cell.shards()[0]
        path.write_bytes(path.read_bytes()[:-1])
        aside = path.with_suffix(".aside")
        for _ in range(2):
            found = verify(ledger)
            (held,) = found.cells
            assert held == VerifiedCell(held.store, 1, 1, 1, 1)
            assert list(found.damaged) == [str(aside)]
        aside.unlink()
        assert verify(ledger).damaged == {}

    def test_what_is_gone_is_named(self, ledger, cell):
        fill(cell, BLOCK, [0], ["baseline"])
        (path,) = cell.shards()
        cell.proofs()
        path.unlink()
        assert "it is gone" in verify(ledger).damaged[str(path)]

    def test_every_kind_of_note_is_read(self, ledger, cell):
        """Also those that nothing is shown from: a disk that rots is noticed by its first bit."""
        fill(cell, BLOCK, [0], ["baseline"])
        cell.proofs()
        cell.add_receipt("mlflow", record="1", location="there")
        ledger.remember("0" * 64, cell)
        Checks(ledger.root).keep("0" * 64, "sound")
        for made in (
            ledger.root / "pulled" / "one.json",
            ledger.root / "formats" / "tiny.json",
            cell.folder / "derived" / "intact.json",
        ):
            write_note(made, {})
        assert verify(ledger).damaged == {}
        notes = [
            path
            for path in ledger.root.rglob("*.json")
            if path.name not in ("tracker.json", "cell.json")
        ]
        assert len(notes) == 7
        for path in notes:
            path.write_text("[]")
        assert verify(ledger).damaged.keys() == set(map(str, notes))

    def test_a_note_in_place_of_another_is_named(self, ledger, cell):
        """Was: a verdict on one architecture could stand for another's."""
        for key in ("0" * 64, "1" * 64):
            Checks(ledger.root).keep(key, "sound")
        sound, other = sorted((ledger.root / "checks").iterdir())
        other.write_bytes(sound.read_bytes())
        assert f"it is a copy of {sound.name}" in verify(ledger).damaged[str(other)]
        other.unlink()
        assert verify(ledger).damaged == {}

    def test_what_was_observed_is_read(self, ledger, cell):
        arrays = {"errors": np.array([1.0, 2.0])}
        blocks = [BLOCK, Block("arc_easy", 1)]
        for block in blocks:
            write_observations(cell.folder, "errors", block, {block.number * 32: arrays})
        first, other = sorted(cell.folder.glob("observed/errors/*"))
        assert verify(ledger).damaged == {}
        other.write_bytes(first.read_bytes())
        assert f"copy of {cell.identity.key[:12]}/errors/" in verify(ledger).damaged[str(other)]
        assert read_observations(cell.folder, "errors", blocks[1]) == {}
        assert list(read_observations(cell.folder, "errors", BLOCK)) == [0]
        other.write_bytes(first.read_bytes()[:-1])
        assert "observed again" in verify(ledger).damaged[str(other)]

    def test_observations_of_earlier_versions_are_read(self, cell):
        """They do not say of which documents they are."""
        table = pa.table({"doc": [0], "errors": [[1.0]]})
        about = {"format": FORMAT, "task": BLOCK.task, "shapes": {"errors": [1]}}
        path = cell.folder / "observed" / "errors" / f"{BLOCK.name}.parquet"
        write_bytes(path, shard_file(table, about))
        assert read_observations(cell.folder, "errors", BLOCK)[0]["errors"].tolist() == [1.0]


class TestCompare:
    @pytest.fixture
    def measured(self, cell) -> CellStore:
        fill(cell, BLOCK, [0, 1], ["baseline", "layer:0"])
        return cell

    @pytest.fixture
    def copied(self, ledger, measured, tmp_path) -> Ledger:
        return Ledger.existing(Path(shutil.copytree(ledger.root, tmp_path / "copy")))

    @staticmethod
    def replace(ledger: Ledger, rows: list[dict[str, Any]]) -> None:
        """Replace the outcomes of the only cell of a folder."""
        (cell,) = ledger.cells()
        for path in cell.shards():
            path.unlink()
        cell.write(BLOCK, rows, {"device": "elsewhere"})

    def test_who_measured_it_and_in_which_order_makes_no_difference(self, ledger, copied):
        names = ("layer:0", "baseline")
        self.replace(copied, [row(doc, name) for name in names for doc in (1, 0)])
        assert list(compare(ledger, copied)) == []

    def test_cells_of_one_alone(self, ledger, copied):
        """Each is named with its folder, and what is in both is compared none the less."""
        names = []
        for place, root in (("0", ledger), ("1", copied)):
            model = model_identity(fingerprint=place * 64)
            names.append(root.cell(model, benchmark_identity(), {}).folder.name)
        (shared,) = {cell.folder.name for cell in ledger.cells()} - set(names)
        (mine,) = (cell for cell in copied.cells() if cell.folder.name == shared)
        for path in mine.shards():
            path.unlink()
        assert sorted(compare(ledger, copied)) == sorted(
            [
                f"{names[0]}: only in {ledger.root}",
                f"{names[1]}: only in {copied.root}",
                f"{shared}: 4 outcomes are only in {ledger.root}",
            ]
        )

    def test_what_was_asked_and_who_made_the_cell(self, ledger, cell, tmp_path):
        """The same weights may be called something else elsewhere: the first name is said."""
        other = Ledger(tmp_path / "other")
        theirs = other.cell(model_identity(name="Other"), benchmark_identity(), {})
        theirs.views.ask(asks(0), "project")
        assert theirs.folder.name != cell.folder.name
        assert list(compare(ledger, other)) == [
            f"{cell.folder.name}: the two cell.json differ",
            f"{cell.folder.name}: not the same was asked of the two",
        ]

    def test_the_first_outcome_that_differs_is_named(self, ledger, copied, measured):
        changed = [row(0), row(0, "layer:0", acc=0.5), row(1, acc=0.5), row(1, "layer:0")]
        self.replace(copied, changed)
        assert list(compare(ledger, copied)) == [
            f"{measured.folder.name}: 2 outcomes differ, that of document 0 of arc_easy under "
            "layer:0 among them"
        ]

    def test_documents_of_two_tasks_are_kept_apart(self, ledger, cell_of, tmp_path):
        """They have the same numbers, and the last would hide that the first differs."""
        cell = cell_of({"a": 3, "b": 3})
        cell.write(Block("b", 0), [row(0, task="b")], {})
        copied = Ledger.existing(Path(shutil.copytree(ledger.root, tmp_path / "copy")))
        cell.write(Block("a", 0), [row(0, task="a")], {})
        copied.cells()[0].write(Block("a", 0), [row(0, task="a", acc=0.0)], {})
        (difference,) = compare(ledger, copied)
        assert "1 outcomes differ, that of document 0 of a under baseline" in difference

    def test_the_last_bit_and_the_middle_of_a_long_list_count(self, ledger, copied):
        """As NumPy prints them, both are the same: eight digits, and dots in the middle."""
        many = [float(place) for place in range(3000)]
        changes: list[tuple[str, list[float], list[float]]] = [
            ("angular_distance_sum", [1.0] * 4, [1.0, 1.0, math.nextafter(1.0, 2.0), 1.0]),
            ("loglikelihoods", many, [*many[:1500], -1.0, *many[1501:]]),
        ]
        common = {**row(0), "greedy": [True] * len(many)}
        for name, one, other in changes:
            self.replace(ledger, [{**common, name: one}])
            for value, differences in ((other, 1), (one, 0)):
                self.replace(copied, [{**common, name: value}])
                assert len(list(compare(ledger, copied))) == differences

    def test_what_is_not_a_number_equals_itself(self, ledger, copied):
        rows = [{**row(0, acc=math.nan), "loglikelihoods": [math.nan, -math.inf]}]
        self.replace(ledger, rows)
        self.replace(copied, rows)
        assert list(compare(ledger, copied)) == []
