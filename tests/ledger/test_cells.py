"""Shards from elsewhere, proofs, what is set aside, and files that the system keeps from us."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.stored_cells import fill, row
from tracker.core.distribution import FORMAT, other_format
from tracker.core.errors import WorkError
from tracker.core.extent import Extent
from tracker.core.provenance import content_hash
from tracker.ledger import cells
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import outcome_table
from tracker.ledger.shards import read_shard, shard_file

BLOCK = Block("arc_easy", 0)


@pytest.fixture
def read(monkeypatch) -> list[list[str] | None]:
    """Record which columns are read of each shard from now on."""
    asked: list[list[str] | None] = []

    def reading(content: bytes, columns: list[str] | None = None) -> Any:
        asked.append(columns)
        return read_shard(content, columns)

    monkeypatch.setattr(cells, "read_shard", reading)
    return asked


def test_a_shards_name_is_what_any_tracker_gave_it(cell):
    """So that the same outcomes, measured again, take its place."""
    cell.write(BLOCK, [row(1, "layer:0"), row(10)], {})
    held = content_hash([["1", "layer:0"], ["10", "baseline"]])
    assert [path.name for path in cell.shards()] == [f"arc_easy.00000.{held[:12]}.parquet"]


def test_what_is_measured_after_another_edition_is_so_by_its_date(cell_of, cell):
    """A clock that is behind would make the edition that was measured last the outdated one."""
    dates = [f"2026-11-28T0{hour}:00:00+00:00" for hour in range(3)]
    cell.write(BLOCK, [row(1)], {"measured": dates[2]})
    later, other = cell_of(task={"fingerprint": "b" * 64}), cell_of(name="arc")
    later.write(BLOCK, [row(1)], {"measured": dates[0]})
    later.write(BLOCK, [row(2)], {"measured": dates[1]})
    other.write(BLOCK, [row(1)], {"measured": dates[0]})
    assert cells.measured_last(later.abouts()) == "2026-11-28T02:00:01+00:00"
    assert [cells.measured_last(each.abouts()) for each in (cell, other)] == [dates[2], dates[0]]
    # The first one again, on more documents, by a clock that is right.
    again = CellStore(cell.folder, cell.identity)
    again.write(BLOCK, [row(3)], {"measured": "2026-11-28T09:00:00+00:00"})
    assert cells.measured_last(again.abouts()) == "2026-11-28T09:00:00+00:00"


class TestAdopt:
    def test_its_content_decides_its_place(self, cell, tmp_path):
        cell.write(Block("arc_easy", 1), [row(32, "layer:0"), row(33)], {})
        (path,) = cell.shards()
        content = path.read_bytes()
        for _ in range(2):
            strange = tmp_path / "strange.parquet"
            strange.write_bytes(content)
            assert cell.adopt(strange) == path.name
            assert not strange.exists()
            assert [each.read_bytes() for each in cell.shards()] == [content]
            shutil.rmtree(cell.folder)

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
        self, cell, tmp_path, about, tasks_and_documents, why
    ):
        rows = [row(doc, task=task) for task, doc in tasks_and_documents]
        table = outcome_table(rows or [row(0)]).slice(0, len(rows))
        path = tmp_path / "it.parquet"
        path.write_bytes(shard_file(table, {"key": cell.identity.key, "format": FORMAT, **about}))
        with pytest.raises(ValueError, match=r"it\.parquet") as caught:
            cell.adopt(path)
        assert str(caught.value) == f"it.parquet is no shard of this benchmark: {why}"
        assert path.exists()
        assert cell.shards() == []


class TestProofs:
    @pytest.fixture
    def measured(self, cell) -> CellStore:
        for number in range(3):
            fill(cell, Block("arc_easy", number), [32 * number], ["baseline"])
        return cell

    def test_every_file_and_its_digest(self, measured):
        expected = [(p.name, read_shard(p.read_bytes()).digest) for p in measured.shards()]
        assert len({digest for _, digest in expected}) == 3
        for _ in range(2):
            assert measured.proofs() == expected
        # A colleague's folder, where nothing can be noted, is read again every time.
        (measured.folder / "verified.json").unlink()
        (measured.folder / "verified.json" / "in the way").mkdir(parents=True)
        assert measured.proofs() == expected

    def test_only_what_changed_is_read_again(self, measured, read):
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

    def test_what_is_lost_stays_known(self, measured):
        before, path = measured.proofs(), measured.shards()[0]
        path.unlink()
        assert measured.shard(path) is None
        for _ in range(2):
            assert measured.proofs() == before[1:]
            assert measured.lost() == [before[0][0]]
        fill(measured, BLOCK, [0], ["baseline"])
        assert measured.proofs() == before
        assert measured.lost() == []
        measured.shards()[0].unlink()
        (measured.folder / "shards" / before[0][0]).symlink_to("nowhere")
        assert measured.proofs() == before[1:]


class TestNoShard:
    """A file that is no shard is named once, with the reason."""

    @pytest.fixture
    def path(self, cell) -> Path:
        fill(cell, BLOCK, [0], ["baseline"])
        (path,) = cell.shards()
        return path

    @pytest.mark.parametrize(
        ("spoil", "why"),
        [
            (lambda path, _: path.symlink_to("nowhere"), "it is a link that leads nowhere)"),
            (lambda path, _: path.mkdir(), "it is a folder)"),
            (lambda path, _: path.write_bytes(b""), "Parquet file size is 0 bytes)"),
            (lambda path, content: path.write_bytes(content[:3]), "Parquet file size is 3 bytes"),
            (lambda path, content: path.write_bytes(content[:500]), ""),
            (lambda path, content: path.write_bytes(content[:-1]), ""),
        ],
        ids=["link", "folder", "empty", "3 bytes", "500 bytes", "cut"],
    )
    def test_it_is_set_aside_and_computed_again(self, cell, path, spoil, why, caplog):
        fill(cell, Block("arc_easy", 1), [32], ["baseline"])
        content = path.read_bytes()
        path.unlink()
        spoil(path, content)
        with caplog.at_level(logging.WARNING):
            assert cell.missing(BLOCK, Extent(limit=1), ["baseline"]) == {("baseline",): [0]}
            assert list(cell.read()["doc"]) == [32]
        (said,) = [record.getMessage() for record in caplog.records]
        aside = path.with_suffix(".aside")
        assert said.startswith(f"the shard {path} is not what was written ({why}")
        assert os.path.lexists(aside)
        fill(cell, BLOCK, [0], ["baseline"])
        assert cell.is_complete(Extent(limit=1), ["baseline"])

    # Was: the loser of the race gets a bare FileNotFoundError.
    def test_another_process_that_sets_it_aside_first_is_no_failure(self, cell, path, monkeypatch):
        """A race of two readers cannot be provoked: the other one acts inside our read."""
        path.write_bytes(b"broken")

        def read(*arguments):
            try:
                return read_shard(*arguments)
            finally:
                path.rename(path.with_suffix(".aside"))

        monkeypatch.setattr(cells, "read_shard", read)
        assert not len(cell.read())

    def test_one_that_cannot_be_moved_counts_for_nothing_where_it_is(self, cell, path, caplog):
        """As in a colleague's folder, which is read and not written."""
        path.write_bytes(b"broken")
        (path.with_suffix(".aside") / "in the way").mkdir(parents=True)
        assert not len(cell.read())
        assert path.exists()
        (said,) = caplog.messages
        assert said.endswith("); it counts for nothing, and is computed again")

    def test_another_blocks_name_is_not_believed(self, cell, path, caplog):
        other = path.rename(path.with_name(path.name.replace("00000", "00001")))
        assert not len(cell.read())
        assert f"the shard {other} is not" in caplog.text
        assert "(it is named as another block)" in caplog.text

    def test_a_shard_of_another_model_is_not_believed(self, cell, cell_of, path, caplog):
        """Was: taken for one's own; and over another block, missing documents on every rerun."""
        foreign = cell_of(model={"fingerprint": "0" * 64})
        fill(foreign, BLOCK, [0], ["baseline"])
        foreign.shards()[0].replace(path)
        assert cell.missing(BLOCK, Extent(limit=1), ["baseline"])
        assert not cell.is_complete(Extent(limit=1), ["baseline"])
        assert "(it belongs to another benchmark)" in caplog.text

    def test_a_system_in_trouble_is_no_damage(self, cell, path, monkeypatch):
        """Was: too many open files, or an error of a network disk, threw measurements away."""

        def refuse(_: Path) -> bytes:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", refuse)
            with pytest.raises(WorkError) as caught:
                cell.read()
        assert str(caught.value) == f"{path} cannot be read now: [Errno 24] Too many open files"
        assert list(cell.read()["doc"]) == [0]


def test_what_is_missing_is_told_without_reading_everything(cell, read):
    """A cell of many documents is mostly proxies and log-likelihoods."""
    fill(cell, BLOCK, [0], ["baseline"])
    assert cell.missing(BLOCK, Extent(limit=1), ["baseline"]) == {}
    assert cell.is_complete(Extent(limit=1), ["baseline"])
    assert read == [["task", "doc", "ablation", "tokens_digest"]] * 2
