"""Shards from elsewhere, proofs, what is set aside, and files that the system keeps from us."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tracker.core.config import CellRequest
from tracker.core.distribution import FORMAT, other_format
from tracker.core.errors import WorkError
from tracker.core.extent import Extent
from tracker.core.provenance import content_hash
from tracker.core.records import CellRecord
from tracker.ledger import cells
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.notes import read_note, write_note
from tracker.ledger.outcomes import outcome_table
from tracker.ledger.shards import read_shard, shard_file
from tracker.ledger.tables import cell_record

BLOCK = Block("arc_easy", 0)
Rows = list[dict[str, object]]


def shard(rows: Rows, **about: Any) -> bytes:
    return shard_file(outcome_table(rows), about)


def test_a_shards_name_is_what_any_tracker_gave_it(cell, row) -> None:
    """So that the same outcomes, measured again, take its place."""
    cell.write(BLOCK, [row(1, "layer:0"), row(10)], {})
    held = content_hash([["1", "layer:0"], ["10", "baseline"]])
    assert [path.name for path in cell.shards()] == [f"arc_easy.00000.{held[:12]}.parquet"]


def test_what_is_measured_after_another_edition_is_so_by_its_date(
    ledger, cell, row, model_identity, benchmark_identity
) -> None:
    """A clock that is behind would make the edition that was measured last the outdated one."""
    dates = [f"2026-11-28T0{hour}:00:00+00:00" for hour in range(3)]
    cell.write(BLOCK, [row(1)], {"measured": dates[2]})
    later = ledger.cell(model_identity(), benchmark_identity(task={"fingerprint": "b" * 64}), {})
    other = ledger.cell(model_identity(), benchmark_identity({"arc_easy": 70}, name="arc"), {})
    later.write(BLOCK, [row(1)], {"measured": dates[0]})
    later.write(BLOCK, [row(2)], {"measured": dates[1]})
    other.write(BLOCK, [row(1)], {"measured": dates[0]})
    assert later.costs()["measured"] == "2026-11-28T02:00:01+00:00"
    assert (cell.costs()["measured"], other.costs()["measured"]) == (dates[2], dates[0])
    # The first one again, on more documents, by a clock that is right.
    again = CellStore(cell.folder, cell.identity)
    again.write(BLOCK, [row(3)], {"measured": "2026-11-28T09:00:00+00:00"})
    assert again.costs()["measured"] == "2026-11-28T09:00:00+00:00"


class TestAdopt:
    def test_its_content_decides_its_place(self, cell, row, tmp_path: Path) -> None:
        rows = [row(32, "layer:0"), row(33)]
        cell.write(Block("arc_easy", 1), rows, {})
        (path,) = cell.shards()
        content = path.read_bytes()
        for known in (True, False):
            if not known:
                shutil.rmtree(cell.folder)
            strange = tmp_path / "strange.parquet"
            strange.write_bytes(content)
            assert cell.adopt(strange) == path.name
            assert not strange.exists()
            assert [each.read_bytes() for each in cell.shards()] == [content]

    @pytest.mark.parametrize(
        ("about", "tasks_and_documents", "why"),
        [
            ({"key": "0" * 64}, [("arc_easy", 0)], "it belongs to another benchmark"),
            ({"format": FORMAT + 1}, [("arc_easy", 0)], f"it {other_format(FORMAT + 1)}"),
            ({}, [("arc_easy", 0), ("b", 0)], "it holds more or less than one block"),
            ({}, [("arc_easy", 31), ("arc_easy", 32)], "it holds more or less than one block"),
            ({}, [], "it holds more or less than one block"),
            ({}, [("arc_easy", 70)], "the benchmark has no such document"),
            ({}, [("arc_easy", -1)], "the benchmark has no such document"),
            ({}, [("b", 0)], "the benchmark has no such document"),
        ],
    )
    def test_what_is_no_block_of_the_cell_is_refused(
        self, cell, row, tmp_path: Path, about, tasks_and_documents, why: str
    ) -> None:
        rows = [row(doc, task=task) for task, doc in tasks_and_documents]
        table = outcome_table(rows or [row(0)]).slice(0, len(rows))
        path = tmp_path / "it.parquet"
        path.write_bytes(shard_file(table, {"key": cell.identity.key, "format": FORMAT, **about}))
        with pytest.raises(ValueError, match=r"it\.parquet") as caught:
            cell.adopt(path)
        assert str(caught.value) == f"it.parquet is no shard of this benchmark: {why}"
        assert path.exists()
        assert cell.shards() == []

    def test_the_first_and_the_last_document_are_the_cells(self, cell, row, tmp_path) -> None:
        for doc in (0, 69):
            path = tmp_path / "it.parquet"
            path.write_bytes(shard([row(doc)], key=cell.identity.key, format=FORMAT))
            cell.adopt(path)
        assert sorted(cell.read()["doc"]) == [0, 69]

    def test_what_cannot_be_read_is_refused(self, cell, tmp_path: Path) -> None:
        with pytest.raises(
            ValueError, match=r"^gone\.parquet is no shard of this benchmark: .*No such"
        ):
            cell.adopt(tmp_path / "gone.parquet")
        (tmp_path / "text.parquet").write_text("text")
        with pytest.raises(ValueError, match=r"^text\.parquet is no shard of this benchmark: "):
            cell.adopt(tmp_path / "text.parquet")


class TestProofs:
    @pytest.fixture
    def measured(self, cell, fill) -> CellStore:
        for number in range(3):
            fill(cell, Block("arc_easy", number), [32 * number], ["baseline"])
        return cell

    def test_every_file_and_its_digest(self, measured: CellStore) -> None:
        expected = [(p.name, read_shard(p.read_bytes()).digest) for p in measured.shards()]
        assert len({digest for _, digest in expected}) == 3
        for _ in range(2):
            assert measured.proofs() == expected

    def test_only_what_changed_is_read_again(
        self, measured: CellStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[int] = []

        def reading(content: bytes, *rest: Any) -> Any:
            read.append(len(content))
            return read_shard(content, *rest)

        monkeypatch.setattr(cells, "read_shard", reading)
        before = measured.proofs()
        assert len(read) == 3
        assert measured.proofs() == before
        assert len(read) == 3
        path = measured.shards()[1]
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert measured.proofs() == before
        assert len(read) == 4
        # One that was cut off, whatever its time says.
        path.write_bytes(path.read_bytes()[:-1])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert measured.proofs() == [before[0], before[2]]
        # What is set aside is not lost.
        assert measured.lost() == []

    def test_a_link_that_leads_nowhere_proves_nothing(self, measured: CellStore) -> None:
        before = measured.proofs()
        path = measured.shards()[0]
        path.unlink()
        path.symlink_to("nowhere")
        assert measured.proofs() == before[1:]

    def test_what_is_lost_stays_known(self, measured: CellStore, fill) -> None:
        before = measured.proofs()
        measured.shards()[0].unlink()
        for _ in range(2):
            assert measured.proofs() == before[1:]
            assert measured.lost() == [before[0][0]]
        fill(measured, BLOCK, [0], ["baseline"])
        assert measured.proofs() == before
        assert measured.lost() == []

    def test_a_colleagues_folder_is_proved_as_well(self, measured: CellStore) -> None:
        """Nothing can be noted there, so that it is read again every time."""
        expected = [(p.name, read_shard(p.read_bytes()).digest) for p in measured.shards()]
        (measured.folder / "verified.json" / "in the way").mkdir(parents=True)
        assert measured.proofs() == expected

    def test_the_same_cell_elsewhere_counts_too(
        self, measured: CellStore, fill, tmp_path: Path
    ) -> None:
        folder = tmp_path / "other"
        fill(CellStore(folder, measured.identity), BLOCK, [0, 1], ["baseline", "layer:0"])
        other = CellStore(folder, measured.identity)
        both = CellStore(measured.folder, measured.identity, [other])
        assert both.proofs() == measured.proofs() + other.proofs()
        assert both.lost() == []
        found = both.read(columns=["doc", "ablation"])
        assert found.index.is_unique
        assert sorted(zip(found["doc"], found["ablation"], strict=True)) == [
            (0, "baseline"),
            (0, "layer:0"),
            (1, "baseline"),
            (1, "layer:0"),
            (32, "baseline"),
            (64, "baseline"),
        ]
        assert list(both.read([Block("arc_easy", 2)])["doc"]) == [64]
        assert both.missing(BLOCK, Extent(limit=3), ["baseline"]) == {("baseline",): [2]}


class TestNoShard:
    """What stands in a shard's place is named with its reason, once."""

    @pytest.fixture
    def path(self, cell, fill) -> Path:
        fill(cell, BLOCK, [0], ["baseline"])
        (path,) = cell.shards()
        return path

    @pytest.mark.parametrize(
        ("spoil", "why"),
        [
            (lambda path: path.symlink_to("nowhere"), "it is a link that leads nowhere"),
            (lambda path: path.mkdir(), "it is a folder"),
            (lambda path: path.write_bytes(b""), "Parquet file size is 0 bytes"),
        ],
        ids=["link", "folder", "empty"],
    )
    def test_it_is_set_aside(
        self, cell, path: Path, spoil: Callable[[Path], None], why: str, caplog
    ) -> None:
        path.unlink()
        spoil(path)
        with caplog.at_level(logging.WARNING):
            assert not len(cell.read())
            assert not len(cell.read())
        (said,) = [record.getMessage() for record in caplog.records]
        aside = path.with_suffix(".aside")
        assert said.startswith(f"the shard {path} is not what was written ({why})")
        assert said.endswith(f"; it is set aside as {aside.name} and computed again")
        assert os.path.lexists(aside)

    def test_another_blocks_name_is_not_believed(self, cell, path: Path, caplog) -> None:
        other = path.rename(path.with_name(path.name.replace("00000", "00001")))
        assert not len(cell.read())
        assert f"the shard {other} is not" in caplog.text
        assert "(it is named as another block)" in caplog.text

    def test_one_that_is_gone_is_nothing_to_speak_of(self, cell, path: Path, caplog) -> None:
        path.unlink()
        assert cell.shard(path) is None
        assert caplog.records == []

    def test_a_system_in_trouble_is_no_damage(self, cell, path: Path, monkeypatch) -> None:
        def refuse(*_: object) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(cells, "read_shard", refuse)
        with pytest.raises(WorkError) as caught:
            cell.read()
        assert str(caught.value) == f"{path} cannot be read now: [Errno 5] Input/output error"
        assert path.exists()

    def test_a_neighbour_is_not_read(self, cell, path: Path) -> None:
        """A block costs what it holds, however large the cell has grown."""
        beside = path.with_name("arc_easy.00001.0123456789ab.parquet")
        beside.write_bytes(b"")
        assert cell.missing(BLOCK, Extent(limit=1), ["baseline"]) == {}
        assert cell.is_complete(Extent(limit=1), ["baseline"])
        assert beside.exists()


