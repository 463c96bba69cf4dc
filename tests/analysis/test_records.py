"""The record of a cell against a second, naive computation from the same hand-made outcomes."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import tracker
from tests.helpers.stored_cells import cell_record, layer_request, make_row, write_rows_to_blocks
from tracker.analysis import records, runs
from tracker.analysis.aligned import AlignedOutcomes
from tracker.analysis.paired import outcome_variance
from tracker.ledger.blocks import Block
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import COMPARED_COLUMNS
from tracker.measuring.derive import DERIVED_BY
from tracker.schema.extent import Clusters
from tracker.schema.proxies import OBSERVED, Proxy, relative_update
from tracker.schema.records import CellRecord, RunRecord
from tracker.stats.accuracy import OutcomeVariance

LAYERS = 8
EVERY_LAYER = layer_request(*range(LAYERS))
Z = 1.959963984540054
"""The 97.5 % point of the normal distribution."""
SCIPY = {"spearman": stats.spearmanr, "kendall": stats.kendalltau, "pearson": stats.pearsonr}
METRICS = {"acc": "mean", "acc_norm": "mean", "f1": "agreement", "own": "a_function_of_the_task"}


def aggregate(aggregation: str, values: Sequence[float | str]) -> float | None:
    """Replace lm-eval's: a mean, a function of pairs, and one that only lm-eval can call."""
    if aggregation == "mean":
        return sum(values) / len(values)
    if aggregation == "agreement":
        pairs = [json.loads(value) for value in values]
        return sum(gold == answer for gold, answer in pairs) / len(pairs)
    return None


@dataclass
class Item:
    """A document, its proxies, and what each ablation answered: None = no finite score."""

    task: str
    index: int
    choices: int
    gold: int | None
    tokens: int
    sums: np.ndarray
    loglikelihoods: dict[str, list[float]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float | str | None]] = field(default_factory=dict)

    def accuracy(self, ablation: str) -> float:
        return self.metrics[ablation]["acc"]


def make_items(sizes: dict[str, int], layers: Sequence[int] = range(LAYERS)) -> list[Item]:
    """Make documents in which later layers matter less, with a fixed seed."""
    rng = np.random.default_rng(7)
    items = []
    for task, index in ((task, index) for task, size in sizes.items() for index in range(size)):
        choices = int(rng.integers(2, 6))
        gold = int(rng.integers(choices))
        tokens = int(rng.integers(3, 30))
        scale = np.linspace(0.5, 1, LAYERS)
        sums = (rng.uniform(0.2, 0.9, size=(tokens, 3, LAYERS)) * scale).sum(axis=0)
        item = Item(task, index, choices, gold, tokens, sums)
        for name in ["baseline", *(f"layer:{layer}" for layer in layers)]:
            skill = 0.9 if name == "baseline" else 0.3 + 0.06 * int(name.split(":")[1])
            is_right = rng.random() < skill
            answer = gold if is_right else (gold + 1) % choices
            item.loglikelihoods[name] = list(rng.uniform(-9, -1, size=choices))
            item.metrics[name] = {
                "acc": float(is_right),
                "acc_norm": float(rng.random() < skill),
                "f1": json.dumps([gold, answer]),
                "own": float(is_right),
            }
        items.append(item)
    return items


@pytest.fixture
def store(cell_of) -> Callable[..., CellStore]:
    """Put documents into a new cell, which has no others where nothing is said."""

    def store(items: list[Item], sizes: dict[str, int] | None = None, **changes: Any) -> CellStore:
        sizes = sizes or dict(Counter(item.task for item in items))
        cell = cell_of(sizes, METRICS, {"layers": LAYERS}, **changes)
        rows = [
            make_row(
                *(item.index, name, item.task),
                metrics=metrics,
                loglikelihoods=item.loglikelihoods[name],
                gold=item.gold,
                proxies=(item.tokens, item.sums.tolist()),
            )
            for item in items
            for name, metrics in item.metrics.items()
        ]
        write_rows_to_blocks(cell, rows)
        return cell

    return store


