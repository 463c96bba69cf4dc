"""What the audit compares: the drop of each layer and every proxy of it, document by document."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tracker.core.documents import Document
from tracker.core.estimates import Estimate
from tracker.core.proxies import OBSERVED, OF_LAYERS, passes
from tracker.core.records import CellRecord
from tracker.engine.observers.divergence import output_proxies
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.aligned import AlignedOutcomes
from tracker.ledger.shards import Arrays
from tracker.ledger.tables import OUTER
from tracker.measuring.observing import Observe, Observed
from tracker.stats.arrays import Array, per_token
from tracker.stats.budgets import LayerMeasure
from tracker.stats.correlation import correlate
from tracker.stats.rank_agreement import row_coefficients
from tracker.stats.resampling import RESAMPLES, SEED, resampled_means
from tracker.studies.base import FEWEST, StudyContext, Subject, lined_up, observe

KIND = "output-proxies-1"
"""What is observed besides outcomes: the sums of `output_proxies`."""
DROP = "accuracy drop"
_NO_NUMBER = {
    "gate_gradient": "autograd cannot differentiate this model, or its loss is not finite",
    "gold_logprob_drop": "a document has no gold answer, or none of a finite score",
}


@dataclass(frozen=True)
class Ordering:
    """How well a proxy orders the layers of one benchmark.

    Attributes:
        spearman: With interval and p-value; the other coefficients are None where it is.
        inner: Spearman without the outer layers.
        kendall: Tau-b.
        pearson: r.
        resampled: Spearman of each resample of the documents.
    """

    spearman: Estimate
    inner: float | None
    kendall: float | None
    pearson: float | None
    resampled: Array


class Audited:
    """One cell: drops and proxies of its whole layers, on the same documents in the same order."""

    def __init__(self, asked: StudyContext, subject: Subject, label: str) -> None:
        """Observe what the ledger lacks, and line everything up."""
        self.record: CellRecord = subject.record
        self.label = label
        cell = subject.outcomes()
        self.layers = [run.layer for run in cell.whole_layers]
        self.tasks = cell.tasks
        self.strata = cell.strata
        self.not_observed = {proxy.name: cell.not_observed(proxy) for proxy in OBSERVED}
        total = subject.record.model.layers
        observed = observe(subject, KIND, asked, _begin)
        self.inner = [i for i, at in enumerate(self.layers) if OUTER <= at < total - OUTER]
        ablations = [cell.ablation(run) for run in cell.whole_layers]
        metric, gold = cell.by_metric(ablations), cell.by_gold_logprob(ablations)
        figures = [
            (DROP, metric.drops, metric.weights),
            ("gold_logprob_drop", gold.drops, gold.weights),
            *((name, v[:, self.layers], weights) for name, v, weights in _proxies(cell, observed)),
        ]
        self.measures = {
            name: LayerMeasure(values, weights, passes(name, total, shared=True))
            for name, values, weights in figures
        }

    @property
    def drop(self) -> LayerMeasure:
        """What the proxies are held against."""
        return self.measures[DROP]

    @property
    def relevance(self) -> Array:
        """The accuracy relevance of each whole layer; NaN where it is undefined."""
        return np.array([run.accuracy_relevance for run in self.record.whole_layers], float)

    def drawn(self, name: str) -> Array:
        """A measure of each layer in each resample of the documents, the same in every call."""
        measure = self.measures[name]
        return resampled_means(measure.values, RESAMPLES, SEED, self.strata, measure.weights)

    @cached_property
    def found(self) -> dict[str, Ordering]:
        """How well each proxy orders the layers."""
        drawn_drop = self.drawn(DROP)
        return {name: self._ordering(name, drawn_drop) for name in OF_LAYERS}

    def _ordering(self, name: str, drawn_drop: Array) -> Ordering:
        x, y, drawn = self.measures[name].means(), self.drop.means(), self.drawn(name)
        spearman = correlate(x, y, coefficient="spearman", resampled=(drawn, drawn_drop))
        if spearman.value is None:
            why = spearman.reason or ""
            if why.startswith("the proxy is undefined"):
                why = self.not_observed.get(name) or _NO_NUMBER.get(
                    name, "a hidden state or a logit is not finite"
                )
            nothing = np.full(RESAMPLES, np.nan)
            return Ordering(Estimate(None, reason=why), None, None, None, nothing)
        return Ordering(
            spearman,
            _coefficient(x[self.inner], y[self.inner], "spearman"),
            _coefficient(x, y, "kendall"),
            _coefficient(x, y, "pearson"),
            row_coefficients(drawn, drawn_drop, "spearman"),
        )


def _proxies(cell: AlignedOutcomes, observed: Observed) -> Iterator[tuple[str, Array, Array]]:
    """Each proxy of every layer of the model: a mean a document, and what it weighs."""
    for proxy in OBSERVED:
        means = per_token(cell.proxy_sums(proxy), cell.tokens)
        yield proxy.name, proxy.of(means), cell.tokens
    sums = lined_up(observed, cell)
    tokens, predicted = sums["tokens"], sums["predicted"]
    for name in ("lens_changes", "kl", "js"):
        yield name, per_token(sums[name], tokens), tokens
    yield "loss_increase", per_token(sums["loss_increase"], predicted), predicted
    # Of each document the size of its derivative, so that opposite ones do not cancel.
    derivatives = np.abs(per_token(sums["gate_gradient"], predicted))
    yield "gate_gradient", derivatives, cell.plain_weights


def _coefficient(x: Array, y: Array, name: str) -> float | None:
    if len(x) < FEWEST:
        return None
    value = float(row_coefficients(x[None], y[None], name)[0])
    return value if np.isfinite(value) else None


def _begin(engine: Engine) -> Observe:
    def watch(document: Document) -> Arrays:
        return {name: each.numpy() for name, each in output_proxies(engine, document).items()}

    return watch
