"""Compute a cell's record: drops, proxies and correlations of one model on one benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from tracker.analysis.aligned import AlignedOutcomes
from tracker.analysis.runs import (
    ONE_LOOK_REASON,
    Aggregate,
    IntactFigures,
    LayerProxies,
    PartProxies,
    accuracy_rounding,
    apply_bounds,
    finite_or_none,
    metric_values,
    run_record,
)
from tracker.ledger.cells import CellStore, last_measured
from tracker.ledger.outcomes import CHECKPOINT_KEY
from tracker.schema.changes import INTACT, WHOLE_LAYER, Ablation, Change
from tracker.schema.estimates import Estimate
from tracker.schema.extent import ALL_DOCUMENTS, shuffle_documents
from tracker.schema.grouping import group_by
from tracker.schema.provenance import list_differences, merge_provenances
from tracker.schema.proxies import OBSERVED, Proxy
from tracker.schema.records import AnswerRecord, CellRecord, CorrelationRecord, RunRecord
from tracker.schema.views import View
from tracker.stats.arrays import Array, Mask, proxy_means, safe_divide, token_means
from tracker.stats.correlation import SURROGATES, correlate
from tracker.stats.rank_agreement import COEFFICIENTS

_MISMATCH = "the outcomes were measured with different software versions or devices"
OUTER_LAYERS = 2
"""Number of layers at each end that the subset `inner` excludes, as the paper excludes outliers."""
PART_PERMUTATIONS = 999
"""Number of random permutations for parts; few, because a model has thousands of experts."""


def cell_record(
    store: CellStore, view: View, aggregate: Aggregate, answer: AnswerRecord | None = None
) -> CellRecord:
    """Compute the record of a cell (drops, proxies, correlations) from its stored outcomes.

    Args:
        store: Stored outcomes of one model on one benchmark.
        view: Selection of documents, runs and metric.
        aggregate: Function that aggregates values with the named lm-eval aggregation.
        answer: Result of the stopping rule (`until`); None if the view has no stopping rule.

    Returns:
        The record, computed on the documents that all runs measured. After early stopping
        (`until`), each run's statistics cover the documents evaluated before the run was decided.
    """
    aligned = AlignedOutcomes(store, view)
    outcomes, order = _select_outcomes(aligned, store, view, answer)
    n, shards = len(outcomes.tasks), store.all_metadata()
    versions = list_differences(outcomes.stacks)
    unsaved = sorted({shard[CHECKPOINT_KEY] for shard in shards if CHECKPOINT_KEY in shard})
    fields = _identity_fields(store, view) | {
        "higher_is_better": outcomes.higher_is_better,
        "n": n,
        "unfinished": _incomplete_reason(n, outcomes.n_requested, answer),
        "mismatch": f"{_MISMATCH}: {versions}" if versions else None,
        "unsaved": "; ".join(unsaved) or None,
        "missing": tuple(outcomes.missing),
        "answer": answer,
        "fitted_on": _calibration_text(store, view, shards),
        **outcomes.comparison_summary(),
        **_measuring_costs(shards),
        "provenance": merge_provenances(outcomes.stacks),
    }
    if not n:
        undefined = Estimate(None, reason="no document is measured yet")
        remaining = undefined if view.removed else Estimate(None)
        fields |= {"baseline": undefined, "remaining": remaining}
        fields["reasons"] = {"chance_accuracy": undefined.reason}
        return unmeasured_record(store, view, **fields)
    texts = cache(store.texts.read)
    intact = IntactFigures(outcomes, texts)
    baseline, remaining = intact.baseline, _reduced_model_metric(outcomes, view)
    reasons = {
        "baseline_rounded": intact.risk.reason,
        "chance_accuracy": None if outcomes.higher_is_better else f"{view.metric} is no accuracy",
    }
    if order:
        baseline = replace(baseline, low=None, high=None)
        remaining = replace(remaining, low=None, high=None)
        reasons["baseline_low"] = ONE_LOOK_REASON
    proxies, parts = LayerProxies(outcomes), PartProxies(outcomes)
    bounds_by_run = {run.change: run for run in answer.runs} if answer and order else {}

    def record_of(run: Change) -> RunRecord:
        run_intact, bounds = intact, bounds_by_run.get(run)
        if bounds is not None:
            run_intact = IntactFigures(aligned.restrict({*order[: bounds.n]}, [run]), texts)
        estimates = proxies.estimates(run) | parts.estimates(run)
        record = run_record(run_intact, run, estimates, aggregate)
        return apply_bounds(record, bounds) if order else record

    runs = tuple(map(record_of, outcomes.runs))
    layer_columns = _layer_columns(outcomes, proxies)
    return CellRecord(
        **fields,
        tokens=int(proxies.tokens.sum()),
        baseline=baseline,
        baseline_rounded=intact.risk.n_undecided,
        baseline_rounding=accuracy_rounding(intact.weights, intact.risk),
        chance_accuracy=intact.chance,
        baseline_metrics=metric_values(outcomes, INTACT, aggregate),
        baseline_options_logprob=finite_or_none(
            float(outcomes.plain_weights @ outcomes.options_logprobs(INTACT))
        ),
        remaining=remaining,
        runs=runs,
        correlations=(
            *_correlations(outcomes, outcomes.whole_layers, layer_columns, bool(order)),
            *(
                correlation
                for kind in _part_columns(outcomes, parts, runs)
                for correlation in _correlations(outcomes, *kind, bool(order))
            ),
        ),
        reasons={name: reason for name, reason in reasons.items() if reason},
    )


def unmeasured_record(store: CellStore, view: View, /, **fields: Any) -> CellRecord:
    """Build the record of a cell in which no document is measured yet.

    `fields` overrides default values of the record.
    """
    empty = {"n": 0, "tokens": 0, "baseline_metrics": {}, "runs": (), "correlations": ()}
    empty["chance_accuracy"] = None
    return CellRecord(**{**empty, **_identity_fields(store, view), **fields})


def _identity_fields(store: CellStore, view: View) -> dict[str, Any]:
    """Return the fields of a record that identify model, benchmark and settings."""
    return {
        "key": store.identity.key,
        "model": store.identity.model,
        "benchmark": store.identity.benchmark,
        "metric": view.metric,
        "removed": view.removed,
        "cluster": view.clusters.column if view.clusters else None,
        "sample_seed": view.seed,
        "view": store.views.view_name(view),
    }


def _measuring_costs(shards: Sequence[Mapping[str, Any]]) -> dict[str, float | int | str | None]:
    """Return the duration, the peak memory and the date of the measurements.

    The dict contains the total `seconds`, the mean `outcome_seconds` per outcome, the largest
    `peak_bytes`, and the latest date (`measured`). An unknown value is None.
    """
    seconds = [float(shard["seconds"]) for shard in shards if shard.get("seconds")]
    peak_bytes = [int(shard["peak_bytes"]) for shard in shards if shard.get("peak_bytes")]
    n_outcomes = sum(shard["rows"] for shard in shards if shard.get("seconds"))
    return {
        "seconds": sum(seconds) if seconds else None,
        "outcome_seconds": sum(seconds) / n_outcomes if n_outcomes else None,
        "peak_bytes": max(peak_bytes, default=None),
        "measured": last_measured(shards) or None,
    }


def _select_outcomes(
    aligned: AlignedOutcomes, store: CellStore, view: View, answer: AnswerRecord | None
) -> tuple[AlignedOutcomes, list[tuple[str, int]]]:
    """Return the outcomes from which a record is computed, and the order of documents.

    Without early stopping, all outcomes are selected, and the returned order is empty. After early
    stopping, only outcomes that the stopping rule evaluated are selected, and the stopping rule's
    order of all documents is returned.
    """
    if answer is None or len(aligned.tasks) >= aligned.n_requested:
        return aligned, []
    order = shuffle_documents(answer.seed, store.task_documents(ALL_DOCUMENTS))
    outcomes = _keep_documents(aligned, view, answer, order)
    if len(outcomes.tasks) >= outcomes.n_requested:
        return outcomes, []
    return _keep_documents(aligned, view, answer, order[: min(r.n for r in answer.runs)]), order


def _keep_documents(
    outcomes: AlignedOutcomes, view: View, answer: AnswerRecord, order: Sequence[tuple[str, int]]
) -> AlignedOutcomes:
    """Return the outcomes on the documents in `order`, without runs that lack these documents.

    Runs that the stopping rule compared are kept. Any other run is kept only if it is measured on
    all documents in `order`. `missing` lists the runs that are not kept.
    """
    documents = {*order}
    answered_runs = {run.change for run in answer.runs}
    runs = [
        run
        for run in view.runs
        if run in answered_runs or len(outcomes.restrict(documents, [run]).tasks) == len(documents)
    ]
    selected = outcomes.restrict(documents, runs)
    selected.missing = [run for run in view.runs if run not in selected.runs]
    return selected


def _incomplete_reason(n: int, n_requested: int, answer: AnswerRecord | None) -> str | None:
    """Explain why some requested documents are not measured; None if all are measured."""
    if n == n_requested:
        return None
    if answer is None:
        return f"{n} of {n_requested} documents are measured so far"
    min_looked, max_looked = min(run.n for run in answer.runs), answer.looked
    span = f"{min_looked} to {max_looked}" if min_looked < max_looked else str(max_looked)
    status = f"the measurement stopped when {answer.question!r} was answered"
    if not answer.over:
        status = f"{answer.question!r} is not answered yet"
    return f"{status}: each run was evaluated on {span} of {answer.population} documents"


def _calibration_text(store: CellStore, view: View, shards: list[dict[str, Any]]) -> str | None:
    """Describe the texts on which replacements of layers (e.g. linear maps) were fitted.

    The description also counts the documents that are used both for fitting and for measuring.
    """
    ablations = (Ablation.from_changes(run, removed=view.removed) for run in view.runs)
    if not any(ablation.has_replacements for ablation in ablations):
        return None
    requested = store.task_documents(view.extent)
    texts = [shard["calibration"] for shard in shards if "calibration" in shard]
    sentences = []
    for text in {text["sha256"]: text for text in texts}.values():
        documents = text["documents"]
        count = sum(map(len, documents.values()))
        n_common = sum(len({*docs} & {*requested[task]}) for task, docs in documents.items())
        common = f"{n_common:,} of these documents" if n_common else "none of these documents"
        sentences.append(
            f"{text['tokens']:,} tokens of the last {count:,} documents in the random order; "
            f"{common} are also measured"
        )
    return "; ".join(sentences) or None


def _reduced_model_metric(outcomes: AlignedOutcomes, view: View) -> Estimate:
    """Estimate the metric of the model without the layers in `view.removed`.

    The estimate is undefined if no layer is removed, or if the reduced model is not measured yet.
    """
    if not view.removed:
        return Estimate(None)
    ablation = Ablation.from_changes(removed=view.removed)
    if not outcomes.is_measured(ablation):
        return Estimate(None, reason="not measured yet")
    return outcomes.level(ablation)


_ProxyColumn = tuple[Proxy, Array, Array, Mask, str]
"""A proxy, its values `[runs]`, values of resampled documents, mask of usable runs, and reason."""


def _layer_columns(outcomes: AlignedOutcomes, proxies: LayerProxies) -> Iterator[_ProxyColumn]:
    """Yield the values of each layer proxy for the runs that remove one whole layer."""
    layers, tokens = [run.layer for run in outcomes.whole_layers], proxies.tokens
    for proxy in OBSERVED:
        sums = proxies.sums[proxy.name][:, layers]
        values = proxy.from_observed(proxy_means(sums, tokens))
        resamples = proxy.from_observed(outcomes.resample(token_means(sums, tokens), tokens))
        yield proxy, values, resamples, np.ones_like(values, bool), proxies.reasons[proxy.name]


def _part_columns(
    outcomes: AlignedOutcomes, parts: PartProxies, records: Sequence[RunRecord]
) -> Iterator[tuple[list[Change], list[_ProxyColumn]]]:
    """Yield the runs of each kind of part (e.g. heads), with one column of values per proxy.

    Each column has a mask of the runs whose proxy value and accuracy drop are both defined.
    """
    has_drop = {record.change for record in records if record.drop.value is not None}
    parts_and_layers = [run for run in parts.runs if run.has_taylor or run.kind == WHOLE_LAYER]
    for runs in group_by(parts_and_layers, lambda run: run.sample).values():
        indexes = [parts.indexes[run] for run in runs]
        columns: list[_ProxyColumn] = []
        for proxy in parts.list_proxies(runs):
            values = parts.means[proxy.name][indexes]
            sums, counts = parts.sums[proxy.name][:, indexes], parts.counts(proxy)[:, indexes]
            resamples = safe_divide(outcomes.resample(sums), outcomes.resample(counts))
            is_usable = np.array([run in has_drop for run in runs]) & np.isfinite(values)
            reason = "" if is_usable.any() else parts.unobserved_reason(proxy, indexes)
            columns.append((proxy, values, resamples, is_usable, reason))
        yield runs, columns


def _correlations(
    outcomes: AlignedOutcomes,
    runs: Sequence[Change],
    columns: Iterable[_ProxyColumn],
    is_raced: bool,
) -> Iterator[CorrelationRecord]:
    """Correlate proxies with accuracy drops, with and without the first and the last layers.

    After early stopping (`is_raced`), confidence intervals and p-values are left out.
    """
    if not runs:
        return
    paired = outcomes.metric_outcomes([outcomes.ablation(run) for run in runs])
    drop, drop_resamples = paired.mean_drops, outcomes.resample(paired.drops, paired.weights)
    sample, is_part = runs[0].sample, runs[0].has_taylor
    is_grouped = len({run.layer for run in runs}) < len(runs)
    layers, n_layers = np.array([run.layer for run in runs]), outcomes.identity.model.layers
    is_inner = (layers >= OUTER_LAYERS) & (layers < n_layers - OUTER_LAYERS)
    subsets = {"all": np.ones(len(runs), dtype=bool), "inner": is_inner}
    for proxy, values, resamples, is_usable, unobserved_reason in columns:
        for coefficient, (subset, in_subset) in product(COEFFICIENTS, subsets.items()):
            if is_part and coefficient == "kendall":
                continue  # it takes all pairs, and there may be thousands of parts
            indexes = np.flatnonzero(in_subset & is_usable)
            estimate = correlate(
                values[indexes],
                drop[indexes],
                coefficient=coefficient,
                resamples=(resamples[:, indexes], drop_resamples[:, indexes]),
                groups=layers[indexes] if is_grouped else None,
                noun=sample,
                surrogates=PART_PERMUTATIONS if is_part else SURROGATES,
            )
            reason = unobserved_reason or estimate.reason
            if is_raced:
                estimate, reason = Estimate(estimate.value), reason or ONE_LOOK_REASON
            yield CorrelationRecord(
                proxy=proxy.name,
                coefficient=coefficient,
                subset=subset,
                sample=sample,
                within_layers=is_grouped,
                estimate=replace(estimate, reason=reason),
                n=len(indexes),
                documents=len(outcomes.tasks),
            )
