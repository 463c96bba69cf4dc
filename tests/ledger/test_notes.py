from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tracker.core.provenance import content_hash
from tracker.ledger.files import read_note, sealed, unsealed, write_note
from tracker.ledger.shards import read_shard, shard_digest, shard_file

EDITED = "its digest is not that of what it says: it was edited or damaged"
CONTENT = {"who": "größe", "numbers": [1, 2.5, None]}


def test_a_note_is_a_text_that_people_can_read():
    """In requests and identities too: they are looked at, and compared line by line."""
    digest = content_hash({"who": "me"})
    assert sealed({"who": "me"}) == f'{{\n  "who": "me",\n  "digest": "{digest}"\n}}'


def test_what_is_written_is_read_back(tmp_path):
    write_note(tmp_path / "new" / "note.json", CONTENT)
    assert read_note(tmp_path / "new" / "note.json") == CONTENT
    assert unsealed(sealed(CONTENT)) == CONTENT
    assert unsealed(sealed(CONTENT).encode()) == CONTENT


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[" * 100_000, "it is nested too deeply"),
        ("[1, 2]", "it holds no JSON object"),
        ("null", "it holds no JSON object"),
        (json.dumps(CONTENT), EDITED),
        (sealed(CONTENT).replace("2.5", "2.6"), EDITED),
        (sealed(CONTENT).replace('"digest": "', '"digest": "0'), EDITED),
    ],
)
def test_what_is_no_note_is_said_in_words(tmp_path, text, why):
    """`tracker verify` prints them after the file's name."""
    with pytest.raises(ValueError, match=f"^{why}$"):
        unsealed(text)
    (tmp_path / "note.json").write_text(text)
    for path in (tmp_path / "note.json", tmp_path / "missing.json", tmp_path):
        assert read_note(path) == {}


class TestCopies:
    """A note is believed only under the name that it was written as."""

    def test_a_copy_of_another_note_is_not_believed(self, tmp_path):
        note, other = tmp_path / "note.json", tmp_path / "other.json"
        write_note(note, CONTENT)
        other.write_bytes(note.read_bytes())
        assert read_note(other) == {}
        with pytest.raises(ValueError, match=r"^it is a copy of note\.json$"):
            unsealed(other.read_bytes(), other.name)
        assert unsealed(other.read_bytes()) == CONTENT, "without a name: what a server sends"

    def test_notes_of_earlier_versions_are_read(self, tmp_path):
        """They do not hold their names."""
        (tmp_path / "note.json").write_text(sealed(CONTENT))
        assert read_note(tmp_path / "note.json") == CONTENT


TABLE = pa.table({"doc": [1, 2], "text": ["a", "b"]})


def test_a_file_is_read_back_whole_or_by_columns():
    content = shard_file(TABLE, {"key": "k"})
    shard = read_shard(content)
    assert shard.table.equals(TABLE)
    assert shard.about == {"key": "k", "digest": shard_digest(content)}
    assert shard.digest == shard_digest(content)
    assert read_shard(content, ["doc"]).table.column_names == ["doc"]


def test_a_text_that_looks_like_a_digest_is_none():
    """An outcome may hold any text; the metadata's place is the last."""
    text = '"digest": "' + "0" * 64 + '"'
    content = shard_file(pa.table({"text": [text]}), {"note": text})
    shard = read_shard(content)
    assert shard.table["text"].to_pylist() == [text]
    assert shard.about["digest"] == shard_digest(content) != "0" * 64


def test_outcomes_are_compressed():
    content = shard_file(TABLE, {})
    columns = pq.ParquetFile(pa.BufferReader(content)).metadata.row_group(0)
    assert {columns.column(place).compression for place in range(2)} == {"ZSTD"}


def test_what_states_no_digest_has_none():
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink)
    content = sink.getvalue().to_pybytes()
    assert shard_digest(content) == shard_digest(b"") == ""
    with pytest.raises(ValueError, match=r"^it is no shard: KeyError: b'tracker'$"):
        read_shard(content)


@pytest.mark.parametrize("about", [{}, {"format": 1}, {"digest": "0"}, {"digest": "0" * 64}])
def test_a_file_that_is_not_proved_is_refused(about):
    schema = TABLE.schema.with_metadata({"tracker": json.dumps(about)})
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE.cast(schema), sink)
    with pytest.raises(ValueError, match=r"^its digest is not that of its content$"):
        read_shard(sink.getvalue().to_pybytes())


def test_the_digest_covers_every_byte():
    content = shard_file(TABLE, {"key": "k"})
    stated = shard_digest(content)
    where = content.index(stated.encode())
    for place in {*range(0, len(content), 7)} - {*range(where, where + 64)}:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        assert shard_digest(bytes(changed)) != stated
