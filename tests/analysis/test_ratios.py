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

from tests.helpers.stored_cells import asks, cell_record, row, write_all
from tracker.benchmarks.tasks import aggregate
from tracker.core.records import CellRecord

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
    draw = np.random.default_rng(3)
    tasks = {}
    for task, size in sizes.items():
        units = draw.integers(5, 400, size=size).astype(float)
        texts: Texts = {"all": {"units": units}}
        for number, name in enumerate(NAMES):
            rate = 0.6 if name == "baseline" else 0.1 * number
            texts[name] = {
                "hits": draw.binomial(units.astype(int), rate).astype(float),
                "windows": -units[:, None] * draw.uniform(0.5, 3 - rate, size=(size, 3)),
            }
        tasks[task] = texts
    return tasks


def pairs(texts: Texts, name: str, metric: str) -> list[tuple[float, float]]:
    sums = texts[name]["hits"] if metric == "acc" else texts[name]["windows"].sum(1)
    if metric == "loss":
        sums = -sums
    return list(zip(sums.tolist(), texts["all"]["units"].tolist(), strict=True))


def ratio(texts: Texts, name: str, metric: str) -> float:
    found = pairs(texts, name, metric)
    scale = {"bits_per_byte": -1 / math.log(2)}.get(metric, 1.0)
    return scale * sum(s for s, _ in found) / sum(u for _, u in found)


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
        better = {"higher_is_better": {name: better for name, (_, better) in KINDS.items()}}
        how = {name: how for name, (how, _) in KINDS.items()}
        cell, rows = cell_of(sizes, how, task=better, **changes), []
        for task, texts in tasks.items():
            for (index, units), name in product(enumerate(texts["all"]["units"]), NAMES):
                metrics: dict[str, str | None] = {
                    metric: json.dumps(pairs(texts, name, metric)[index]) for metric in KINDS
                }
                if undefined == (name, index):
                    metrics = dict.fromkeys(KINDS)
                draw = np.random.default_rng(index)
                sums = (units * draw.uniform(0.1, 0.9, size=(3, LAYERS))).tolist()
                about = {"gold": None, "choices": 0, "rolling": True, "proxies": (int(units), sums)}
                said = texts[name]["windows"][index]
                rows.append(row(index, name, task, metrics=metrics, said=said, **about))
        write_all(cell, rows)
        return cell_record(cell, asks(), metric, aggregate)

    return record_of


@pytest.mark.parametrize("metric", ["acc", "loss", "bits_per_byte"])
def test_every_figure_of_one_task(record_of, metric: str) -> None:
    texts = make_texts({"notes": 50})["notes"]
    record = record_of({"notes": texts}, metric)
    better = KINDS[metric][1]
    why = None if better else f"{metric} is no accuracy"
    before = ratio(texts, "baseline", metric)
    assert record.higher_is_better is better
    assert record.baseline.value == pytest.approx(before, rel=1e-12)
    assert record.baseline.low < before < record.baseline.high
    assert record.baseline_metrics == pytest.approx(
        {
            **{name: ratio(texts, "baseline", name) for name in ("acc", "loss", "bits_per_byte")},
            "word_perplexity": math.exp(ratio(texts, "baseline", "loss")),
        }
    )
    for layer in record.runs:
        after = ratio(texts, layer.ablation, metric)
        drop = before - after if better else after - before
        assert layer.accuracy == pytest.approx(after, rel=1e-12)
        assert layer.drop.value == pytest.approx(drop, rel=1e-9)
        assert layer.drop.low < drop < layer.drop.high
        assert layer.drop.p_value is None
        assert layer.reasons["mcnemar_p"] == "the outcomes are not all right or wrong"
        lost = texts["baseline"]["windows"].sum(1) - texts[layer.ablation]["windows"].sum(1)
        # Log-likelihoods are kept in single precision.
        assert layer.gold_drop.value == pytest.approx(lost.mean(), rel=1e-5)
        assert "gold_logprob_drop" not in layer.reasons
        relevance = pytest.approx(1 - after / before) if better else None
        assert layer.accuracy_relevance == relevance
        assert layer.reasons.get("accuracy_relevance") == why
    assert record.chance_accuracy == (0 if better else None)
    assert record.reasons == ({} if better else {"chance_accuracy": why})


