"""Runs that remove sublayers, spans of layers, or layers beneath, against a naive computation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest

from tests.helpers.stored_cells import cell_record, layer_request, make_row, write_rows_to_blocks
from tracker.ledger.outcomes import PART_SUMS
from tracker.report.wording import correlation_sentences
from tracker.schema.changes import Change
from tracker.schema.proxies import OBSERVED
from tracker.schema.records import CellRecord
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

    def show(*layers: int, names: Iterable[str] = RIGHT, **settings: Any) -> CellRecord:
        keys = product(names, range(DOCUMENTS))
        rows = [make_row(doc, name, acc=float(doc < RIGHT[name])) for name, doc in keys]
        write_rows_to_blocks(cell, rows)
        return cell_record(cell, layer_request(*layers, limit=DOCUMENTS, **settings))

    return show


def test_one_record_a_run_in_the_order_of_the_request(show):
    record = show(0, 1, 3, components=("layer", "attention"), spans=(1, 2))
    changes = [(run.ablation, run.change) for run in record.runs]
    assert [(name, c.component, c.layer, c.span) for name, c in changes] == [
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
    layers_only, record = show(), show(components=("layer", "attention"), spans=(1, 2))
    assert record.whole_layers == layers_only.runs
    assert record.correlations == layers_only.correlations
    assert len(layers_only.correlations) == len(OBSERVED) * len(COEFFICIENTS) * 2
    proxies = ("cosine_similarity", "cosine_score", "angular_distance", "relative_update")
    for run in record.runs:
        is_whole = (run.change.component, run.change.span) == ("layer", 1)
        for name in proxies:
            assert (getattr(run, name) is not None) == is_whole
            reason = (
                None
                if is_whole
                else "this value is measured only for the removal of a single whole layer"
            )
            assert run.reasons.get(name) == reason
    attention = show(components=("attention",))
    assert (len(attention.runs), attention.whole_layers, attention.correlations) == (4, (), ())


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
    rows = []
    for name, (count, load) in ({"baseline": (18, [None, None])} | EXPERTS).items():
        scores = (-1.5 - len(name) * count / 99, -0.25)
        for doc in range(DOCUMENTS):
            fields = {"loglikelihoods": scores, "load": load[doc % 2]}
            rows.append(make_row(doc, name, acc=float(doc < count), **fields))
    return rows


EXPERT_REQUEST = layer_request(0, 1, 2, components=("expert",), experts=(0, 1), limit=DOCUMENTS)


def test_proxies_of_experts_are_those_of_the_documents_tokens(cell):
    write_rows_to_blocks(cell, expert_rows())
    record = cell_record(cell, EXPERT_REQUEST)
    runs = {run.ablation: run for run in record.runs}
    proxies = {name: (run.expert_saliency, run.routed_share) for name, run in runs.items()}
    assert proxies == {
        "expert:0.0": (pytest.approx(11 / 3), pytest.approx(3 / 10)),
        "expert:0.1": (pytest.approx(1 / 4), pytest.approx(4 / 10)),
        "expert:1.0": (pytest.approx(7 / 3), pytest.approx(3 / 10)),
        "expert:1.1": (pytest.approx(1), pytest.approx(1 / 10)),
        "expert:2.0": (None, 0),
        "expert:2.1": (None, pytest.approx(4 / 10)),
    }
    reasons = {name: run.reasons.get("expert_saliency") for name, run in runs.items()}
    assert reasons["expert:2.0"] == "no token of these documents is routed to this expert"
    assert "is not finite" in str(reasons["expert:2.1"])
    correlations = {(c.proxy, c.coefficient): c for c in record.correlations if c.subset == "all"}
    # Ranks of saliency 4 1 3 2, of drops 4 2 3 1.
    assert correlations["expert_saliency", "spearman"].estimate.value == pytest.approx(0.8)
    assert [c.n for c in correlations.values()] == [4, 4, 6, 6]
    inner = {(c.n, c.estimate.reason) for c in record.correlations if c.subset == "inner"}
    assert inner == {(0, "a correlation needs at least 3 experts, but 0 are available")}
    assert (
        "Spearman correlation of expert saliency and accuracy drop: 0.80 ("
        in correlation_sentences(record)
    )
    assert "4 experts, 20 documents" in correlation_sentences(record)


def test_experts_that_were_measured_before_were_not_observed(cell):
    rows = expert_rows()
    for row, name in product(rows, PART_SUMS):
        if row["doc"] < 8:
            row.pop(name, None)
    rows.sort(key=lambda row: row["doc"])
    write_rows_to_blocks(cell, rows)
    record = cell_record(cell, EXPERT_REQUEST)
    reason = "the proxy was not computed for 8 of 20 documents"
    for run in record.runs:
        assert (run.expert_saliency, run.routed_share) == (None, None)
        assert {run.reasons["expert_saliency"], run.reasons["routed_share"]} == {reason}
    assert {c.estimate.reason for c in record.correlations} == {reason}


HEADS = {"head:0.0": (12, 20.0), "head:0.1": (16, 30.0), "head:1.0": (15, 5.0), "int4:1": (9, 10.0)}
"""How many documents are right under a change; its first-order Taylor sum in odd documents."""


def write_heads(cell, observed):
    rows = []
    for name, (count, term) in ({"baseline": (18, 0.0)} | HEADS).items():
        for doc in range(DOCUMENTS):
            row = make_row(doc, name, acc=float(doc < count))
            if name != "baseline" and doc in observed:
                row["taylor_sum"] = term * (doc % 2)
            rows.append(row)
    write_rows_to_blocks(cell, rows)
    request = layer_request(limit=DOCUMENTS).with_changes(map(Change.parse, HEADS))
    return cell_record(cell, request)


def test_taylor_terms_of_parts_are_means_over_tokens(cell):
    record = write_heads(cell, range(DOCUMENTS))
    # Half of the documents have a term, and each has five tokens.
    expected = {name: pytest.approx(term / 2 / 5) for name, (_, term) in HEADS.items()}
    assert {run.ablation: run.taylor for run in record.runs} == expected
    spearman = [c for c in record.correlations if (c.coefficient, c.subset) == ("spearman", "all")]
    assert [(c.sample, c.n, c.within_layers) for c in spearman] == [
        ("int4 layer", 1, False),
        ("head", 3, True),
    ]
    # Ranks of the terms 2 3 1, of the drops 3 1 2.
    assert spearman[1].estimate.value == pytest.approx(-0.5)
    assert (
        "Spearman correlation of first-order Taylor and accuracy drop: −0.50 ("
        in correlation_sentences(record)
    )
    assert "3 heads, 20 documents" in correlation_sentences(record)


def test_taylor_terms_are_complete_or_undefined(cell):
    record = write_heads(cell, range(12))
    reason = "the proxy was not computed for 8 of 20 documents"
    assert {(run.taylor, run.reasons["taylor"]) for run in record.runs} == {(None, reason)}


def test_a_run_without_a_taylor_term_keeps_those_of_others(cell, monkeypatch):
    """The first of the maps may be one of experts, which never has a term."""
    monkeypatch.setitem(HEADS, "head:0.0", (12, math.nan))
    record = write_heads(cell, range(DOCUMENTS))
    runs = {run.ablation: run for run in record.runs}
    assert runs["head:0.0"].taylor is None
    assert "not computed for 20 of 20 documents" in runs["head:0.0"].reasons["taylor"]
    assert runs["head:0.1"].taylor == pytest.approx(3)
    (spearman,) = (
        c
        for c in record.correlations
        if (c.sample, c.coefficient, c.subset) == ("head", "spearman", "all")
    )
    assert spearman.n == 2
    assert spearman.estimate.reason == "a correlation needs at least 3 heads, but 2 are available"


def test_cells_measured_before_have_no_taylor_terms(cell):
    record = write_heads(cell, ())
    assert not any("taylor" in run.proxies or "taylor" in run.reasons for run in record.runs)
    assert record.correlations == ()


def test_layers_beneath_count_in_every_drop(show):
    """The drop stays relative to the intact model; what lies beneath has its own accuracy."""
    record = show(components=("layer", "mlp"), removed=(2,))
    assert record.title.endswith("· 0-shot · without layer 2")
    assert record.baseline.value == pytest.approx(18 / DOCUMENTS)
    assert record.remaining.value == pytest.approx(RIGHT["layer:2"] / DOCUMENTS)
    assert record.remaining.low < record.remaining.value < record.remaining.high
    drops = {run.ablation: run.drop.value for run in record.runs}
    names = ["layers:0,2", "layers:1,2", "layers:2,3", *(f"layer:2+mlp:{i}" for i in (0, 1, 3))]
    assert drops == {name: pytest.approx((18 - RIGHT[name]) / DOCUMENTS) for name in names}
    assert [run.change.layer for run in record.runs] == [0, 1, 3, 0, 1, 3]
    assert all(run.cosine_score is not None for run in record.whole_layers)
    assert {c.n for c in record.correlations if c.subset == "all"} == {3}


def test_an_expert_to_which_nothing_went_costs_nothing_that_can_be_said(cell):
    """The same right answers with other log-probabilities are a drop of zero; without, none."""
    logprobs = {"baseline": -1.5, "expert:0.0": -1.50001, "expert:0.1": -1.6, "head:0.0": -1.5}
    keys = product(range(DOCUMENTS), logprobs)
    rows = [make_row(doc, name, loglikelihoods=(logprobs[name], -0.25)) for doc, name in keys]
    write_rows_to_blocks(cell, rows)
    request = layer_request(0, components=("expert", "head"), experts=(0, 1), heads=(0,))
    head, idle, moved = cell_record(cell, request).runs
    figures = ("accuracy_drop", "gold_logprob_drop", "options_logprob_drop", "accuracy_relevance")
    for name in figures:
        assert idle.figure(name) is None
        assert "no token that affects an answer is routed to this expert" in idle.all_reasons[name]
    assert (idle.drop.low, idle.accuracy) == (None, 1)
    assert (moved.drop.value, head.drop.value) == (0, 0)
