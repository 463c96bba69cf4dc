"""Texts of documents are stored once, verified by a digest, and reported if missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.faults import flip
from tests.helpers.stored_cells import fill
from tracker.core.documents import Document, DocumentText
from tracker.core.extent import Extent
from tracker.ledger.store import Ledger
from tracker.ledger.texts import LONGEST, KeptText, is_texts, text_row
from tracker.ledger.verify import compare, verify

BLOCK = "arc_easy.00000"


def said(doc: int, public: bool = True) -> KeptText:
    return KeptText(DocumentText(f"What is {doc}?", ("a", f"{doc}"), None), public)


def rows(*docs: int, public: bool = True) -> list[dict[str, object]]:
    return [text_row(Document("arc_easy", doc, (), 0, 2), said(doc).text, public) for doc in docs]


def test_what_is_kept_is_read_back(cell):
    cell.texts.add(BLOCK, rows(0, 3))
    cell.texts.add("arc_easy+7.00001", rows(40, public=False))
    assert cell.texts.read() == {
        ("arc_easy", 0): said(0),
        ("arc_easy", 3): said(3),
        ("arc_easy", 40): said(40, public=False),
    }
    assert all(is_texts(path) for path in cell.texts.files())
    assert not any(is_texts(path) for path in cell.shards())


def test_a_text_is_written_once(cell):
    cell.texts.add(BLOCK, rows(0, 1))
    before = {path: path.stat().st_mtime_ns for path in cell.texts.files()}
    cell.texts.add(BLOCK, rows(0, 1))
    assert {path: path.stat().st_mtime_ns for path in cell.texts.files()} == before
    cell.texts.add(BLOCK, rows(1, 2))
    (new,) = set(cell.texts.files()) - set(before)
    assert set(cell.texts.read_file(new)) == {("arc_easy", 2)}


def test_long_questions_lose_their_middle_and_nothing_keeps_a_shard_from_being_written(cell):
    long = "first " + "x" * LONGEST + " last"
    document = Document("arc_easy", 0, (), None, 0)
    cell.texts.add(BLOCK, [text_row(document, DocumentText(long, (), "half \ud800"), True)])
    (kept,) = cell.texts.read().values()
    assert kept.text.question.startswith("first ")
    assert kept.text.question.endswith(" last")
    assert len(kept.text.question) <= LONGEST + len(" […] ")
    assert kept.text.answer == "half ?"


class TestDamage:
    @pytest.mark.parametrize("place", [0.3, 0.9])
    def test_a_flipped_bit_is_set_aside_and_said(self, ledger, cell, caplog, place):
        fill(cell, cell.blocks(Extent(limit=1))[0], [0], ["baseline"])
        cell.texts.add(BLOCK, rows(0))
        assert verify(ledger).damaged == {}
        (path,) = cell.texts.files()
        flip(path, 8 * int(place * path.stat().st_size))
        damaged = verify(ledger).damaged
        assert list(damaged) == [str(path.with_suffix(".aside"))]
        assert "no outcome is touched" in next(iter(damaged.values()))
        assert "not what was written" in caplog.text
        assert cell.texts.read() == {}
        # The next measurement keeps them again.
        cell.texts.add(BLOCK, rows(0))
        assert cell.texts.read() == {("arc_easy", 0): said(0)}

    def test_those_of_another_cell_or_document_are_not_believed(self, cell_of, cell):
        other = cell_of(model={"fingerprint": "0" * 64})
        other.texts.add(BLOCK, rows(0))
        (path,) = other.texts.files()
        with pytest.raises(
            ValueError, match="holds no texts of this benchmark: it belongs to another"
        ):
            cell.texts.adopt(path)
        cell.texts.add(BLOCK, rows(70))
        (beyond,) = cell.texts.files()
        assert cell.texts.read_file(beyond) == {}
        (shard,) = (other.folder / "texts").glob("*")
        assert other.texts.adopt(shard) == path.name


def test_copies_that_say_different_things_are_told_apart(ledger, cell, tmp_path):
    copy = Ledger.existing(Path(shutil.copytree(ledger.root, tmp_path / "copy")))
    (other,) = copy.cells()
    cell.texts.add(BLOCK, rows(0, 1))
    assert list(compare(ledger, copy)) == []
    changed = rows(0, 1)
    changed[1]["question"] = "What else?"
    other.texts.add(BLOCK, changed)
    (difference,) = compare(ledger, copy)
    assert difference.endswith("the texts of 1 documents differ, document 1 of arc_easy")
