"""A shard's file: Parquet that says of which cell it is, who measured it, and its own digest.

The file's metadata holds JSON under `tracker`:

    format      how the file is written
    key, task   the cell and the task that the outcomes are of
    provenance  versions, machine and device that measured them
    digest      SHA-256 of the whole file, every byte of it, with 64 zeros in the digest's place
    …           how they were measured: when, in how many seconds, with which sharing

Beside outcomes, what a study observed of a cell's documents: arrays, a row a document.

They stand in the cell's folder as `observed/KIND/TASK.NUMBER.parquet`, a block of documents a file,
each with its digest. The kind names what was observed and how: another way is another kind.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tracker.core.distribution import FORMAT
from tracker.ledger.blocks import Block
from tracker.ledger.files import write_bytes

ASIDE = ".aside"
"""What the name of a file of this kind ends with that is not what was written."""
_UNKNOWN = "0" * 64
_DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"')


def shard_file(table: pa.Table, about: Mapping[str, object]) -> bytes:
    """Lay out a shard's file; `about` is what the metadata says, but for the digest."""
    metadata = {"tracker": json.dumps({**about, "digest": _UNKNOWN})}
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        # Not through the schema, of which Arrow keeps a second copy that the digest cannot reach.
        writer.add_key_value_metadata(metadata)
    content: bytes = sink.getvalue().to_pybytes()
    return _with_digest(content, shard_digest(content))


def shard_digest(content: bytes) -> str:
    """Compute the SHA-256 of a shard's file that its metadata should state.

    Empty where the file has no place for a digest.
    """
    whole = _with_digest(content, _UNKNOWN)
    return hashlib.sha256(whole).hexdigest() if whole else ""


@dataclass(frozen=True)
class Shard:
    """A shard that was read.

    Attributes:
        about: What the metadata says.
        digest: SHA-256 of the file, as the metadata states it.
    """

    table: pa.Table
    about: dict[str, Any]
    digest: str


def shard_about(path: Path) -> dict[str, Any]:
    """Read what a shard's metadata says, unproved; ValueError or OSError if that is impossible."""
    try:
        found = (pq.read_metadata(path).metadata or {})[b"tracker"]
        return dict(json.loads(found))
    except (pa.ArrowException, LookupError, TypeError) as error:
        raise ValueError(f"it is no shard: {error}") from None


def read_shard(content: bytes, columns: Sequence[str] | None = None) -> Shard:
    """Read a shard's file, all columns or some.

    ValueError if it is no shard, or not as it was written.
    """
    stated = _DIGEST.findall(content)
    digest = shard_digest(content)
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        about = dict(json.loads((file.metadata.metadata or {})[b"tracker"]))
        if not stated or stated[-1].decode() != digest:
            raise ValueError("its digest is not that of its content")
        table = file.read(columns=columns)
    except ValueError:
        raise
    except MemoryError:
        raise ValueError("unpacked it takes more memory than there is") from None
    # Whatever the reader stumbles over in a damaged file.
    except (pa.ArrowException, OSError, TypeError, LookupError, ArithmeticError) as e:
        raise ValueError(f"it is no shard: {type(e).__name__}: {e}") from None
    return Shard(table, about, digest)


def _with_digest(content: bytes, digest: str) -> bytes:
    # The metadata comes last in the file, so a text that looks like it comes before.
    places = [found.span(1) for found in _DIGEST.finditer(content)]
    if not places:
        return b""
    start, end = places[-1]
    return content[:start] + digest.encode() + content[end:]


Arrays = Mapping[str, NDArray[np.float64]]
"""Name → figures of one document, of the same shape for every document."""


def write_observations(
    folder: Path, kind: str, block: Block, observed: Mapping[int, Arrays]
) -> None:
    """Keep what was observed of a block in a cell's folder: document → arrays."""
    first = next(iter(observed.values()))
    columns: dict[str, list[Any]] = {"doc": list(observed)}
    for name in first:
        columns[name] = [np.ravel(arrays[name]).tolist() for arrays in observed.values()]
    shapes = {name: list(np.shape(array)) for name, array in first.items()}
    path = _path(folder, kind, block)
    about = {"format": FORMAT, "task": block.task, "shapes": shapes, "file": _identity(path)}
    write_bytes(path, shard_file(pa.table(columns), about))


def read_observations(folder: Path, kind: str, block: Block) -> dict[int, Arrays]:
    """Read what is kept of a block: document → arrays.

    Nothing where there is none, or not what was written: it is observed again.
    """
    try:
        shard = read_observed(_path(folder, kind, block))
    except (OSError, ValueError):
        return {}
    shapes, columns = shard.about["shapes"], shard.table.to_pydict()
    return {
        doc: {name: np.reshape(columns[name][row], shape) for name, shape in shapes.items()}
        for row, doc in enumerate(columns["doc"])
    }


def read_observed(path: Path) -> Shard:
    """Read a file of `write_observations`; OSError or ValueError if it is not what was written."""
    shard = read_shard(path.read_bytes())
    # Those of earlier versions do not say which file they are.
    if (original := shard.about.get("file", _identity(path))) != _identity(path):
        raise ValueError(f"it is a copy of {original}")
    return shard


def _identity(path: Path) -> str:
    """Name an observation by its cell's key, its kind and its block."""
    cell, _, kind, block = path.parts[-4:]
    return f"{cell[-12:]}/{kind}/{block}"


def _path(folder: Path, kind: str, block: Block) -> Path:
    return folder / "observed" / kind / f"{block.name}.parquet"
