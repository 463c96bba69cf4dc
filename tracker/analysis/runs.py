"""Compute the figures of one run of a cell, compared with the intact model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from tracker.analysis.aligned import AlignedOutcomes, pairs
from tracker.analysis.decisions import Chances, Texts, judged
from tracker.analysis.paired import PairedOutcomes
from tracker.core.changes import INTACT, WHOLE_LAYER, Ablation, Change
from tracker.core.estimates import Estimate
from tracker.core.proxies import OBSERVED, OF_EXPERTS, Proxy
from tracker.core.records import RunAnswer, RunRecord
from tracker.ledger.outcomes import METRIC
from tracker.stats.accuracy import (
    RATIO,
    accuracy,
    accuracy_relevance,
    chance_accuracy,
    mean_interval,
    ratio_of_sums,
)
from tracker.stats.arrays import Array, divided, proxy_means
from tracker.stats.decisions import shift, within

Aggregate = Callable[[str, Sequence[float | str]], float | None]
ONE_LOOK = "it holds for one look, and how many documents there are was decided by many"
"""Reason why a cell with a stopping rule lacks an interval or a p-value."""

_NOT_FINITE = "a hidden state of a baseline token is not finite or is zero"
_WHOLE_ONLY = "measured for whole single layers only"
_NEVER_ROUTED = "no token of these documents is routed to it"
_NOT_ALONE = "what it gives to a token is not finite, or cannot be told from what others give"
_NOT_ASKED = "no log-probability moved: no token that an answer depends on went to this expert"
_NO_METRIC = "a document has no finite score, or only lm-eval can aggregate this metric"


class Intact:
    """Figures of the intact model with which runs are compared, on the same documents.

    `chance` is None for a loss.
    """

    def __init__(self, outcomes: AlignedOutcomes, texts: Texts) -> None:
        self.outcomes, self.texts, self.weights = outcomes, texts, outcomes.weights
        self.baseline = accuracy(outcomes.values(INTACT), self.weights)
        self.judged = judged(outcomes, INTACT, texts)
        choices = outcomes.of(INTACT)["choices"].to_numpy(dtype=np.float64)
        is_accuracy = outcomes.higher_is_better
        self.chance = chance_accuracy(choices, self.weights) if is_accuracy else None


class LayerProxies:
    """Proxies of the intact model's layers, observed on some documents.

    Args:
        outcomes: The documents.

    Attributes:
        tokens: `[documents]`, number of tokens behind each sum.
        sums: Proxy → its sums `[documents, layers]`.
        reasons: Proxy → reason why it is undefined in every layer; empty if it is defined.
    """

    def __init__(self, outcomes: AlignedOutcomes) -> None:
        self.tokens = outcomes.tokens
        self.sums = {proxy.name: outcomes.proxy_sums(proxy) for proxy in OBSERVED}
        self.reasons = {proxy.name: outcomes.not_observed(proxy) for proxy in OBSERVED}
        self._figures: dict[str, list[Estimate]] = {}
        for proxy in OBSERVED:
            means = proxy_means(self.sums[proxy.name], self.tokens)
            why = self.reasons[proxy.name] or _NOT_FINITE
            for name in proxy.headings:
                values = map(finite, proxy.of(means) if name == proxy.name else means)
                self._figures[name] = [
                    Estimate(v, reason=why if v is None else None) for v in values
                ]

    def of(self, run: Change) -> dict[str, Estimate]:
        """List the proxies of a run's layer, each with the reason if it is undefined."""
        if run.kind != WHOLE_LAYER:
            return dict.fromkeys(self._figures, Estimate(None, reason=_WHOLE_ONLY))
        return {name: figures[run.layer] for name, figures in self._figures.items()}


class ExpertProxies:
    """Proxies of the experts that runs remove, observed in the intact model.

    Args:
        outcomes: The documents.

    Attributes:
        runs: Runs that remove an expert.
        sums: Proxy → its sums over each document's tokens `[documents, runs]`.
    """

    def __init__(self, outcomes: AlignedOutcomes) -> None:
        self.runs = [run for run in outcomes.runs if run.component == "expert"]
        self.sums = {proxy.name: outcomes.part_sums(proxy, self.runs) for proxy in OF_EXPERTS}
        self._tokens = np.tile(outcomes.tokens[:, None], len(self.runs))
        self._places = {run: place for place, run in enumerate(self.runs)}

    @property
    def not_observed(self) -> str:
        """The number of documents measured without proxies of experts, as text; "" if none."""
        missing = int(np.isnan(self.sums["routed_share"]).any(axis=1).sum())
        return _not_observed(missing, len(self._tokens)) if missing else ""

    def counts(self, proxy: Proxy) -> Array:
        """Return the number of tokens behind each of a proxy's sums `[documents, runs]`."""
        return self.sums[proxy.over] if proxy.over else self._tokens

    def means(self, proxy: Proxy) -> Array:
        """Return a proxy of each run's expert `[runs]`; NaN where it is undefined."""
        return divided(self.sums[proxy.name].sum(axis=0), self.counts(proxy).sum(axis=0))

    def of(self, run: Change) -> dict[str, Estimate]:
        """List the proxies of a run's expert, with reasons if undefined; empty for other runs."""
        if run.component != "expert":
            return {}
        place = self._places[run]
        return {proxy.name: self._figure(proxy, place) for proxy in OF_EXPERTS}

    def _figure(self, proxy: Proxy, place: int) -> Estimate:
        routed = self.sums["routed_share"][:, place]
        if lacking := int(np.isnan(routed).sum()):
            why = _not_observed(lacking, len(routed))
        else:
            why = _NOT_ALONE if routed.sum() else _NEVER_ROUTED
        value = finite(self.means(proxy)[place])
        return Estimate(value, reason=why if value is None else None)


