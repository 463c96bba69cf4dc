"""Figures of the audit: drops and proxies of each layer, document by document, and by model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tracker.analysis.aligned import AlignedOutcomes
from tracker.analysis.records import OUTER
from tracker.core.documents import Document
from tracker.core.estimates import Estimate
from tracker.core.findings import gaps
from tracker.core.formats import counted
from tracker.core.proxies import OBSERVED, OF_LAYERS, passes
from tracker.engine.observers.layer_proxies import output_proxies
from tracker.engine.scoring.sweep import Engine
from tracker.ledger.shards import Arrays
from tracker.measuring.observing import Observe, Observed
from tracker.stats.arrays import Array, per_token
from tracker.stats.correlation import correlate
from tracker.stats.rank_agreement import (
    Disagreement,
    disagreement,
    mean_spearman_p,
    overlap,
    row_coefficients,
)
from tracker.stats.reliability import LayerMeasure, at_equal_cost
from tracker.stats.resampling import RESAMPLES, SEED, bias_corrected_interval, resampled_means
from tracker.stats.support import between, holm, pairs, together
from tracker.stats.task_dependence import (
    Paired,
    Sample,
    clean_difference,
    compared,
    reliability,
    sampling_noise,
    variance_across,
)
from tracker.studies.base import FEWEST, StudyContext, Subject, observe

KIND = "output-proxies-1"
"""Kind of the observations besides outcomes: the sums of `output_proxies`."""
DROP = "accuracy drop"
_NO_NUMBER = {
    "gate_gradient": "autograd cannot differentiate this model, or its loss is not finite",
    "gold_logprob_drop": "a document has no gold answer, or none of a finite score",
}
TOP = 5
"""Layers that are called the most, or the least, relevant ones."""
MAJOR = 1 / 4
"""Ranks that differ by more than this share of the layers differ majorly."""
RELIABLE = 0.5
"""The figures of a benchmark must be as much signal as noise before their noise is taken off."""


@dataclass(frozen=True)
class Ordering:
    """The agreement of a proxy with the drop on one benchmark.

    Attributes:
        spearman: Spearman correlation with interval and p-value; if None, so are the others.
        inner: Spearman correlation without the outer layers.
        kendall: Tau-b.
        pearson: r.
        resampled: Spearman of each resample of the documents.
    """

    spearman: Estimate
    inner: float | None
    kendall: float | None
    pearson: float | None
    resampled: Array


class AuditedCell:
    """One cell: drops and proxies of its whole layers, on the same documents in the same order."""

    def __init__(self, context: StudyContext, subject: Subject, label: str) -> None:
        """Observe what the ledger lacks, and align all arrays on the same documents."""
        self.record = subject.record
        self.label = label
        cell = subject.outcomes()
        self.layers = [run.layer for run in cell.whole_layers]
        self.tasks = cell.tasks
        self.strata = cell.strata
        self.not_observed = {proxy.name: cell.not_observed(proxy) for proxy in OBSERVED}
        total = subject.record.model.layers
        observed = observe(subject, KIND, context, _begin)
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
        """The measure that the proxies are compared with."""
        return self.measures[DROP]

    @property
    def relevance(self) -> Array:
        """The accuracy relevance of each whole layer; NaN where it is undefined."""
        return np.array([run.accuracy_relevance for run in self.record.whole_layers], float)

    def drawn(self, name: str) -> Array:
        """Return a measure of each layer in each resample of the documents, the same for all."""
        measure = self.measures[name]
        return resampled_means(measure.values, RESAMPLES, SEED, self.strata, measure.weights)

    @cached_property
    def found(self) -> dict[str, Ordering]:
        """The agreement of each proxy with the drop."""
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
    """Yield each proxy of every layer of the model: means of documents, and their weights."""
    for proxy in OBSERVED:
        means = per_token(cell.proxy_sums(proxy), cell.tokens)
        yield proxy.name, proxy.of(means), cell.tokens
    sums = observed.of(cell.documents)
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


@dataclass(frozen=True)
class Summary:
    """Agreement of one proxy with the order of the layers, over all benchmarks where it is defined.

    Attributes:
        proxy: Name in `OF_LAYERS`.
        cells: Cells of the benchmarks.
        spearman: Mean coefficient, always defined, with an interval over documents.
        inner: Mean coefficient without the outer layers.
        kendall: Mean tau-b.
        p_value: p-value of the mean, not adjusted.
        resampled: Mean coefficient in each resample of the documents.
    """

    proxy: str
    cells: tuple[AuditedCell, ...]
    spearman: Estimate
    inner: float | None
    kendall: float
    p_value: float
    resampled: Array

    @cached_property
    def overlaps(self) -> tuple[float, float, float]:
        """Mean overlap of the most relevant layers, of the least relevant ones, and by chance."""
        found = []
        for cell in self.cells:
            count = min(TOP, len(cell.layers))
            x, y = cell.measures[self.proxy].means()[None], cell.drop.means()[None]
            top, bottom = (float(overlap(sign * x, sign * y, count)[0]) for sign in (1, -1))
            found.append((top, bottom, count / len(cell.layers)))
        top, bottom, chance = np.mean(found, axis=0).tolist()
        return top, bottom, chance


@dataclass(frozen=True)
class Spreads:
    """Variation of layers' relevance over benchmarks, by one measure.

    Attributes:
        raw: Mean over layers of the variance of z-scores.
        test: Comparison of the accuracy drop's variance with this one, layer by layer.
        noisy: `raw` over the benchmarks that `clean` uses.
        clean: `raw` without the noise of the documents.
        excess: Difference of the accuracy drop's `clean` and this one.
        reason: Reason why `clean` is None.
    """

    raw: float
    test: Paired | None = None
    noisy: float | None = None
    clean: float | None = None
    excess: Estimate | None = None
    reason: str = ""


class ModelAudit:
    """One model, audited."""

    def __init__(self, name: str, cells: Sequence[AuditedCell]) -> None:
        self.name = name
        self.cells = cells
        self.total = cells[0].record.model.layers

    @property
    def on(self) -> str:
        """The number of benchmarks and documents, in words."""
        documents = sum(cell.record.n for cell in self.lined_up)
        return f"{counted(len(self.lined_up), 'benchmark')}, {counted(documents, 'document')}"

    @property
    def drop(self) -> str:
        """The name of the loss of a removal: accuracy drop, loss increase, or both."""
        kinds = sorted({cell.record.higher_is_better for cell in self.cells}, reverse=True)
        return " or ".join(DROP if accuracy else "loss increase" for accuracy in kinds)

    @cached_property
    def lined_up(self) -> list[AuditedCell]:
        """The cells that means over benchmarks use: one of each, all with the same layers."""
        return alike(apart(self.cells))

    @property
    def left_out(self) -> list[str]:
        """The cells that means over benchmarks leave out, with reasons."""
        kept, reasons = apart(self.cells), []
        for cell in self.cells:
            if cell not in kept:
                same = next(other for other in kept if set(other.tasks) & set(cell.tasks))
                reasons.append(f"{cell.label} has documents of {same.label}")
            elif cell not in self.lined_up:
                others = self.lined_up[0]
                reasons.append(
                    f"{cell.label} removes {counted(len(cell.layers), 'layer')}, not the "
                    f"{len(others.layers)} that {others.label} does"
                )
        return reasons

    @cached_property
    def summaries(self) -> dict[str, Summary]:
        """The comparable proxies by name, sorted by their mean coefficient."""
        summaries = {}
        for proxy in OF_LAYERS:
            cells = [c for c in self.lined_up if c.found[proxy].spearman.value is not None]
            if not cells:
                continue
            orders = [cell.found[proxy] for cell in cells]
            value = float(np.mean([order.spearman.value for order in orders]))
            resampled = np.mean([order.resampled for order in orders], axis=0)
            inner = [order.inner for order in orders if order.inner is not None]
            summaries[proxy] = Summary(
                proxy,
                tuple(cells),
                Estimate(value, *bias_corrected_interval(value, resampled, -1, 1)),
                float(np.mean(inner)) if inner else None,
                float(np.mean([order.kendall for order in orders if order.kendall is not None])),
                mean_spearman_p(means(proxy, cells), means(DROP, cells)),
                resampled,
            )
        best_first = sorted(summaries, key=lambda s: -(summaries[s].spearman.value or 0.0))
        return {proxy: summaries[proxy] for proxy in best_first}

    def apart(self, one: Summary, other: Summary) -> Estimate:
        """Compute how much better a proxy orders the layers than another, on the same documents.

        The interval is simultaneous for all comparisons of two proxies.
        """
        if one.cells != other.cells or one.spearman.value is None or other.spearman.value is None:
            return Estimate(None, reason="they are not defined on the same benchmarks")
        value = one.spearman.value - other.spearman.value
        ends = bias_corrected_interval(value, one.resampled - other.resampled)
        documents = sum(cell.record.n for cell in one.cells)
        (found,) = together([Estimate(value, *ends)], [documents], pairs(len(self.summaries)))
        return found

    @cached_property
    def ranks(self) -> dict[str, tuple[int, int]]:
        """The possible ranks of proxies by their agreement with the drops, simultaneous."""
        some = list(self.summaries.values())
        better = [[(self.apart(one, other).low or 0.0) > 0 for other in some] for one in some]
        return dict(zip(self.summaries, between(np.array(better, dtype=bool)), strict=True))

    @cached_property
    def adjusted(self) -> dict[str, float]:
        """P-values of the means, adjusted by Holm for the number of proxies."""
        adjusted = holm([summary.p_value for summary in self.summaries.values()])
        return {n: p for n, p in zip(self.summaries, adjusted, strict=True) if p is not None}

    @cached_property
    def orders(self) -> dict[str, tuple[Disagreement, Disagreement]]:
        """Proxy → in how many layers its ranks differ from those of the drop: at all, majorly."""
        found = {}
        for name, summary in self.summaries.items():
            x, y = means(name, summary.cells), means(DROP, summary.cells)
            found[name] = (disagreement(x, y, 0), disagreement(x, y, MAJOR * x.shape[1]))
        return found

    @cached_property
    def above_chance(self) -> list[AuditedCell]:
        """Benchmarks in which relevance is defined: the intact model is above chance."""
        finite = [cell for cell in self.lined_up if np.isfinite(cell.relevance).all()]
        cells = [cell for cell in finite if np.ptp(cell.drop.means()) > 0]
        return cells if len(cells) > 1 else []

    @cached_property
    def reliabilities(self) -> dict[str, float]:
        """Benchmark → which share of the spread of its drops is no noise of the documents."""
        noise = {
            c.label: sampling_noise(c.drop.values, c.drop.weights, c.strata) for c in self.cells
        }
        return {label: reliability(*pair) for label, pair in noise.items()}

    @cached_property
    def reliable(self) -> list[AuditedCell]:
        """The benchmarks above chance of which noise can be taken off."""
        return [c for c in self.above_chance if self.reliabilities[c.label] >= RELIABLE]

    @cached_property
    def spreads(self) -> dict[str, Spreads]:
        """The variation of each measure over benchmarks; empty if it is undefined."""
        cells = self.above_chance
        if not cells:
            return {}
        raw_drop = variance_across(means(DROP, cells))
        relevance = np.array([cell.relevance for cell in cells])
        found = {}
        if (np.ptp(relevance, axis=1) > 0).all():
            raw = float(variance_across(relevance).mean())
            found["accuracy relevance"] = Spreads(raw, reason="its noise is that of the drop")
        found[DROP] = self._spread(DROP, raw_drop, None)
        for proxy in OF_LAYERS:
            if all(cell.found[proxy].spearman.value is not None for cell in cells):
                raw_proxy = variance_across(means(proxy, cells))
                found[proxy] = self._spread(proxy, raw_proxy, compared(raw_drop, raw_proxy))
        return found

    def _spread(self, name: str, raw: Array, test: Paired | None) -> Spreads:
        mean, cells = float(raw.mean()), self.reliable
        if len(cells) < 2:
            return Spreads(mean, test, reason=self.noisy)
        samples = [_sample(name, cell) for cell in cells]
        pairs = [sampling_noise(*each) for each in samples]
        for cell, pair in zip(cells, pairs, strict=True):
            if not reliability(*pair) >= RELIABLE:
                why = f"on {cell.label} it is more noise of the documents than signal"
                return Spreads(mean, test, reason=why)
        profiles, noise = (np.array(each) for each in zip(*pairs, strict=True))
        drops = [_sample(DROP, cell) for cell in cells]
        return Spreads(
            mean,
            test,
            float(variance_across(profiles).mean()),
            float(variance_across(profiles, noise).mean()),
            None if name == DROP else clean_difference(drops, samples),
        )

    @cached_property
    def at_cost(self) -> tuple[list[float], dict[str, tuple[float | None, ...]], float | None]:
        """The prediction of other documents by each measure, for its cost.

        Returns budgets in forward passes for each benchmark; measure → mean Spearman correlation
        for each budget; and that of the drop of half of the documents, for any cost.
        """
        dearest = passes(DROP, self.total, shared=True)
        most = max(len(cell.tasks) for cell in self.lined_up) // 2 * dearest
        budgets = [float(2**i) for i in range(int(np.log2(max(most, 1))) + 1)]
        by_cell = []
        for cell in self.lined_up:
            if len(cell.tasks) < 4 or np.ptp(cell.drop.means()) == 0:
                continue
            usable = {
                name: measure
                for name, measure in cell.measures.items()
                if name == DROP or cell.found[name].spearman.value is not None
            }
            half = len(cell.tasks) // 2 * dearest
            by_cell.append(at_equal_cost(usable, cell.drop, [*budgets, half]))
        if not by_cell:
            return budgets, {}, None
        nothing = [np.nan] * (len(budgets) + 1)
        found = {
            name: gaps(np.mean([rows.get(name, nothing) for rows in by_cell], axis=0))
            for name in (*OF_LAYERS, DROP)
        }
        return budgets, {name: row[:-1] for name, row in found.items()}, found[DROP][-1]

    @property
    def noisy(self) -> str:
        """The benchmarks that are too noisy, and the documents that they need, in words."""
        needs = []
        for cell in self.above_chance:
            share, n = self.reliabilities[cell.label], cell.record.n
            if not share >= RELIABLE:
                more = "many more"
                if share > 0:
                    more = f"about {np.ceil(n * (1 - share) / share):,.0f}"
                needs.append(f"{cell.label} needs {more} documents, and has {n:,}")
        return "; ".join(needs)


def apart(cells: Sequence[AuditedCell]) -> list[AuditedCell]:
    """Choose one cell for each benchmark, without common tasks, by metric, layers, documents."""
    best = sorted(cells, key=lambda c: (-c.record.higher_is_better, -len(c.layers), -c.record.n))
    kept: list[AuditedCell] = []
    for cell in best:
        if not any(set(cell.tasks) & set(each.tasks) for each in kept):
            kept.append(cell)
    return [cell for cell in cells if cell in kept]


def alike(cells: Sequence[AuditedCell]) -> list[AuditedCell]:
    """Those with the layers that most of them have; of equally many, with the most layers."""
    of_each = [tuple(cell.layers) for cell in cells]
    most = max(of_each, key=lambda layers: (of_each.count(layers), len(layers)), default=())
    return [cell for cell, layers in zip(cells, of_each, strict=True) if layers == most]


def means(name: str, cells: Sequence[AuditedCell]) -> Array:
    """Return the profiles of a measure [cells, layers]."""
    return np.array([cell.measures[name].means() for cell in cells])


def _sample(name: str, cell: AuditedCell) -> Sample:
    measure = cell.measures[name]
    return np.nan_to_num(measure.values), measure.weights, cell.strata


def pooled(cells: Sequence[AuditedCell]) -> Estimate | None:
    """Pearson over inner layers × benchmarks of cosine score and accuracy drop, with its interval.

    Losses have units of their own, and no place among accuracies.
    """
    inner = [cell for cell in cells if cell.inner and cell.record.higher_is_better]
    if not inner or sum(len(cell.inner) for cell in inner) < FEWEST:
        return None
    both = ("cosine_score", DROP)
    x, y = (np.concatenate([c.measures[name].means()[c.inner] for c in inner]) for name in both)
    drawn_x, drawn_y = (
        np.concatenate([c.drawn(name)[:, c.inner] for c in inner], axis=1) for name in both
    )
    value = float(row_coefficients(x[None], y[None], "pearson")[0])
    drawn = row_coefficients(drawn_x, drawn_y, "pearson")
    low, high = bias_corrected_interval(value, drawn, -1, 1)
    return None if low is None else Estimate(value, low, high)
