"""Records whose metric is a ratio of sums, against sums by hand and naive resampling."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from scipy import stats

from tests.helpers.stored_cells import cell_record, layer_request, make_row, write_rows_to_blocks
from tracker.analysis.paired import PairedOutcomes
from tracker.benchmarks.tasks import aggregate
from tracker.schema.records import CellRecord
from tracker.stats.accuracy import accuracy_drop

LAYERS = 4
NAMES = ["baseline", *(f"layer:{layer}" for layer in range(LAYERS))]
KINDS = {
    "acc": ("ratio", True),
    "loss": ("ratio", False),
    "bits_per_byte": ("bits_per_byte", False),
    "word_perplexity": ("weighted_perplexity", False),
}
Texts = dict[str, dict[str, np.ndarray]]


def make_texts(sizes: dict[str, int]) -> dict[str, Texts]:
    """Per task: `units`, and per ablation `hits` and `windows` (log-likelihoods), seeded."""
    rng = np.random.default_rng(3)
    tasks = {}
    for task, size in sizes.items():
        units = rng.integers(5, 400, size=size).astype(float)
        texts: Texts = {"all": {"units": units}}
        for number, name in enumerate(NAMES):
            rate = 0.6 if name == "baseline" else 0.1 * number
            texts[name] = {
                "hits": rng.binomial(units.astype(int), rate).astype(float),
                "windows": -units[:, None] * rng.uniform(0.5, 3 - rate, size=(size, 3)),
            }
        tasks[task] = texts
    return tasks


def pairs(texts: Texts, name: str, metric: str) -> list[tuple[float, float]]:
    sums = texts[name]["hits"] if metric == "acc" else texts[name]["windows"].sum(1)
    if metric == "loss":
        sums = -sums
    return list(zip(sums.tolist(), texts["all"]["units"].tolist(), strict=True))


def ratio(texts: Texts, name: str, metric: str) -> float:
    sums = pairs(texts, name, metric)
    scale = {"bits_per_byte": -1 / math.log(2)}.get(metric, 1.0)
    return scale * sum(s for s, _ in sums) / sum(u for _, u in sums)


@pytest.fixture
def record_of(cell_of) -> Callable[..., CellRecord]:
    """Derive what is shown of texts by a metric; `undefined` have no figure."""

    def record_of(
        tasks: dict[str, Texts],
        metric: str,
        undefined: tuple[str, int] | None = None,
        **changes: Any,
    ) -> CellRecord:
        sizes = {task: len(texts["all"]["units"]) for task, texts in tasks.items()}
        aggregations = {name: aggregation for name, (aggregation, _) in KINDS.items()}
        better = {"higher_is_better": {name: is_better for name, (_, is_better) in KINDS.items()}}
        cell, rows = cell_of(sizes, aggregations, task=better, **changes), []
        for task, texts in tasks.items():
            for (index, units), name in product(enumerate(texts["all"]["units"]), NAMES):
                metrics: dict[str, str | None] = {
                    metric: json.dumps(pairs(texts, name, metric)[index]) for metric in KINDS
                }
                if undefined == (name, index):
                    metrics = dict.fromkeys(KINDS)
                rng = np.random.default_rng(index)
                sums = (units * rng.uniform(0.1, 0.9, size=(3, LAYERS))).tolist()
                fields = {"gold": None, "choices": 0, "rolling": True}
                fields |= {"proxies": (int(units), sums), "metrics": metrics}
                windows = texts[name]["windows"][index]
                rows.append(make_row(index, name, task, loglikelihoods=windows, **fields))
        write_rows_to_blocks(cell, rows)
        return cell_record(cell, layer_request(), metric, aggregate)

    return record_of


@pytest.mark.parametrize("metric", ["acc", "loss", "bits_per_byte"])
def test_every_figure_of_one_task(record_of, metric):
    texts = make_texts({"notes": 50})["notes"]
    record = record_of({"notes": texts}, metric)
    is_better = KINDS[metric][1]
    reason = None if is_better else f"{metric} is no accuracy"
    intact = ratio(texts, "baseline", metric)
    assert record.higher_is_better is is_better
    assert record.baseline.value == pytest.approx(intact, rel=1e-12)
    assert record.baseline.low < intact < record.baseline.high
    assert record.baseline_metrics == pytest.approx(
        {
            **{name: ratio(texts, "baseline", name) for name in ("acc", "loss", "bits_per_byte")},
            "word_perplexity": math.exp(ratio(texts, "baseline", "loss")),
        }
    )
    for layer in record.runs:
        ablated = ratio(texts, layer.ablation, metric)
        drop = intact - ablated if is_better else ablated - intact
        assert layer.accuracy == pytest.approx(ablated, rel=1e-12)
        assert layer.drop.value == pytest.approx(drop, rel=1e-9)
        assert layer.drop.low < drop < layer.drop.high
        assert layer.drop.p_value is None
        assert layer.reasons["mcnemar_p"] == "McNemar's test needs outcomes that are all 0 or 1"
        falls = texts["baseline"]["windows"].sum(1) - texts[layer.ablation]["windows"].sum(1)
        # Log-likelihoods are kept in single precision.
        assert layer.gold_drop.value == pytest.approx(falls.mean(), rel=1e-5)
        assert "gold_logprob_drop" not in layer.reasons
        relevance = pytest.approx(1 - ablated / intact) if is_better else None
        assert layer.accuracy_relevance == relevance
        assert layer.reasons.get("accuracy_relevance") == reason
    assert record.chance_accuracy == (0 if is_better else None)
    assert record.reasons == ({} if is_better else {"chance_accuracy": reason})


def test_the_interval_is_that_of_a_ratio_estimator(record_of):
    """Cochran, Sampling Techniques (1977), chapter 6: residuals of the ratio, by document."""
    texts = make_texts({"notes": 50})["notes"]
    record = record_of({"notes": texts}, "bits_per_byte")
    units = texts["all"]["units"]
    for layer in record.runs:
        losses = texts["baseline"]["windows"].sum(1) - texts[layer.ablation]["windows"].sum(1)
        losses /= math.log(2)
        value = losses.sum() / units.sum()
        share = units / units.sum()
        standard_error = (
            math.sqrt(((losses - value * units) ** 2).sum() / (1 - share @ share)) / units.sum()
        )
        half_width = stats.t.ppf(0.975, 1 / (share @ share) - 1) * standard_error
        assert layer.drop.value == pytest.approx(value)
        assert layer.drop.bounds == pytest.approx((value - half_width, value + half_width))


@pytest.mark.parametrize("by_size", [True, False])
@pytest.mark.parametrize("metric", ["acc", "bits_per_byte"])
def test_a_group_is_aggregated_as_lm_eval_does(record_of, metric, by_size):
    sizes = {"first": 37, "second": 5}
    tasks = make_texts(sizes)
    record = record_of(tasks, metric, weight_by_size=by_size)
    weights = list(sizes.values()) if by_size else [1, 1]
    expected = np.average([ratio(t, "baseline", metric) for t in tasks.values()], weights=weights)
    assert record.baseline.value == pytest.approx(expected)
    assert record.baseline_metrics[metric] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["baseline", "layer:1"])
def test_a_document_without_a_finite_score(record_of, name):
    record = record_of(make_texts({"notes": 9}), "acc", undefined=(name, 4))
    reason = "1 of 9 documents has no finite score"
    assert record.runs[1].drop.value is None
    assert record.runs[1].drop.reason == reason
    assert (record.runs[1].metrics["acc"] is None) is (name == "layer:1")
    assert (record.baseline.value is None) is (name == "baseline")
    assert (record.runs[0].drop.value is None) is (name == "baseline")


WEIGHTS = np.array([0.1, 0.2, 0.3, 0.4])


def test_right_and_wrong_are_tested_as_such_of_a_loss_too():
    intact, ablated = np.array([0.0] * 8), np.array([[1.0]] * 6 + [[0.0]] * 2)
    weights = np.full(8, 1 / 8)
    paired = PairedOutcomes(intact, ablated, weights, higher_is_better=False)
    assert paired.drop(0).p_value == 2 / 2**6
    assert paired.drop(0) == accuracy_drop(ablated[:, 0], intact, weights)
    assert paired.drop_sd(0).value == pytest.approx(np.std(paired.drops, ddof=1))


def test_a_document_without_an_outcome_has_no_drop_and_leaves_no_estimate():
    intact = np.array([1.0, math.nan, 1.0, 0.0])
    ablated = np.array([[1.0, 0.0], [0.0, 0.0], [math.nan, 0.0], [0.0, 0.0]])
    paired = PairedOutcomes(intact, ablated, WEIGHTS)
    assert np.isnan(paired.drops).tolist() == [[0, 0], [1, 1], [1, 0], [0, 0]]
    assert paired.drop(0).value is None
    assert paired.drop(0).reason == "2 of 4 documents have no finite score"
    assert paired.drop(1).reason == "1 of 4 documents has no finite score"
