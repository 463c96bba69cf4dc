"""Define the columns of a shard, a file with one row per document and ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from tracker.schema.changes import INTACT
from tracker.schema.documents import Document, Response
from tracker.schema.proxies import OBSERVED, PART_PROXIES

METRIC_PREFIX = "metric/"
"""Prefix of the columns of the task's metrics; lm-eval's name of the metric follows."""
PROVENANCE_COLUMN = "provenance"
"""Column of provenance as JSON, which `CellStore.read` adds from a shard's metadata."""
CHECKPOINT_KEY = "checkpoint"
"""Metadata key: reason why no saved checkpoint holds the measured model; usually absent."""
DIGEST_COLUMN = "tokens_digest"
"""Column of the digest of a document's tokens; absent in shards of former versions."""
SAMPLES_COLUMN = "texts"
"""Column of the texts of a document after the first; absent unless several are sampled."""
TOKENS_COLUMN = "text_tokens"
"""Column of the number of tokens of each generated text; absent in shards of former versions."""
CUT_COLUMN = "text_cut"
"""Column of whether the token limit ended each generated text; absent in former versions."""
COMPARED_COLUMNS = ("compared", "difference", "unsteady")
"""Columns about outcomes that were computed again with a pruned copy of the model."""
REPEATED_COLUMN = "again"
"""Column of the second computation's log-likelihoods, for outcomes that are computed twice."""
PROXY_SUMS = tuple(proxy.column for proxy in OBSERVED)
"""Columns of layer proxies, summed over `proxy_tokens` tokens; only in rows of the baseline."""
PART_SUMS = tuple(proxy.column for proxy in PART_PROXIES)
"""Columns of proxies of a changed part, summed over the same tokens; only in its ablation."""


def outcome_row(
    document: Document,
    ablation: str,
    responses: Sequence[Response],
    metrics: Mapping[str, float | str | None],
    proxies: tuple[int, Sequence[Sequence[float]]] | None,
    comparison: tuple[int, float, int] | None = None,
    repeated: Sequence[Response] | None = None,
    part_sums: Mapping[str, float] | None = None,
) -> dict[str, object]:
    """Build the row of a shard (file of outcomes) for one document under one ablation.

    Args:
        document: The document.
        ablation: The ablation's name.
        responses: The model's responses to the document's requests.
        metrics: Name of each task metric → the metric's value for the responses.
        proxies: Number of measured tokens, and sums of layer statistics [statistic][layer] for the
            columns `PROXY_SUMS`; None unless the ablation is the baseline.
        comparison: Comparison of the responses with a really changed model: number of responses,
            largest difference in nats, and number of large differences due to rounding. None
            without comparison.
        repeated: The responses of a second computation, if there was one.
        part_sums: Column of `PART_SUMS` → sum of a layer statistic; None or empty if nothing was
            measured.

    Returns:
        The row, as column name → value.
    """
    row: dict[str, object] = {
        "task": document.task,
        "doc": document.index,
        "ablation": ablation,
        "choices": document.choices,
        "gold": document.gold,
        "rolling": document.rolling,
        "loglikelihoods": [response.loglikelihood for response in responses],
        "greedy": [response.greedy for response in responses],
        **{f"{METRIC_PREFIX}{name}": value for name, value in metrics.items()},
    }
    texts = responses[0].texts
    traces = document.traces if ablation == INTACT.name else ()
    if samples := [text.text for text in texts] or [*traces]:
        row["text"] = samples[0]
    if texts:
        row[TOKENS_COLUMN] = [text.tokens for text in texts]
        row[CUT_COLUMN] = [text.is_cut for text in texts]
    if len(samples) > 1:
        row[SAMPLES_COLUMN] = samples[1:]
    tokens, sums = proxies if proxies is not None else (None, (None,) * len(PROXY_SUMS))
    row["proxy_tokens"] = tokens
    row.update(zip(PROXY_SUMS, sums, strict=True))
    row.update(zip(COMPARED_COLUMNS, comparison or (None,) * len(COMPARED_COLUMNS), strict=True))
    if repeated is not None:
        row[REPEATED_COLUMN] = [response.loglikelihood for response in repeated]
    return row | dict(part_sums or {})


def stored_texts(row: Mapping[Any, Any]) -> list[str]:
    """Return all generated texts in a row of a shard, i.e. of one document."""
    first, others = row.get("text"), row.get(SAMPLES_COLUMN)
    if not isinstance(first, str):
        return []
    if others is None or isinstance(others, float):  # NaN: other shards have the column
        return [first]
    return [first, *map(str, others)]


_SCHEMA = {
    "task": pa.string(),
    "doc": pa.int32(),
    "ablation": pa.string(),
    DIGEST_COLUMN: pa.string(),
    "choices": pa.int32(),
    "gold": pa.int32(),
    "rolling": pa.bool_(),
    "loglikelihoods": pa.list_(pa.float32()),
    REPEATED_COLUMN: pa.list_(pa.float32()),
    "greedy": pa.list_(pa.bool_()),
    "text": pa.string(),
    SAMPLES_COLUMN: pa.list_(pa.string()),
    TOKENS_COLUMN: pa.list_(pa.int32()),
    CUT_COLUMN: pa.list_(pa.bool_()),
    "proxy_tokens": pa.int32(),
    **dict(zip(COMPARED_COLUMNS, (pa.int32(), pa.float64(), pa.int32()), strict=True)),
    **dict.fromkeys(PROXY_SUMS, pa.list_(pa.float64())),
    **dict.fromkeys(PART_SUMS, pa.float64()),
}


def outcome_table(rows: Sequence[Mapping[str, object]]) -> pa.Table:
    """Build the table of a shard from rows that were built with `outcome_row`.

    A metric's column contains JSON text if any of its values is text, and numbers otherwise.
    """
    types = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        is_text = any(isinstance(row.get(name), str) for row in rows)
        types[name] = _SCHEMA.get(name, pa.string() if is_text else pa.float64())
    return pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(types))