@pytest.fixture
def record_of(store) -> Callable[..., CellRecord]:
    """Derive what a request for some layers shows of documents."""

    def record_of(
        items: list[Item],
        layers: Sequence[int] = range(LAYERS),
        limit: int | None = None,
        metric: str = "acc",
        **changes: Any,
    ) -> CellRecord:
        request = layer_request(*layers, limit=limit)
        return cell_record(store(items, **changes), request, metric, aggregate)

    return record_of


def naive_mean(items: list[Item], by_size: bool, value: Callable[[Item], float]) -> float:
    """Return the mean over documents, or the plain mean of the tasks' means."""
    if by_size:
        return sum(map(value, items)) / len(items)
    by_task = defaultdict(list)
    for item in items:
        by_task[item.task].append(value(item))
    return sum(sum(values) / len(values) for values in by_task.values()) / len(by_task)


def naive_metric(items: list[Item], by_size: bool, ablation: str, name: str) -> float | None:
    if name == "own":
        return None
    if name != "f1":
        return naive_mean(items, by_size, lambda item: item.metrics[ablation][name])

    def agrees(item: Item) -> float:
        gold, answer = json.loads(item.metrics[ablation][name])
        return float(gold == answer)

    # The agreement is a mean too, so its average over tasks is the same mean.
    return naive_mean(items, by_size, agrees)


def naive_proxy(items: list[Item], number: int, layer: int) -> float:
    """Return the mean over all tokens of all documents."""
    return sum(item.sums[number, layer] for item in items) / sum(item.tokens for item in items)


def check(record: CellRecord, items: list[Item], by_size: bool, layers: Sequence[int]) -> None:
    """Compare every figure of a record with its naive computation."""
    n = len(items)
    baseline = naive_mean(items, by_size, lambda item: item.accuracy("baseline"))
    chance = naive_mean(items, by_size, lambda item: 1 / item.choices)
    assert record.n == n
    assert record.metric == "acc"
    assert record.tokens == sum(item.tokens for item in items)
    assert record.baseline.value == pytest.approx(baseline)
    assert record.baseline.low < baseline < record.baseline.high
    assert record.chance_accuracy == pytest.approx(chance)
    assert {name: record.baseline_metrics[name] for name in METRICS} == {
        name: pytest.approx(naive_metric(items, by_size, "baseline", name)) for name in METRICS
    }
    assert [layer.change.layer for layer in record.runs] == list(layers)
    for layer in record.runs:
        check_layer(layer, items, by_size, baseline, chance)


def check_layer(
    record: RunRecord, items: list[Item], by_size: bool, baseline: float, chance: float
) -> None:
    name = f"layer:{record.change.layer}"
    ablated = naive_mean(items, by_size, lambda item: item.accuracy(name))
    changes = [i.accuracy("baseline") - i.accuracy(name) for i in items]
    n_lost, n_won = changes.count(1), changes.count(-1)
    n = n_lost + n_won
    tail = sum(math.comb(n, k) for k in range(min(n_lost, n_won) + 1)) / 2**n
    assert record.ablation == name
    assert record.n == len(items)
    assert record.accuracy == pytest.approx(ablated)
    assert record.drop.value == pytest.approx(baseline - ablated)
    assert record.drop.low < record.drop.value < record.drop.high
    assert record.drop.p_value == pytest.approx(min(1, 2 * tail))
    relevance = 1 - max(ablated - chance, 0) / (baseline - chance)
    assert record.accuracy_relevance == pytest.approx(relevance)
    cosine, angle, update = (naive_proxy(items, number, record.change.layer) for number in range(3))
    assert record.cosine_similarity == pytest.approx(cosine)
    assert record.cosine_score == pytest.approx(1 - cosine)
    assert record.angular_distance == pytest.approx(angle)
    assert record.relative_update == pytest.approx(update)

    def gold_drop(item: Item) -> float:
        return item.loglikelihoods["baseline"][item.gold] - item.loglikelihoods[name][item.gold]

    gold = naive_mean(items, by_size, gold_drop)
    # Log-likelihoods are kept in single precision.
    assert record.gold_drop.value == pytest.approx(gold, abs=1e-5)
    assert {metric: record.metrics[metric] for metric in METRICS} == {
        metric: pytest.approx(naive_metric(items, by_size, name, metric)) for metric in METRICS
    }
    # No texts are stored, so the lengths of options are unknown.
    assert set(record.reasons) == {"metrics.own", "metrics.choice_probability_norm"}


