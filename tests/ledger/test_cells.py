"""Shards from elsewhere, proofs, what is set aside, and files that the system keeps from us."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.stored_cells import fill_block, make_row
from tracker.ledger import cells
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import outcome_table
from tracker.ledger.shards import read_shard, shard_file
from tracker.schema.distribution import LEDGER_FORMAT, version_problem
from tracker.schema.errors import WorkError
from tracker.schema.extent import Extent
from tracker.schema.provenance import content_hash

BLOCK, NEXT_FORMAT = Block("arc_easy", 0), LEDGER_FORMAT + 1
NO_BLOCK = "the file does not hold exactly one block of documents"
FOREIGN = "the benchmark lacks a document that the file contains"


@pytest.fixture
def columns_read(monkeypatch) -> list[list[str] | None]:
    """Record which columns are read of each shard from now on."""
    columns_seen: list[list[str] | None] = []

    def spy_read_shard(content: bytes, columns: list[str] | None = None) -> Any:
        columns_seen.append(columns)
        return read_shard(content, columns)

    monkeypatch.setattr(cells, "read_shard", spy_read_shard)
    return columns_seen


def test_names_of_shards_are_stable(cell):
    """So that the same outcomes, measured again, take its place."""
    cell.write(BLOCK, [make_row(1, "layer:0"), make_row(10)], {})
    digest = content_hash([["1", "layer:0"], ["10", "baseline"]])
    assert [path.name for path in cell.shards()] == [f"arc_easy.00000.{digest[:12]}.parquet"]


def test_dates_follow_those_of_earlier_editions(cell_of, cell):
    """A clock that is behind would make the edition that was measured last the outdated one."""
    dates = [f"2026-11-28T0{hour}:00:00+00:00" for hour in range(3)]
    cell.write(BLOCK, [make_row(1)], {"measured": dates[2]})
    later, other = cell_of(task={"fingerprint": "b" * 64}), cell_of(name="arc")
    later.write(BLOCK, [make_row(1)], {"measured": dates[0]})
    later.write(BLOCK, [make_row(2)], {"measured": dates[1]})
    other.write(BLOCK, [make_row(1)], {"measured": dates[0]})
    assert cells.last_measured(later.all_metadata()) == "2026-11-28T02:00:01+00:00"
    last_dates = [cells.last_measured(store.all_metadata()) for store in (cell, other)]
    assert last_dates == [dates[2], dates[0]]
    # The first one again, on more documents, by a clock that is right.
    reopened = CellStore(cell.folder, cell.identity)
    reopened.write(BLOCK, [make_row(3)], {"measured": "2026-11-28T09:00:00+00:00"})
    assert cells.last_measured(reopened.all_metadata()) == "2026-11-28T09:00:00+00:00"


class TestAdopt:
    def test_imported_shards_are_named_by_content(self, cell, tmp_path):
        cell.write(Block("arc_easy", 1), [make_row(32, "layer:0"), make_row(33)], {})
        (path,) = cell.shards()
        content = path.read_bytes()
        for _ in range(2):
            strange = tmp_path / "strange.parquet"
            strange.write_bytes(content)
            assert cell.import_shard(strange) == path.name
            assert not strange.exists()
            assert [shard_path.read_bytes() for shard_path in cell.shards()] == [content]
            shutil.rmtree(cell.folder)

    @pytest.mark.parametrize(
        ("metadata", "tasks_and_documents", "message"),
        [
            ({"key": "0" * 64}, [("arc_easy", 0)], "it belongs to another benchmark"),
            ({"format": NEXT_FORMAT}, [("arc_easy", 0)], f"it {version_problem(NEXT_FORMAT)}"),
            ({}, [("arc_easy", 0), ("b", 0)], NO_BLOCK),
            ({}, [("arc_easy", 31), ("arc_easy", 32)], NO_BLOCK),
            ({}, [], NO_BLOCK),
            ({}, [("arc_easy", 70)], FOREIGN),
            ({}, [("arc_easy", -1)], FOREIGN),
            ({}, [("b", 0)], FOREIGN),
        ],
    )
    def test_shards_of_other_blocks_are_refused(
        self, cell, tmp_path, metadata, tasks_and_documents, message
    ):
        rows = [make_row(doc, task=task) for task, doc in tasks_and_documents]
        table = outcome_table(rows or [make_row(0)]).slice(0, len(rows))
        path = tmp_path / "it.parquet"
        metadata = {"key": cell.identity.key, "format": LEDGER_FORMAT, **metadata}
        path.write_bytes(shard_file(table, metadata))
        with pytest.raises(ValueError, match=r"it\.parquet") as caught:
            cell.import_shard(path)
        assert str(caught.value) == f"it.parquet is not a shard of this benchmark: {message}"
        assert path.exists()
        assert cell.shards() == []


class TestProofs:
    @pytest.fixture
    def measured(self, cell) -> CellStore:
        for number in range(3):
            fill_block(cell, Block("arc_easy", number), [32 * number], ["baseline"])
        return cell

    def test_every_file_and_its_digest(self, measured):
        expected = [(p.name, read_shard(p.read_bytes()).digest) for p in measured.shards()]
        assert len({digest for _, digest in expected}) == 3
        for _ in range(2):
            assert measured.shard_digests() == expected
        # A colleague's folder, where nothing can be noted, is read again every time.
        (measured.folder / "verified.json").unlink()
        (measured.folder / "verified.json" / "in the way").mkdir(parents=True)
        assert measured.shard_digests() == expected

    def test_only_changed_shards_are_read_again(self, measured, columns_read):
        before = measured.shard_digests()
        assert len(columns_read) == 3
        assert measured.shard_digests() == before
        assert len(columns_read) == 3
        path = measured.shards()[1]
        stat = path.stat()
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert measured.shard_digests() == before
        assert len(columns_read) == 4
        # One that was cut off, whatever its time says.
        path.write_bytes(path.read_bytes()[:-1])
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert measured.shard_digests() == [before[0], before[2]]
        # What is set aside is not lost.
        assert measured.lost_shards() == []

    def test_lost_shards_are_listed(self, measured):
        before, path = measured.shard_digests(), measured.shards()[0]
        path.unlink()
        assert measured.load_shard(path) is None
        for _ in range(2):
            assert measured.shard_digests() == before[1:]
            assert measured.lost_shards() == [before[0][0]]
        fill_block(measured, BLOCK, [0], ["baseline"])
        assert measured.shard_digests() == before
        assert measured.lost_shards() == []
        measured.shards()[0].unlink()
        (measured.folder / "shards" / before[0][0]).symlink_to("nowhere")
        assert measured.shard_digests() == before[1:]


class TestNoShard:
    """A file that is no shard is named once, with the reason."""

    @pytest.fixture
    def path(self, cell) -> Path:
        fill_block(cell, BLOCK, [0], ["baseline"])
        (path,) = cell.shards()
        return path

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda path, _: path.symlink_to("nowhere"), "it is a broken link)"),
            (lambda path, _: path.mkdir(), "it is a folder)"),
            (lambda path, _: path.write_bytes(b""), "Parquet file size is 0 bytes)"),
            (lambda path, content: path.write_bytes(content[:3]), "Parquet file size is 3 bytes"),
            (lambda path, content: path.write_bytes(content[:500]), ""),
            (lambda path, content: path.write_bytes(content[:-1]), ""),
        ],
        ids=["link", "folder", "empty", "3 bytes", "500 bytes", "cut"],
    )
    def test_damaged_shards_are_set_aside_and_computed_again(
        self, cell, path, spoil, message, caplog
    ):
        fill_block(cell, Block("arc_easy", 1), [32], ["baseline"])
        content = path.read_bytes()
        path.unlink()
        spoil(path, content)
        with caplog.at_level(logging.WARNING):
            assert cell.missing_outcomes(BLOCK, Extent(limit=1), ["baseline"]) == {
                ("baseline",): [0]
            }
            assert list(cell.read()["doc"]) == [32]
        (warning,) = [record.getMessage() for record in caplog.records]
        aside = path.with_suffix(".aside")
        assert warning.startswith(f"the shard {path} is damaged ({message}")
        assert os.path.lexists(aside)
        fill_block(cell, BLOCK, [0], ["baseline"])
        assert cell.is_complete(Extent(limit=1), ["baseline"])

    # Was: the loser of the race gets a bare FileNotFoundError.
    def test_two_readers_may_set_a_shard_aside(self, cell, path, monkeypatch):
        """A race of two readers cannot be provoked: the other one acts inside our read."""
        path.write_bytes(b"broken")

        def read(*arguments):
            try:
                return read_shard(*arguments)
            finally:
                path.rename(path.with_suffix(".aside"))

        monkeypatch.setattr(cells, "read_shard", read)
        assert not len(cell.read())

    def test_damaged_shards_that_cannot_be_moved_are_ignored(self, cell, path, caplog):
        """As in a colleague's folder, which is read and not written."""
        path.write_bytes(b"broken")
        (path.with_suffix(".aside") / "in the way").mkdir(parents=True)
        assert not len(cell.read())
        assert path.exists()
        (warning,) = caplog.messages
        assert warning.endswith(") and is ignored; its outcomes are computed again")

    def test_shards_under_another_blocks_name_are_set_aside(self, cell, path, caplog):
        renamed_path = path.rename(path.with_name(path.name.replace("00000", "00001")))
        assert not len(cell.read())
        assert f"the shard {renamed_path} is damaged" in caplog.text
        assert "(the file name does not match the block of documents in the file)" in caplog.text

    def test_shards_of_another_model_are_set_aside(self, cell, cell_of, path, caplog):
        """Was: taken for one's own; and over another block, missing documents on every rerun."""
        foreign = cell_of(model={"fingerprint": "0" * 64})
        fill_block(foreign, BLOCK, [0], ["baseline"])
        foreign.shards()[0].replace(path)
        assert cell.missing_outcomes(BLOCK, Extent(limit=1), ["baseline"])
        assert not cell.is_complete(Extent(limit=1), ["baseline"])
        assert "(it belongs to another benchmark)" in caplog.text

    def test_errors_of_the_system_are_no_damage(self, cell, path, monkeypatch):
        """Was: too many open files, or an error of a network disk, threw measurements away."""

        def refuse(_: Path) -> bytes:
            raise OSError(24, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", refuse)
            with pytest.raises(WorkError) as caught:
                cell.read()
        assert str(caught.value) == f"{path} cannot be read now: [Errno 24] Too many open files"
        assert list(cell.read()["doc"]) == [0]


def test_missing_outcomes_are_found_by_reading_few_columns(cell, columns_read):
    """A cell of many documents is mostly proxies and log-likelihoods."""
    fill_block(cell, BLOCK, [0], ["baseline"])
    assert cell.missing_outcomes(BLOCK, Extent(limit=1), ["baseline"]) == {}
    assert cell.is_complete(Extent(limit=1), ["baseline"])
    assert columns_read == [["task", "doc", "ablation", "tokens_digest"]] * 2
