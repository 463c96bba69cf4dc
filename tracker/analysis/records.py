"""Deriving everything that is shown from the outcomes: one cell's drops, proxies, correlations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from tracker.analysis.aligned import AlignedOutcomes
from tracker.analysis.runs import (
    ONE_LOOK,
    Aggregate,
    ExpertProxies,
    Intact,
    LayerProxies,
    at_all_looks,
    finite,
    metric_values,
    moved_by_rounding,
    run_record,
)
from tracker.core.changes import INTACT, Ablation, Change
from tracker.core.estimates import Estimate
from tracker.core.extent import ALL, shuffled
from tracker.core.provenance import differences, united
from tracker.core.proxies import OBSERVED, OF_EXPERTS, Proxy
from tracker.core.records import AnswerRecord, CellRecord, CorrelationRecord, RunRecord
from tracker.core.views import View
from tracker.ledger.cells import CellStore, measured_last
from tracker.ledger.outcomes import CHECKPOINT
from tracker.stats.accuracy import accuracy
from tracker.stats.arrays import Array, Mask, divided, per_token, proxy_means
from tracker.stats.correlation import DRAWS, correlate
from tracker.stats.decisions import within
from tracker.stats.rank_agreement import COEFFICIENTS

OUTER = 2
"""Layers at each end that the subset `inner` leaves out, as the paper leaves out its outliers."""
DEALS = 999
"""Number of random permutations of the proxies of experts, of which there are thousands."""


def cell_record(
    store: CellStore, view: View, aggregate: Aggregate, answer: AnswerRecord | None = None
) -> CellRecord:
    """Compute a cell's record from its outcomes.

    Args:
        store: The cell on disk.
        view: Documents and runs to show, by a metric that is a mean, or a ratio of sums over
            documents.
        aggregate: lm-eval's aggregation by name.
        answer: Answer to the question of the view; None if it has no question.

    Returns:
        The record, over the documents on which every shown run is measured. If a question decided
        their number, the figures of a run rest on the documents that decided it.
    """
    every = AlignedOutcomes(store, view)
    outcomes, order = _answered(every, store, view, answer)
    n, abouts = len(outcomes.tasks), store.abouts()
    unlike = differences(outcomes.stacks)
    common = _identity(store, view) | {
        "higher_is_better": outcomes.higher_is_better,
        "n": n,
        "unfinished": _why_fewer(n, outcomes.wanted, answer),
        "mismatch": f"measured by different versions or devices: {unlike}" if unlike else None,
        "unsaved": "; ".join(sorted({a[CHECKPOINT] for a in abouts if CHECKPOINT in a})) or None,
        "missing": tuple(outcomes.missing),
        "answer": answer,
        "fitted_on": _fitted_on(store, view, abouts),
        **outcomes.comparisons(),
        **_took(abouts),
        "provenance": united(outcomes.stacks),
    }
    if not n:
        nothing = Estimate(None, reason="no document is measured yet")
        common |= {"baseline": nothing, "remaining": nothing if view.removed else Estimate(None)}
        common["reasons"] = {"chance_accuracy": nothing.reason}
        return unmeasured_record(store, view, **common)
    texts = cache(store.texts.read)
    intact = Intact(outcomes, texts)
    baseline, beneath = intact.baseline, _beneath(outcomes, view)
    reasons = {
        "baseline_rounded": intact.judged.reason,
        "chance_accuracy": None if outcomes.higher_is_better else f"{view.metric} is no accuracy",
    }
    if order:
        baseline, beneath = (replace(level, low=None, high=None) for level in (baseline, beneath))
        reasons["baseline_low"] = ONE_LOOK
    proxies, experts = LayerProxies(outcomes), ExpertProxies(outcomes)
    looked = {run.change: run for run in answer.runs} if answer and order else {}

    def record_of(run: Change) -> RunRecord:
        own, bounds = intact, looked.get(run)
        if bounds is not None:
            own = Intact(every.of_documents({*order[: bounds.n]}, [run]), texts)
        record = run_record(own, run, proxies.of(run) | experts.of(run), aggregate)
        return at_all_looks(record, bounds) if order else record

    runs = tuple(map(record_of, outcomes.runs))
    return CellRecord(
        **common,
        tokens=int(proxies.tokens.sum()),
        baseline=baseline,
        baseline_rounded=None if intact.judged.chances is None else within(intact.judged.chances),
        baseline_rounding=moved_by_rounding(intact.weights, intact.judged),
        chance_accuracy=intact.chance,
        baseline_metrics=metric_values(outcomes, INTACT, aggregate),
        baseline_options_logprob=finite(float(outcomes.plain_weights @ outcomes.options(INTACT))),
        remaining=beneath,
        runs=runs,
        correlations=(
            *_of_layers(outcomes, proxies, raced=bool(order)),
            *_of_experts(outcomes, experts, runs, raced=bool(order)),
        ),
        reasons=_known(reasons),
    )


def unmeasured_record(store: CellStore, view: View, /, **fields: Any) -> CellRecord:
    """Describe a view of which no document is measured, with further fields of its record."""
    empty = {"n": 0, "tokens": 0, "baseline_metrics": {}, "runs": (), "correlations": ()}
    empty["chance_accuracy"] = None
    return CellRecord(**{**empty, **_identity(store, view), **fields})


def _identity(store: CellStore, view: View) -> dict[str, Any]:
    return {
        "key": store.identity.key,
        "model": store.identity.model,
        "benchmark": store.identity.benchmark,
        "metric": view.metric,
        "removed": view.removed,
        "sample_seed": view.seed,
        "view": store.views.name_of(view),
    }


def _known(reasons: Mapping[str, str | None]) -> dict[str, str]:
    return {name: reason for name, reason in reasons.items() if reason}


def _took(abouts: Sequence[Mapping[str, Any]]) -> dict[str, float | int | str | None]:
    """Return the duration, peak memory and date of measuring, as far as the shards record them."""
    seconds = [float(about["seconds"]) for about in abouts if about.get("seconds")]
    peaks = [int(about["peak_bytes"]) for about in abouts if about.get("peak_bytes")]
    return {
        "seconds": sum(seconds) if seconds else None,
        "peak_bytes": max(peaks, default=None),
        "measured": measured_last(abouts) or None,
    }


def _answered(
    every: AlignedOutcomes, store: CellStore, view: View, answer: AnswerRecord | None
) -> tuple[AlignedOutcomes, list[tuple[str, int]]]:
    """Select the documents that an answer rests on; also return their order in the race.

    Returns all documents and an empty order without an answer, or if all documents are measured.
    """
    if answer is None or len(every.tasks) >= every.wanted:
        return every, []
    order = shuffled(answer.seed, store.wanted(ALL))
    outcomes = _beginning(every, view, answer, order)
    if len(outcomes.tasks) >= outcomes.wanted:
        return outcomes, []
    return _beginning(every, view, answer, order[: min(r.n for r in answer.runs)]), order


def _beginning(
    outcomes: AlignedOutcomes, view: View, answer: AnswerRecord, order: Sequence[tuple[str, int]]
) -> AlignedOutcomes:
    """Select some documents, under the runs that an answer is about.

    Other runs of the view are shown if they are measured on all of these documents.
    """
    first = {*order}
    asked = {run.change for run in answer.runs}
    runs = [
        run
        for run in view.runs
        if run in asked or len(outcomes.of_documents(first, [run]).tasks) == len(first)
    ]
    found = outcomes.of_documents(first, runs)
    found.missing = [run for run in view.runs if run not in found.runs]
    return found


def _why_fewer(n: int, wanted: int, answer: AnswerRecord | None) -> str | None:
    if n == wanted:
        return None
    if answer is None:
        return f"{n} of {wanted} documents are measured so far"
    least = min(run.n for run in answer.runs)
    span = f"{least} to {answer.looked}" if least < answer.looked else str(answer.looked)
    done = f"stopped at the answer to {answer.question!r}"
    if not answer.over:
        done = f"{answer.question!r} is not answered yet"
    return f"{done}: {span} of {answer.population} documents were looked at, run by run"


def _fitted_on(store: CellStore, view: View, abouts: Sequence[Mapping[str, Any]]) -> str | None:
    """Describe the texts that replacements were fitted on, and their overlap with the documents."""
    if not any(Ablation.of(run, removed=view.removed).is_fitted for run in view.runs):
        return None
    wanted = store.wanted(view.extent)
    texts = [about["calibration"] for about in abouts if "calibration" in about]
    said = []
    for text in {text["sha256"]: text for text in texts}.values():
        count = sum(map(len, text["documents"].values()))
        both = sum(len({*docs} & {*wanted[task]}) for task, docs in text["documents"].items())
        said.append(
            f"{text['tokens']:,} tokens of {count:,} documents from the end of the random order, "
            + (f"{both:,} of them among those measured" if both else "none of them measured")
        )
    return "; ".join(said) or None


def _beneath(outcomes: AlignedOutcomes, view: View) -> Estimate:
    """Estimate the metric of the model without the layers that every run lacks."""
    if not view.removed:
        return Estimate(None)
    ablation = Ablation.of(removed=view.removed)
    if not outcomes.has(ablation):
        return Estimate(None, reason="not measured yet")
    return accuracy(outcomes.values(ablation), outcomes.weights)


def _of_layers(
    outcomes: AlignedOutcomes, proxies: LayerProxies, raced: bool
) -> Iterator[CorrelationRecord]:
    """Correlate every proxy with the accuracy drop, over all layers and without the outer ones."""
    runs = outcomes.whole_layers
    if not runs:
        return
    layers, tokens = [run.layer for run in runs], proxies.tokens
    everyone = np.ones(len(runs), dtype=bool)
    correlated = _correlated(outcomes, runs, raced)
    for proxy in OBSERVED:
        per_document = proxies.sums[proxy.name][:, layers]
        value = proxy.of(proxy_means(per_document, tokens))
        drawn = proxy.of(outcomes.resampled(per_token(per_document, tokens), tokens))
        yield from correlated(proxy, value, drawn, everyone, proxies.reasons[proxy.name])


def _of_experts(
    outcomes: AlignedOutcomes, experts: ExpertProxies, records: Sequence[RunRecord], raced: bool
) -> Iterator[CorrelationRecord]:
    """Correlate the proxies of experts with their drops, where both are defined."""
    if not experts.runs:
        return
    measured = np.array(
        [r.drop.value is not None for r in records if r.change.component == "expert"]
    )
    correlated = _correlated(outcomes, experts.runs, raced)
    for proxy in OF_EXPERTS:
        value = experts.means(proxy)
        sums, counts = experts.sums[proxy.name], experts.counts(proxy)
        drawn = divided(outcomes.resampled(sums), outcomes.resampled(counts))
        usable = measured & np.isfinite(value)
        yield from correlated(proxy, value, drawn, usable, experts.not_observed)


def _correlated(
    outcomes: AlignedOutcomes, runs: Sequence[Change], raced: bool
) -> Callable[[Proxy, Array, Array, Mask, str], Iterator[CorrelationRecord]]:
    """Return a function that correlates a proxy of runs with their accuracy drops.

    For a cell that a race stopped, figures that hold for a single look are left out.
    """
    paired = outcomes.by_metric([outcomes.ablation(run) for run in runs])
    drop, drawn_drop = paired.mean_drops, outcomes.resampled(paired.drops, paired.weights)
    layers, total = np.array([run.layer for run in runs]), outcomes.identity.model.layers
    inner = (layers >= OUTER) & (layers < total - OUTER)
    subsets = {"all": np.ones(len(runs), dtype=bool), "inner": inner}

    def records(
        proxy: Proxy, value: Array, drawn: Array, usable: Mask, not_observed: str
    ) -> Iterator[CorrelationRecord]:
        of_experts = proxy.component == "expert"
        for coefficient, (subset, inside) in product(COEFFICIENTS, subsets.items()):
            if of_experts and coefficient == "kendall":
                continue  # which takes all pairs, and there are thousands of experts
            chosen = np.flatnonzero(inside & usable)
            found = correlate(
                value[chosen],
                drop[chosen],
                coefficient=coefficient,
                resampled=(drawn[:, chosen], drawn_drop[:, chosen]),
                within=layers[chosen] if of_experts else None,
                what=proxy.component,
                surrogates=DEALS if of_experts else DRAWS,
            )
            reason = not_observed or found.reason
            if raced:
                found = Estimate(found.value)
                reason = reason or ONE_LOOK
            yield CorrelationRecord(
                proxy=proxy.name,
                coefficient=coefficient,
                subset=subset,
                estimate=replace(found, reason=reason),
                n=len(chosen),
                documents=len(outcomes.tasks),
            )

    return records
