"""Test the exact output of `tracker verify` on hand-made cells; see also test_faults.py."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.helpers.stored_cells import (
    benchmark_identity,
    fill_block,
    layer_request,
    make_row,
    model_identity,
)
from tracker.ledger.blocks import Block
from tracker.ledger.cache import Checks
from tracker.ledger.cells import CellStore
from tracker.ledger.files import write_bytes, write_note
from tracker.ledger.shards import read_observations, shard_file, write_observations
from tracker.ledger.store import Ledger
from tracker.ledger.verify import VerifiedCell, compare_ledgers, verify_ledger
from tracker.schema.distribution import LEDGER_FORMAT

BLOCK = Block("arc_easy", 0)


class TestVerify:
    def test_outcomes_of_a_cell_are_counted(self, ledger, cell, cell_of):
        fill_block(cell, BLOCK, [0, 1], ["baseline", "layer:0"])
        fill_block(cell, Block("arc_easy", 1), [32], ["baseline"])
        cell_of(name="other")
        progress: list[int] = []
        result = verify_ledger(ledger, progress.append)
        cell_result, other = result.cells
        assert cell_result == VerifiedCell(cell_result.store, 2, 3, 5, 0)
        assert other == VerifiedCell(other.store, 0, 0, 0, 0)
        assert cell_result.store.folder == cell.folder
        assert result.damaged == {}
        assert progress == [1, 1]

    def test_files_set_aside_are_reported_until_deleted(self, ledger, cell):
        fill_block(cell, BLOCK, [0, 1], ["baseline"])
        fill_block(cell, Block("arc_easy", 1), [32], ["baseline"])
        path = cell.shards()[0]
        path.write_bytes(path.read_bytes()[:-1])
        aside = path.with_suffix(".aside")
        for _ in range(2):
            result = verify_ledger(ledger)
            (cell_result,) = result.cells
            assert cell_result == VerifiedCell(cell_result.store, 1, 1, 1, 1)
            assert list(result.damaged) == [str(aside)]
        aside.unlink()
        assert verify_ledger(ledger).damaged == {}

    def test_lost_shards_are_reported(self, ledger, cell):
        fill_block(cell, BLOCK, [0], ["baseline"])
        (path,) = cell.shards()
        cell.shard_digests()
        path.unlink()
        assert "the file is missing" in verify_ledger(ledger).damaged[str(path)]

    def test_every_kind_of_note_is_read(self, ledger, cell):
        """Also those that nothing is shown from: a disk that rots is noticed by its first bit."""
        fill_block(cell, BLOCK, [0], ["baseline"])
        cell.shard_digests()
        cell.add_receipt("mlflow", record="1", location="there")
        ledger.index_cell("0" * 64, cell)
        Checks(ledger.root).keep("0" * 64, "sound")
        for note_path in (
            ledger.root / "pulled" / "one.json",
            ledger.root / "formats" / "tiny.json",
            cell.folder / "derived" / "intact.json",
        ):
            write_note(note_path, {})
        assert verify_ledger(ledger).damaged == {}
        paths = ledger.root.rglob("*.json")
        notes = [path for path in paths if path.name not in ("tracker.json", "cell.json")]
        assert len(notes) == 7
        for path in notes:
            path.write_text("[]")
        assert verify_ledger(ledger).damaged.keys() == set(map(str, notes))

    def test_a_note_in_place_of_another_is_named(self, ledger, cell):
        """Was: a verdict on one architecture could stand for another's."""
        for key in ("0" * 64, "1" * 64):
            Checks(ledger.root).keep(key, "sound")
        sound, other = sorted((ledger.root / "checks").iterdir())
        other.write_bytes(sound.read_bytes())
        assert f"the file is a copy of {sound.name}" in verify_ledger(ledger).damaged[str(other)]
        other.unlink()
        assert verify_ledger(ledger).damaged == {}

    def test_observations_are_verified(self, ledger, cell):
        arrays = {"errors": np.array([1.0, 2.0])}
        blocks = [BLOCK, Block("arc_easy", 1)]
        for block in blocks:
            write_observations(cell.folder, "errors", block, {block.number * 32: arrays})
        first, other = sorted(cell.folder.glob("observed/errors/*"))
        assert verify_ledger(ledger).damaged == {}
        other.write_bytes(first.read_bytes())
        problem = verify_ledger(ledger).damaged[str(other)]
        assert f"copy of {cell.identity.key[:12]}/errors/" in problem
        assert read_observations(cell.folder, "errors", blocks[1]) == {}
        assert list(read_observations(cell.folder, "errors", BLOCK)) == [0]
        other.write_bytes(first.read_bytes()[:-1])
        assert "creates it again" in verify_ledger(ledger).damaged[str(other)]

    def test_observations_of_earlier_versions_are_read(self, cell):
        """They do not say of which documents they are."""
        table = pa.table({"doc": [0], "errors": [[1.0]]})
        metadata = {"format": LEDGER_FORMAT, "task": BLOCK.task, "shapes": {"errors": [1]}}
        path = cell.folder / "observed" / "errors" / f"{BLOCK.name}.parquet"
        write_bytes(path, shard_file(table, metadata))
        assert read_observations(cell.folder, "errors", BLOCK)[0]["errors"].tolist() == [1.0]