def test_the_interval_is_that_of_a_ratio_estimator(record_of) -> None:
    """Cochran, Sampling Techniques (1977), chapter 6: residuals of the ratio, by document."""
    texts = make_texts({"notes": 50})["notes"]
    record = record_of({"notes": texts}, "bits_per_byte")
    units = texts["all"]["units"]
    for layer in record.runs:
        gain = texts["baseline"]["windows"].sum(1) - texts[layer.ablation]["windows"].sum(1)
        gain /= math.log(2)
        value = gain.sum() / units.sum()
        share = units / units.sum()
        error = math.sqrt(((gain - value * units) ** 2).sum() / (1 - share @ share)) / units.sum()
        half = stats.t.ppf(0.975, 1 / (share @ share) - 1) * error
        assert layer.drop.value == pytest.approx(value)
        assert layer.drop.low == pytest.approx(value - half)
        assert layer.drop.high == pytest.approx(value + half)


@pytest.mark.parametrize("by_size", [True, False])
@pytest.mark.parametrize("metric", ["acc", "bits_per_byte"])
def test_a_group_is_aggregated_as_lm_eval_does(record_of, metric: str, by_size: bool) -> None:
    sizes = {"first": 37, "second": 5}
    tasks = make_texts(sizes)
    record = record_of(tasks, metric, weight_by_size=by_size)
    weights = list(sizes.values()) if by_size else [1, 1]
    expected = np.average([ratio(t, "baseline", metric) for t in tasks.values()], weights=weights)
    assert record.baseline.value == pytest.approx(expected)
    assert record.baseline_metrics[metric] == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["acc", "loss"])
def test_a_layer_that_matters_correlates_the_same_way(record_of, metric: str) -> None:
    """For a loss the drop is its increase: positive = the layer mattered, as for an accuracy."""
    record = record_of(make_texts({"notes": 50}), metric)
    drops = [layer.drop.value for layer in record.runs]
    scores = [layer.cosine_score for layer in record.runs]
    found = next(
        c
        for c in record.correlations
        if (c.proxy, c.coefficient, c.subset) == ("cosine_score", "pearson", "all")
    )
    assert found.estimate.value == pytest.approx(float(np.corrcoef(scores, drops)[0, 1]))
    assert found.estimate.low < found.estimate.value < found.estimate.high


@pytest.mark.parametrize("name", ["baseline", "layer:1"])
def test_a_document_without_a_finite_score(record_of, name: str) -> None:
    record = record_of(make_texts({"notes": 9}), "acc", undefined=(name, 4))
    reason = "1 of 9 documents has no finite score"
    assert record.runs[1].drop.value is None
    assert record.runs[1].drop.reason == reason
    assert (record.runs[1].metrics["acc"] is None) is (name == "layer:1")
    assert (record.baseline.value is None) is (name == "baseline")
    assert (record.runs[0].drop.value is None) is (name == "baseline")


def test_a_text_without_tokens_changes_nothing(record_of) -> None:
    texts = make_texts({"notes": 20})["notes"]
    plain = record_of({"notes": texts}, "bits_per_byte")
    for name in NAMES:
        texts[name] = {key: np.append(v, 0 * v[:1], axis=0) for key, v in texts[name].items()}
    texts["all"]["units"] = np.append(texts["all"]["units"], 0.0)
    more = record_of({"notes": texts}, "bits_per_byte", name="other")
    assert more.n == plain.n + 1
    assert more.baseline.value == pytest.approx(plain.baseline.value)
    for one, other in zip(plain.runs, more.runs, strict=True):
        assert other.drop.value == pytest.approx(one.drop.value)
        assert other.drop.low == pytest.approx(one.drop.low)
        assert other.cosine_score == pytest.approx(one.cosine_score)