def test_every_figure_of_a_single_task(store):
    items = make_items({"arc_easy": 70})
    cell = store(items)
    record = cell_record(cell, EVERY_LAYER, "acc", aggregate)
    check(record, items, True, range(LAYERS))
    assert record.key == cell.identity.key
    assert (record.model, record.benchmark) == (cell.identity.model, cell.identity.benchmark)
    assert record.missing == ()
    assert record.reasons == {}
    record = cell_record(cell, EVERY_LAYER, "acc_norm", aggregate)
    assert record.metric == "acc_norm"
    for layer in record.runs:
        expected = naive_metric(items, True, f"layer:{layer.change.layer}", "acc_norm")
        assert layer.accuracy == pytest.approx(expected)


def test_the_intervals_of_a_single_task(record_of):
    items = make_items({"arc_easy": 70})
    record = record_of(items)
    n, p = 70, record.baseline.value
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half_width = Z / (1 + Z**2 / n) * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    assert record.baseline.bounds == pytest.approx((centre - half_width, centre + half_width))
    for run in record.runs:
        changes = [i.accuracy("baseline") - i.accuracy(run.ablation) for i in items]
        lost, won = ((changes.count(sign) + 1) / (n + 2) for sign in (1, -1))
        half_width = Z * math.sqrt((lost + won - (lost - won) ** 2) / (n + 2))
        assert run.drop.bounds == pytest.approx((lost - won - half_width, lost - won + half_width))
        # The share that changes is all that a smaller drop depends on.
        share = pytest.approx(np.count_nonzero(changes) / n)
        assert outcome_variance(run) == OutcomeVariance(share, binary=True)


def test_the_interval_of_dependent_documents_is_that_of_their_clusters(store):
    items = make_items({"arc_easy": 60})
    labels = np.arange(60) // 4
    clusters = Clusters(column="passage", labels=(("arc_easy", tuple(labels.tolist())),))
    request = replace(layer_request(*range(LAYERS)), clusters=clusters)
    cell = store(items)
    record = cell_record(cell, request, "acc", aggregate)
    aligned = AlignedOutcomes(cell, cell.views.view_of(request))
    assert record.cluster == "passage"
    for run in record.runs:
        changes = np.array([i.accuracy("baseline") - i.accuracy(run.ablation) for i in items])
        # The sandwich estimate of Liang and Zeger for clusters of equal size.
        totals = [(changes - changes.mean())[labels == cluster].sum() for cluster in range(15)]
        error = math.sqrt(15 / 14 * np.square(totals).sum()) / 60
        half_width = stats.t.ppf(0.975, 14) * error
        assert run.drop.value == pytest.approx(changes.mean())
        assert run.drop.high - run.drop.low == pytest.approx(2 * half_width)
        assert (run.units, run.drop.p_value) == (pytest.approx(15), None)
        # So many independent documents would give the same error.
        assert run.drop_sd / math.sqrt(60) == pytest.approx(error)
        resamples = aligned.resample(changes[:, None])
        assert resamples.std() == pytest.approx(error * math.sqrt(14 / 15), rel=0.1)


