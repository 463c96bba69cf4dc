"""Data frames hold the records' numbers, unrounded."""

from __future__ import annotations

import pandas as pd

from tracker.core.records import CellRecord
from tracker.report import frames

from .conftest import CONSTANT, LAYERS


def test_layer_frame_holds_fractions_and_says_why(cells: list[CellRecord]) -> None:
    frame = frames.layer_frame(cells)
    assert len(frame) == 3 * LAYERS - 2
    row = frame[(frame.benchmark == "piqa") & (frame.layer == 12)].iloc[0]
    record = next(record for record in cells[1].runs if record.layer == 12)
    assert row.accuracy_drop == record.accuracy_drop
    assert row.metric_acc_norm == record.metrics["acc_norm"]
    assert pd.isna(row.gold_logprob_drop)
    assert "gold_logprob_drop: a log-probability was not finite" in row.reasons
    assert frame[frame.benchmark == "rte"].accuracy_relevance.isna().all()
    assert frame.accuracy_relevance.dtype == "float64"
    assert list(frames.layer_frame([]).columns[:10]) == [
        "key", "model", "benchmark", "num_fewshot", "metric", "removed", "sample_seed",
        "component", "layer", "span",
    ]  # fmt: skip


def test_correlation_frame_holds_the_records(cells: list[CellRecord]) -> None:
    frame = frames.correlation_frame(cells)
    assert len(frame) == 3 * 18
    first, record = frame.iloc[0], cells[0].correlations[0]
    assert (first.proxy, first.value, first.n) == (record.proxy, record.value, record.n)
    undefined = frame[frame.value.isna()]
    assert set(undefined.reason) == {CONSTANT}
