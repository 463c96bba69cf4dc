"""Texts of documents are stored once, verified by a digest, and reported if missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.faults import flip_bit
from tests.helpers.stored_cells import fill_block
from tracker.ledger.store import Ledger
from tracker.ledger.texts import MAX_QUESTION_LENGTH, StoredText, is_text_file, text_row
from tracker.ledger.verify import compare_ledgers, verify_ledger
from tracker.schema.documents import Document, DocumentText
from tracker.schema.extent import Extent

BLOCK = "arc_easy.00000"


def stored_text(doc: int, public: bool = True) -> StoredText:
    return StoredText(DocumentText(f"What is {doc}?", ("a", f"{doc}"), None), public)


def rows(*docs: int, public: bool = True) -> list[dict[str, object]]:
    return [
        text_row(Document("arc_easy", doc, (), 0, 2), stored_text(doc).text, public) for doc in docs
    ]


def test_texts_are_read_back(cell):
    cell.texts.add(BLOCK, rows(0, 3))
    cell.texts.add("arc_easy+7.00001", rows(40, public=False))
    assert cell.texts.read() == {
        ("arc_easy", 0): stored_text(0),
        ("arc_easy", 3): stored_text(3),
        ("arc_easy", 40): stored_text(40, public=False),
    }
    assert all(is_text_file(path) for path in cell.texts.files())
    assert not any(is_text_file(path) for path in cell.shards())


def test_a_text_is_written_once(cell):
    cell.texts.add(BLOCK, rows(0, 1))
    before = {path: path.stat().st_mtime_ns for path in cell.texts.files()}
    cell.texts.add(BLOCK, rows(0, 1))
    assert {path: path.stat().st_mtime_ns for path in cell.texts.files()} == before
    cell.texts.add(BLOCK, rows(1, 2))
    (new,) = set(cell.texts.files()) - set(before)
    assert set(cell.texts.read_file(new)) == {("arc_easy", 2)}


def test_long_questions_lose_their_middle_and_nothing_keeps_a_shard_from_being_written(cell):
    long = "first " + "x" * MAX_QUESTION_LENGTH + " last"
    document = Document("arc_easy", 0, (), None, 0)
    cell.texts.add(BLOCK, [text_row(document, DocumentText(long, (), "half \ud800"), True)])
    (stored,) = cell.texts.read().values()
    assert stored.text.question.startswith("first ")
    assert stored.text.question.endswith(" last")
    assert len(stored.text.question) <= MAX_QUESTION_LENGTH + len(" […] ")
    assert stored.text.answer == "half ?"


class TestDamage:
    @pytest.mark.parametrize("position", [0.3, 0.9])
    def test_damaged_texts_are_set_aside_and_reported(self, ledger, cell, caplog, position):
        fill_block(cell, cell.blocks(Extent(limit=1))[0], [0], ["baseline"])
        cell.texts.add(BLOCK, rows(0))
        assert verify_ledger(ledger).damaged == {}
        (path,) = cell.texts.files()
        flip_bit(path, 8 * int(position * path.stat().st_size))
        damaged = verify_ledger(ledger).damaged
        assert list(damaged) == [str(path.with_suffix(".aside"))]
        assert "no outcome is affected" in next(iter(damaged.values()))
        assert "is damaged" in caplog.text
        assert cell.texts.read() == {}
        # The next measurement keeps them again.
        cell.texts.add(BLOCK, rows(0))
        assert cell.texts.read() == {("arc_easy", 0): stored_text(0)}

    def test_texts_of_another_cell_are_ignored(self, cell_of, cell):
        other = cell_of(model={"fingerprint": "0" * 64})
        other.texts.add(BLOCK, rows(0))
        (path,) = other.texts.files()
        with pytest.raises(
            ValueError, match="holds no texts of this benchmark: it belongs to another"
        ):
            cell.texts.import_file(path)
        cell.texts.add(BLOCK, rows(70))
        (beyond,) = cell.texts.files()
        assert cell.texts.read_file(beyond) == {}
        (shard,) = (other.folder / "texts").glob("*")
        assert other.texts.import_file(shard) == path.name


def test_texts_of_copies_are_compared(ledger, cell, tmp_path):
    copy = Ledger.open_existing(Path(shutil.copytree(ledger.root, tmp_path / "copy")))
    (other,) = copy.cells()
    cell.texts.add(BLOCK, rows(0, 1))
    assert list(compare_ledgers(ledger, copy)) == []
    changed = rows(0, 1)
    changed[1]["question"] = "What else?"
    other.texts.add(BLOCK, changed)
    (difference,) = compare_ledgers(ledger, copy)
    assert difference.endswith(
        "the texts of 1 documents differ between the two folders, such as document 1 of arc_easy"
    )
