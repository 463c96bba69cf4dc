"""Runs that remove sublayers, spans of layers, or layers beneath, against a naive computation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tracker.core.config import CellRequest
from tracker.core.extent import Extent
from tracker.core.proxies import OBSERVED
from tracker.ledger.cells import CellStore
from tracker.stats.rank_agreement import COEFFICIENTS

from .conftest import cell_record

DOCUMENTS = 20
RIGHT = {
    "baseline": 18,
    "layer:0": 5,
    "layer:1": 9,
    "layer:2": 14,
    "layer:3": 16,
    "layers:0,1": 3,
    "layers:1,2": 8,
    "layers:2,3": 12,
    "layers:0,2": 2,
    "attention:0": 11,
    "attention:1": 17,
    "attention:2": 18,
    "attention:3": 19,
    "attention:0,1": 4,
    "layer:2+mlp:0": 1,
    "layer:2+mlp:1": 6,
    "layer:2+mlp:3": 13,
}
"""How many of the documents each ablation answers right."""

Measure = Callable[[Sequence[str]], CellStore]


def mean(how: str, values: Sequence[float | str]) -> float:
    return sum(map(float, values)) / len(values)


def ask(**changes: Any) -> CellRequest:
    settings: dict[str, Any] = {"model": "m", "benchmark": "b", "layers": (0, 1, 2, 3)}
    return CellRequest(**{**settings, "limit": DOCUMENTS, **changes})


@pytest.fixture
def measure(cell: CellStore, row: Callable[..., dict[str, object]]) -> Measure:
    """Measure some ablations of a model of four layers."""

    def measure(names: Sequence[str]) -> CellStore:
        (block,) = cell.blocks(Extent(limit=DOCUMENTS))
        rows = [row(doc, name, acc=float(doc < RIGHT[name])) for name in names for doc in range(20)]
        cell.write(block, rows, {})
        return cell

    return measure


def test_one_record_a_run_in_the_order_of_the_request(measure: Measure) -> None:
    store = measure(list(RIGHT))
    request = ask(components=("layer", "attention"), spans=(1, 2), layers=(0, 1, 3))
    record = cell_record(store, request, "acc", mean)
    assert [(run.ablation, run.component, run.layer, run.span) for run in record.runs] == [
        ("layer:0", "layer", 0, 1),
        ("layer:1", "layer", 1, 1),
        ("layer:3", "layer", 3, 1),
        ("layers:0,1", "layer", 0, 2),
        ("layers:1,2", "layer", 1, 2),
        ("attention:0", "attention", 0, 1),
        ("attention:1", "attention", 1, 1),
        ("attention:3", "attention", 3, 1),
        ("attention:0,1", "attention", 0, 2),
    ]
    for run in record.runs:
        assert run.accuracy_drop == pytest.approx((18 - RIGHT[run.ablation]) / DOCUMENTS)
    # A span beyond the last layer is no run; the attention of layers 1 and 2 is none yet.
    assert [run.label() for run in record.missing] == ["attention 1–2"]
    assert (record.removed, record.removed_accuracy, record.reasons) == ((), None, {})


def test_proxies_and_correlations_rest_on_whole_single_layers(measure: Measure) -> None:
    store = measure(list(RIGHT))
    alone = cell_record(store, ask(), "acc", mean)
    request = ask(components=("layer", "attention"), spans=(1, 2))
    record = cell_record(store, request, "acc", mean)
    assert record.whole_layers == alone.runs
    assert record.correlations == alone.correlations
    assert len(alone.correlations) == len(OBSERVED) * len(COEFFICIENTS) * 2
    proxies = ("cosine_similarity", "cosine_score", "angular_distance", "relative_update")
    for run in record.runs:
        whole = (run.component, run.span) == ("layer", 1)
        for name in proxies:
            assert (getattr(run, name) is not None) == whole
            assert run.reasons.get(name) == (
                None if whole else "measured for whole single layers only"
            )


def test_without_whole_layers_nothing_is_correlated(measure: Measure) -> None:
    store = measure(list(RIGHT))
    record = cell_record(store, ask(components=("attention",)), "acc", mean)
    assert (len(record.runs), record.whole_layers, record.correlations) == (4, (), ())


def test_layers_beneath_count_in_every_drop(measure: Measure) -> None:
    """The drop stays relative to the intact model; what lies beneath has its own accuracy."""
    store = measure(list(RIGHT))
    request = ask(components=("layer", "mlp"), removed=(2,))
    record = cell_record(store, request, "acc", mean)
    assert record.title.endswith("· 0-shot · without layer 2")
    assert record.baseline_accuracy == pytest.approx(18 / DOCUMENTS)
    assert record.removed_accuracy == pytest.approx(RIGHT["layer:2"] / DOCUMENTS)
    assert record.removed_low < record.removed_accuracy < record.removed_high
    drops = {run.ablation: run.accuracy_drop for run in record.runs}
    assert drops == {
        name: pytest.approx((18 - RIGHT[name]) / DOCUMENTS)
        for name in (
            "layers:0,2", "layers:1,2", "layers:2,3",
            "layer:2+mlp:0", "layer:2+mlp:1", "layer:2+mlp:3",
        )
    }  # fmt: skip
    assert [run.layer for run in record.runs] == [0, 1, 3, 0, 1, 3]
    assert all(run.cosine_score is not None for run in record.whole_layers)
    assert {c.n for c in record.correlations if c.subset == "all"} == {3}


def test_what_lies_beneath_may_not_be_measured_yet(measure: Measure) -> None:
    store = measure(["baseline", "layers:0,2"])
    record = cell_record(store, ask(removed=(2,)), "acc", mean)
    assert (record.removed_accuracy, record.removed_low) == (None, None)
    assert record.reasons == {"removed_accuracy": "not measured yet"}
    assert [run.label() for run in record.missing] == ["layer 1", "layer 3"]


def test_nothing_measured_says_so_of_what_lies_beneath_too(cell: CellStore) -> None:
    record = cell_record(cell, ask(removed=(2,)), "acc", mean)
    assert record.reasons["removed_accuracy"] == "no document is measured yet"
