"""The columns of a shard: what is kept of one document under one ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from tracker.core.documents import Document, Response
from tracker.core.proxies import OBSERVED, OF_EXPERTS

METRIC = "metric/"
"""Columns that start so hold the task's metrics under lm-eval's names."""
PROVENANCE = "provenance"
"""What `CellStore.read` adds: who measured the outcome, as JSON; it stands in a shard once."""
CHECKPOINT = "checkpoint"
"""Why no saved checkpoint holds the model that was measured; most shards have none."""
TOKENS_DIGEST = "tokens_digest"
"""Digest of the tokens that an outcome's document was read as; none before it was kept."""
COMPARED = ("compared", "difference", "unsteady")
"""What is known of the outcomes that were answered again on a really pruned model."""
AGAIN = "again"
"""Log-likelihoods of the outcomes that were computed twice, as they came out the second time."""
PROXY_SUMS = tuple(proxy.column for proxy in OBSERVED)
"""Per layer, summed over `proxy_tokens` tokens; only in the baseline's rows."""
PART_SUMS = tuple(proxy.column for proxy in OF_EXPERTS)
"""Of the expert that an ablation takes out, summed over these tokens; only in its rows."""


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
    """Lay out one outcome.

    Args:
        document: The document.
        ablation: The ablation's name.
        responses: The model's responses to the document's requests.
        metrics: What the task makes of them.
        proxies: For the baseline: tokens, and the sums [proxies][layers], as `PROXY_SUMS`.
        compared: Of an outcome that was answered again on a really pruned model: how many answers,
            the largest difference in nats, and how many differ where the model is discontinuous.
        again: The responses of an outcome that was computed twice, in another way.
        load: For the ablation of an expert: what the intact model does with it, as `PART_SUMS`.

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
    """Put results of `outcome_row` into a table with fixed types, as a shard holds it.

    A metric is a number everywhere or JSON everywhere.
    """
    types = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        text = any(isinstance(row.get(name), str) for row in rows)
        types[name] = _SCHEMA.get(name, pa.string() if text else pa.float64())
    return pa.Table.from_pylist([dict(row) for row in rows], schema=pa.schema(types))
