from __future__ import annotations

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tracker.ledger.shards import read_shard, shard_digest, shard_file

TABLE = pa.table({"doc": [1, 2], "text": ["a", "b"]})


def test_a_file_is_read_back_whole_or_by_columns() -> None:
    content = shard_file(TABLE, {"key": "k"})
    shard = read_shard(content)
    table, about = shard.table, shard.about
    assert table.equals(TABLE)
    assert about == {"key": "k", "digest": shard_digest(content)}
    assert (shard.digest, shard.proved) == (shard_digest(content), True)
    assert read_shard(content, ["doc"]).table.column_names == ["doc"]


def test_a_text_that_looks_like_a_digest_is_none() -> None:
    """An outcome may hold any text; the metadata's place is the last."""
    text = '"digest": "' + "0" * 64 + '"'
    content = shard_file(pa.table({"text": [text]}), {"note": text})
    shard = read_shard(content)
    table, about = shard.table, shard.about
    assert table["text"].to_pylist() == [text]
    assert about["digest"] == shard_digest(content) != "0" * 64


def test_outcomes_are_compressed() -> None:
    content = shard_file(TABLE, {})
    columns = pq.ParquetFile(pa.BufferReader(content)).metadata.row_group(0)
    assert {columns.column(place).compression for place in range(2)} == {"ZSTD"}


def test_what_states_no_digest_has_none() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE, sink)
    content = sink.getvalue().to_pybytes()
    assert shard_digest(content) == shard_digest(b"") == ""
    with pytest.raises(ValueError, match=r"^it is no shard: KeyError: b'tracker'$"):
        read_shard(content)


def stating(about: dict[str, object]) -> bytes:
    """Write a file as older trackers did: what its metadata says is in the schema, undigested."""
    schema = TABLE.schema.with_metadata({"tracker": json.dumps(about)})
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE.cast(schema), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def test_a_file_of_format_1_is_read_and_called_unproved() -> None:
    content = stating({"format": 1, "seconds": "2"})
    shard = read_shard(content)
    assert shard.table.to_pylist() == TABLE.to_pylist()
    assert shard.about == {"format": 1, "seconds": "2"}
    assert (shard.digest, shard.proved) == (hashlib.sha256(content).hexdigest(), False)


@pytest.mark.parametrize(
    "about",
    [{}, {"format": 2}, {"format": 1, "key": "k"}, {"format": 1, "digest": "0"}],
)
def test_only_a_whole_file_of_format_1_may_state_no_digest(about: dict[str, object]) -> None:
    """One flipped bit in the word `digest`, or in the format's number, makes no proof needless."""
    with pytest.raises(ValueError, match=r"^its digest is not that of its content$"):
        read_shard(stating(about))
