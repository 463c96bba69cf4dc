"""Define the columns of a shard: the outcome of one document under one ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from tracker.core.documents import Document, Response
from tracker.core.proxies import OBSERVED, OF_EXPERTS

METRIC = "metric/"
"""Prefix of the columns of the task's metrics, which follow under lm-eval's names."""
PROVENANCE = "provenance"
"""Column of provenance as JSON, which `CellStore.read` adds from a shard's metadata."""
CHECKPOINT = "checkpoint"
"""Key of the reason why no saved checkpoint holds the measured model; absent in most shards."""
TOKENS_DIGEST = "tokens_digest"
"""Column of the digest of a document's tokens; absent in shards of former versions."""
COMPARED = ("compared", "difference", "unsteady")
"""Columns about outcomes that were repeated with a really pruned model."""
AGAIN = "again"
"""Column of the log-likelihoods of the second computation of outcomes computed twice."""
PROXY_SUMS = tuple(proxy.column for proxy in OBSERVED)
"""Columns of proxies per layer, summed over `proxy_tokens` tokens; only in the baseline's rows."""
PART_SUMS = tuple(proxy.column for proxy in OF_EXPERTS)
"""Columns of proxies of the removed expert, summed over the same tokens; only in its rows."""


def outcome_row(
    document: Document,
    ablation: str,
    responses: Sequence[Response],
    metrics: Mapping[str, float | str | None],
    proxies: tuple[int, Sequence[Sequence[float]]] | None,
    compared: tuple[int, float, int] | None = None,
    again: Sequence[Response] | None = None,
    load: Sequence[float] | None = None,
) -> dict[str, object]:
    """Build the row of one outcome.

    Args:
        document: The document.
        ablation: The ablation's name.
        responses: The model's responses to the document's requests.
        metrics: The task's metrics of the responses.
        proxies: Number of tokens and sums [proxies][layers] as in `PROXY_SUMS`; only for the
            baseline.
        compared: Number of responses repeated with a really pruned model, the largest difference in
            nats, and the number that differ where the model is discontinuous; None if none were.
        again: The responses of a second, different computation; None if there is none.
        load: Sums of the intact model's use of an expert as in `PART_SUMS`; only for ablations of
            an expert.

    Returns:
        Column → value.
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
        **{f"{METRIC}{name}": value for name, value in metrics.items()},
    }
    if document.prompt is not None:
        row["text"] = responses[0].text
    tokens, sums = proxies if proxies is not None else (None, (None,) * len(PROXY_SUMS))
    row["proxy_tokens"] = tokens
    row.update(zip(PROXY_SUMS, sums, strict=True))
    row.update(zip(COMPARED, compared or (None,) * len(COMPARED), strict=True))
    if again is not None:
        row[AGAIN] = [response.loglikelihood for response in again]
    if load is not None:
        row.update(zip(PART_SUMS, load, strict=True))
    return row


_SCHEMA = {
    "task": pa.string(),
    "doc": pa.int32(),
    "ablation": pa.string(),
    TOKENS_DIGEST: pa.string(),
    "choices": pa.int32(),
    "gold": pa.int32(),
    "rolling": pa.bool_(),
    "loglikelihoods": pa.list_(pa.float32()),
    AGAIN: pa.list_(pa.float32()),
    "greedy": pa.list_(pa.bool_()),
    "text": pa.string(),
    "proxy_tokens": pa.int32(),
    **dict(zip(COMPARED, (pa.int32(), pa.float64(), pa.int32()), strict=True)),
    **dict.fromkeys(PROXY_SUMS, pa.list_(pa.float64())),
    **dict.fromkeys(PART_SUMS, pa.float64()),
}


def outcome_table(rows: Sequence[Mapping[str, object]]) -> pa.Table:
    """Build a shard's table with fixed types from results of `outcome_row`.

    A metric is a number in all rows, or JSON in all rows.
    """
    types = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        text = any(isinstance(row.get(name), str) for row in rows)
        types[name] = _SCHEMA.get(name, pa.string() if text else pa.float64())
    return pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(types))