@pytest.mark.parametrize("by_size", [True, False])
def test_every_figure_of_a_group(record_of, by_size):
    items = make_items({"z/first": 37, "a::second": 5, "m": 64})
    check(record_of(items, name="group", weight_by_size=by_size), items, by_size, range(LAYERS))
    for name in ("acc", "f1"):
        weighted, plain = (naive_metric(items, size, "layer:1", name) for size in (True, False))
        assert weighted != pytest.approx(plain), "else nothing would tell them apart"
    without_score(items, "layer:1")
    broken = record_of(items, name="other", weight_by_size=by_size).runs[1]
    assert broken.accuracy is broken.metrics["acc"] is None


@pytest.mark.parametrize("limit", [1, 10, 32, 33, 64])
def test_a_limit_below_what_is_measured(record_of, limit):
    items = make_items({"a": 40, "b": 12})
    record = record_of(items, limit=limit, name="group")
    shown_items = [item for item in items if item.index < limit]
    assert record.n == len(shown_items) == min(limit, 40) + min(limit, 12)
    assert record.unfinished is None
    expected = naive_mean(shown_items, True, lambda item: item.accuracy("baseline"))
    assert record.baseline.value == pytest.approx(expected)
    if limit > 1:
        check(record, shown_items, True, range(LAYERS))


@pytest.mark.parametrize(
    ("layers", "requested", "shown", "missing"),
    [
        (range(LAYERS), [2, 5], [2, 5], []),
        ([0, 1, 2, 4], range(LAYERS), [0, 1, 2, 4], [3, 5, 6, 7]),
        ([], [0, 1], [], [0, 1]),
    ],
)
def test_the_layers_that_were_asked_for_and_are_measured(
    record_of, layers, requested, shown, missing
):
    items = make_items({"arc_easy": 40}, layers=layers)
    record = record_of(items, requested)
    check(record, items, True, shown)
    assert [run.layer for run in record.missing] == missing
    counts = {c.n for c in record.correlations if c.subset == "all"}
    assert counts == {len(shown)} - {0}


def test_a_layer_on_fewer_documents_narrows_all(store):
    """Figures that stand side by side rest on the same documents."""
    items = make_items({"a": 40, "b": 12})
    for item in items:
        if item.task == "a" and item.index in (0, 39):
            del item.metrics["layer:3"]
    cell = store(items, name="group", weight_by_size=False)
    shared_items = [item for item in items if "layer:3" in item.metrics]
    record = cell_record(cell, EVERY_LAYER, "acc", aggregate)
    assert len(shared_items) == 50
    check(record, shared_items, False, range(LAYERS))
    assert record.unfinished == "50 of 52 documents are measured so far"
    # A layer that is not shown does not narrow.
    check(cell_record(cell, layer_request(0, 1), "acc", aggregate), items, False, [0, 1])


@pytest.mark.parametrize(
    "measured",
    [((), ()), (("layer:0",), ("layer:0",)), (("baseline", "layer:0"), ("baseline", "layer:1"))],
    ids=["nothing", "no baseline", "no two layers share a document"],
)
def test_no_document_that_counts(record_of, measured):
    items = make_items({"arc_easy": 5}, layers=[0, 1])
    for item in items:
        item.metrics = {name: item.metrics[name] for name in measured[item.index % 2]}
    record = record_of(items, [0, 1], sizes={"arc_easy": 5})
    assert (record.n, record.tokens) == (0, 0)
    assert record.baseline.value is record.baseline.low is record.baseline.high is None
    assert record.runs == record.correlations == ()
    assert [run.layer for run in record.missing] == [0, 1]
    assert record.baseline_metrics == {}
    assert record.all_reasons == {
        "n": "0 of 5 documents are measured so far",
        "baseline_accuracy": "no document is measured yet",
        "chance_accuracy": "no document is measured yet",
    }


DROPS = ("accuracy_drop", "accuracy_relevance", "gold_logprob_drop")


def without_score(items: list[Item], ablation: str) -> None:
    """Set the outcomes of a document whose log-likelihood is not finite."""
    items[3].metrics[ablation] = dict.fromkeys(METRICS)
    items[3].loglikelihoods[ablation][items[3].gold] = math.nan


