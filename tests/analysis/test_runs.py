"""Runs that remove sublayers, spans of layers, or layers beneath, against a naive computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.helpers.stored_cells import asks, cell_record, row, write_all
from tracker.core.proxies import OBSERVED
from tracker.core.records import CellRecord
from tracker.ledger.outcomes import PART_SUMS
from tracker.report.wording import sentence
from tracker.stats.rank_agreement import COEFFICIENTS

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


@pytest.fixture
def show(cell) -> Callable[..., CellRecord]:
    """Measure some ablations of a model of four layers, and derive what a request shows."""

    def show(*layers: int, names: Iterable[str] = RIGHT, **asked: Any) -> CellRecord:
        rows = [row(doc, name, acc=float(doc < RIGHT[name])) for name in names for doc in range(20)]
        write_all(cell, rows)
        return cell_record(cell, asks(*layers, limit=DOCUMENTS, **asked))

    return show


def test_one_record_a_run_in_the_order_of_the_request(show):
    record = show(0, 1, 3, components=("layer", "attention"), spans=(1, 2))
    assert [
        (run.ablation, run.change.component, run.change.layer, run.change.span)
        for run in record.runs
    ] == [
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
        assert run.drop.value == pytest.approx((18 - RIGHT[run.ablation]) / DOCUMENTS)
    # A span beyond the last layer is no run; the attention of layers 1 and 2 is none yet.
    assert [run.label() for run in record.missing] == ["attention 1–2"]
    assert (record.removed, record.remaining.value, record.reasons) == ((), None, {})


def test_proxies_and_correlations_rest_on_whole_single_layers(show):
    alone, record = show(), show(components=("layer", "attention"), spans=(1, 2))
    assert record.whole_layers == alone.runs
    assert record.correlations == alone.correlations
    assert len(alone.correlations) == len(OBSERVED) * len(COEFFICIENTS) * 2
    proxies = ("cosine_similarity", "cosine_score", "angular_distance", "relative_update")
    for run in record.runs:
        whole = (run.change.component, run.change.span) == ("layer", 1)
        for name in proxies:
            assert (getattr(run, name) is not None) == whole
            why = None if whole else "measured for whole single layers only"
            assert run.reasons.get(name) == why
    none = show(components=("attention",))
    assert (len(none.runs), none.whole_layers, none.correlations) == (4, (), ())


EXPERTS = {
    "expert:0.0": (12, [(2.0, 1), (9.0, 2)]),
    "expert:0.1": (16, [(1.0, 4), (0.0, 0)]),
    "expert:1.0": (15, [(4.0, 2), (3.0, 1)]),
    "expert:1.1": (17, [(0.0, 0), (1.0, 1)]),
    "expert:2.0": (18, [(0.0, 0), (0.0, 0)]),
    "expert:2.1": (11, [(math.nan, 2), (6.0, 2)]),
}
"""How many documents are right without an expert; what is observed of even and of odd ones."""


def expert_rows() -> list[Any]:
    """Lay out what is measured of experts; each document has five tokens."""
    right = {"baseline": (18, [None, None])} | EXPERTS
    return [
        row(doc, name, acc=float(doc < count), said=(-1.5 - len(name) * count / 99, -0.25),
            load=load[doc % 2])
        for name, (count, load) in right.items()
        for doc in range(DOCUMENTS)
    ]  # fmt: skip


def test_proxies_of_experts_are_those_of_the_documents_tokens(cell):
    write_all(cell, expert_rows())
    asked = {"components": ("expert",), "experts": (0, 1), "limit": DOCUMENTS}
    record = cell_record(cell, asks(0, 1, 2, **asked))
    runs = {run.ablation: run for run in record.runs}
    seen = {name: (run.expert_saliency, run.routed_share) for name, run in runs.items()}
    assert seen == {
        "expert:0.0": (pytest.approx(11 / 3), pytest.approx(3 / 10)),
        "expert:0.1": (pytest.approx(1 / 4), pytest.approx(4 / 10)),
        "expert:1.0": (pytest.approx(7 / 3), pytest.approx(3 / 10)),
        "expert:1.1": (pytest.approx(1), pytest.approx(1 / 10)),
        "expert:2.0": (None, 0),
        "expert:2.1": (None, pytest.approx(4 / 10)),
    }
    reasons = {name: run.reasons.get("expert_saliency") for name, run in runs.items()}
    assert reasons["expert:2.0"] == "no token of these documents is routed to it"
    assert "is not finite" in str(reasons["expert:2.1"])
    found = {(c.proxy, c.coefficient): c for c in record.correlations if c.subset == "all"}
    # Ranks of saliency 4 1 3 2, of drops 4 2 3 1.
    assert found["expert_saliency", "spearman"].estimate.value == pytest.approx(0.8)
    assert [c.n for c in found.values()] == [4, 4, 6, 6]
    inner = [c for c in record.correlations if c.subset == "inner"]
    assert {(c.n, c.estimate.reason) for c in inner} == {
        (0, "0 experts, and a correlation needs at least 3")
    }
    assert "Spearman of expert saliency and accuracy drop: 0.80 (" in sentence(record)
    assert "4 experts, 20 documents" in sentence(record)


def test_experts_that_were_measured_before_were_not_observed(cell):
    old = [
        {name: value for name, value in each.items() if name not in PART_SUMS}
        for each in expert_rows()
        if each["doc"] < 8
    ]
    write_all(cell, [*old, *(each for each in expert_rows() if each["doc"] >= 8)])
    asked = {"components": ("expert",), "experts": (0, 1), "limit": DOCUMENTS}
    record = cell_record(cell, asks(0, 1, 2, **asked))
    why = "not observed when 8 of 20 documents were measured"
    for run in record.runs:
        assert (run.expert_saliency, run.routed_share) == (None, None)
        assert {run.reasons["expert_saliency"], run.reasons["routed_share"]} == {why}
    assert {c.estimate.reason for c in record.correlations} == {why}


def test_layers_beneath_count_in_every_drop(show):
    """The drop stays relative to the intact model; what lies beneath has its own accuracy."""
    record = show(components=("layer", "mlp"), removed=(2,))
    assert record.title.endswith("· 0-shot · without layer 2")
    assert record.baseline.value == pytest.approx(18 / DOCUMENTS)
    assert record.remaining.value == pytest.approx(RIGHT["layer:2"] / DOCUMENTS)
    assert record.remaining.low < record.remaining.value < record.remaining.high
    drops = {run.ablation: run.drop.value for run in record.runs}
    assert drops == {
        name: pytest.approx((18 - RIGHT[name]) / DOCUMENTS)
        for name in (
            "layers:0,2", "layers:1,2", "layers:2,3",
            "layer:2+mlp:0", "layer:2+mlp:1", "layer:2+mlp:3",
        )
    }  # fmt: skip
    assert [run.change.layer for run in record.runs] == [0, 1, 3, 0, 1, 3]
    assert all(run.cosine_score is not None for run in record.whole_layers)
    assert {c.n for c in record.correlations if c.subset == "all"} == {3}


def test_an_expert_to_which_nothing_went_costs_nothing_that_can_be_said(cell):
    """The same right answers with other log-probabilities are a drop of zero; without, none."""
    said = {"baseline": -1.5, "expert:0.0": -1.50001, "expert:0.1": -1.6, "head:0.0": -1.5}
    write_all(
        cell,
        [row(doc, name, said=(ll, -0.25)) for doc in range(DOCUMENTS) for name, ll in said.items()],
    )
    asked = asks(0, components=("expert", "head"), experts=(0, 1), heads=(0,))
    head, idle, moved = cell_record(cell, asked).runs
    figures = ("accuracy_drop", "gold_logprob_drop", "options_logprob_drop", "accuracy_relevance")
    for name in figures:
        assert idle.figure(name) is None
        assert "no token that an answer depends on went to this expert" in idle.all_reasons[name]
    assert (idle.drop.low, idle.accuracy) == (None, 1)
    assert (moved.drop.value, head.drop.value) == (0, 0)
