from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tracker.ledger.files import parse_note, read_note, seal_note, write_note
from tracker.ledger.shards import read_shard, shard_digest, shard_file
from tracker.schema.provenance import content_hash

EDITED = "the digest does not match the content: the file was edited or damaged"
CONTENT = {"who": "größe", "numbers": [1, 2.5, None]}


def test_notes_are_readable_json():
    """In requests and identities too: they are looked at, and compared line by line."""
    digest = content_hash({"who": "me"})
    assert seal_note({"who": "me"}) == f'{{\n  "who": "me",\n  "digest": "{digest}"\n}}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "the JSON text is nested too deeply"),
        ("[1, 2]", "the file contains no JSON object"),
        ("null", "the file contains no JSON object"),
        (json.dumps(CONTENT), EDITED),
        (seal_note(CONTENT).replace("2.5", "2.6"), EDITED),
        (seal_note(CONTENT).replace('"digest": "', '"digest": "0'), EDITED),
    ],
)
def test_invalid_notes_are_explained(tmp_path, text, message):
    """`tracker verify` prints them after the file's name."""
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse_note(text)
    (tmp_path / "note.json").write_text(text)
    for path in (tmp_path / "note.json", tmp_path / "missing.json", tmp_path):
        assert read_note(path) == {}


class TestCopies:
    """A note is believed only under the name that it was written as."""

    def test_copies_of_other_notes_are_ignored(self, tmp_path):
        note, copy = tmp_path / "note.json", tmp_path / "other.json"
        write_note(note, CONTENT)
        copy.write_bytes(note.read_bytes())
        assert read_note(copy) == {}
        with pytest.raises(ValueError, match=r"^the file is a copy of note\.json$"):
            parse_note(copy.read_bytes(), copy.name)
        assert parse_note(copy.read_bytes()) == CONTENT, "without a name: what a server sends"

    def test_notes_of_earlier_versions_are_read(self, tmp_path):
        """They do not hold their names."""
        (tmp_path / "note.json").write_text(seal_note(CONTENT))
        assert read_note(tmp_path / "note.json") == CONTENT


TABLE = pa.table({"doc": [1, 2], "text": ["a", "b"]})


def test_shards_are_read_back_by_columns():
    content = shard_file(TABLE, {"key": "k"})
    shard = read_shard(content)
    assert shard.table.equals(TABLE)
    assert shard.metadata == {"key": "k", "digest": shard_digest(content)}
    assert shard.digest == shard_digest(content)
    assert read_shard(content, ["doc"]).table.column_names == ["doc"]


def test_texts_that_look_like_digests_are_ignored():
    """An outcome may hold any text; the metadata's place is the last."""
    text = '"digest": "' + "0" * 64 + '"'
    content = shard_file(pa.table({"text": [text]}), {"note": text})
    shard = read_shard(content)
    assert shard.table["text"].to_pylist() == [text]
    assert shard.metadata["digest"] == shard_digest(content) != "0" * 64


def test_outcomes_are_compressed():
    content = shard_file(TABLE, {})
    columns = pq.ParquetFile(pa.BufferReader(content)).metadata.row_group(0)
    assert {columns.column(index).compression for index in range(2)} == {"ZSTD"}


def test_files_without_a_digest_are_refused():
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink)
    content = sink.getvalue().to_pybytes()
    assert shard_digest(content) == shard_digest(b"") == ""
    with pytest.raises(ValueError, match=r"^the file is not a shard: KeyError: b'tracker'$"):
        read_shard(content)


@pytest.mark.parametrize("metadata", [{}, {"format": 1}, {"digest": "0"}, {"digest": "0" * 64}])
def test_files_with_a_wrong_digest_are_refused(metadata):
    schema = TABLE.schema.with_metadata({"tracker": json.dumps(metadata)})
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE.cast(schema), sink)
    with pytest.raises(
        ValueError, match=r"^the digest in the shard does not match the content of the shard$"
    ):
        read_shard(sink.getvalue().to_pybytes())


def test_the_digest_covers_every_byte():
    content = shard_file(TABLE, {"key": "k"})
    stated = shard_digest(content)
    start = content.index(stated.encode())
    for position in {*range(0, len(content), 7)} - {*range(start, start + 64)}:
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        assert shard_digest(bytes(changed)) != stated