def test_a_layer_without_a_finite_score(record_of):
    items = make_items({"arc_easy": 40})
    without_score(items, "layer:2")
    record = record_of(items)
    broken = record.runs[2]
    for name in (*DROPS, "accuracy", "mcnemar_p"):
        assert broken.figure(name) is None
        assert broken.all_reasons[name]
    assert "1 of 40 documents" in broken.reasons["accuracy"]
    assert broken.drop.low is broken.drop.high is None
    assert set(broken.metrics.values()) == {None}
    # The proxies are the baseline's, and the other layers are whole.
    assert broken.cosine_similarity == pytest.approx(naive_proxy(items, 0, 2))
    chance = record.chance_accuracy
    for layer in (*record.runs[:2], *record.runs[3:]):
        check_layer(layer, items, True, record.baseline.value, chance)
    # A drop that is missing leaves the correlation undefined, never 0.
    for correlation in record.correlations:
        assert correlation.estimate.value is None
        assert correlation.estimate.reason


def test_a_baseline_without_a_finite_score(record_of):
    items = make_items({"arc_easy": 40})
    without_score(items, "baseline")
    record = record_of(items)
    assert record.baseline.value is None
    assert "1 of 40 documents" in record.baseline.reason
    assert set(record.baseline_metrics.values()) == {None}
    for layer in record.runs:
        expected = naive_metric(items, True, layer.ablation, "acc")
        assert layer.accuracy == pytest.approx(expected)
        for name in DROPS:
            assert layer.figure(name) is None
            assert layer.all_reasons[name]


def test_a_document_without_a_gold_answer(record_of):
    items = make_items({"arc_easy": 10})
    items[4].gold = None
    record = record_of(items)
    for layer in record.runs:
        assert layer.accuracy is not None
        assert layer.gold_drop.value is None
        assert layer.gold_drop.reason == "1 of 10 documents has no finite gold score"


def test_a_hidden_state_that_is_not_finite(record_of):
    items = make_items({"arc_easy": 10})
    items[4].sums[:, 6] = math.nan
    record = record_of(items)
    reason = "in the intact model, a token's hidden state is zero or not finite"
    for name in ("cosine_similarity", "cosine_score", "angular_distance", "relative_update"):
        assert (getattr(record.runs[6], name), record.runs[6].reasons[name]) == (None, reason)
        assert getattr(record.runs[5], name) is not None


def test_a_proxy_that_was_not_observed_then_is_undefined_and_not_zero(record_of, monkeypatch):
    """Shards from before there was the proxy lack its column."""
    proxy = Proxy("later", "later", "ratio", observe=relative_update)
    for module in (records, runs):
        monkeypatch.setattr(module, "OBSERVED", (*OBSERVED, proxy))
    record = record_of(make_items({"arc_easy": 10}))
    reason = "the proxy was not computed for 10 of 10 documents"
    for run in record.runs:
        assert (run.figure("later"), run.reasons["later"]) == (None, reason)
    estimates = [c.estimate for c in record.correlations if c.proxy == "later"]
    assert [(estimate.value, estimate.reason) for estimate in estimates] == [(None, reason)] * 6
    assert all(run.cosine_score is not None for run in record.runs)


def test_what_was_answered_again_is_counted_over_all_that_is_shown(cell):
    """Most outcomes are not."""
    checks = {
        (0, "baseline"): (2, 0.25, 1),
        (3, "layer:0"): (5, 0.125, 0),
        (2, "layer:1"): (9, 9.0, 9),  # is not shown
    }
    names = ("baseline", "layer:0", "layer:1")
    rows = [make_row(doc, name) for doc in range(4) for name in names]
    cell.write(Block("arc_easy", 0), rows[: 3 * 2], {})
    record = cell_record(cell, layer_request(0, limit=4))
    assert (record.compared, record.compared_difference, record.compared_unsteady) == (0, None, 0)
    for row in rows:
        values = checks.get((row["doc"], row["ablation"]), (None,) * 3)
        row.update(zip(COMPARED_COLUMNS, values, strict=True))
    for path in cell.shards():
        path.unlink()
    cell.write(Block("arc_easy", 0), rows, {})
    record = cell_record(cell, layer_request(0, limit=4))
    assert (record.compared, record.compared_difference, record.compared_unsteady) == (7, 0.25, 1)


