"""Deriving everything that is shown from the outcomes: one cell's drops, proxies, correlations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from tracker.ablations import INTACT, Ablation, ablate, ablation_of
from tracker.ledger.cells import CellStore
from tracker.ledger.outcomes import METRIC, PROVENANCE, PROXY_SUMS
from tracker.ledger.viewed import Array, Viewed, gold_logprobs, pairs
from tracker.metrics.accuracy import (
    Estimate,
    accuracy,
    accuracy_drop,
    accuracy_relevance,
    chance_accuracy,
    drop_sd,
    weights_by_task,
)
from tracker.metrics.correlation import COEFFICIENTS, correlate
from tracker.metrics.proxies import PROXIES, cosine_score, proxy_means
from tracker.metrics.ratios import RATIO, ratio_of_sums
from tracker.metrics.resampling import RESAMPLES, SEED, resampled_means
from tracker.provenance import differences, united
from tracker.records import (
    WHOLE_LAYER,
    CellRecord,
    CorrelationRecord,
    RunRecord,
    View,
)

Aggregate = Callable[[str, Sequence[float | str]], float | None]
OUTER = 2
"""Layers at each end that the subset `inner` leaves out, as the paper leaves out its outliers."""

_NOT_FINITE = "a hidden state of a baseline token is not finite or is zero"
_WHOLE_ONLY = "measured for whole single layers only"
_NO_METRIC = "a document has no finite score, or only lm-eval can aggregate this metric"


def cell_record(store: CellStore, view: View, aggregate: Aggregate) -> CellRecord:
    """Derive a cell's record from its outcomes.

    Args:
        store: The cell on disk.
        view: Which documents and runs to show, by a metric that is a mean, or a ratio of sums over
            documents.
        aggregate: lm-eval's aggregation by name.

    Returns:
        The record, over the documents that every shown run is measured on.
    """
    outcomes = Viewed(store, view)
    identity, metric = store.identity, view.metric
    n = len(outcomes.tasks)
    is_accuracy = outcomes.higher_is_better(metric)
    reasons = {}
    if n < outcomes.wanted:
        reasons["n"] = f"{n} of {outcomes.wanted} documents are measured so far"
    if differing := differences(outcomes.stacks):
        reasons[PROVENANCE] = f"measured by different versions or devices: {differing}"
    if not n:
        fields = ["baseline_accuracy", "chance_accuracy"]
        fields += ["removed_accuracy"] if view.removed else []
        reasons |= dict.fromkeys(fields, "no document is measured yet")
    common = {
        "key": identity.key,
        "model": identity.model,
        "benchmark": identity.benchmark,
        "metric": metric,
        "higher_is_better": is_accuracy,
        "n": n,
        "sample_seed": view.seed,
        "removed": view.removed,
        "missing": tuple(outcomes.missing),
        "fitted_on": _fitted_on(store, view),
        **outcomes.comparisons(),
        **store.costs(),
        "provenance": united(outcomes.stacks),
    }
    if not n:
        return CellRecord(
            **common,
            tokens=0,
            baseline_accuracy=None,
            baseline_low=None,
            baseline_high=None,
            chance_accuracy=None,
            baseline_metrics={},
            layers=(),
            correlations=(),
            reasons=reasons,
        )
    by_size = identity.benchmark.weight_by_size
    weights = weights_by_task(outcomes.tasks, by_size, outcomes.units(metric))
    by_document = weights_by_task(outcomes.tasks, by_size)
    base = outcomes.of(INTACT)
    before = outcomes.metric(INTACT, metric)
    baseline = accuracy(before, weights)
    if baseline.reason:
        reasons["baseline_accuracy"] = baseline.reason
    chance = None
    if is_accuracy:
        chance = chance_accuracy(base["choices"].to_numpy(dtype=np.float64), weights)
    else:
        reasons["chance_accuracy"] = f"{metric} is no accuracy"
    beneath = _beneath(outcomes, view, weights)
    if beneath.reason:
        reasons["removed_accuracy"] = beneath.reason
    tokens = base["proxy_tokens"].to_numpy(dtype=np.float64)
    sums = {name: np.stack(base[name].to_list()) for name in PROXY_SUMS}
    means = {name: proxy_means(values, tokens) for name, values in sums.items()}
    gold = gold_logprobs(base)
    all_metrics = _metric_values(outcomes, INTACT, aggregate)
    layers = []
    for run in outcomes.runs:
        ablation = outcomes.ablation(run)
        whole = run.kind == WHOLE_LAYER
        after = outcomes.metric(ablation, metric)
        pair = (before, after) if is_accuracy else (after, before)
        drop = accuracy_drop(*pair, weights)
        spread = drop_sd(*pair, weights)
        accurate = accuracy(after, weights)
        relevance = (
            Estimate(None, reason=f"{metric} is no accuracy")
            if chance is None
            else accuracy_relevance(baseline.value, accurate.value, chance)
        )
        gold_drop = _mean_drop(gold, gold_logprobs(outcomes.of(ablation)), by_document)
        proxies = {
            name.removesuffix("_sum"): _finite(values[run.layer]) if whole else None
            for name, values in means.items()
        }
        proxies["cosine_score"] = cosine_score(proxies["cosine_similarity"])
        metrics = _metric_values(outcomes, ablation, aggregate)
        undefined = {
            "accuracy": accurate.reason,
            "accuracy_drop": drop.reason,
            "drop_sd": spread.reason,
            "accuracy_relevance": relevance.reason,
            "gold_logprob_drop": gold_drop.reason,
            "mcnemar_p": None
            if drop.p_value is not None
            else drop.reason or "the outcomes are not all right or wrong",
            **{
                name: _NOT_FINITE if whole else _WHOLE_ONLY
                for name, value in proxies.items()
                if value is None
            },
            **{f"metrics.{name}": _NO_METRIC for name, value in metrics.items() if value is None},
            PROVENANCE: outcomes.mismatch(ablation),
        }
        layers.append(
            RunRecord(
                **dict(run),
                ablation=ablation.name,
                n=n,
                accuracy=accurate.value,
                accuracy_drop=drop.value,
                accuracy_drop_low=drop.low,
                accuracy_drop_high=drop.high,
                drop_sd=spread.value,
                mcnemar_p=drop.p_value,
                accuracy_relevance=relevance.value,
                gold_logprob_drop=gold_drop.value,
                metrics=metrics,
                reasons={name: reason for name, reason in undefined.items() if reason},
                **proxies,
            )
        )
    return CellRecord(
        **common,
        tokens=int(tokens.sum()),
        baseline_accuracy=baseline.value,
        baseline_low=baseline.low,
        baseline_high=baseline.high,
        chance_accuracy=chance,
        baseline_metrics=all_metrics,
        removed_accuracy=beneath.value,
        removed_low=beneath.low,
        removed_high=beneath.high,
        layers=tuple(layers),
        correlations=tuple(_correlations(outcomes, metric, weights, sums, tokens)),
        reasons=reasons,
    )


def _fitted_on(store: CellStore, view: View) -> str | None:
    """Say what stands in for layers was fitted on, and how much of that is measured too."""
    if not any(ablation_of(run, view.removed).is_fitted for run in view.runs):
        return None
    wanted = store.wanted(view.extent)
    said = []
    for one in store.calibrations():
        count = sum(map(len, one["documents"].values()))
        both = sum(len({*docs} & {*wanted[task]}) for task, docs in one["documents"].items())
        said.append(
            f"{one['tokens']:,} tokens of {count:,} documents from the end of the random order, "
            + (f"{both:,} of them among those measured" if both else "none of them measured")
        )
    return "; ".join(said) or None


def _beneath(outcomes: Viewed, view: View, weights: Array) -> Estimate:
    """The metric with the layers taken out that every run lacks, and nothing else."""
    if not view.removed:
        return Estimate(None)
    ablation = ablate("layer", view.removed)
    if not outcomes.has(ablation):
        return Estimate(None, reason="not measured yet")
    return accuracy(outcomes.metric(ablation, view.metric), weights)


def _correlations(
    outcomes: Viewed, metric: str, weights: Array, sums: Mapping[str, Array], tokens: Array
) -> list[CorrelationRecord]:
    """Set every proxy beside the accuracy drop, over all layers and without the outer ones."""
    runs = [run for run in outcomes.runs if run.kind == WHOLE_LAYER]
    if not runs:
        return []
    layers = [run.layer for run in runs]
    before = outcomes.metric(INTACT, metric)
    ablations = map(outcomes.ablation, runs)
    drops = np.stack([before - outcomes.metric(each, metric) for each in ablations], axis=1)
    if not outcomes.higher_is_better(metric):
        drops = -drops
    strata = None if len(set(outcomes.tasks)) == 1 else np.array(outcomes.tasks)
    total = outcomes.identity.model.layers
    inner = [i for i, layer in enumerate(layers) if OUTER <= layer < total - OUTER]
    drop = weights @ drops
    drawn_drop = resampled_means(drops, RESAMPLES, SEED, strata, weights)
    records = []
    for proxy in PROXIES:
        name = "cosine_similarity" if proxy == "cosine_score" else proxy
        per_document = sums[f"{name}_sum"][:, layers]
        value = proxy_means(per_document, tokens)
        # An empty text has no tokens, and therefore no weight.
        means = per_document / np.maximum(tokens, 1)[:, None]
        drawn = resampled_means(means, RESAMPLES, SEED, strata, tokens)
        if proxy == "cosine_score":
            value, drawn = 1 - value, 1 - drawn
        for coefficient in COEFFICIENTS:
            for subset, chosen in (("all", list(range(len(layers)))), ("inner", inner)):
                found = correlate(
                    value[chosen],
                    drop[chosen],
                    coefficient=coefficient,
                    resampled_proxy=drawn[:, chosen],
                    resampled_drop=drawn_drop[:, chosen],
                )
                records.append(
                    CorrelationRecord(
                        proxy=proxy,
                        coefficient=found.coefficient,
                        subset=subset,
                        value=found.value,
                        low=found.low,
                        high=found.high,
                        p_value=found.p_value,
                        n=found.n,
                        documents=len(before),
                        reason=found.reason,
                    )
                )
    return records


def _metric_values(
    outcomes: Viewed, ablation: Ablation, aggregate: Aggregate
) -> dict[str, float | None]:
    """Every metric of the benchmark, aggregated as lm-eval does."""
    rows = outcomes.of(ablation)
    benchmark = outcomes.identity.benchmark
    by_task = [
        (task, mine) for task in benchmark.tasks if len(mine := rows[rows["task"] == task.name])
    ]
    weights = [len(mine) for _, mine in by_task] if benchmark.weight_by_size else None
    values: dict[str, float | None] = {}
    for name in benchmark.tasks[0].metrics:
        per_task = [
            _aggregated(mine, METRIC + name, task.metrics.get(name), aggregate)
            for task, mine in by_task
        ]
        defined = [value for value in per_task if value is not None]
        complete = len(defined) == len(per_task)
        values[name] = float(np.average(defined, weights=weights)) if complete else None
    return values


def _aggregated(
    rows: pd.DataFrame, column: str, how: str | None, aggregate: Aggregate
) -> float | None:
    """One metric of one task; None where a document has no value, or lm-eval alone can tell."""
    if how is None or column not in rows or rows[column].isna().any():
        return None
    if how == RATIO:
        return _finite(ratio_of_sums(RATIO, pairs(rows[column]).tolist()))
    return aggregate(how, rows[column].to_list())


def _mean_drop(before: Array, after: Array, weights: Array) -> Estimate:
    drop = before - after
    bad = int((~np.isfinite(drop)).sum())
    if bad:
        return Estimate(None, reason=f"{bad} of {len(drop)} documents have no finite gold score")
    return Estimate(float(weights @ drop))


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
