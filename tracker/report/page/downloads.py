"""Files that a page carries within itself, as text in base64."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tracker.core.records import CellRecord
from tracker.report.frames import layer_frame


def packed(text: str) -> str:
    """Compress a text into base64 of its gzip, free of HTML's markup; the browser unpacks it."""
    # Without the time, the same text gives the same bytes.
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def packed_json(value: Mapping[str, Any]) -> str:
    """Compress what a script reads, without spaces; NaN is refused."""
    return packed(json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False))


def layer_files(cells: Sequence[CellRecord]) -> tuple[str, str]:
    """Write every run as CSV, packed, and as Parquet in base64; both unrounded, fractions."""
    frame = layer_frame(cells)
    parquet = io.BytesIO()
    table = pa.Table.from_pandas(frame, preserve_index=False)
    pq.write_table(table, parquet, compression="zstd")
    return packed(frame.to_csv(index=False)), base64.b64encode(parquet.getvalue()).decode()