def _not_observed(lacking: int, documents: int) -> str:
    return f"not observed when {lacking} of {documents} documents were measured"


def run_record(
    intact: Intact, run: Change, proxies: Mapping[str, Estimate], aggregate: Aggregate
) -> RunRecord:
    """Compute the record of one run."""
    outcomes = intact.outcomes
    ablation = outcomes.ablation(run)
    paired = outcomes.by_metric([ablation])
    drop, spread, accurate = paired.drop(0), paired.drop_sd(0), paired.level(0)
    relevance = Estimate(None, reason=f"{outcomes.metric} is no accuracy")
    if intact.chance is not None:
        relevance = accuracy_relevance(intact.baseline.value, accurate.value, intact.chance)
    gold = _mean_drop(outcomes.by_gold_logprob([ablation]), "finite gold score")
    options = _mean_drop(outcomes.by_options([ablation]), "options of a finite score")
    if run.component == "expert" and outcomes.moves_nothing(ablation):
        # Removing an expert that no token was routed to changes nothing, so it has no drop.
        drop = spread = gold = options = Estimate(None, reason=_NOT_ASKED)
        relevance = relevance if intact.chance is None else drop
    metrics = metric_values(outcomes, ablation, aggregate)
    mine = judged(outcomes, ablation, intact.texts)
    untested = drop.reason or "the outcomes are not all right or wrong"
    undefined = {
        "accuracy": accurate.reason,
        "drop_sd": spread.reason,
        "accuracy_relevance": relevance.reason,
        "rounded": mine.reason,
        "drop_rounding": mine.reason or intact.judged.reason,
        "mcnemar_p": untested if drop.p_value is None else None,
        **{name: proxy.reason for name, proxy in proxies.items()},
        **{f"metrics.{name}": _NO_METRIC for name, value in metrics.items() if value is None},
    }
    return RunRecord(
        change=run,
        ablation=ablation.name,
        n=len(outcomes.tasks),
        accuracy=accurate.value,
        drop=drop,
        drop_sd=spread.value,
        accuracy_relevance=relevance.value,
        gold_drop=gold,
        options_drop=options,
        rounded=None if mine.chances is None else within(mine.chances),
        drop_rounding=moved_by_rounding(intact.weights, intact.judged, mine),
        metrics=metrics,
        reasons={name: reason for name, reason in undefined.items() if reason},
        mismatch=outcomes.mismatch(ablation),
        **{name: proxy.value for name, proxy in proxies.items()},
    )


def moved_by_rounding(weights: Array, *models: Chances) -> float | None:
    """Compute how far rounding moves a model's accuracy, or the difference of two models."""
    every = [model.chances for model in models if model.chances is not None]
    if len(every) < len(models):
        return None
    return math.hypot(*(shift(chances, weights) for chances in every))


def at_all_looks(run: RunRecord, bounds: RunAnswer | None) -> RunRecord:
    """Replace a run's intervals by bounds that hold at every look, and drop its p-values."""
    reasons = run.reasons | {"mcnemar_p": ONE_LOOK}
    drop, gold, options = (
        replace(figure, low=None, high=None, p_value=None)
        for figure in (run.drop, run.gold_drop, run.options_drop)
    )
    if bounds is None:
        reasons["accuracy_drop_low"] = "the question is not about it"
    else:
        drop = replace(drop, low=bounds.low, high=bounds.high)
    estimates = {"drop": drop, "gold_drop": gold, "options_drop": options}
    return run.model_copy(update={**estimates, "reasons": reasons})


def metric_values(
    outcomes: AlignedOutcomes, ablation: Ablation, aggregate: Aggregate
) -> dict[str, float | None]:
    """Return every metric of the benchmark, aggregated as lm-eval does."""
    rows = outcomes.of(ablation)
    benchmark = outcomes.identity.benchmark
    by_task = {task: rows[rows["task"] == task] for task in dict.fromkeys(outcomes.tasks)}
    tasks = [task for task in benchmark.tasks if task.name in by_task]
    weights = [len(by_task[task.name]) for task in tasks] if benchmark.weight_by_size else None
    values: dict[str, float | None] = {}
    for name in benchmark.tasks[0].metrics:
        per_task = [
            _aggregated(by_task[task.name], METRIC + name, task.metrics.get(name), aggregate)
            for task in tasks
        ]
        defined = [value for value in per_task if value is not None]
        complete = len(defined) == len(per_task)
        values[name] = float(np.average(defined, weights=weights)) if complete else None
    return values


def _aggregated(
    rows: pd.DataFrame, column: str, how: str | None, aggregate: Aggregate
) -> float | None:
    """Aggregate one metric of one task; None if a value is missing or only lm-eval can do it."""
    if how is None or column not in rows or rows[column].isna().any():
        return None
    if how == RATIO:
        return finite(ratio_of_sums(RATIO, pairs(rows[column]).tolist()))
    return aggregate(how, rows[column].to_list())


def _mean_drop(logprobs: PairedOutcomes, what: str) -> Estimate:
    """Estimate the mean fall of a log-probability; `what` names the value that documents lack."""
    if bad := int((~np.isfinite(logprobs.drops)).sum()):
        why = f"{bad} of {len(logprobs.drops)} documents have no {what}"
        return Estimate(None, reason=why)
    drops = logprobs.drops[:, 0]
    return Estimate(float(logprobs.mean_drops[0]), *mean_interval(drops, logprobs.weights))


def finite(value: float) -> float | None:
    """Return a value as a float; None if it is not finite."""
    return float(value) if math.isfinite(value) else None
