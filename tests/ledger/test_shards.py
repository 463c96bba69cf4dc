from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tracker.ledger.shards import read_shard, shard_digest, shard_file

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