def test_what_lies_beneath_is_weighted_as_all_else(cell_of):
    """Of a group whose tasks count alike: one document of the small one is as much as three."""
    cell = cell_of({"a": 3, "b": 1}, METRICS, weight_by_size=False)
    for task, documents in (("a", range(3)), ("b", range(1))):
        keys = product(documents, ("baseline", "layer:1", "layers:0,1"))
        rows = [make_row(doc, name, task, float(task == "a")) for doc, name in keys]
        cell.write(Block(task, 0), rows, {})
    record = cell_record(cell, layer_request(0, removed=(1,)))
    assert record.baseline.value == record.remaining.value == 0.5
    assert cell_record(cell, layer_request(0, removed=(2,))).remaining.reason == "not measured yet"


class TestCorrelations:
    @pytest.fixture
    def items(self) -> list[Item]:
        return make_items({"a": 40, "b": 12})

    @pytest.fixture
    def record(self, record_of, items) -> CellRecord:
        return record_of(items, weight_by_size=False)

    def test_the_values(self, record, items):
        names = ["baseline", *(f"layer:{layer}" for layer in range(LAYERS))]
        intact, *ablated = (naive_metric(items, False, name, "acc") for name in names)
        drops = [intact - accuracy for accuracy in ablated]
        proxies = ("cosine_score", "angular_distance", "relative_update")
        values = {(c.proxy, c.coefficient, c.subset): c.estimate.value for c in record.correlations}
        assert len(values) == len(record.correlations) == 3 * 3 * 2
        pearson = {values[proxy, "pearson", "all"] for proxy in proxies}
        assert len(pearson) == 3, "else the naive values could come from the wrong proxy"
        for correlation in record.correlations:
            number = proxies.index(correlation.proxy)
            figures = [naive_proxy(items, number, layer) for layer in range(LAYERS)]
            if correlation.proxy == "cosine_score":
                figures = [1 - figure for figure in figures]
            layers = slice(None) if correlation.subset == "all" else slice(2, LAYERS - 2)
            expected = SCIPY[correlation.coefficient](figures[layers], drops[layers])[0]
            estimate = correlation.estimate
            assert estimate.value == pytest.approx(expected)
            assert (correlation.n, correlation.documents) == (len(drops[layers]), 52)
            assert estimate.low <= estimate.value <= estimate.high
            assert 0 < estimate.p_value <= 1

    @pytest.mark.parametrize("by_size", [True, False])
    def test_documents_are_drawn_within_their_tasks(self, record_of, by_size):
        """Where all documents of a task are alike, drawing among them leaves nothing open."""
        items = make_items({"a": 6, "b": 4})
        for item in items:
            is_first = item.task == "a"
            item.tokens = 10
            item.sums = np.tile(np.linspace(1, 2 + is_first, LAYERS), (3, 1))
            item.metrics["baseline"]["acc"] = 1.0
            for layer in range(LAYERS):
                item.metrics[f"layer:{layer}"]["acc"] = float(layer > (4 if is_first else 2))
        for correlation in record_of(items, weight_by_size=by_size).correlations:
            estimate = correlation.estimate
            assert [estimate.low, estimate.high] == pytest.approx([estimate.value] * 2)


def test_records_are_derived_anew_when_any_code_that_they_follow_from_changes():
    """The code that derives records imports only packages whose code is hashed."""
    code = [
        path.read_text(encoding="utf-8")
        for name in DERIVED_BY
        for path in (Path(tracker.__file__).parent / name).rglob("*.py")
    ]
    imported = re.findall(r"^ *from tracker\.(\w+)", "\n".join(code), re.MULTILINE)
    assert set(imported) == set(DERIVED_BY)