class TestCompare:
    @pytest.fixture
    def measured(self, cell) -> CellStore:
        fill_block(cell, BLOCK, [0, 1], ["baseline", "layer:0"])
        return cell

    @pytest.fixture
    def copied(self, ledger, measured, tmp_path) -> Ledger:
        return Ledger.open_existing(Path(shutil.copytree(ledger.root, tmp_path / "copy")))

    @staticmethod
    def replace(ledger: Ledger, rows: list[dict[str, Any]]) -> None:
        """Replace the outcomes of the only cell of a folder."""
        (cell,) = ledger.cells()
        for path in cell.shards():
            path.unlink()
        cell.write(BLOCK, rows, {"device": "elsewhere"})

    def test_equal_outcomes_in_another_order_are_equal(self, ledger, copied):
        names = ("layer:0", "baseline")
        self.replace(copied, [make_row(doc, name) for name in names for doc in (1, 0)])
        assert list(compare_ledgers(ledger, copied)) == []

    def test_cells_of_only_one_copy_are_reported(self, ledger, copied):
        """Each is named with its folder, and what is in both is compared none the less."""
        names = []
        for digit, root in (("0", ledger), ("1", copied)):
            model = model_identity(fingerprint=digit * 64)
            names.append(root.open_cell(model, benchmark_identity(), {}).folder.name)
        (shared,) = {cell.folder.name for cell in ledger.cells()} - set(names)
        (copied_cell,) = (cell for cell in copied.cells() if cell.folder.name == shared)
        for path in copied_cell.shards():
            path.unlink()
        assert sorted(compare_ledgers(ledger, copied)) == sorted(
            [
                f"{names[0]}: only in {ledger.root}",
                f"{names[1]}: only in {copied.root}",
                f"{shared}: 4 outcomes are only in the results folder {ledger.root}",
            ]
        )

    def test_identities_and_requests_are_compared(self, ledger, cell, tmp_path):
        """The same weights may be called something else elsewhere: the first name is said."""
        other = Ledger(tmp_path / "other")
        other_cell = other.open_cell(model_identity(name="Other"), benchmark_identity(), {})
        other_cell.views.add_request(layer_request(0), "project")
        assert other_cell.folder.name != cell.folder.name
        assert list(compare_ledgers(ledger, other)) == [
            f"{cell.folder.name}: the two cell.json differ",
            f"{cell.folder.name}: different runs were requested in the two folders",
        ]

    def test_the_first_outcome_that_differs_is_named(self, ledger, copied, measured):
        changed = [make_row(0), make_row(0, "layer:0", acc=0.5)]
        changed += [make_row(1, acc=0.5), make_row(1, "layer:0")]
        self.replace(copied, changed)
        assert list(compare_ledgers(ledger, copied)) == [
            f"{measured.folder.name}: 2 outcomes differ between the two folders, such as the "
            "outcome of document 0 of arc_easy with ablation layer:0"
        ]

    def test_tasks_with_equal_document_numbers_are_distinguished(self, ledger, cell_of, tmp_path):
        """They have the same numbers, and the last would hide that the first differs."""
        cell = cell_of({"a": 3, "b": 3})
        cell.write(Block("b", 0), [make_row(0, task="b")], {})
        copied = Ledger.open_existing(Path(shutil.copytree(ledger.root, tmp_path / "copy")))
        cell.write(Block("a", 0), [make_row(0, task="a")], {})
        copied.cells()[0].write(Block("a", 0), [make_row(0, task="a", acc=0.0)], {})
        (difference,) = compare_ledgers(ledger, copied)
        assert (
            "1 outcomes differ between the two folders, such as the outcome of document 0 of a "
            "with ablation baseline" in difference
        )

    def test_the_last_bit_and_the_middle_of_a_long_list_count(self, ledger, copied):
        """As NumPy prints them, both are the same: eight digits, and dots in the middle."""
        many = [float(index) for index in range(3000)]
        changes: list[tuple[str, list[float], list[float]]] = [
            ("angular_distance_sum", [1.0] * 4, [1.0, 1.0, math.nextafter(1.0, 2.0), 1.0]),
            ("loglikelihoods", many, [*many[:1500], -1.0, *many[1501:]]),
        ]
        common = {**make_row(0), "greedy": [True] * len(many)}
        for name, first_value, changed in changes:
            self.replace(ledger, [{**common, name: first_value}])
            for value, differences in ((changed, 1), (first_value, 0)):
                self.replace(copied, [{**common, name: value}])
                assert len(list(compare_ledgers(ledger, copied))) == differences

    def test_nan_equals_nan(self, ledger, copied):
        rows = [{**make_row(0, acc=math.nan), "loglikelihoods": [math.nan, -math.inf]}]
        self.replace(ledger, rows)
        self.replace(copied, rows)
        assert list(compare_ledgers(ledger, copied)) == []
