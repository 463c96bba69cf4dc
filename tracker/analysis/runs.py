"""Compute the statistics of one run, compared with the intact model.

A run is one ablation on one benchmark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import pandas as pd

from tracker.analysis.aligned import AlignedOutcomes, count_unobserved
from tracker.analysis.decisions import RoundingRisk, rounding_risk
from tracker.analysis.metrics import TextReader, read_pairs
from tracker.ledger.outcomes import METRIC_PREFIX
from tracker.schema.changes import INTACT, WHOLE_LAYER, Ablation, Change
from tracker.schema.estimates import Estimate
from tracker.schema.grouping import group_by
from tracker.schema.identities import CHOICE_PROBABILITIES
from tracker.schema.proxies import ANSWER_TOKENS, OBSERVED, PART_PROXIES, PROXIES, Proxy
from tracker.schema.records import RunAnswer, RunRecord
from tracker.stats.accuracy import RATIO, accuracy_relevance, chance_accuracy
from tracker.stats.arrays import Array, proxy_means, safe_divide
from tracker.stats.decisions import rounding_shift

Aggregate = Callable[[str, Sequence[float | str]], float | None]
ONE_LOOK_REASON = (
    "intervals and p-values assume a fixed number of documents, but the measurement stopped early"
)
"""Reason why a cell with a stopping rule lacks an interval or a p-value."""

_NOT_FINITE = "in the intact model, a token's hidden state is zero or not finite"
WHOLE_LAYERS_REASON = "this value is measured only for the removal of a single whole layer"
_NO_GRADIENT = "a gradient is not finite"
_OTHER_KIND = "the proxy is not defined for the measured kind of change to the model"
_NEVER_ROUTED = "no token of these documents is routed to this expert"
_NOT_SEPARABLE = "the expert's output is not finite, or not separable from other experts' outputs"
_NO_EFFECT = (
    "no log-probability changed, because no token that affects an answer is routed to this expert"
)
_NO_METRIC = "a document has no finite score, or only lm-eval can aggregate this metric"


class IntactFigures:
    """Accuracy, chance accuracy and rounding risk of the intact model on some documents.

    `chance`, the accuracy of random guessing, is None if the metric is a loss.
    """

    def __init__(self, outcomes: AlignedOutcomes, texts: TextReader) -> None:
        self.outcomes, self.texts, self.weights = outcomes, texts, outcomes.weights
        baseline = outcomes.level(INTACT)
        self.baseline = _explain(baseline, outcomes.undefined_reason)
        self.risk = rounding_risk(outcomes, INTACT, texts)
        choices = outcomes.rows(INTACT)["choices"].to_numpy(dtype=np.float64)
        is_accuracy = outcomes.higher_is_better
        self.chance = chance_accuracy(choices, self.weights) if is_accuracy else None


class LayerProxies:
    """Proxies (cheap estimates of importance) of the intact model's layers on some documents.

    Args:
        outcomes: Outcomes of the documents.

    Attributes:
        tokens: Number of tokens over which the proxies are summed in each document.
        sums: Name of the proxy → array `[documents, layers]` of sums over tokens.
        reasons: Name of the proxy → reason why the proxy is undefined for all layers; "" if
            defined.
    """

    def __init__(self, outcomes: AlignedOutcomes) -> None:
        self.tokens = outcomes.tokens
        self.sums = {proxy.name: outcomes.proxy_sums(proxy) for proxy in OBSERVED}
        self.reasons = {proxy.name: outcomes.unobserved_reason(proxy) for proxy in OBSERVED}
        self._estimates: dict[str, list[Estimate]] = {}
        for proxy in OBSERVED:
            means = proxy_means(self.sums[proxy.name], self.tokens)
            reason = self.reasons[proxy.name] or _NOT_FINITE
            for name in proxy.headings:
                values = proxy.from_observed(means) if name == proxy.name else means
                self._estimates[name] = [_finite_estimate(value, reason) for value in values]

    def estimates(self, run: Change) -> dict[str, Estimate]:
        """Map the name of each proxy to its estimate for the layer that a run removes."""
        if run.kind != WHOLE_LAYER:
            return dict.fromkeys(self._estimates, Estimate(None, reason=WHOLE_LAYERS_REASON))
        return {name: values[run.layer] for name, values in self._estimates.items()}


class PartProxies:
    """Proxies (cheap estimates of importance) of the part of the model that each run changes.

    Args:
        outcomes: Outcomes of the documents.

    Attributes:
        runs: The measured runs.
        sums: Name of the proxy → array `[documents, runs]` of sums over tokens.
        means: Name of the proxy → array `[runs]` of means over all tokens.
        indexes: Run → index of the run in `runs`.
    """

    def __init__(self, outcomes: AlignedOutcomes) -> None:
        self.runs = outcomes.runs
        columns = {p.name: p.column for p in PART_PROXIES} | {ANSWER_TOKENS: ANSWER_TOKENS}
        self.sums = {name: outcomes.part_sums(col, self.runs) for name, col in columns.items()}
        self._tokens = np.tile(outcomes.tokens[:, None], len(self.runs))
        self.means = {
            proxy.name: safe_divide(
                self.sums[proxy.name].sum(axis=0), self.counts(proxy).sum(axis=0)
            )
            for proxy in PART_PROXIES
        }
        self.indexes = {run: index for index, run in enumerate(self.runs)}
        self._names = {
            key: [proxy.name for proxy in self.list_proxies(runs)]
            for key, runs in group_by(self.runs, lambda r: (r.sample, r.has_taylor)).items()
        }

    def list_proxies(self, runs: Sequence[Change]) -> list[Proxy]:
        """List the proxies for runs of one kind, such as runs that change an expert.

        A proxy that is defined for every kind of part is listed only if some run has a value.
        """
        indexes = [self.indexes[run] for run in runs]
        return [
            proxy
            for proxy in PART_PROXIES
            if proxy.component == runs[0].component
            or (proxy.component == "part" and not np.isnan(self.sums[proxy.name][:, indexes]).all())
        ]

    def unobserved_reason(self, proxy: Proxy, indexes: Sequence[int]) -> str:
        """Describe how many documents lack a proxy; return "" if no document does."""
        name = proxy.name if proxy.component == "part" else "routed_share"
        return count_unobserved(np.isnan(self.sums[name][:, indexes].sum(axis=1)))

    def counts(self, proxy: Proxy) -> Array:
        """Return the number of tokens over which a proxy is summed, as `[documents, runs]`."""
        return self.sums[proxy.over] if proxy.over else self._tokens

    def estimates(self, run: Change) -> dict[str, Estimate]:
        """Map the name of each proxy to its estimate for the part that a run changes.

        The estimate of a proxy that is defined only for other kinds of runs is undefined.
        """
        names = self._names.get((run.sample, run.has_taylor), ())
        undefined = dict.fromkeys(chain(*self._names.values()), Estimate(None, reason=_OTHER_KIND))
        return undefined | {name: self._estimate(PROXIES[name], run) for name in names}

    def _estimate(self, proxy: Proxy, run: Change) -> Estimate:
        index = self.indexes[run]
        undefined = _NO_GRADIENT
        if proxy.component == "expert":
            routed = self.sums["routed_share"][:, index].sum()
            undefined = _NOT_SEPARABLE if routed else _NEVER_ROUTED
        reason = self.unobserved_reason(proxy, [index]) or undefined
        return _finite_estimate(self.means[proxy.name][index], reason)


def _finite_estimate(value: float, reason: str) -> Estimate:
    """Convert a value to an estimate; infinity and NaN give an undefined estimate."""
    return Estimate(float(value)) if math.isfinite(value) else Estimate(None, reason=reason)


def _explain(estimate: Estimate, reason: str) -> Estimate:
    """Set the reason of an undefined estimate, unless `reason` is empty."""
    return replace(estimate, reason=reason) if estimate.value is None and reason else estimate


def run_record(
    intact: IntactFigures, run: Change, proxies: Mapping[str, Estimate], aggregate: Aggregate
) -> RunRecord:
    """Compute the record of one run: its accuracy, drops, proxies and metrics."""
    outcomes = intact.outcomes
    ablation = outcomes.ablation(run)
    paired = outcomes.metric_outcomes([ablation])
    reason = outcomes.undefined_reason
    figures = paired.drop(0), paired.drop_sd(0), paired.level(0)
    drop, spread, level = (_explain(figure, reason) for figure in figures)
    relevance = Estimate(None, reason=f"{outcomes.metric} is no accuracy")
    if intact.chance is not None:
        relevance = accuracy_relevance(intact.baseline.value, level.value, intact.chance)
    gold = outcomes.gold_outcomes([ablation]).mean_drop("finite gold score")
    choice = outcomes.choice_outcomes([ablation]).mean_drop("choice of finite scores")
    options = outcomes.options_outcomes([ablation]).mean_drop("options of a finite score")
    if run.component == "expert" and outcomes.has_no_effect(ablation):
        # Removing an expert that no token was routed to changes nothing, so it has no drop.
        drop = spread = gold = choice = options = Estimate(None, reason=_NO_EFFECT)
        relevance = relevance if intact.chance is None else drop
    metrics = metric_values(outcomes, ablation, aggregate)
    risk = rounding_risk(outcomes, ablation, intact.texts)
    no_test_reason = drop.reason or "McNemar's test needs outcomes that are all 0 or 1"
    if outcomes.clusters is not None and not drop.reason:
        no_test_reason = "McNemar's test needs independent documents, not clusters"
    reasons = {
        "accuracy": level.reason,
        "drop_sd": spread.reason,
        "accuracy_relevance": relevance.reason,
        "rounded": risk.reason,
        "drop_rounding": risk.reason or intact.risk.reason,
        "mcnemar_p": no_test_reason if drop.p_value is None else None,
        **{name: proxy.reason for name, proxy in proxies.items()},
        **{f"metrics.{name}": _NO_METRIC for name, value in metrics.items() if value is None},
    }
    return RunRecord(
        change=run,
        ablation=ablation.name,
        n=len(outcomes.tasks),
        clusters=outcomes.n_clusters,
        accuracy=level.value,
        drop=drop,
        drop_sd=spread.value,
        accuracy_relevance=relevance.value,
        gold_drop=gold,
        choice_drop=choice,
        options_drop=options,
        rounded=risk.n_undecided,
        drop_rounding=accuracy_rounding(intact.weights, intact.risk, risk),
        metrics=metrics,
        reasons={name: reason for name, reason in reasons.items() if reason},
        mismatch=outcomes.describe_mismatch(ablation),
        **{name: proxy.value for name, proxy in proxies.items()},
    )


def accuracy_rounding(weights: Array, *risks: RoundingRisk) -> float | None:
    """Estimate the error that rounding causes in an accuracy, or in a difference of two accuracies.

    Args:
        weights: Weight of each document in an accuracy; the weights sum to 1.
        *risks: Rounding risk of the accuracy, or of both accuracies of the difference.

    Returns:
        Half the width of a 95 % interval of the error; None if a probability is unknown.
    """
    probabilities = [risk.chances for risk in risks if risk.chances is not None]
    if len(probabilities) < len(risks):
        return None
    return math.hypot(*(rounding_shift(values, weights) for values in probabilities))


def apply_bounds(run: RunRecord, bounds: RunAnswer | None) -> RunRecord:
    """Replace the interval of a run's drop by bounds that are valid after early stopping.

    If `bounds` is None, the drop has no interval. p-values and the intervals of other drops are
    removed, because they assume a fixed number of documents.
    """
    reasons = run.reasons | {"mcnemar_p": ONE_LOOK_REASON}
    if bounds is None:
        reasons["accuracy_drop_low"] = "the stopping rule in 'until' gives no interval for this run"
    estimates = {
        name: replace(getattr(run, name), low=None, high=None, p_value=None)
        for name in ("drop", "choice_drop", "gold_drop", "options_drop")
    }
    if bounds is not None:
        estimates["drop"] = replace(run.drop, low=bounds.low, high=bounds.high, p_value=None)
    return run.model_copy(update={**estimates, "reasons": reasons})


def metric_values(
    outcomes: AlignedOutcomes, ablation: Ablation, aggregate: Aggregate
) -> dict[str, float | None]:
    """Compute every metric of the benchmark under an ablation, aggregated as in lm-eval."""
    rows = outcomes.metric_rows(ablation)
    benchmark = outcomes.identity.benchmark
    by_task = {task: rows[rows["task"] == task] for task in dict.fromkeys(outcomes.tasks)}
    tasks = [task for task in benchmark.tasks if task.name in by_task]
    weights = [len(by_task[task.name]) for task in tasks] if benchmark.weight_by_size else None
    derived = (name for name in CHOICE_PROBABILITIES if METRIC_PREFIX + name in rows)
    values: dict[str, float | None] = dict.fromkeys([*benchmark.tasks[0].metrics, *derived])
    for name in values:
        pairs = ((by_task[task.name], task.all_metrics.get(name)) for task in tasks)
        column = METRIC_PREFIX + name
        aggregated = [
            _aggregate_metric(rows, column, aggregation, aggregate) for rows, aggregation in pairs
        ]
        defined = [value for value in aggregated if value is not None]
        if len(defined) == len(tasks):
            values[name] = float(np.average(defined, weights=weights))
    return values


def _aggregate_metric(
    rows: pd.DataFrame, column: str, aggregation: str | None, aggregate: Aggregate
) -> float | None:
    """Aggregate one metric over the documents of one task, as lm-eval does.

    Returns None if a value is missing, or if only lm-eval can aggregate the metric.
    """
    if aggregation is None or column not in rows or rows[column].isna().any():
        return None
    if aggregation == RATIO:
        amount, units = read_pairs(rows[column]).sum(axis=0).tolist()
        return finite_or_none(amount / units) if units else None
    return aggregate(aggregation, rows[column].to_list())


def finite_or_none(value: float) -> float | None:
    """Return a value as a float; None if it is not finite."""
    return float(value) if math.isfinite(value) else None