def test_what_is_missing_is_told_without_reading_everything(
    cell, fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell of many documents is mostly proxies and log-likelihoods."""
    fill(cell, BLOCK, [0], ["baseline"])
    asked: list[list[str] | None] = []

    def reading(content: bytes, columns: list[str] | None = None) -> Any:
        asked.append(columns)
        return read_shard(content, columns)

    monkeypatch.setattr(cells, "read_shard", reading)
    assert cell.missing(BLOCK, Extent(limit=1), ["baseline"]) == {}
    assert cell.is_complete(Extent(limit=1), ["baseline"])
    assert asked == [["task", "doc", "ablation"]] * 2


def test_who_measured_is_said_of_every_outcome(cell, row) -> None:
    """By the shard, whoever made the cell."""
    stacks = [{"numpy": "1"}, {"numpy": "1", "device": "cuda"}]
    for doc, stack in enumerate(stacks):
        cell.write(BLOCK, [row(doc)], {"provenance": stack})
    found = cell.read().set_index("doc")["provenance"].map(json.loads)
    assert [found[doc] for doc in range(2)] == stacks


class TestNotesOfACell:
    def test_a_receipt_is_found_by_any_destination(self, cell) -> None:
        cell.add_receipt("a" * 64, "1", "there")
        assert cell.receipt("a" * 64) == {"record": "1", "location": "there"}
        (path,) = (cell.folder / "receipts").iterdir()
        assert path.name == f"{'a' * 32}.json"
        write_note(path, {"record": "1"})
        assert cell.receipt("a" * 64) == {}

    def test_a_record_is_kept_where_it_is_verified(self, cell, fill) -> None:
        fill(cell, BLOCK, [0], ["baseline"])
        request = CellRequest(model="m", benchmark="b", layers=(0,), limit=1)
        record = cell_record(cell, cell.views.of(request), lambda how, values: 0.0)
        cell.keep("state", record.view, record)
        path = cell.folder / "derived" / "intact.json"
        assert read_note(path)["state"] == "state"
        write_note(path, {"state": "state", "record": {"key": 1}})
        assert cell.derived("state", "intact", CellRecord) is None
        path.unlink()
        (path / "in the way").mkdir(parents=True)
        cell.keep("state", record.view, record)
        assert cell.derived("state", "intact", CellRecord) is None
