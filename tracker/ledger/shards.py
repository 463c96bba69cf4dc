"""Read and write shards: Parquet files with outcomes and the details of their measurement.

The metadata of a shard contains a JSON object under the key `tracker`. Its fields are:

    format      version of the file format
    key, task   key of the cell, and task of the outcomes
    provenance  software versions, machine and device of the measurement
    digest      SHA-256 of the file, computed with 64 zeros in place of the digest
    …           further details of the measurement, such as date, seconds and sharing

Statistics for studies and for the setting `observe` are stored in the cell's folder, in files named
`observed/KIND/TASK.NUMBER.parquet`. A file contains one block of documents. KIND is a name for the
measured quantity and the method.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from tracker.ledger.blocks import Block
from tracker.ledger.files import write_bytes
from tracker.schema.distribution import LEDGER_FORMAT
from tracker.schema.proxies import ANSWER_TOKENS, KL_COLUMN, KL_KIND

ASIDE_SUFFIX = ".aside"
"""Suffix of damaged files that were set aside."""
_EMPTY_DIGEST = "0" * 64
_DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"')


def shard_file(table: pa.Table, fields: Mapping[str, object]) -> bytes:
    """Build the bytes of a shard from a table and metadata, with a digest of the content."""
    file_metadata = {"tracker": json.dumps({**fields, "digest": _EMPTY_DIGEST})}
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        # Not through the schema: Arrow stores a second copy of it that has no correct digest.
        writer.add_key_value_metadata(file_metadata)
    content: bytes = sink.getvalue().to_pybytes()
    return _with_digest(content, shard_digest(content))


def shard_digest(content: bytes) -> str:
    """Compute the digest of a shard's file.

    The result is empty if the file's metadata has no digest.
    """
    blank_content = _with_digest(content, _EMPTY_DIGEST)
    return hashlib.sha256(blank_content).hexdigest() if blank_content else ""


@dataclass(frozen=True)
class Shard:
    """Content of a shard: the table of outcomes, the metadata and the digest.

    Attributes:
        metadata: The metadata of the file: format, cell, task, provenance and details.
        digest: SHA-256 of the file, as given in the metadata.
    """

    table: pa.Table
    metadata: dict[str, Any]
    digest: str


def read_shard_metadata(path: Path) -> dict[str, Any]:
    """Read a shard's metadata and number of rows, without verifying the content."""
    try:
        metadata = pq.read_metadata(path)
        return {**json.loads((metadata.metadata or {})[b"tracker"]), "rows": metadata.num_rows}
    except (pa.ArrowException, LookupError, TypeError) as error:
        raise ValueError(f"the file is not a shard: {error}") from None


def read_shard(content: bytes, columns: Sequence[str] | None = None) -> Shard:
    """Parse and verify the bytes of a shard's file, with all columns or only the given columns.

    Raises ValueError if the file is not a shard or is damaged.
    """
    digests = _DIGEST.findall(content)
    digest = shard_digest(content)
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        metadata = dict(json.loads((file.metadata.metadata or {})[b"tracker"]))
        if not digests or digests[-1].decode() != digest:
            raise ValueError("the digest in the shard does not match the content of the shard")
        table = file.read(columns=columns)
    except ValueError:
        raise
    except MemoryError:
        raise ValueError("the unpacked content needs more memory than is available") from None
    # Errors of the reader on damaged files.
    except (pa.ArrowException, OSError, TypeError, LookupError, ArithmeticError) as e:
        raise ValueError(f"the file is not a shard: {type(e).__name__}: {e}") from None
    return Shard(table, metadata, digest)


def _with_digest(content: bytes, digest: str) -> bytes:
    # The metadata comes last in the file, after any text that looks like it.
    spans = [match.span(1) for match in _DIGEST.finditer(content)]
    if not spans:
        return b""
    start, end = spans[-1]
    return content[:start] + digest.encode() + content[end:]


DocumentArrays = Mapping[str, NDArray[np.float64]]
"""Name → array of one document; arrays of a name have the same shape for every document."""


def write_observations(
    folder: Path, kind: str, block: Block, observed: Mapping[int, DocumentArrays]
) -> None:
    """Write the arrays that a study measured on a block of documents.

    `observed` maps document numbers to arrays. The file is written to the cell's folder `folder`;
    `kind` is a name for the measured quantity and the method.
    """
    path = _observation_path(folder, kind, block)
    columns: dict[str, list[Any]] = {"doc": list(observed)}
    shapes = {n: list(np.shape(array)) for n, array in next(iter(observed.values())).items()}
    for name in shapes:
        columns[name] = [np.ravel(arrays[name]).tolist() for arrays in observed.values()]
    metadata = {"format": LEDGER_FORMAT, "task": block.task, "shapes": shapes}
    metadata["file"] = _file_identity(path)
    write_bytes(path, shard_file(pa.table(columns), metadata))


def read_observations(folder: Path, kind: str, block: Block) -> dict[int, DocumentArrays]:
    """Read the arrays that a study measured on a block of documents.

    Returns a dict that maps document numbers to arrays. The dict is empty if the file is missing or
    damaged.
    """
    try:
        shard = read_observation_file(_observation_path(folder, kind, block))
    except (OSError, ValueError):
        return {}
    shapes, columns = shard.metadata["shapes"], shard.table.to_pydict()
    return {
        doc: {name: np.reshape(columns[name][row], shape) for name, shape in shapes.items()}
        for row, doc in enumerate(columns["doc"])
    }


def read_observation_file(path: Path) -> Shard:
    """Read a file that `write_observations` wrote; raise OSError or ValueError on damage."""
    shard = read_shard(path.read_bytes())
    # Files of former versions do not have their own name.
    if (original := shard.metadata.get("file", _file_identity(path))) != _file_identity(path):
        raise ValueError(f"the file is a copy of {original}")
    return shard


def divergence_files(folder: Path) -> list[Path]:
    """List the files of a cell's folder that contain KL divergences."""
    return sorted(folder.glob(f"observed/{KL_KIND}-*/*.parquet"))


def read_divergences(folder: Path) -> pd.DataFrame:
    """Read the KL divergences in a cell's folder, one row per (task, doc, ablation)."""
    keys = ["task", "doc", "ablation"]
    frames = [pd.DataFrame(columns=[*keys, ANSWER_TOKENS, KL_COLUMN])]
    for path in divergence_files(folder):
        with suppress(OSError, ValueError):  # damaged divergences are computed again
            shard = read_observation_file(path)
            frame = shard.table.to_pandas().set_index("doc").map(np.ndarray.item).reset_index()
            frame = frame.melt(["doc", ANSWER_TOKENS], var_name="ablation", value_name=KL_COLUMN)
            frames.append(frame.assign(task=shard.metadata["task"]))
    return pd.concat(frames[1:] or frames).drop_duplicates(keys).astype({"doc": int})


def _file_identity(path: Path) -> str:
    """Return the cell key, kind and block of an observation file as one text."""
    cell, _, kind, block = path.parts[-4:]
    return f"{cell[-12:]}/{kind}/{block}"


def _observation_path(folder: Path, kind: str, block: Block) -> Path:
    return folder / "observed" / kind / f"{block.name}.parquet"
